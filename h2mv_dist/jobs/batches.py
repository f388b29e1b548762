"""From staged cells (numpy) to a Batch (torch): where io and model meet."""

import numpy as np
import torch
from numpy.typing import NDArray

from h2mv_dist.io.cache import StagedCells
from h2mv_dist.io.folds import Fold
from h2mv_dist.io.source import StepAxis
from h2mv_dist.model.base import Batch, Steps, Target, steps_between


def gather(staged: StagedCells, fold: Fold, role: str, cells: NDArray[np.int64]) -> Batch:
    """The given cells over all days; targets that do not have this role are NaN, so they carry no weight.

    Args:
        staged: every land cell.
        fold: says which cells and periods have which role.
        role: "train", "validation" or "test".
        cells: positions among the land cells, [cell].
    """
    targets = {}
    for name, series in staged.targets.items():
        counted = fold.observed(role, cells, series.axis)
        values = np.where(counted, series.values[cells], np.float32(np.nan))
        targets[name] = Target(torch.from_numpy(values), model_steps(series.axis, staged.period.first))
    return Batch(
        torch.from_numpy(np.asarray(staged.forcing[cells])),
        torch.from_numpy(np.asarray(staged.static[cells])),
        targets,
    )


def model_steps(axis: StepAxis, first_day: int) -> Steps:
    """Positions of a target's steps among days that start at ``first_day`` (days since 1970-01-01)."""
    first, stop = axis.ranges()
    return steps_between(torch.from_numpy(first - first_day), torch.from_numpy(stop - first_day))
