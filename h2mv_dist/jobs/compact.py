"""The compacting job: the days of a cube, copied into a second one with longer shards; again, as it grows.

A Zarr array has one length of shards, and nothing that readers use is rewritten, so a cube that grows a day
at a time keeps its small shards. Its copy holds as many whole shards of its own as there are by now; days
beyond stay in the first cube. A piece of work is a tile over one shard of days, with a receipt; readers see
the days last.

The copy counts the rollbacks of the cube it is from as its own, each moved to where one of its shards begins.
"""

import hashlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from math import prod
from typing import Final, NamedTuple

from dask.utils import format_bytes
from distributed import Client

from h2mv_dist.config import StorageOptions, canonical_json
from h2mv_dist.errors import ConfigError, JobError, NothingNewError, StoreError, describe
from h2mv_dist.grid import Period, Tile, as_date
from h2mv_dist.io.cube import COMPACTED, FINGERPRINT, CubeLayout, Progress, part_bytes
from h2mv_dist.io.cube_check import require_receipts
from h2mv_dist.io.cube_copy import CubeCopy
from h2mv_dist.io.cube_store import (
    Cube,
    create_cube,
    differences,
    find_cube,
    publish,
    publish_further,
    read_cube,
)
from h2mv_dist.io.ledger import Ledger, gaps, ledger_url
from h2mv_dist.io.sink import ARRAYS_AT_ONCE, Sink, StoredValues
from h2mv_dist.io.stores import displayed, public, resolved
from h2mv_dist.jobs.cluster import require_workers, smallest_memory
from h2mv_dist.jobs.handle import JobHandle, require_idle, submit
from h2mv_dist.jobs.messages import Job, Message, Unit, job_id
from h2mv_dist.jobs.room import require_disk
from h2mv_dist.jobs.tasks import cancellation_check, report
from h2mv_dist.jobs.versions import require_same_versions

SHARD_DAYS: Final = 360
CHUNK_DAYS: Final = 120
FINISH: Final = "finish"
"""The unit that comes after all tiles: constants and metadata."""
_UNITS: Final = 2000
"""About how many units a job has at most; where there are more shards, some share a unit, for the scheduler's
sake."""
_ATTEMPTS: Final = 3
_FLOAT_BYTES: Final = 4

_log = logging.getLogger(__name__)


class Cut(NamedTuple):
    """How the copy is cut.

    Attributes:
        shard_days: days of a shard; a multiple of the cube's.
        chunk_days: days of a chunk.
        chunk: cells of a chunk along each spatial axis.
    """

    shard_days: int
    chunk_days: int
    chunk: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CompactPlan:
    """What is to be copied where.

    Attributes:
        cube: URL of the cube.
        target: URL of its copy.
        source: the cube, as readers see it.
        layout: of the copy, as long as it is to become.
        rollbacks: of the copy, from now on.
        progress: how far the copy is, or None if there is none yet.
        missing: tile -> shards of days without a receipt; without the tiles that are finished.
    """

    cube: str
    target: str
    source: Cube
    layout: CubeLayout
    rollbacks: tuple[date, ...]
    progress: Progress | None
    missing: Mapping[Tile, tuple[Period, ...]]

    @property
    def done(self) -> bool:
        """Whether readers are shown all of it."""
        wanted = Progress(self.layout.period, True, self.rollbacks, self.source.progress.constants)
        return not self.missing and self.progress == wanted

    def unit_bytes(self) -> int:
        """Projected peak of a unit, bytes; a box is one array over a tile and a shard of days.

        One box is read: its values, its chunks and these coded. Of each that is being written there are
        three: its values, these coded, and joined or sent.
        """
        members = len(self.layout.members) if self.layout.member_axis else 1
        cells = max(prod(tile.shape) for tile in self.layout.tiles)
        return _FLOAT_BYTES * members * self.layout.shard_days * cells * (3 + 3 * ARRAYS_AT_ONCE)

    def summary(self) -> str:
        """What will be copied, in a sentence."""
        count = sum(len(blocks) for blocks in self.missing.values())
        return (
            f"{self.layout.period} of {self.source.layout.period} in shards of {self.layout.shard_days} "
            f"days: {count} to copy, of {len(self.missing)} tiles, with about "
            f"{format_bytes(self.unit_bytes())} of a worker's memory"
        )


