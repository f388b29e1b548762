"""The global-inference job: create a cube or find it, then submit one unit a tile that is not finished.

A tile is asked for the days that no receipt of it covers; what readers are shown changes last, in one swap.
"""

import json
import logging
import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime
from typing import Any, Final

from dask.utils import format_bytes
from distributed import Client

from h2mv_dist.config import Settings, StorageOptions, as_toml, to_json
from h2mv_dist.errors import JobError, describe
from h2mv_dist.grid import Period, Tile
from h2mv_dist.io.cube import CubeLayout
from h2mv_dist.io.cube_check import CubeCheck
from h2mv_dist.io.cube_store import create_cube, publish, read_cube, require_cube
from h2mv_dist.io.ledger import Ledger, unfilled
from h2mv_dist.io.stores import displayed
from h2mv_dist.jobs.cluster import require_workers, smallest_memory
from h2mv_dist.jobs.cube_plan import CubePlan, plan_inference, tiles_sharing_no_chunk
from h2mv_dist.jobs.handle import JobHandle, require_idle, submit
from h2mv_dist.jobs.messages import Job, Unit, job_id
from h2mv_dist.jobs.room import require_disk
from h2mv_dist.jobs.run_record import RunRecord, run_url
from h2mv_dist.jobs.versions import require_same_versions

FINISH_UNIT: Final = "finish"
"""The unit that comes after all tiles: constants and metadata."""
_CUTS: Final = ("shard_days", "tile", "shard")
"""Settings that decide how much of a cube is in memory at once."""

_ALL_STATES: Final = 1_000_000
"""Of any cube."""

_log = logging.getLogger(__name__)


def start_inference(
    client: Client, planned: CubePlan, training_folder: str, cube: str, options: StorageOptions
) -> JobHandle | None:
    """Fill the cube at ``cube``, rolled back first if so planned; what has a receipt is not computed again.

    Returns:
        A handle, or None if there is nothing to do.

    Raises:
        H2mvError: another cube is there, the cluster or the disk is too small, or the job runs already.
    """
    settings, name = planned.settings, job_id("infer", cube)
    require_idle(client, name)
    require_workers(client, 1, "inference")
    require_same_versions(client)
    _require_memory(client, planned)
    missing = missing_days(planned, cube, options)
    require_cube_disk(planned, missing, cube)
    warn_of_split_chunks(planned)
    if planned.before is not None:
        _require_an_end(cube, name, options)
        roll_back(planned, cube, options)
    create_cube(cube, planned.layout, options, settings.inference.overwrite)
    constants_done = not planned.layout.constants or planned.progress is None or planned.progress.constants
    if planned.done and constants_done and not missing:
        return None
    _log.info("%s: %s", displayed(cube), planned.summary())
    common = {
        "settings": to_json(settings),
        "training_folder": training_folder,
        "cube": cube,
        "period": str(planned.layout.period),
        "progress": planned.progress.attributes() if planned.progress else None,
        "provenance": dict(planned.layout.attributes),
        "objects": planned.source.identity_by_objects(),
        "storage_options": options.reveal(),
    }
    attempts = settings.inference.attempts
    units = tuple(
        Unit(
            tile.name,
            "tile",
            {"start": tile.start, "stop": tile.stop},
            attempts=attempts,
            neighbourhood=neighbourhood(planned, tile),
        )
        for tile in in_good_order(planned, missing)
    )
    final = Unit(FINISH_UNIT, "finish", {}, attempts=attempts, steps=0)
    return submit(client, Job(name, cube, common, units, final))


def submit_inference(
    client: Client,
    settings: Settings,
    training_folder: str,
    cube: str,
    options: StorageOptions,
    *,
    append: bool = False,
    since: date | None = None,
) -> JobHandle | None:
    """Plan and start inference; see :func:`plan_inference` and :func:`start_inference`."""
    planned = plan_inference(settings, training_folder, options, cube=cube, append=append, since=since)
    return start_inference(client, planned, training_folder, cube, options)


