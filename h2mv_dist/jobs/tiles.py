"""One tile of global inference, on a worker.

The tile's forcing is streamed in blocks of days. Each member is spun up, then runs block by block with its
state carried over; while a block computes, the one before is written and the next one is read.
"""

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from h2mv_dist.config import StorageOptions, canonical_json
from h2mv_dist.errors import JobError, describe
from h2mv_dist.grid import Period, Tile
from h2mv_dist.io.cube_store import consolidate
from h2mv_dist.io.ledger import FINISH_UNIT, Ledger, Receipt
from h2mv_dist.io.sink import Sink, unit_checksum
from h2mv_dist.io.tile_forcing import TileForcing
from h2mv_dist.jobs.inference import CubePlan, plan_from_message
from h2mv_dist.jobs.tasks import Message, report
from h2mv_dist.model.base import Batch, ProcessModel, Result, State
from h2mv_dist.model.rollout import run_block
from h2mv_dist.spec import Float32Array


@dataclass(frozen=True, slots=True)
class TileContext:
    """What a worker keeps between the tiles of one cube."""

    plan: CubePlan
    models: tuple[ProcessModel, ...]
    cube: Sink
    ledger: Ledger


_contexts: dict[str, TileContext] = {}
"""The context of the cube this worker is busy with; one at most."""


def run_tile_unit(message: Message) -> None:
    """Compute a tile, or finish the cube; the receipt is written last."""
    context = _context(message)
    torch.set_num_threads(context.plan.settings.inference.threads)
    started = time.monotonic()
    if message["task"] == "finish":
        unit, written = FINISH_UNIT, finish_cube(context)
    else:
        tile = Tile(tuple(message["start"]), tuple(message["stop"]))
        unit, written = tile.name, compute_tile(context, tile)
    seconds = round(time.monotonic() - started, 3)
    fingerprint = context.plan.layout.fingerprint
    context.ledger.record(Receipt(unit, fingerprint, written, seconds))
    report(message, event="tile", seconds=seconds)


def _context(message: Message) -> TileContext:
    # not the job's name: a cube that is replaced keeps its name, but not its model
    key = canonical_json([message["cube"], message["provenance"], message["settings"]])
    if key not in _contexts:
        planned = plan_from_message(message)
        options = StorageOptions(message["storage_options"])
        cube = Sink.open(message["cube"], planned.layout, options)
        models = tuple(c.build_model() for c in planned.checkpoints)
        _contexts.clear()
        _contexts[key] = TileContext(planned, models, cube, Ledger(message["cube"], options))
    return _contexts[key]


def finish_cube(context: TileContext) -> str:
    """Write what belongs to no tile, and make the cube whole for readers; returns a checksum.

    Raises:
        JobError: a tile has no receipt.
    """
    layout, source = context.plan.layout, context.plan.source
    _require_receipts(context)
    no_cells = Batch(torch.zeros(0, 1, len(source.forcing)), torch.zeros(0, len(source.static)), {})
    with torch.no_grad():
        results = [model(no_cells, model.initial_state(0)) for model in context.models]
    values = {n: np.stack([r.constants[n].numpy() for r in results]) for n in layout.constants}
    written = [context.cube.write_constants(values)] if values else []
    consolidate(context.cube.url, context.cube.options)
    return unit_checksum(written)


def _require_receipts(context: TileContext) -> None:
    layout = context.plan.layout
    missing = context.ledger.missing([tile.name for tile in layout.tiles], layout.fingerprint)
    if missing:
        raise JobError(
            describe(
                "tiles of the cube have no receipt",
                where=context.cube.url,
                expected=f"receipts of all {len(layout.tiles)} tiles before the cube is finished",
                actual=f"none of {len(missing)} tiles, such as {missing[0]}",
                fix="do not delete receipts while a cube is made; run h2mv-dist infer again",
            )
        )


