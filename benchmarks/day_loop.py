"""The day loop against the machine's own matrix product.

The limit is the recurrent product of a day, [256, 104] x [104, 400], at the rate ``torch.mm`` reaches in
the same run. Inference needs it once for spin-up and once for the run; training once more for each of the two
products of the backward pass.
"""

import statistics
import time
from collections.abc import Callable

import torch

from h2mv_dist.model.base import Batch
from h2mv_dist.model.h2mv import H2MV
from h2mv_dist.model.rollout import spin_up
from h2mv_dist.spec import Moments, Scaler

CELLS, DAYS, REPEATS = 256, 365, 5
STATES, GATES = 104, 400


def main() -> None:
    torch.set_num_threads(torch.get_num_threads())
    model, batch = H2MV(_scaler()), _batch()
    limit = _best(lambda: _products(DAYS))
    rows = []
    for name, work, passes in (
        ("inference (spin-up + run)", lambda: _infer(model, batch), 2),
        ("training (spin-up + run + backward)", lambda: _train(model, batch), 4),
    ):
        seconds = statistics.median(_seconds(work) for _ in range(REPEATS))
        rows.append((name, CELLS * DAYS / seconds, passes * limit / seconds))
    print(f"batch {CELLS}, {DAYS} days, {torch.get_num_threads()} threads\n")
    print("| day loop | cell-days a second | share of the GEMM limit |\n|---|---|---|")
    for name, rate, share in rows:
        print(f"| {name} | {rate:,.0f} | {share:.1%} |")


def _infer(model: H2MV, batch: Batch) -> None:
    with torch.no_grad():
        model(batch, spin_up(model, batch, None))


def _train(model: H2MV, batch: Batch) -> None:
    model.zero_grad()
    daily = model(batch, spin_up(model, batch, None)).daily
    total = daily["runoff"].mean() + daily["terrestrial_water_storage"].mean()
    torch.autograd.backward(total)


def _products(n: int) -> None:
    left, right = torch.ones(CELLS, STATES), torch.ones(STATES, GATES)
    for _ in range(n):
        torch.mm(left, right)


def _seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _best(work: Callable[[], None]) -> float:
    work()
    return min(_seconds(work) for _ in range(REPEATS))


def _scaler() -> Scaler:
    forcing = Moments((50.0, 3.0, 280.0), (50.0, 5.0, 15.0))
    return Scaler(forcing, Moments((0.0,) * 30, (1.0,) * 30), {})


def _batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    weather = torch.randn(CELLS, DAYS, 3, generator=generator)
    forcing = weather * torch.tensor([50.0, 5.0, 10.0]) + torch.tensor([60.0, 0.0, 278.0])
    forcing[:, :, 1].clamp_(min=0.0)
    return Batch(forcing, torch.randn(CELLS, 30, generator=generator), {})


if __name__ == "__main__":
    main()