def plan_compact(
    cube: str,
    target: str,
    options: StorageOptions,
    *,
    shard_days: int | None = None,
    chunk_days: int | None = None,
    chunk: tuple[int, ...] | None = None,
) -> CompactPlan:
    """Find out what of a cube its copy lacks; nothing is written.

    Args:
        cube: URL of the cube.
        target: URL of the copy, which may exist.
        options: of both stores.
        shard_days, chunk_days, chunk: see :class:`Cut`; if left out, as the copy has them already, or else
            360 days, 120 days, and the cube's.

    Raises:
        NothingNewError: the copy lacks nothing, for there is no further whole shard.
        H2mvError: anything that does not fit together.
    """
    _refuse_same_place(cube, target)
    source, known = read_cube(cube, options), find_cube(target, options)
    _require_complete(source, cube)
    there = _copy_of(source, target, options) if known else None
    cut = _settled(source.layout, there, shard_days, chunk_days, chunk)
    layout = _layout(source, cube, cut, source.layout.period)
    rollbacks = tuple(_shard_start(layout, day) for day in source.progress.rollbacks)
    if known and there:
        _require_same_cut(known, layout, target)
        _require_same_past(there.progress, rollbacks, layout, target)
    layout = replace(layout, period=_whole_shards(layout))
    progress = there.progress if there else None
    missing = _missing(layout, Ledger(target, options, rollbacks)) if there else _everything(layout)
    plan = CompactPlan(cube, target, source, layout, rollbacks, progress, missing)
    if plan.done:
        raise NothingNewError(
            f"nothing to compact: {displayed(target)} is complete until {layout.period.stop} (that day "
            f"excluded), the cube ends {source.layout.period.stop}, and days are copied "
            f"{layout.shard_days} at a time"
        )
    return plan


def start_compact(client: Client, plan: CompactPlan, options: StorageOptions) -> JobHandle:
    """Copy what is missing; shards of a tile that have a receipt are not copied again.

    Raises:
        H2mvError: workers are too small, the store fails, or the job runs already.
    """
    name = job_id("compact", plan.target)
    require_idle(client, name)
    require_workers(client, 1, "compact")
    require_same_versions(client)
    _require_memory(client, plan)
    require_disk(
        "compacted cube", plan.target, part_bytes(plan.layout, plan.missing), "move older files away"
    )
    _log.info("%s: %s", displayed(plan.target), plan.summary())
    create_cube(plan.target, plan.layout, options, overwrite=False)
    _roll_back(plan, options)
    common = {
        "cube": plan.cube,
        "target": plan.target,
        "cut": [plan.layout.shard_days, plan.layout.chunk_days, plan.layout.chunk],
        "period": str(plan.layout.period),
        "fingerprint": plan.layout.fingerprint,
        "rollbacks": [str(day) for day in plan.source.progress.rollbacks],
        "storage_options": options.reveal(),
    }
    final = Unit(FINISH, "compact", {}, attempts=_ATTEMPTS, steps=0)
    return submit(client, Job(name, plan.target, common, tuple(_units(plan)), final))


def run_compact_unit(message: Message) -> None:
    """Copy some shards of a tile, or show readers the whole copy."""
    context, started = _context(message), time.monotonic()
    if message["unit"] == FINISH:
        finish_copy(context)
    else:
        tile = Tile(tuple(message["start"]), tuple(message["stop"]))
        require_wanted = cancellation_check()
        for block in _left(context.copy.ledger, tile, message["blocks"]):
            context.copy.copy(tile, block, require_wanted)
    report(message, event="compacted", seconds=round(time.monotonic() - started, 3))


