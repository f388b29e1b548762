"""The global-inference job: create a cube or find it, then submit one unit a tile that is not finished.

A tile is asked for the days that no receipt of it covers; what readers are shown changes last, in one put.
"""

import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from typing import Any, Final

from dask.utils import format_bytes
from distributed import Client

from h2mv_dist.config import Settings, StorageOptions, to_json
from h2mv_dist.errors import JobError, StoreError, describe
from h2mv_dist.grid import Period, Tile
from h2mv_dist.io.cube import CubeLayout, Progress
from h2mv_dist.io.cube_check import CubeCheck
from h2mv_dist.io.cube_store import create_cube, publish, read_cube
from h2mv_dist.io.ledger import Ledger, gaps
from h2mv_dist.io.snapshots import Snapshots
from h2mv_dist.io.stores import displayed, local_path
from h2mv_dist.jobs.cluster import require_workers, smallest_memory
from h2mv_dist.jobs.cube_plan import CubePlan, plan_inference, tiles_sharing_no_chunk
from h2mv_dist.jobs.handle import JobHandle, submit
from h2mv_dist.jobs.messages import Job, Unit
from h2mv_dist.jobs.training import job_id

COMPRESSION: Final = 10
"""Outputs are not compressed any further than by about this factor."""
FINISH_UNIT: Final = "finish"
"""The unit that comes after all tiles: constants and metadata."""

_log = logging.getLogger(__name__)


def start_inference(
    client: Client, planned: CubePlan, training_folder: str, cube: str, options: StorageOptions
) -> JobHandle | None:
    """Fill the cube at ``cube``; days of a tile that have a receipt are not computed again.

    Returns:
        A handle, or None if there is nothing to do.

    Raises:
        H2mvError: another cube is there, the cluster or the disk is too small, or the job runs already.
    """
    settings = planned.settings
    require_workers(client, 1, "inference")
    _require_memory(client, planned)
    missing = missing_days(planned, cube, options)
    _require_disk(planned, missing, cube)
    warn_of_split_chunks(planned)
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
        "storage_options": options.reveal(),
    }
    attempts = settings.inference.attempts
    units = tuple(
        Unit(tile.name, "tile", {"start": tile.start, "stop": tile.stop}, attempts=attempts)
        for tile in in_good_order(planned, missing)
    )
    final = Unit(FINISH_UNIT, "finish", {}, attempts=attempts)
    return submit(client, Job(id=job_id("infer", cube), common=common, units=units, final=final))


def submit_inference(
    client: Client,
    settings: Settings,
    training_folder: str,
    cube: str,
    options: StorageOptions,
    *,
    append: bool = False,
) -> JobHandle | None:
    """Plan and start inference; see :func:`plan_inference` and :func:`start_inference`."""
    planned = plan_inference(settings, training_folder, options, cube=cube, append=append)
    return start_inference(client, planned, training_folder, cube, options)


def missing_days(planned: CubePlan, cube: str, options: StorageOptions) -> dict[Tile, tuple[Period, ...]]:
    """Tile -> the stretches of days without a receipt; without the tiles that are finished."""
    progress = planned.progress
    covered = Ledger(cube, options, progress.rollbacks).covered() if progress else {}
    found = {tile: gaps(covered.get(tile.name, ()), planned.layout.period) for tile in planned.layout.tiles}
    return {tile: stretches for tile, stretches in found.items() if stretches}


def in_good_order(planned: CubePlan, missing: Mapping[Tile, Sequence[Period]]) -> list[Tile]:
    """The tiles with most land first, so that no long one is left for the end.

    Where tiles read the same chunks of the forcing, neighbours follow each other instead.
    """
    if not tiles_sharing_no_chunk(planned):
        return list(missing)
    mask = planned.layout.grid.mask
    return sorted(missing, key=lambda tile: -int(mask[tile.slices].sum()))


