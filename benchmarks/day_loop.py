"""The day loop: compiled, as written, and the frozen baseline, against the machine's own matrix product.

The limit is the recurrent product of a day, [256, 104] x [104, 400], at the best rate ``torch.mm`` reaches in
the same run. Inference needs it once for spin-up and once for the run; training once more for each of the two
products of going backward. Each way has a process of its own: the baseline's is as PyTorch leaves it, the
others keep freed memory, as workers and ranks do. All take turns; medians.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.connection import Connection
from typing import Final

import torch

from benchmarks import frozen
from h2mv_dist.jobs.memory import keep_freed_memory
from h2mv_dist.model.base import Batch
from h2mv_dist.model.days import no_compiler_because
from h2mv_dist.model.h2mv import H2MV
from h2mv_dist.model.rollout import spin_up, warm_up
from h2mv_dist.spec import Moments, Scaler

CELLS: Final = 256
DAYS: Final = 365
REPEATS: Final = 7
STATES, GATES = 104, 400
KEPT: Final = frozenset(frozen.OUTPUTS)
PASSES: Final = {"inference": 2, "training": 4}
Work = Callable[[], object]


def main() -> None:
    """Print a table for one process with all threads, then how cost grows with cells and days."""
    ways = ["baseline", "as written", *([] if no_compiler_because() else ["compiled"])]
    started = time.perf_counter()
    processes = {way: _Process(way) for way in ways}
    print(
        f"batch {CELLS}, {DAYS} days, {torch.get_num_threads()} threads; "
        f"compiled (or found on disk) in {time.perf_counter() - started:.0f} s\n"
    )
    print(
        "| day loop | way | cell-days a second | of the baseline | of the GEMM limit |\n|---|---|---|---|---|"
    )
    for work, passes in PASSES.items():
        runs: dict[str, Work] = {way: partial(process.run, work) for way, process in processes.items()}
        times = medians(runs | {"limit": partial(processes[ways[-1]].run, "limit")})
        for way in ways:
            rate, share = CELLS * DAYS / times[way], passes * times["limit"] / times[way]
            print(f"| {work} | {way} | {rate:,.0f} | {times['baseline'] / times[way]:.2f} | {share:.1%} |")
    for process in processes.values():
        process.end()
    if "compiled" in ways:
        _growth()


def _growth() -> None:
    """How long compiled inference takes for other numbers of cells and days."""
    keep_freed_memory()
    model = sample_model(compiled=True)
    warm_up(model, KEPT)
    print("\n| compiled inference | microseconds a cell-day |\n|---|---|")
    for cells, days in ((128, 365), (256, 365), (512, 365), (256, 730), (256, 1460)):
        taken = medians({"run": partial(infer, model, sample_batch(cells, days))})["run"]
        print(f"| {cells} cells, {days} days | {1e6 * taken / cells / days:.2f} |")


class _Process:
    """A process that waits for work of one way."""

    def __init__(self, way: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(way, theirs))
        self.process.start()
        self.pipe.recv()

    def run(self, work: str) -> None:
        """Have it done."""
        self.pipe.send(work)
        self.pipe.recv()

    def end(self) -> None:
        """Let the process end."""
        self.pipe.send("")
        self.process.join()


def _serve(way: str, pipe: Connection) -> None:
    if way != "baseline":
        keep_freed_memory()
    model, batch = sample_model(compiled=way == "compiled", width=CELLS), sample_batch(CELLS, DAYS)
    if model.compiled:
        warm_up(model, KEPT, gradient=True)
    run, go_back = (infer_frozen, train_frozen) if way == "baseline" else (infer, train)
    works: dict[str, Work] = {"limit": products}
    works |= {"inference": partial(run, model, batch), "training": partial(go_back, model, batch)}
    pipe.send("ready")
    while work := pipe.recv():
        works[work]()
        pipe.send("done")


def infer(model: H2MV, batch: Batch) -> None:
    """Spin-up and run."""
    with torch.no_grad():
        model(batch, spin_up(model, batch, None, KEPT), KEPT)


def train(model: H2MV, batch: Batch) -> None:
    """Spin-up, run, and backward."""
    model.zero_grad()
    daily = model(batch, spin_up(model, batch, None, KEPT), KEPT).daily
    torch.autograd.backward(sum_of(daily))


def infer_frozen(model: H2MV, batch: Batch) -> None:
    """As :func:`infer`."""
    with torch.no_grad():
        _, state = frozen.run(model, batch, frozen.empty_state(model, batch.n_cells))
        frozen.run(model, batch, state)


def train_frozen(model: H2MV, batch: Batch) -> None:
    """As :func:`train`."""
    model.zero_grad()
    with torch.no_grad():
        _, state = frozen.run(model, batch, frozen.empty_state(model, batch.n_cells))
    torch.autograd.backward(sum_of(frozen.run(model, batch, state)[0]))


def sum_of(daily: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A loss that needs every output."""
    return torch.stack([daily[name].mean() for name in frozen.OUTPUTS]).sum()


def products(n_days: int = DAYS) -> None:
    """The limit: one recurrent product for each day."""
    left, right = torch.ones(CELLS, STATES), torch.ones(STATES, GATES)
    for _ in range(n_days):
        torch.mm(left, right)


def medians(ways: Mapping[str, Work]) -> dict[str, float]:
    """Seconds of each; they take turns, after one round that does not count. Of ``limit`` the best counts."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(REPEATS + 1):
        for name, work in ways.items():
            started = time.perf_counter()
            work()
            if repeat:
                times[name].append(time.perf_counter() - started)
    return {name: min(t) if name == "limit" else statistics.median(t) for name, t in times.items()}


def sample_model(*, compiled: bool = False, width: int | None = None) -> H2MV:
    """A model of the published sizes that nobody trained."""
    torch.manual_seed(0)
    forcing = Moments((50.0, 3.0, 280.0), (50.0, 5.0, 15.0))
    model = H2MV(Scaler(forcing, Moments((0.0,) * 30, (1.0,) * 30), {}))
    model.compiled, model.width = compiled, width
    return model


def sample_batch(n_cells: int, n_days: int) -> Batch:
    """Weather of some kind."""
    generator = torch.Generator().manual_seed(0)
    weather = torch.randn(n_cells, n_days, 3, generator=generator)
    forcing = weather * torch.tensor([50.0, 5.0, 10.0]) + torch.tensor([60.0, 0.0, 278.0])
    forcing[:, :, 1].clamp_(min=0.0)
    return Batch(forcing, torch.randn(n_cells, 30, generator=generator), {})


if __name__ == "__main__":
    main()
