"""One tile of global inference, on a worker.

The tile's forcing is streamed in blocks of days, through all members, whose states are carried over; while a
block computes, the one before is written and the next one is read, which for the last block is the first one
of the worker's next tile. A stretch of days ends with a snapshot of the states and a receipt; what has a
receipt is never computed again.
"""

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from itertools import pairwise
from typing import Any, Final, TypeVar

import torch

from h2mv_dist.config import StorageOptions
from h2mv_dist.grid import Period, Tile, as_date
from h2mv_dist.io.cube import Progress
from h2mv_dist.io.cube_check import require_receipts
from h2mv_dist.io.cube_store import publish_further, still_as_planned
from h2mv_dist.io.ledger import Ledger, Receipt, cut_off, unfilled
from h2mv_dist.io.sink import Sink
from h2mv_dist.io.snapshots import Snapshots
from h2mv_dist.jobs.code_path import compiles_here
from h2mv_dist.jobs.cube_plan import CubePlan, plan_from_message
from h2mv_dist.jobs.memory import keep_freed_memory, set_apart_what_is_loaded
from h2mv_dist.jobs.messages import Message, Place
from h2mv_dist.jobs.simulation import Carried, Days, TileSimulation, Values, constants_of, kept_outputs
from h2mv_dist.jobs.tasks import cancellation_check, make_room, report
from h2mv_dist.model.base import Batch
from h2mv_dist.model.ensemble import Ensemble

POLL_SECONDS: Final = 0.2
"""How often a tile that waits for its turn looks whether it is still wanted."""

_T = TypeVar("_T")