def _left(ledger: Ledger, tile: Tile, blocks: Sequence[str]) -> Iterator[Period]:
    """The shards of a tile that an earlier attempt did not copy."""
    covered = ledger.covered(tile.name).get(tile.name, ())
    for block in map(Period.parse, blocks):
        if gaps(covered, block):
            yield block


@dataclass(frozen=True, slots=True)
class CompactContext:
    """What a worker keeps between the units of one job.

    Attributes:
        copy: from one cube to the other.
        rollbacks: of the source, when the job was planned.
    """

    copy: CubeCopy
    rollbacks: tuple[date, ...]


_contexts: dict[str, CompactContext] = {}
"""By run of a job, the copy this worker is busy with; one at most."""


def _context(message: Message) -> CompactContext:
    run = message["run"]
    if run not in _contexts:
        _contexts.clear()
        _contexts[run] = _opened(message)
    return _contexts[run]


def _opened(message: Message) -> CompactContext:
    cube, target, period = message["cube"], message["target"], Period.parse(message["period"])
    options = StorageOptions(message["storage_options"])
    shard_days, chunk_days, chunk = message["cut"]
    source = read_cube(cube, options)
    layout = _layout(source, cube, Cut(shard_days, chunk_days, tuple(chunk)), period)
    rollbacks = tuple(date.fromisoformat(day) for day in message["rollbacks"])
    if layout.fingerprint != message["fingerprint"]:
        raise _changed(cube, "another cube")
    _require_unchanged(cube, source, layout, rollbacks)
    ours = tuple(_shard_start(layout, day) for day in rollbacks)
    copy = CubeCopy(
        StoredValues.open(cube, source.layout, options),
        Ledger(cube, options, rollbacks),
        Sink.open(target, layout, options),
        Ledger(target, options, ours),
    )
    return CompactContext(copy, rollbacks)


def finish_copy(context: CompactContext) -> None:
    """Copy what belongs to no tile, and show readers the days.

    Raises:
        JobError: days of a tile have no receipt, or the cube was rolled back meanwhile.
    """
    copy, layout = context.copy, context.copy.target.layout
    url, options = copy.target.url, copy.target.options
    require_receipts(layout, copy.ledger, "h2mv-dist compact")
    source = read_cube(copy.source.url, options)
    _require_unchanged(copy.source.url, source, layout, context.rollbacks)
    constants = read_cube(url, options).progress.constants or copy.copy_constants(source.progress)
    publish_further(url, layout, Progress(layout.period, True, copy.ledger.rollbacks, constants), options)


def _layout(source: Cube, cube: str, cut: Cut, period: Period) -> CubeLayout:
    """Layout of the copy of the cube at ``cube``."""
    ours = source.layout
    _check_cut(ours, cut)
    identity = {COMPACTED: ours.fingerprint, **cut._asdict()}
    provenance = {
        **ours.attributes,
        COMPACTED: ours.fingerprint,
        "source_cube": public(cube),
        FINGERPRINT: hashlib.sha256(canonical_json(identity).encode()).hexdigest(),
    }
    return replace(ours, period=period, attributes=provenance, **cut._asdict())


def _settled(
    ours: CubeLayout,
    there: Cube | None,
    shard_days: int | None,
    chunk_days: int | None,
    chunk: tuple[int, ...] | None,
) -> Cut:
    """What was left open, decided."""
    if there is not None:
        known = Cut(there.layout.shard_days, there.layout.chunk_days, there.layout.chunk)
    else:
        known = Cut(SHARD_DAYS, min(CHUNK_DAYS, shard_days or SHARD_DAYS), ours.chunk)
    return Cut(shard_days or known.shard_days, chunk_days or known.chunk_days, chunk or known.chunk)


