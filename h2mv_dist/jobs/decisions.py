"""What is decided for a fold before its first step, and kept by every attempt that continues it."""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from h2mv_dist.config import Settings
from h2mv_dist.errors import JobError, describe
from h2mv_dist.io.cache import StagedCells
from h2mv_dist.jobs.code_path import EAGER, chosen_path
from h2mv_dist.jobs.preflight import Facts, must_recompute, require_step_memory
from h2mv_dist.jobs.probe import WORTH_TRYING, Measure, fastest, rates_or_none, threads_to_try
from h2mv_dist.jobs.records import FoldRecord

PASSES: Final = 4
"""Spin-up, run, and two for going backward."""


class Way(NamedTuple):
    """How a rank runs its model.

    Attributes:
        compiled: as compiled code.
        recompute: blocks of days once more when going backward.
    """

    compiled: bool
    recompute: bool


class Work(NamedTuple):
    """What there is to do.

    Attributes:
        n_days: of the data.
        cell_days: that a rank simulates at least, unless the loss stops being finite; backward counts twice.
    """

    n_days: int
    cell_days: float


def work_of(settings: Settings, staged: StagedCells, world: int) -> Work:
    """The work of a fold."""
    training, n_days = settings.training, staged.period.n_days
    epochs = min(training.epochs, training.patience + 1)
    return Work(n_days, epochs * len(staged.forcing) * n_days * PASSES / world)


class Begun(NamedTuple):
    """The fold, and where it is trained."""

    record: FoldRecord
    ranks: int
    device: str


def decided(
    begun: Begun,
    settings: Settings,
    work: Work,
    nthreads: int,
    everyone: Sequence[Facts],
    measure: Measure,
) -> dict[str, Any]:
    """What defaults stand for here; written before the first step, and read back by every later attempt.

    Args:
        begun: the fold.
        settings: of the job.
        work: that there is to do.
        nthreads: of rank 0's worker.
        everyone: facts of all ranks.
        measure: cell-days a second with each of some numbers of threads; called where there is a choice.

    Raises:
        ConfigError: compiled code is asked for where there is no compiler.
        JobError: the fold was begun in a way that is not possible here, so numbers would differ.
        RankError: a step does not fit into a rank's memory now.
    """
    ours = {"ranks": begun.ranks, "device": begun.device}
    obstacle = next(filter(None, (facts["no_compiler"] for facts in everyone)), "")
    found = begun.record.decisions()
    if found is None:
        training = settings.training
        path = chosen_path(training.code_path, begun.device, work.cell_days, obstacle, "training.code_path")
        recompute = must_recompute(settings, work.n_days, path, everyone)
        tried = threads_to_try(nthreads, everyone) if _may_try(training.threads, begun, path, work) else ()
        rates = rates_or_none(measure, tried, recompute)
        threads = training.threads or (fastest(rates) if rates else nthreads)
        choices = {"threads": threads, "code_path": path, "recompute": recompute}
        measured = {"cell_days_a_second": rates} if rates else {}
        found = begun.record.settle({**ours, **choices, **measured, "facts": list(everyone)})
    here = {**ours, "code_path": EAGER if obstacle else found["code_path"]}
    theirs = {key: found[key] for key in here}
    if theirs != here:
        raise JobError(
            describe(
                "the fold was begun in another way",
                where=begun.record.url,
                expected=str(theirs),
                actual=f"{here}" + (f" ({obstacle})" if obstacle else ""),
                fix="resume it where it was begun, or choose another job folder",
            )
        )
    # the numbers are the same; folds begun before there was a choice have none
    chosen = settings.training.recompute
    recompute = bool(found.get("recompute", False)) if chosen is None else chosen
    require_step_memory(settings, work.n_days, found["code_path"], recompute, everyone)
    return {key: found[key] for key in (*here, "threads")} | {"recompute": recompute}


def _may_try(wanted: int | None, begun: Begun, path: str, work: Work) -> bool:
    """Whether threads are tried out; compiled code would have to be compiled anew for each number of them."""
    return wanted is None and begun.device == "cpu" and path == EAGER and work.cell_days >= WORTH_TRYING
