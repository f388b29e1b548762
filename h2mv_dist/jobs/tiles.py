"""One tile of global inference, on a worker.

The tile's forcing is streamed in blocks of days. Each member is spun up, then runs block by block with its
state carried over; while a block computes, the one before is written and the next one is read.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from h2mv_dist.config import StorageOptions, canonical_json
from h2mv_dist.grid import Period, Tile
from h2mv_dist.io import sink
from h2mv_dist.io.ledger import Ledger, Receipt
from h2mv_dist.io.source import Source
from h2mv_dist.jobs.inference import FINISH_UNIT, CubePlan, plan_from_message
from h2mv_dist.jobs.tasks import Message, report
from h2mv_dist.model.base import Batch, ProcessModel, Result, State
from h2mv_dist.model.checkpoint import checksum

KEPT_BYTES: Final = 256 * 2**20
"""A tile whose whole forcing is smaller than this is read once, however often it is run."""

Float32Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TileContext:
    """What a worker keeps between the tiles of one cube."""

    plan: CubePlan
    models: tuple[ProcessModel, ...]
    cube: sink.Sink
    ledger: Ledger


_contexts: dict[str, TileContext] = {}
"""The context of the cube this worker is busy with; one at most."""


def run_tile_unit(message: Message) -> None:
    """Compute a tile, or finish the cube; the receipt is written last."""
    context = _context(message)
    torch.set_num_threads(context.plan.settings.inference.threads)
    started = time.monotonic()
    if message["task"] == "finish":
        unit, written = FINISH_UNIT, _finish(context)
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
        cube = sink.Sink.open(message["cube"], planned.layout, options)
        models = tuple(c.build_model() for c in planned.checkpoints)
        _contexts.clear()
        _contexts[key] = TileContext(planned, models, cube, Ledger(message["cube"], options))
    return _contexts[key]


def _finish(context: TileContext) -> str:
    layout, source = context.plan.layout, context.plan.source
    no_cells = Batch(torch.zeros(0, 1, len(source.forcing)), torch.zeros(0, len(source.static)), {})
    with torch.no_grad():
        results = [model(no_cells, model.initial_state(0)) for model in context.models]
    values = {n: np.stack([r.constants[n].numpy() for r in results]) for n in layout.constants}
    written = context.cube.write_constants(values) if values else ""
    sink.consolidate(context.cube.url, context.cube.options)
    return checksum(written.encode())


def compute_tile(context: TileContext, tile: Tile) -> str:
    """Compute and write every output of a tile; returns a checksum of what was written."""
    plan = context.plan
    land = plan.source.grid.mask[tile.slices]
    forcing = TileForcing(plan.source, tile, land, plan.period, plan.layout.shard_days)
    run = _TileRun(context.models, forcing, torch.from_numpy(plan.source.read_static(tile)[land]))
    states = run.after(plan.spinup)
    references = run.baseline_means(states, plan)
    checksums: list[str] = []
    with ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
        writing: Future[str] | None = None
        for block, results in run.blocks(plan.period, states):
            values = _daily_values(plan, results, references)
            if writing is None:
                checksums.append(context.cube.write_static(tile, _static_values(plan, results)))
            else:
                checksums.append(writing.result())
            writing = writer.submit(context.cube.write, tile, block, values)
        if writing is not None:
            checksums.append(writing.result())
    return checksum("".join(checksums).encode())


def _daily_values(
    plan: CubePlan, results: Sequence[Result], references: Mapping[str, torch.Tensor]
) -> dict[str, Float32Array]:
    """Daily outputs of a block, each [member, time, cell]."""
    values = {}
    for name in plan.layout.daily:
        source = plan.spec.anomalies.get(name, name)
        members = torch.stack([r.daily[source] for r in results]).transpose(1, 2)
        if name in references:
            members = members - references[name].unsqueeze(1)
        values[name] = np.ascontiguousarray(members.numpy())
    return values


def _static_values(plan: CubePlan, results: Sequence[Result]) -> dict[str, Float32Array]:
    """Static outputs, each [member, cell]."""
    return {n: torch.stack([r.static[n] for r in results]).numpy() for n in plan.layout.static}


class TileForcing:
    """Packed forcing of a tile's land cells, in blocks of days."""

    def __init__(
        self, source: Source, tile: Tile, land: NDArray[np.bool_], period: Period, block_days: int
    ) -> None:
        self.source, self.tile, self.land = source, tile, land
        self.period, self.block_days = period, block_days
        size = int(land.sum()) * period.n_days * len(source.forcing) * np.dtype(np.float32).itemsize
        self.kept = self._read(period) if size <= KEPT_BYTES else None

    def blocks(self, period: Period) -> Iterator[tuple[Period, torch.Tensor]]:
        """Consecutive blocks, each [cell, time, var]; the next one is read while this one is used."""
        with ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
            ahead: list[tuple[Period, Future[Float32Array]]] = []
            for block in period.blocks(self.block_days):
                ahead.append((block, reader.submit(self._block, block)))
                if len(ahead) > 1:
                    yield _ready(*ahead.pop(0))
            for waiting in ahead:
                yield _ready(*waiting)

    def _block(self, block: Period) -> Float32Array:
        if self.kept is None:
            return self._read(block)
        first = block.first - self.period.first
        return self.kept[:, first : first + block.n_days]

    def _read(self, period: Period) -> Float32Array:
        values = self.source.read_forcing(self.tile, period)
        return np.ascontiguousarray(values[:, self.land].swapaxes(0, 1))


def _ready(block: Period, values: Future[Float32Array]) -> tuple[Period, torch.Tensor]:
    return block, torch.from_numpy(values.result())


class _TileRun:
    """All members over the same forcing, each with its own state."""

    def __init__(self, models: tuple[ProcessModel, ...], forcing: TileForcing, static: torch.Tensor) -> None:
        self.models, self.forcing, self.static = models, forcing, static

    @torch.no_grad()
    def blocks(self, period: Period, states: list[State]) -> Iterator[tuple[Period, list[Result]]]:
        """Results of all members, block by block."""
        for block, values in self.forcing.blocks(period):
            batch = Batch(values, self.static, {})
            results = [m(batch, s) for m, s in zip(self.models, states, strict=True)]
            states = [r.state for r in results]
            yield block, results

    def after(self, spinup: Period | None) -> list[State]:
        """States after the spin-up, from empty stores."""
        states = [m.initial_state(self.static.shape[0]) for m in self.models]
        for _, results in self.blocks(spinup, states) if spinup is not None else ():
            states = [r.state for r in results]
        return states

    def baseline_means(self, states: list[State], plan: CubePlan) -> dict[str, torch.Tensor]:
        """Mean of each store whose anomaly is asked for over the baseline, [member, cell].

        Costs one more run up to the baseline's end, and no memory that grows with the period.
        """
        wanted = {n: s for n, s in plan.spec.anomalies.items() if n in plan.layout.daily}
        if not wanted:
            return {}
        shape = (len(self.models), self.static.shape[0])
        sums = {name: torch.zeros(shape, dtype=torch.float64) for name in wanted}
        for block, results in self.blocks(Period(plan.period.start, plan.baseline.stop), states):
            inside = torch.from_numpy(np.isin(block.days(), plan.baseline.days()))
            for name, store in wanted.items():
                days = torch.stack([r.daily[store] for r in results])[:, :, inside]
                sums[name] += days.sum(dim=2, dtype=torch.float64)
        return {name: (s / plan.baseline.n_days).float() for name, s in sums.items()}
