"""One tile of global inference, on a worker.

The tile's forcing is streamed in blocks of days, through all members, whose states are carried over; while a
block computes, the one before is written and the next one is read. A stretch of days ends with a snapshot of
the states and a receipt; what has a receipt is never computed again.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from h2mv_dist.config import StorageOptions, canonical_json
from h2mv_dist.errors import JobError, describe
from h2mv_dist.grid import Period, Tile, as_date
from h2mv_dist.io.cube import Progress
from h2mv_dist.io.cube_store import publish
from h2mv_dist.io.ledger import Ledger, Receipt, gaps
from h2mv_dist.io.sink import Sink
from h2mv_dist.io.snapshots import Snapshots
from h2mv_dist.io.tile_forcing import TileForcing
from h2mv_dist.jobs.cube_plan import CubePlan, plan_from_message
from h2mv_dist.jobs.tasks import Message, report
from h2mv_dist.model.base import Batch, Result, State
from h2mv_dist.model.ensemble import Ensemble
from h2mv_dist.spec import Float32Array, ModelSpec

_REFERENCE = "reference/"
_STATE = "state/"


@dataclass(frozen=True, slots=True)
class TileContext:
    """What a worker keeps between the tiles of one cube."""

    plan: CubePlan
    ensemble: Ensemble
    cube: Sink
    ledger: Ledger
    snapshots: Snapshots


_contexts: dict[str, TileContext] = {}
"""The context of the cube this worker is busy with; one at most."""


def run_tile_unit(message: Message) -> None:
    """Compute what is missing of a tile, or finish the cube."""
    context = _context(message)
    torch.set_num_threads(context.plan.settings.inference.threads)
    started = time.monotonic()
    if message["task"] == "finish":
        finish_cube(context)
    else:
        compute_tile(context, Tile(tuple(message["start"]), tuple(message["stop"])))
    report(message, event="tile", seconds=round(time.monotonic() - started, 3))


def _context(message: Message) -> TileContext:
    # not the job's name: a cube that is replaced keeps its name, but not its model
    key = canonical_json([message[name] for name in ("cube", "provenance", "settings", "period", "progress")])
    if key not in _contexts:
        planned = plan_from_message(message)
        _contexts.clear()
        _contexts[key] = open_context(planned, message["cube"], StorageOptions(message["storage_options"]))
    return _contexts[key]


def open_context(planned: CubePlan, cube: str, options: StorageOptions) -> TileContext:
    """Open a cube that exists, with everything it takes to fill it.

    Raises:
        StoreError: there is no such cube, or it cannot be reached.
    """
    rollbacks = planned.progress.rollbacks if planned.progress else ()
    return TileContext(
        plan=planned,
        ensemble=Ensemble([c.build_model() for c in planned.checkpoints], inference_device()),
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
        JobError: days of a tile have no receipt.
    """
    layout, options = context.plan.layout, context.cube.options
    covered = context.ledger.covered()
    _require_receipts(context, {n: gaps(covered.get(n, ()), layout.period) for n in _tile_names(context)})
    progress = Progress(layout.period, True, context.ledger.rollbacks, _constants(context))
    publish(context.cube.url, layout, progress, options)
    kept = days_to_keep(context.plan)
    for name in _tile_names(context):
        context.snapshots.forget(name, [day for day in context.snapshots.days(name) if kept(day)])


def _tile_names(context: TileContext) -> list[str]:
    return [tile.name for tile in context.plan.layout.tiles]


def _constants(context: TileContext) -> str:
    """Checksum of the constants, which are written once."""
    plan = context.plan
    known = plan.progress.constants if plan.progress else ""
    if known or not plan.layout.constants:
        return known
    no_cells = Batch(torch.zeros(0, 1, len(plan.source.forcing)), torch.zeros(0, len(plan.source.static)), {})
    results: list[Result] = []
    ensemble = context.ensemble
    ensemble.run(no_cells, ensemble.initial_state(0), lambda _, result: results.append(result))
    values = {n: np.stack([r.constants[n].cpu().numpy() for r in results]) for n in plan.layout.constants}
    return context.cube.write_constants(values)


def days_to_keep(plan: CubePlan) -> Callable[[date], bool]:
    """Which snapshots stay: the last ones, and those at multiples of ``state_days``."""
    chosen, period = plan.settings.inference, plan.layout.period
    oldest = period.first + period.n_days - chosen.keep_states * plan.layout.shard_days

    def kept(day: date) -> bool:
        first = Period(date(1970, 1, 1), day).n_days
        regular = chosen.state_days is not None and (first - period.first) % chosen.state_days == 0
        return regular or first >= oldest

    return kept