def compute_tile(context: TileContext, tile: Tile) -> str:
    """Compute and write every output of a tile; returns a checksum of what was written."""
    plan = context.plan
    run = _TileRun(plan, context.models, tile)
    states = run.after(plan.spinup)
    references = run.baseline_means(states)
    checksums: list[str] = []
    with ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
        writing: Future[str] | None = None
        for block, batch in run.blocks(plan.period):
            states, values = run.outputs(batch, states, references)
            if writing is None:
                checksums.append(context.cube.write_static(tile, values.static))
            else:
                checksums.append(writing.result())
            writing = writer.submit(context.cube.write, tile, block, values.daily)
        if writing is not None:
            checksums.append(writing.result())
    return unit_checksum(checksums)


@dataclass(frozen=True, slots=True)
class _Values:
    """Outputs of all members for one block: daily [member, time, cell], static [member, cell]."""

    daily: Mapping[str, Float32Array]
    static: Mapping[str, Float32Array]


class _TileRun:
    """All members over the same forcing, each with its own state."""

    def __init__(self, plan: CubePlan, models: tuple[ProcessModel, ...], tile: Tile) -> None:
        self.plan, self.models = plan, models
        self.forcing = TileForcing(plan.source, tile, plan.period, plan.layout.shard_days)
        land = plan.source.grid.mask[tile.slices]
        self.static = torch.from_numpy(plan.source.read_static(tile)[land])

    def blocks(self, period: Period) -> Iterator[tuple[Period, Batch]]:
        """The first days of the cube's period, block by block."""
        forcing = self.forcing.blocks(period.n_days)
        for block in period.blocks(self.plan.layout.shard_days):
            yield block, Batch(torch.from_numpy(next(forcing)), self.static, {})

    def after(self, spinup: Period | None) -> list[State]:
        """States after the spin-up, from empty stores."""
        states = [m.initial_state(self.static.shape[0]) for m in self.models]
        for _, batch in self.blocks(spinup) if spinup is not None else ():
            states = run_block(self.models, batch, states, _nothing)
        return states

    def baseline_means(self, states: list[State]) -> dict[str, torch.Tensor]:
        """Mean of each store whose anomaly is asked for over the baseline, [member, cell].

        Costs one more run up to the baseline's end, and no memory that grows with the period.
        """
        plan = self.plan
        wanted = {n: s for n, s in plan.spec.anomalies.items() if n in plan.layout.daily}
        if not wanted:
            return {}
        shape = (len(self.models), self.static.shape[0])
        sums = {name: torch.zeros(shape, dtype=torch.float64) for name in wanted}
        for block, batch in self.blocks(Period(plan.period.start, plan.baseline.stop)):
            inside = torch.from_numpy(np.isin(block.days(), plan.baseline.days()))

            def add(member: int, result: Result, inside: torch.Tensor = inside) -> None:
                for name, store in wanted.items():
                    sums[name][member] += result.daily[store][:, inside].sum(dim=1, dtype=torch.float64)

            states = run_block(self.models, batch, states, add)
        return {name: (s / plan.baseline.n_days).float() for name, s in sums.items()}

    def outputs(
        self, batch: Batch, states: list[State], references: Mapping[str, torch.Tensor]
    ) -> tuple[list[State], _Values]:
        """Run a block; the states after it, and what goes into the cube."""
        layout, anomalies = self.plan.layout, self.plan.spec.anomalies
        members = len(self.models)
        daily = {n: np.empty((members, batch.n_days, batch.n_cells), np.float32) for n in layout.daily}
        static = {n: np.empty((members, batch.n_cells), np.float32) for n in layout.static}

        def keep(member: int, result: Result) -> None:
            for name, values in daily.items():
                found = result.daily[anomalies.get(name, name)]
                if name in references:
                    found = found - references[name][member].unsqueeze(1)
                values[member] = found.T.numpy()
            for name, once in static.items():
                once[member] = result.static[name].numpy()

        return run_block(self.models, batch, states, keep), _Values(daily, static)


def _nothing(_member: int, _result: Result) -> None:
    """Of a spin-up only the states are kept."""