def _whole_shards(layout: CubeLayout) -> Period:
    """The days of all whole shards.

    Raises:
        NothingNewError: there is no whole shard yet.
    """
    period, days = layout.period, layout.shard_days
    whole = period.n_days // days * days
    if not whole:
        raise NothingNewError(
            f"nothing to compact: the cube has {period.n_days} days by now, and days are copied {days} at a "
            "time (--shard-days)"
        )
    return Period(period.start, as_date(period.first + whole))


def _check_cut(ours: CubeLayout, cut: Cut) -> None:
    pairs = (
        ("--shard-days", "the cube's shard_days", (cut.shard_days,), (ours.shard_days,)),
        ("--shard-days", "--chunk-days", (cut.shard_days,), (cut.chunk_days,)),
        ("the cube's shard", "--chunk", ours.shard, cut.chunk),
    )
    for outer_name, inner_name, outer, inner in pairs:
        fits = len(outer) == len(inner) and min(inner) >= 1 and min(outer) >= 1
        if not fits or any(o % i for o, i in zip(outer, inner, strict=True)):
            raise ConfigError(
                describe(
                    f"{outer_name} is not a multiple of {inner_name}",
                    where=f"{outer_name} and {inner_name}",
                    expected="whole shards made of whole shards and whole chunks, along every axis",
                    actual=f"{list(outer)} and {list(inner)}",
                    fix="change " + (inner_name if inner_name.startswith("--") else outer_name),
                )
            )