def _require_receipts(context: TileContext, missing: Mapping[str, Sequence[Period]]) -> None:
    left = [f"{name}/{stretch}" for name, stretches in missing.items() for stretch in stretches]
    if left:
        raise JobError(
            describe(
                "tiles of the cube have no receipt",
                where=context.cube.url,
                expected=f"receipts of all {len(missing)} tiles before the cube is finished",
                actual=f"none of {len(left)} stretches of days, such as {left[0]}",
                fix="do not delete receipts while a cube is made; run h2mv-dist infer again",
            )
        )


def compute_tile(context: TileContext, tile: Tile) -> None:
    """Compute and write every output of a tile, over the days that no receipt of it covers."""
    covered = context.ledger.covered(tile.name).get(tile.name, ())
    run = _TileRun(context, tile)
    carried: _Carried | None = None
    for gap in gaps(covered, context.plan.layout.period):
        carried = run.fill(gap, run.carried_to(gap.start, carried))


class _Carried(NamedTuple):
    """What is remembered when a day begins.

    Attributes:
        day: that day.
        state: of all members, stacked.
        references: daily output -> what its anomalies refer to, [member, cell].
    """

    day: date
    state: State
    references: Mapping[str, torch.Tensor]

    def arrays(self, names: Sequence[str]) -> dict[str, Float32Array]:
        """For a snapshot, each [member, cell, ...]."""
        parts = {_STATE + name: part for name, part in zip(names, self.state, strict=True)}
        parts |= {_REFERENCE + name: mean for name, mean in self.references.items()}
        return {name: part.cpu().numpy() for name, part in parts.items()}

    @staticmethod
    def of(
        day: date, arrays: Mapping[str, Float32Array], names: Sequence[str], device: torch.device
    ) -> "_Carried":
        """Inverse of :meth:`arrays`."""
        parts = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        means = {n.removeprefix(_REFERENCE): p for n, p in parts.items() if n.startswith(_REFERENCE)}
        return _Carried(day, tuple(parts[_STATE + name] for name in names), means)


@dataclass(frozen=True, slots=True)
class _Values:
    """Outputs of all members for one block: daily [member, time, cell], static [member, cell].

    Attributes:
        residual: largest gap of the water budget, mm; None for a model without one.
    """

    daily: Mapping[str, Float32Array]
    static: Mapping[str, Float32Array]
    residual: float | None

    def n_missing(self) -> int:
        """Values that are not finite."""
        return sum(int((~np.isfinite(values)).sum()) for values in self.daily.values())


class _TileRun:
    """All members over the same forcing, each with its own state."""

    def __init__(self, context: TileContext, tile: Tile) -> None:
        self.context, self.plan, self.tile = context, context.plan, tile
        self.ensemble = context.ensemble
        self.layout = context.plan.layout
        land = self.plan.source.grid.mask[tile.slices]
        self.static = torch.from_numpy(self.plan.source.read_static(tile)[land])
        self.forcing: TileForcing | None = None

    def carried_to(self, day: date, carried: _Carried | None) -> _Carried:
        """What is remembered when ``day`` begins: carried over or kept, else worked out without writing."""
        if carried is None or carried.day != day:
            carried = self._latest(day)
        if carried.day == day:
            return carried
        state = carried.state
        for _, batch in self.blocks(Period(carried.day, day)):
            state = self.ensemble.run(batch, state, _nothing)
        return carried._replace(day=day, state=state)

    def _latest(self, day: date) -> _Carried:
        usable = [kept for kept in self.context.snapshots.days(self.tile.name) if kept <= day]
        if not usable:
            return self._start()
        arrays = self.context.snapshots.load(self.tile.name, usable[-1])
        return _Carried.of(usable[-1], arrays, self.plan.spec.state, self.ensemble.device)

    def _start(self) -> _Carried:
        """After the spin-up, from empty stores."""
        state = self.ensemble.initial_state(self.static.shape[0])
        for _, batch in self.blocks(self.plan.spinup) if self.plan.spinup is not None else ():
            state = self.ensemble.run(batch, state, _nothing)
        return _Carried(self.layout.period.start, state, self._baseline_means(state))

    def _baseline_means(self, state: State) -> dict[str, torch.Tensor]:
        """Mean of each store whose anomaly is asked for over the baseline, [member, cell].

        Costs one more run up to the baseline's end, and no memory that grows with the period.
        """
        plan, baseline = self.plan, self.plan.baseline
        wanted = {n: s for n, s in plan.spec.anomalies.items() if n in self.layout.daily}
        if not wanted:
            return {}
        shape, device = (len(self.ensemble.models), self.static.shape[0]), self.ensemble.device
        sums = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name in wanted}
        for block, batch in self.blocks(Period(self.layout.period.start, baseline.stop)):
            inside = torch.from_numpy(np.isin(block.days(), baseline.days())).to(device)

            def add(member: int, result: Result, inside: torch.Tensor = inside) -> None:
                for name, store in wanted.items():
                    sums[name][member] += result.daily[store][:, inside].sum(dim=1, dtype=torch.float64)

            state = self.ensemble.run(batch, state, add)
        return {name: (s / baseline.n_days).float() for name, s in sums.items()}

    def blocks(self, period: Period) -> Iterator[tuple[Period, Batch]]:
        """Days of the source, block by block; a pass from where one began before may find them in memory."""
        if self.forcing is None or not self.forcing.begins(period):
            whole = Period(period.start, max(period.stop, self.layout.period.stop))
            self.forcing = TileForcing(self.plan.source, self.tile, whole, self.layout.shard_days)
        forcing = self.forcing.blocks(period.n_days)
        for block in period.blocks(self.layout.shard_days):
            yield block, Batch(torch.from_numpy(next(forcing)), self.static, {})

    def fill(self, gap: Period, carried: _Carried) -> _Carried:
        """Compute and write some days, from what is carried to their first one; returns it after the last."""
        ends = {stretch.stop for stretch in stretches(self.plan, gap)}
        with ThreadPoolExecutor(1, thread_name_prefix="h2mv-write") as writer:
            stretch = _Stretch(self.context, self.tile, gap.start, writer)
            for block, batch in self.blocks(gap):
                state, values = self._outputs(batch, carried)
                carried = carried._replace(day=block.stop, state=state)
                stretch.write(block, batch, values)
                if block.stop in ends:
                    stretch.finish(carried)
                    stretch = _Stretch(self.context, self.tile, block.stop, writer)
        return carried

    def _outputs(self, batch: Batch, carried: _Carried) -> tuple[State, _Values]:
        """Run a block; the state after it, and what goes into the cube."""
        layout, spec = self.layout, self.plan.spec
        members = len(self.ensemble.models)
        daily = {n: np.empty((members, batch.n_days, batch.n_cells), np.float32) for n in layout.daily}
        static = {n: np.empty((members, batch.n_cells), np.float32) for n in layout.static}
        residuals: list[float] = []

        def keep(member: int, result: Result) -> None:
            for name, values in daily.items():
                found = result.daily[spec.anomalies.get(name, name)]
                if name in carried.references:
                    found = found - carried.references[name][member].unsqueeze(1)
                values[member] = found.T.cpu().numpy()
            for name, once in static.items():
                once[member] = result.static[name].cpu().numpy()
            if spec.budget is not None:
                before = tuple(part[member] for part in carried.state)
                residuals.append(_residual(spec, before, result))

        state = self.ensemble.run(batch, carried.state, keep)
        return state, _Values(daily, static, max(residuals, default=None))