def missing_days(planned: CubePlan, cube: str, options: StorageOptions) -> dict[Tile, tuple[Period, ...]]:
    """Tile -> the stretches of days without a receipt; without the tiles that are finished."""
    progress = planned.progress
    covered = Ledger(cube, options, progress.rollbacks).covered() if progress else {}
    period, shard_days = planned.layout.period, planned.layout.shard_days
    found = {tile: unfilled(covered.get(tile.name, ()), period, shard_days) for tile in planned.layout.tiles}
    return {tile: stretches for tile, stretches in found.items() if stretches}


def in_good_order(planned: CubePlan, missing: Mapping[Tile, Sequence[Period]]) -> list[Tile]:
    """The tiles with most land first, so that no long one is left for the end.

    Where tiles read the same chunks of the forcing, neighbours follow each other instead.
    """
    if not tiles_sharing_no_chunk(planned):
        return list(missing)
    mask = planned.layout.grid.mask
    return sorted(missing, key=lambda tile: -int(mask[tile.slices].sum()))


def neighbourhood(planned: CubePlan, tile: Tile) -> str:
    """Tiles of the same one read the same chunks of the forcing; empty where no tiles share any."""
    if tiles_sharing_no_chunk(planned):
        return ""
    return ",".join(str(a // c) for a, c in zip(tile.start, planned.source.chunk_shape, strict=True))


def _require_an_end(cube: str, name: str, options: StorageOptions) -> None:
    """Refuse a cube whose last job has no end in its record: it may still run, under any scheduler.

    Raises:
        JobError: it has none.
        StoreError: the record cannot be read.
    """
    last = RunRecord.read(name, cube, options)
    if last is not None and last.state == "running":
        began = datetime.fromtimestamp(last.submitted, UTC)
        raise JobError(
            describe(
                "another run may be filling the cube, which cannot be rolled back meanwhile",
                where=displayed(cube),
                expected="no run under way, or one whose end is recorded",
                actual=f"one submitted {began:%Y-%m-%d %H:%M} UTC to {last.scheduler}, with no end recorded",
                fix=f"wait for it, or stop it (h2mv-dist jobs cancel, --address {last.scheduler}); if its "
                f"scheduler and workers are gone, delete {displayed(run_url(name, cube))}, and try again",
            )
        )


def roll_back(planned: CubePlan, cube: str, options: StorageOptions) -> None:
    """Make a cube end where the plan begins; what lies behind counts as not computed from then on.

    Raises:
        JobError: another run has changed meanwhile how far the cube is.
        StoreError: the plan is for another cube, or the store fails.
    """
    assert planned.progress is not None
    require_cube(cube, planned.layout, options)
    shorter = replace(planned.progress, until=planned.layout.period.stop)
    publish(cube, planned.layout, shorter, options, before=planned.before)


def forget_damage(cube: str, check: CubeCheck, options: StorageOptions) -> None:
    """Make what a check found damaged count as not done, so that inference writes it anew.

    Raises:
        StoreError: there is no complete cube, or the store fails.
    """
    layout, progress = read_cube(cube, options)
    Ledger(cube, options, progress.rollbacks).forget(check.damaged)
    if check.constants:
        publish(cube, layout, replace(progress, constants=""), options, before=progress)


def recorded_job(cube: str, options: StorageOptions) -> tuple[dict[str, Any], str]:
    """Settings and training job that a cube was last worked on with, from its root.

    Raises:
        StoreError: there is no complete cube.
    """
    attributes = read_cube(cube, options).layout.attributes
    settings = json.loads(attributes["settings"])
    # early cubes do not say; none of their states are to be dropped
    settings["inference"].setdefault("keep_states", _ALL_STATES)
    return settings, attributes["training_job"]


def _require_memory(client: Client, planned: CubePlan) -> None:
    if (limit := smallest_memory(client)) is not None:
        require_memory(planned, limit, "the smallest worker's limit")


def require_memory(planned: CubePlan, limit: int, whose: str) -> None:
    """Refuse tiles that do not fit into a worker, and say what would.

    Raises:
        JobError: the largest tile takes more than ``limit`` bytes.
    """
    needed = planned.tile_bytes()
    if needed > limit:
        raise JobError(
            describe(
                "a tile does not fit into a worker",
                where="inference.tile and inference.shard_days",
                expected=f"at most {format_bytes(limit)}, {whose}",
                actual=f"about {format_bytes(needed)} for the largest tile",
                fix=_what_fits(planned, limit),
            )
        )


def require_cube_disk(planned: CubePlan, missing: Mapping[Tile, Sequence[Period]], cube: str) -> None:
    """Refuse a cube whose missing days cannot fit on this machine's disk.

    Raises:
        StoreError: not even a tenth of the bytes before compression is free.
    """
    require_disk("cube", cube, planned.missing_bytes(missing), "fewer inference.outputs")


def _what_fits(planned: CubePlan, limit: int) -> str:
    fitting = fitting_layout(planned, limit)
    if fitting is None:
        return (
            "start larger workers; neither fewer days nor smaller tiles of whole chunks would fit "
            "(chunks of the forcing that are larger than a tile take room, too: h2mv-dist prepare cuts them)"
        )
    changed = [name for name in _CUTS if getattr(fitting, name) != getattr(planned.layout, name)]
    values = " and ".join(f"inference.{name} = {as_toml(getattr(fitting, name))}" for name in changed)
    if planned.progress is not None:
        return f"start larger workers, or make another cube, with {values}"
    return f"set {values}, or start larger workers"


def fitting_layout(planned: CubePlan, limit: int) -> CubeLayout | None:
    """The plan's layout, changed so that no tile takes more than ``limit`` bytes; None if that is not enough.

    Shards of the most days that fit, in whole chunks; else tiles, and shards if need be, of fewer chunks.
    """
    layout, every = planned.layout, planned.settings.inference.state_days

    def fits(changed: CubeLayout) -> bool:
        return replace(planned, layout=changed).tile_bytes() <= limit

    days = range(layout.shard_days, 0, -layout.chunk_days)
    fewer = [replace(layout, shard_days=n) for n in days if every is None or every % n == 0]
    found = bisect_left(fewer, True, key=fits)
    if found < len(fewer):
        return fewer[found]
    return next(filter(fits, (small for days in (layout, fewer[-1]) for small in _smaller_tiles(days))), None)


def _smaller_tiles(layout: CubeLayout) -> Iterator[CubeLayout]:
    """The same layout with tiles of fewer and fewer chunks, of about the same shape."""
    tiles = [
        tuple(max(t // parts // c, 1) * c for t, c in zip(layout.tile, layout.chunk, strict=True))
        for parts in range(2, max(layout.tile) + 1)
    ]
    for tile in dict.fromkeys(tiles):
        whole = not any(t % s for t, s in zip(tile, layout.shard, strict=True))
        yield replace(layout, tile=tile, shard=layout.shard if whole else tile)


def warn_of_split_chunks(planned: CubePlan) -> None:
    """Say so if several tiles need the same chunks of the forcing, each of which reads them."""
    chunk, tile, shard = planned.source.chunk_shape, planned.layout.tile, planned.layout.shard
    if not tiles_sharing_no_chunk(planned):
        fitting = [_nearest_multiple(t, math.lcm(c, s)) for t, c, s in zip(tile, chunk, shard, strict=True)]
        _log.warning(
            "inference.tile = %s cuts chunks of the forcing, %s cells each, which are then read by several "
            "tiles; inference.tile = %s would not",
            *(list(tile), list(chunk), fitting),
        )


def _nearest_multiple(size: int, unit: int) -> int:
    """The multiple of ``unit`` nearest to ``size``, not 0.

    >>> _nearest_multiple(20, 12), _nearest_multiple(5, 12)
    (24, 12)
    """
    return max(round(size / unit), 1) * unit