def roll_back(cube: str, day: date, options: StorageOptions) -> Progress:
    """Make a cube end at the last day, not after ``day``, from which every tile can go on.

    What lies behind it counts as not computed from then on; one put of the metadata decides.

    Raises:
        JobError: there is no such day.
        StoreError: there is no complete cube, or the store fails.
    """
    layout, progress = read_cube(cube, options)
    starts = _possible_starts(cube, layout, progress, options)
    usable = [start for start in starts if start <= min(day, progress.period.stop)]
    if not usable:
        raise JobError(
            describe(
                "no tile can go on from there",
                where=displayed(cube),
                expected=f"snapshots of all tiles at or before {day}",
                actual=f"they are there for {', '.join(map(str, starts)) or 'no day'}",
                fix="choose a later day, or make the cube anew with inference.overwrite; one that is created "
                "with inference.state_days can be gone back to more days",
            )
        )
    shorter = Period(progress.period.start, usable[-1])
    new = Progress(shorter, True, (*progress.rollbacks, usable[-1]), progress.constants)
    publish(cube, layout, new, options)
    return new


def forget_damage(cube: str, check: CubeCheck, options: StorageOptions) -> None:
    """Make what a check found damaged count as not done, so that inference writes it anew.

    Raises:
        StoreError: there is no complete cube, or the store fails.
    """
    layout, progress = read_cube(cube, options)
    Ledger(cube, options, progress.rollbacks).forget(check.damaged)
    if check.constants:
        publish(cube, layout, replace(progress, constants=""), options)


def recorded_job(cube: str, options: StorageOptions) -> tuple[dict[str, Any], str]:
    """Settings and training job that a cube was last worked on with, from its root.

    Raises:
        StoreError: there is no complete cube.
    """
    attributes = read_cube(cube, options).layout.attributes
    return json.loads(attributes["settings"]), attributes["training_job"]


def _possible_starts(
    cube: str, layout: CubeLayout, progress: Progress, options: StorageOptions
) -> list[date]:
    """Days from which every tile can go on: its receipts end there, and it has a snapshot."""
    covered = Ledger(cube, options, progress.rollbacks).covered()
    snapshots = Snapshots(cube, options, layout.fingerprint, progress.rollbacks)
    ends = [
        {one.period.stop for one in covered.get(tile.name, ())} & set(snapshots.days(tile.name))
        for tile in layout.tiles
    ]
    return sorted(set.intersection(*ends))


def _require_memory(client: Client, planned: CubePlan) -> None:
    limit = smallest_memory(client)
    needed = planned.tile_bytes()
    if limit is not None and needed > limit:
        raise JobError(
            describe(
                "a tile does not fit into a worker",
                where="inference.tile and inference.shard_days",
                expected=f"at most {format_bytes(limit)}, the smallest worker's limit",
                actual=f"about {format_bytes(needed)} for the largest tile",
                fix="choose smaller tiles or fewer inference.shard_days, or start larger workers",
            )
        )


def _require_disk(planned: CubePlan, missing: Mapping[Tile, Sequence[Period]], cube: str) -> None:
    """Refuse a cube that cannot fit on this machine's disk; object stores do not say what is free.

    Raises:
        StoreError: not even a tenth of the bytes before compression is free.
    """
    place = local_path(cube)
    if place is None:
        return
    needed = planned.missing_bytes(missing)
    folder = next(path for path in (place, *place.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if free * COMPRESSION < needed:
        raise StoreError(
            describe(
                "the cube does not fit on the disk",
                where=str(folder),
                expected=f"at least {format_bytes(needed // COMPRESSION)} free for what is missing of the "
                f"cube ({format_bytes(needed)} before compression)",
                actual=f"{format_bytes(free)} free",
                fix="free space (a cube that is to be replaced can be deleted first), choose another disk, "
                "or fewer inference.outputs",
            )
        )
    if free < needed:
        _log.warning(
            "%s has %s free; the tiles of the cube that are missing take %s before compression",
            *(folder, format_bytes(free), format_bytes(needed)),
        )


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