def _shard_start(layout: CubeLayout, day: date) -> date:
    """The day, not after this one, with which a shard begins."""
    since = (day - layout.period.start).days
    return as_date(layout.period.first + since // layout.shard_days * layout.shard_days)


def _roll_back(plan: CompactPlan, options: StorageOptions) -> None:
    """Make the copy end where the cube was rolled back to, if it was; one swap of the root decides."""
    there = read_cube(plan.target, options).progress
    new = plan.rollbacks[len(there.rollbacks) :]
    if not new:
        return
    # what is not complete shows nothing, so its first shard may stay on view
    first = plan.layout.period.first + plan.layout.shard_days
    stop = max(min(there.period.stop, *new), as_date(first))
    shorter = replace(there, period=Period(there.period.start, stop), rollbacks=plan.rollbacks)
    publish(plan.target, plan.layout, shorter, options, before=there)


def _everything(layout: CubeLayout) -> dict[Tile, tuple[Period, ...]]:
    """Tile -> all shards of days."""
    return dict.fromkeys(layout.tiles, tuple(layout.period.blocks(layout.shard_days)))


def _missing(layout: CubeLayout, ledger: Ledger) -> dict[Tile, tuple[Period, ...]]:
    """Tile -> shards of days without a receipt; without the tiles that are finished."""
    covered = ledger.covered()
    found = {
        tile: tuple(block for block in blocks if gaps(covered.get(tile.name, ()), block))
        for tile, blocks in _everything(layout).items()
    }
    return {tile: blocks for tile, blocks in found.items() if blocks}


def _units(plan: CompactPlan) -> Iterator[Unit]:
    """A shard of a tile each, or, where these are very many, several of one tile in a row."""
    count = sum(len(blocks) for blocks in plan.missing.values())
    at_once = -(-count // _UNITS)
    for tile, blocks in plan.missing.items():
        for first in range(0, len(blocks), at_once):
            part = blocks[first : first + at_once]
            spec = {"start": tile.start, "stop": tile.stop, "blocks": [str(block) for block in part]}
            name = f"{tile.name}/{part[0].start}..{part[-1].stop}"
            yield Unit(name, "compact", spec, attempts=_ATTEMPTS)


def _copy_of(source: Cube, target: str, options: StorageOptions) -> Cube:
    """The copy as it is.

    Raises:
        StoreError: what is there was not compacted from this cube.
    """
    found = read_cube(target, options)
    origin = found.layout.attributes.get(COMPACTED)
    if origin == source.layout.fingerprint:
        return found
    raise StoreError(
        describe(
            "another cube is already there; nothing was touched",
            where=displayed(target),
            expected="nothing, or what this cube was compacted into before",
            actual=f"a cube compacted from one of fingerprint {origin}" if origin else "a cube of its own",
            fix="choose another path, or delete it and its .ledger yourself",
        )
    )


def _require_same_cut(known: Mapping[str, str], layout: CubeLayout, target: str) -> None:
    # the fingerprint follows from what is listed beside it
    different = [line for line in differences(known, layout) if not line.startswith(FINGERPRINT)]
    if different:
        raise StoreError(
            describe(
                "the copy that is there is cut in another way; nothing was touched",
                where=displayed(target),
                expected="the same --shard-days, --chunk-days and --chunk as before, or none of them",
                actual="it differs in " + ", ".join(different),
                fix="leave these options out, or choose another path",
            )
        )


def _require_same_past(there: Progress, rollbacks: tuple[date, ...], layout: CubeLayout, target: str) -> None:
    """Make sure that the copy can follow the cube's rollbacks."""
    n_followed = len(there.rollbacks)
    new = rollbacks[n_followed:]
    if there.rollbacks != rollbacks[:n_followed]:
        actual = f"rollbacks to {', '.join(map(str, there.rollbacks))} that the cube does not have"
    elif there.complete and new and min(new) <= layout.period.start:
        actual = "a rollback of the cube into the first shard of its copy, which has nothing to show then"
    else:
        return
    raise StoreError(
        describe(
            "the copy cannot follow what became of the cube; nothing was touched",
            where=displayed(target),
            expected="days that the cube still has",
            actual=actual,
            fix="delete the copy and its .ledger, or choose another path; then compact again",
        )
    )


def _require_complete(source: Cube, cube: str) -> None:
    if not source.progress.complete:
        raise JobError(
            describe(
                "the cube to be copied is not finished",
                where=displayed(cube),
                expected="a cube whose first days readers are shown",
                actual=f"days of {source.layout.period} are missing",
                fix="run h2mv-dist infer again, then compact",
            )
        )


def _require_unchanged(cube: str, source: Cube, layout: CubeLayout, rollbacks: tuple[date, ...]) -> None:
    if source.layout.fingerprint != layout.attributes[COMPACTED]:
        raise _changed(cube, "another cube")
    if source.progress.rollbacks != rollbacks or not source.layout.period.contains(layout.period):
        raise _changed(cube, "one that was rolled back")


def _changed(cube: str, found: str) -> JobError:
    return JobError(
        describe(
            "the cube changed while it was copied",
            where=displayed(cube),
            expected="the cube that was planned with; days may be appended meanwhile",
            actual=found,
            fix="run h2mv-dist compact again: what does not count any more is copied anew",
        )
    )


def _refuse_same_place(cube: str, target: str) -> None:
    one, other = resolved(cube), resolved(target)
    nested = one.startswith(other + "/") or other.startswith(one + "/")
    if one == other or nested or ledger_url(one) == ledger_url(other):
        raise ConfigError(
            describe(
                "a cube cannot be compacted into itself, nor share its receipts",
                where="TARGET",
                expected=f"another place than {displayed(cube)}, with a name of its own",
                actual=displayed(target),
                fix="choose another path",
            )
        )


def _require_memory(client: Client, plan: CompactPlan) -> None:
    limit, needed = smallest_memory(client), plan.unit_bytes()
    if limit is None or needed <= limit:
        return
    days = plan.layout.shard_days
    raise JobError(
        describe(
            "a tile over a shard of days does not fit into a worker",
            where="--shard-days",
            expected=f"at most {format_bytes(limit)}, the smallest worker's limit",
            actual=f"about {format_bytes(needed)} for {days} days",
            fix=f"give --shard-days of about {max(days * limit // needed, 1)}, or start larger workers",
        )
    )