class _Writer:
    """A thread that writes what it is given, in this order."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="h2mv-write")
        self.latest: Future[Any] | None = None

    def submit(self, write: Callable[[], _T]) -> "Future[_T]":
        """Have it write something after all it was given before."""
        self.latest = future = self.pool.submit(write)
        return future

    def has_written(self, seconds: float | None = None) -> bool:
        """Wait until nothing is left to write, whatever became of it; False if that takes longer."""
        if self.latest is not None and wait([self.latest], seconds).not_done:
            return False
        self.latest = None  # its error would keep what could not be written
        return True


@dataclass(frozen=True, slots=True)
class TileContext:
    """What a worker keeps between the tiles of one cube.

    One tile is computed at a time (whose thread holds ``computing``), and one block is written at a time: so
    tiles that overlap take no more memory than one, but for the forcing of the one that waits.
    """

    plan: CubePlan
    ensemble: Ensemble
    cube: Sink
    ledger: Ledger
    snapshots: Snapshots
    computing: threading.Lock = field(default_factory=threading.Lock)
    writer: _Writer = field(default_factory=_Writer)

    def be_left(self) -> None:
        """Wait for what a tile that was cancelled is still at."""
        with self.computing:
            self.writer.has_written()

    def require_current(self) -> None:
        """Write nothing, and sign nothing, for a cube that is not the one any more that was planned with.

        Raises:
            JobError: it was replaced or rolled back.
        """
        still_as_planned(self.ledger.url, self.plan.layout, self.ledger.rollbacks, self.ledger.options)


_contexts: dict[str, TileContext] = {}
"""By run of a job, the context of the cube this worker is busy with; one at most."""
_opening: Final = threading.Lock()


def run_tile_unit(message: Message, place: Place) -> None:
    """Compute what is missing of a tile, or finish the cube."""
    context = _context(message)
    torch.set_num_threads(context.plan.settings.inference.threads)
    started = time.monotonic()
    if message["task"] == "finish":
        finish_cube(context)
    else:
        tile = Tile(tuple(message["start"]), tuple(message["stop"]))
        compute_tile(context, tile, cancellation_check(), partial(make_room, place), partial(_tell, message))
    report(message, event="tile", seconds=round(time.monotonic() - started, 3))


def _tell(message: Message, days: int, of: int) -> None:
    report(message, event="days", days=days, of=of)


def _context(message: Message) -> TileContext:
    # not the job's name: another run may have another model, credentials or forcing
    run = message["run"]
    with _opening:
        if run not in _contexts:
            planned = plan_from_message(message)
            for other in _contexts.values():
                other.be_left()
            _contexts.clear()
            options = StorageOptions(message["storage_options"])
            _contexts[run] = open_context(planned, message["cube"], options)
            set_apart_what_is_loaded()
        return _contexts[run]


def open_context(planned: CubePlan, cube: str, options: StorageOptions) -> TileContext:
    """Open a cube that exists, with everything it takes to fill it.

    Raises:
        StoreError: there is no such cube, or it cannot be reached.
    """
    keep_freed_memory()
    # code is compiled for a number of threads
    torch.set_num_threads(planned.settings.inference.threads)
    rollbacks = planned.progress.rollbacks if planned.progress else ()
    members = [checkpoint.build_model() for checkpoint in planned.checkpoints]
    device = inference_device()
    compiled = device.type == "cpu" and compiles_here(planned.code_path)
    ensemble = Ensemble(members, device, compiled=compiled)
    ensemble.warm_up(kept_outputs(planned.spec, planned.layout.daily))
    return TileContext(
        plan=planned,
        ensemble=ensemble,
        cube=Sink.open(cube, planned.layout, options),
        ledger=Ledger(cube, options, rollbacks),
        snapshots=Snapshots(cube, options, planned.layout.fingerprint, rollbacks),
    )


def inference_device() -> torch.device:
    """The GPU of the worker this runs on, if it was started with one."""
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def finish_cube(context: TileContext) -> None:
    """Write what belongs to no tile, show readers the whole cube, and drop snapshots that are not needed.

    Raises:
        JobError: days of a tile have no receipt, or the cube was rolled back meanwhile.
    """
    layout, options = context.plan.layout, context.cube.options
    require_receipts(layout, context.ledger, "h2mv-dist infer")
    progress = Progress(layout.period, True, context.ledger.rollbacks, _constants(context))
    publish_further(context.cube.url, layout, progress, options)
    chosen = context.plan.settings.inference
    newest_days = chosen.keep_states * layout.shard_days
    for name in (tile.name for tile in layout.tiles):
        days = context.snapshots.days(name)
        kept = [day for day in days if is_kept(day, layout.period, newest_days, chosen.state_days)]
        context.snapshots.forget(name, kept)


def _constants(context: TileContext) -> str:
    """Checksum of the constants, which are written once."""
    plan = context.plan
    known = plan.progress.constants if plan.progress else ""
    if known or not plan.layout.constants:
        return known
    values = constants_of(context.ensemble, plan.source, plan.layout.constants)
    return context.cube.write_constants(values)


def is_kept(day: date, period: Period, newest_days: int, every: int | None) -> bool:
    """Whether the snapshot of a day stays: it is among the last days, or at a regular distance.

    >>> period = Period(date(1960, 1, 1), date(1960, 1, 31))
    >>> [is_kept(date(1960, 1, d), period, newest_days=5, every=10) for d in (10, 11, 25, 26)]
    [False, True, False, True]
    """
    since = (day - period.start).days
    return since >= period.n_days - newest_days or (every is not None and since % every == 0)


def _nothing(*_days: int) -> None:
    """What is wanted stays wanted, and nobody needs room or asks how far it is."""


def compute_tile(
    context: TileContext,
    tile: Tile,
    require_wanted: Callable[[], None] = _nothing,
    make_room: Callable[[], None] = _nothing,
    tell: Callable[[int, int], None] = _nothing,
) -> None:
    """Compute and write every output of a tile, over the days that no receipt of it covers.

    Args:
        context: of the cube.
        tile: one of its tiles.
        require_wanted: raises what ends the work early; called several times a second, by two threads.
        make_room: called once only the last block is to be computed, for which all is read: from here on
            another tile of the context may be computed by another thread.
        tell: called after each block with the days that are computed by now, and those there are to compute.
    """
    covered = context.ledger.covered(tile.name).get(tile.name, ())
    wanted, shard_days = context.plan.layout.period, context.plan.layout.shard_days
    missing = unfilled(covered, wanted, shard_days)
    context.ledger.forget(cut_off(covered, wanted, shard_days))
    if missing:
        _TileRun(context, tile, require_wanted, make_room, tell).fill(missing)


class _TileRun:
    """Fills a tile of a cube with what its members compute.

    While a block computes, the one before is written. A write that fails ends the block that is being
    computed, between two of its parts.
    """

    def __init__(
        self,
        context: TileContext,
        tile: Tile,
        require_wanted: Callable[[], None],
        make_room: Callable[[], None],
        tell: Callable[[int, int], None],
    ) -> None:
        plan, layout = context.plan, context.plan.layout
        self.context, self.tile = context, tile
        self.require_wanted, self.make_room, self.tell = require_wanted, make_room, tell
        self.has_turn, self.writes = False, deque[Future[Any]]()
        days = Days(period=layout.period, block=layout.shard_days, baseline=plan.baseline, spinup=plan.spinup)
        outputs = (*layout.daily, *layout.static)
        self.simulation = TileSimulation(
            plan.source, plan.spec, context.ensemble, tile, days, outputs, layout.monthly, self._before_part
        )

    def fill(self, missing: Sequence[Period]) -> None:
        """Compute and write some days; returns once they have their receipts."""
        try:
            self._compute(missing)
        finally:
            self._end_turn()
            self.simulation.forcing = None
            wait(self.writes)
        self._require_written()

    def _compute(self, missing: Sequence[Period]) -> None:
        carried: Carried | None = None
        done, of, end = 0, sum(gap.n_days for gap in missing), missing[-1].stop
        for gap in missing:
            begun = self._carried_to(gap.start, carried)
            for carried in self._fill_gap(gap, begun, end):
                self.tell(done + (carried.day - gap.start).days, of)
            done += gap.n_days

    def _fill_gap(self, gap: Period, carried: Carried, end: date) -> Iterator[Carried]:
        """Days without a receipt, from what is carried to their first one; gives it after each block."""
        stretch, ends = None, {stretch.stop for stretch in stretches(self.context.plan, gap)}
        for block, batch in self.simulation.blocks(gap):
            if block.stop == end:
                self.make_room()
            self._take_turn()
            stretch = stretch or _Stretch(self.context, self.tile, block.start, self.require_wanted)
            carried, values = self.simulation.step(block, batch, carried)
            stretch.count(batch, values)
            while not self.context.writer.has_written(POLL_SECONDS):
                self.require_wanted()
            self._require_written()
            stretch.blocks.append(self._hand_over(partial(stretch.write, block, values)))
            if block.stop in ends:
                self._hand_over(partial(stretch.finish, carried))
                stretch = None
            yield carried

    def _hand_over(self, write: Callable[[], _T]) -> "Future[_T]":
        self.writes.append(future := self.context.writer.submit(write))
        return future

    def _carried_to(self, day: date, carried: Carried | None) -> Carried:
        """What is remembered when ``day`` begins: carried over or kept, else worked out without writing."""
        if carried is None or carried.day != day:
            carried = self._latest(day)
        return self.simulation.advance(carried, day)

    def _latest(self, day: date) -> Carried:
        snapshots = self.context.snapshots
        usable = [kept for kept in snapshots.days(self.tile.name) if kept <= day]
        if not usable:
            return self.simulation.start()
        arrays = snapshots.load(self.tile.name, usable[-1])
        return Carried.of(usable[-1], arrays, self.context.plan.spec.state, self.context.ensemble.device)

    def _before_part(self) -> None:
        """Wait for this tile's turn, and end a part of a block before it begins, if it is in vain."""
        self.require_wanted()
        self._take_turn()
        self._require_written()

    def _take_turn(self) -> None:
        while not self.has_turn:
            self.has_turn = self.context.computing.acquire(timeout=POLL_SECONDS)
            self.require_wanted()

    def _end_turn(self) -> None:
        if self.has_turn:
            self.context.computing.release()
            self.has_turn = False

    def _require_written(self) -> None:
        """Raise what has become of the writes that have ended."""
        while self.writes and self.writes[0].done():
            self.writes.popleft().result()


