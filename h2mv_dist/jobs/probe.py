"""How many threads a rank runs best with, tried out before the first step."""

import logging
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Final

import torch

from h2mv_dist.config import Settings
from h2mv_dist.io.cache import StagedCells
from h2mv_dist.io.folds import Fold
from h2mv_dist.jobs.batches import gather
from h2mv_dist.jobs.code_path import COMPILED, EAGER, Way
from h2mv_dist.jobs.preflight import Facts, ranks_of_host
from h2mv_dist.model.base import Batch, ProcessModel
from h2mv_dist.model.checkpoint import new_model
from h2mv_dist.model.days import BLOCK_DAYS
from h2mv_dist.model.networks import multiply_in
from h2mv_dist.model.registry import model_kind
from h2mv_dist.model.rollout import spin_up
from h2mv_dist.spec import Scaler

WORTH_TRYING: Final[Mapping[str, float]] = MappingProxyType({EAGER: 5e6, COMPILED: 1e10})
"""Code path -> from so many simulated cell-days of a rank on it pays: a few seconds as written, but compiled
code is made for a number of threads, which takes about two minutes for each of them."""
DAYS: Final = 2 * BLOCK_DAYS
ROUNDS: Final = 3
LIMIT_SECONDS: Final[Mapping[str, float]] = MappingProxyType({EAGER: 5.0, COMPILED: 1800.0})
MARGIN: Final = 0.1
"""How much faster each further thread must make a step: others could use it."""

Measure = Callable[[Sequence[int], Way], Mapping[int, float]]
"""(numbers of threads, how the model runs) -> cell-days a second with each of them."""

_log: Final = logging.getLogger(__name__)


def threads_to_try(nthreads: int, everyone: Sequence[Facts]) -> tuple[int, ...]:
    """Numbers of threads that every rank can have at once; none where there is nothing to choose.

    Args:
        nthreads: of the worker; no more than these are its own.
        everyone: facts of all ranks.

    >>> threads_to_try(6, [{"host": "a", "cores": 16}, {"host": "a", "cores": 16}])
    (1, 2, 4, 6)
    >>> threads_to_try(6, [{"host": "a", "cores": 2}, {"host": "a", "cores": 2}])
    ()
    """
    most = min(nthreads, *(int(facts["cores"]) // ranks_of_host(facts, everyone) for facts in everyone))
    powers = [2**i for i in range(max(most, 1).bit_length())]
    return tuple(sorted({*powers, most})) if most > 1 else ()


def fastest(rates: Mapping[int, float]) -> int:
    """The number of threads that gives the highest rate; each thread more must be worth it.

    >>> fastest({1: 100.0, 2: 109.0, 4: 200.0})
    4
    >>> fastest({1: 100.0, 2: 150.0, 4: 170.0})
    2
    """
    chosen = min(rates)
    for threads in sorted(rates):
        if rates[threads] > rates[chosen] * (1 + MARGIN * (threads - chosen)):
            chosen = threads
    return chosen


def rates_or_none(measure: Measure, threads: Sequence[int], way: Way) -> dict[int, float]:
    """What was measured; nothing if there was nothing to measure, or it did not work or took too long."""
    try:
        return dict(measure(threads, way)) if threads else {}
    except Exception as error:  # whatever it is, the fold can do without
        _log.warning("threads were not tried out, ranks use those of the worker: %s", error)
        return {}


def cell_days_a_second(
    settings: Settings,
    staged: StagedCells,
    fold: Fold,
    scaler: Scaler,
    threads: Sequence[int],
    way: Way,
) -> dict[int, float]:
    """Try numbers of threads on a few days of a rank's share of a batch.

    Raises:
        TimeoutError: it takes too long.
    """
    training = settings.training
    share = -(-training.batch_size // training.ranks)
    cells = fold.cells("train")[: min(share, training.cells_at_once or share)]
    model = new_model(settings.model, scaler)
    multiply_in(model, training.precision)
    model.compiled, model.recompute, model.width = *way, len(cells)
    reads = model_kind(settings.model.name).loss(scaler).reads
    return measured(model, gather(staged, fold, "train", cells).days(0, DAYS), reads, threads)


def measured(
    model: ProcessModel, batch: Batch, reads: Collection[str], threads: Sequence[int]
) -> dict[int, float]:
    """Cell-days a second, forward and backward, with each number of threads; medians of rounds in turn.

    Raises:
        TimeoutError: it takes too long.
    """
    limit, before = LIMIT_SECONDS[COMPILED if model.compiled else EAGER], torch.get_num_threads()
    deadline = time.monotonic() + limit
    taken: dict[int, list[float]] = {number: [] for number in threads}
    try:
        for _ in range(1 + ROUNDS):
            for number, seconds in taken.items():
                torch.set_num_threads(number)
                seconds.append(_step_seconds(model, batch, reads))
                if time.monotonic() > deadline:
                    raise TimeoutError(f"it takes longer than {limit:g} s")
    finally:
        torch.set_num_threads(before)
    cell_days = batch.n_cells * batch.n_days
    # the first round warms up
    return {number: cell_days / statistics.median(seconds[1:]) for number, seconds in taken.items()}


def _step_seconds(model: ProcessModel, batch: Batch, reads: Collection[str]) -> float:
    started = time.perf_counter()
    outputs = model(batch, spin_up(model, batch, 0, reads), reads).only(reads).outputs()
    torch.autograd.backward([output.sum() for output in outputs if output.requires_grad])
    return time.perf_counter() - started
