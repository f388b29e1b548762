"""What is decided for a fold before its first step, and kept by every attempt that continues it."""

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from h2mv_dist.config import Settings, TrainingSettings
from h2mv_dist.errors import JobError, describe
from h2mv_dist.jobs.code_path import COMPILED, EAGER, Way, chosen_path
from h2mv_dist.jobs.preflight import Facts, must_recompute, require_step_memory
from h2mv_dist.jobs.probe import WORTH_TRYING, Measure, fastest, rates_or_none, threads_to_try
from h2mv_dist.jobs.records import FoldRecord

PASSES: Final = 4
"""Spin-up, run, and two for going backward."""
FEWEST_CELLS: Final = 128
"""A day as written takes as long with fewer cells as with so many."""


class Work(NamedTuple):
    """What there is to do.

    Attributes:
        n_cells: that are trained on.
        n_days: of the data.
        cell_days: that a rank simulates at least, unless the loss stops being finite; backward counts twice,
            and a batch of few cells as one of ``FEWEST_CELLS``.
    """

    n_cells: int
    n_days: int
    cell_days: float


def work_of(training: TrainingSettings, n_cells: int, n_days: int, world: int) -> Work:
    """The work of a fold of so many cells and days, for each of ``world`` ranks.

    >>> work_of(TrainingSettings(epochs=10, batch_size=256), 512, 365, 1).cell_days == 10 * 512 * 365 * 4
    True
    >>> work_of(TrainingSettings(epochs=10, batch_size=256), 2, 365, 1).cell_days == 10 * 128 * 365 * 4
    True
    """
    epochs = min(training.epochs, training.patience + 1)
    cells = max(n_cells / world, math.ceil(n_cells / training.batch_size) * FEWEST_CELLS)
    return Work(n_cells, n_days, epochs * cells * n_days * PASSES)


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
        measure: called where there is a choice.

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
        way = Way(path == COMPILED, must_recompute(settings, work.n_cells, work.n_days, path, everyone))
        # first of all: what does not fit here may be begun elsewhere, with nothing decided yet
        require_step_memory(settings, work.n_cells, work.n_days, way, everyone)
        tried = threads_to_try(nthreads, everyone) if _may_try(training.threads, begun, path, work) else ()
        rates = rates_or_none(measure, tried, way)
        threads = training.threads or (fastest(rates) if rates else nthreads)
        choices = {"threads": threads, "code_path": path, "recompute": way.recompute}
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
    path, recompute = found["code_path"], settings.training.recompute
    if recompute is None:
        # the numbers are the same, so it may be begun at any time; early folds do not say whether it was
        stored = bool(found.get("recompute", False))
        recompute = stored or must_recompute(settings, work.n_cells, work.n_days, path, everyone)
    way = Way(path == COMPILED, recompute)
    require_step_memory(settings, work.n_cells, work.n_days, way, everyone)
    return {key: found[key] for key in (*here, "threads")} | {"recompute": recompute}


def _may_try(wanted: int | None, begun: Begun, path: str, work: Work) -> bool:
    """Whether threads are tried out."""
    return wanted is None and begun.device == "cpu" and work.cell_days >= WORTH_TRYING[path]