class _Stretch:
    """Days of a tile that get one receipt; written and signed by the worker's writer, in this order."""

    def __init__(
        self, context: TileContext, tile: Tile, start: date, require_wanted: Callable[[], None]
    ) -> None:
        self.context, self.tile, self.start, self.require_wanted = context, tile, start, require_wanted
        self.started = time.monotonic()
        self.static, self.months, self.forcing = "", list[str](), hashlib.sha256()
        self.blocks: list[Future[str]] = []
        self.missing, self.residual = 0, list[float]()

    def count(self, batch: Batch, values: Values) -> None:
        """Note what the receipt is to say of a block."""
        self.forcing.update(batch.forcing.numpy().tobytes())
        self.missing += values.n_missing()
        self.residual += [] if values.residual is None else [values.residual]

    def write(self, block: Period, values: Values) -> str:
        """Write a block; returns its checksum."""
        # again for each block: a run that was rolled back may have been at this tile for hours
        self.require_wanted()
        self.context.require_current()
        cube, layout = self.context.cube, self.context.plan.layout
        if block.start == layout.period.start and values.static:
            self.static = cube.write_static(self.tile, values.static)
        for month, means in values.months.items() if layout.monthly else ():
            self.months.append(cube.write_month(self.tile, month, means))
        return cube.write(self.tile, block, values.daily)

    def finish(self, carried: Carried) -> None:
        """Keep the states, then put the receipt, if all blocks were written."""
        blocks = tuple(block.result() for block in self.blocks)
        self.require_wanted()
        self.context.require_current()
        layout, tile = self.context.plan.layout, self.tile.name
        if _is_whole(layout.period, carried.day, layout.shard_days):
            self.context.snapshots.save(tile, carried.day, carried.arrays(self.context.plan.spec.state))
        receipt = Receipt(
            fingerprint=layout.fingerprint,
            static=self.static,
            blocks=blocks,
            months=tuple(self.months),
            forcing=self.forcing.hexdigest(),
            missing=self.missing,
            residual=max(self.residual, default=None),
            seconds=round(time.monotonic() - self.started, 3),
        )
        self.context.ledger.record(tile, Period(self.start, carried.day), receipt)


def stretches(plan: CubePlan, gap: Period) -> Iterator[Period]:
    """Cut days where states are to be kept: regularly if asked for, and where the last whole shard ends."""
    period, shard = plan.layout.period, plan.layout.shard_days
    every = plan.settings.inference.state_days or period.n_days
    first, stop = gap.first - period.first, gap.first - period.first + gap.n_days
    last_whole = stop // shard * shard
    cuts = {*range(first // every * every, stop, every), last_whole, stop}
    bounds = sorted({first, *(cut for cut in cuts if first < cut <= stop)})
    for a, b in pairwise(bounds):
        yield Period(as_date(period.first + a), as_date(period.first + b))


def _is_whole(period: Period, day: date, shard_days: int) -> bool:
    """Whether a shard of days ends where ``day`` begins."""
    return (day - period.start).days % shard_days == 0