class _Stretch:
    """Days of a tile that get one receipt; while a block computes, the one before is written."""

    def __init__(self, context: TileContext, tile: Tile, start: date, writer: ThreadPoolExecutor) -> None:
        self.context, self.tile, self.start, self.writer = context, tile, start, writer
        self.started = time.monotonic()
        self.static, self.blocks, self.forcing = "", list[str](), hashlib.sha256()
        self.missing, self.residual = 0, list[float]()
        self.writing: Future[str] | None = None

    def write(self, block: Period, batch: Batch, values: _Values) -> None:
        """Hand over a block; returns once the one before is written."""
        self._wait()
        if block.start == self.context.plan.layout.period.start:
            self.static = self.context.cube.write_static(self.tile, values.static) if values.static else ""
        self.writing = self.writer.submit(self.context.cube.write, self.tile, block, values.daily)
        self.forcing.update(batch.forcing.numpy().tobytes())
        self.missing += values.n_missing()
        self.residual += [] if values.residual is None else [values.residual]

    def finish(self, carried: _Carried) -> None:
        """Keep the states, then put the receipt."""
        self._wait()
        layout, tile = self.context.plan.layout, self.tile.name
        if _is_whole(layout.period, carried.day, layout.shard_days):
            self.context.snapshots.save(tile, carried.day, carried.arrays(self.context.plan.spec.state))
        receipt = Receipt(
            fingerprint=layout.fingerprint,
            static=self.static,
            blocks=tuple(self.blocks),
            forcing=self.forcing.hexdigest(),
            missing=self.missing,
            residual=max(self.residual, default=None),
            seconds=round(time.monotonic() - self.started, 3),
        )
        self.context.ledger.record(tile, Period(self.start, carried.day), receipt)

    def _wait(self) -> None:
        if self.writing is not None:
            self.blocks.append(self.writing.result())
            self.writing = None


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


def _residual(spec: ModelSpec, before: State, result: Result) -> float:
    budget = spec.budget
    assert budget is not None, "asked for by a model that has one"
    daily = {name: result.daily[name].T.double().cpu().numpy() for name in budget.terms}
    parts = [before[spec.state.index(name)].double().cpu().numpy() for name in budget.states]
    return budget.residual(daily, np.sum(parts, axis=0))


def _nothing(_member: int, _result: Result) -> None:
    """Of a spin-up only the states are kept."""
