"""The day loop: compiled, as written, and the frozen baseline, against the machine's own matrix product.

The limit is the recurrent product of a day, [256, 104] x [104, 400], at the best rate ``torch.mm`` reaches in
the same run. Inference needs it once for spin-up and once for the run; training once more for each of the two
products of going backward. All ways take turns; medians.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, TypeVar

import torch

from benchmarks import frozen
from h2mv_dist.jobs.memory import RANK_BYTES, keep_freed_memory
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
SIZES: Final = ((128, 365), (256, 365), (512, 365), (256, 730), (256, 1460))
"""Cells and days whose cost must grow as they do."""
PASSES: Final = {"inference": 2, "training": 4}
Work = Callable[[], object]
_Key = TypeVar("_Key")


def main() -> None:
    """Print a table for one process with all threads, then how cost grows with cells and days."""
    # as ranks do
    keep_freed_memory(RANK_BYTES)
    model, batch = sample_model(), sample_batch(CELLS, DAYS)
    compiled = sample_model(compiled=not no_compiler_because(), width=CELLS)
    seconds = time.perf_counter()
    if compiled.compiled:
        warm_up(compiled, KEPT, gradient=True)
    print(
        f"batch {CELLS}, {DAYS} days, {torch.get_num_threads()} threads; "
        f"compiled (or found on disk) in {time.perf_counter() - seconds:.0f} s\n"
    )
    print(
        "| day loop | way | cell-days a second | of the baseline | of the GEMM limit |\n|---|---|---|---|---|"
    )
    for name, run, baseline in (("inference", infer, infer_frozen), ("training", train, train_frozen)):
        ways: dict[str, Work] = {
            "baseline": partial(baseline, model, batch),
            "as written": partial(run, model, batch),
            "compiled": partial(run, compiled, batch),
            "limit": products,
        }
        times = medians(ways)
        for way in ("baseline", "as written", *(["compiled"] if compiled.compiled else [])):
            rate = CELLS * DAYS / times[way]
            share = PASSES[name] * times["limit"] / times[way]
            print(f"| {name} | {way} | {rate:,.0f} | {times['baseline'] / times[way]:.2f} | {share:.1%} |")
    if not compiled.compiled:
        return
    print("\n| compiled | microseconds a cell-day |\n|---|---|")
    costs = [
        *(("inference", infer, cells, days) for cells, days in SIZES),
        *(("training", train, CELLS, days) for cells, days in SIZES if cells == CELLS),
    ]
    taken = medians(
        {
            (work, cells, days): partial(run, compiled, sample_batch(cells, days))
            for work, run, cells, days in costs
        }
    )
    for (work, cells, days), seconds in taken.items():
        print(f"| {work}, {cells} cells, {days} days | {1e6 * seconds / cells / days:.2f} |")


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


def medians(ways: Mapping[_Key, Work]) -> dict[_Key, float]:
    """Seconds of each; they take turns, after one round that does not count. Of ``limit`` the best counts."""
    times: dict[_Key, list[float]] = {name: [] for name in ways}
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
