"""Loss terms, formed from statistics that add up over cells, batches and ranks.

A term turns predictions into a few sums (``statistics``); once these are summed over everything that
counts, ``value`` forms the term. So ragged batches, any number of ranks and unequal numbers of
observations give the same loss. Entries without observation carry no weight and no gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

import torch
from torch import Tensor

from h2mv_dist.model.base import Batch, Result

SATURATION: Final = 100.0
"""SWE beyond which the satellite product says only "a lot", mm."""


class LossTerm(Protocol):
    """One summand of a loss."""

    @property
    def name(self) -> str:
        """Name in records and plots."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Outputs that the statistics are made of; no other one is kept when a batch is run in pieces."""

    def statistics(self, result: Result, batch: Batch) -> Tensor:
        """Sums that are additive over cells, [2]."""

    def value(self, statistics: Tensor) -> Tensor:
        """The term, from sums over all cells; a scalar."""


def cell_mean_error(error: Tensor, observed: Tensor) -> Tensor:
    """Sum over cells of each cell's mean squared error, and the number of cells that have any, [2].

    Args:
        error: scaled prediction minus observation, [cell, step]; anything where not observed.
        observed: [cell, step], bool.

    >>> error = torch.tensor([[1.0, 3.0], [2.0, float("nan")], [float("nan")] * 2])
    >>> cell_mean_error(error, ~error.isnan())
    tensor([9., 2.])
    """
    count = observed.sum(dim=1)
    squared = torch.where(observed, error, 0.0).square().sum(dim=1) / count.clamp(min=1)
    return torch.stack([squared.sum(), (count > 0).sum().to(squared.dtype)])


def _known(values: Tensor, observed: Tensor) -> Tensor:
    """Values with a harmless number where there is none, so that gradients stay finite."""
    return torch.where(observed, values, 0.0)


class _MeanOverCells:
    """Terms that are a sum over cells divided by a number of cells."""

    def value(self, statistics: Tensor) -> Tensor:
        """Mean over the cells that have observations; 0 if there is none."""
        return statistics[0] / statistics[1].clamp(min=1.0)


@dataclass(frozen=True, slots=True)
class StepError(_MeanOverCells):
    """Squared error of an output averaged over the target's steps.

    Attributes:
        name: of the term.
        variable: output and target.
        std: what errors are divided by, in the variable's units.
    """

    name: str
    variable: str
    std: float

    @property
    def reads(self) -> tuple[str, ...]:
        """Outputs that the statistics are made of."""
        return (self.variable,)

    def statistics(self, result: Result, batch: Batch) -> Tensor:
        """Sums over cells, [2]."""
        target = batch.targets[self.variable]
        observed = ~target.values.isnan()
        predicted = target.steps.mean(result.daily[self.variable])
        return cell_mean_error((predicted - _known(target.values, observed)) / self.std, observed)


@dataclass(frozen=True, slots=True)
class SaturatingError(_MeanOverCells):
    """As :class:`StepError`, but no error where prediction and target both exceed a limit.

    Those steps stay in the count: the target is met there.
    """

    name: str
    variable: str
    std: float
    limit: float = SATURATION

    @property
    def reads(self) -> tuple[str, ...]:
        """Outputs that the statistics are made of."""
        return (self.variable,)

    def statistics(self, result: Result, batch: Batch) -> Tensor:
        """Sums over cells, [2]."""
        target = batch.targets[self.variable]
        observed = ~target.values.isnan()
        predicted = target.steps.mean(result.daily[self.variable])
        known = _known(target.values, observed)
        met = (known > self.limit) & (predicted > self.limit)
        error = torch.where(met, 0.0, predicted - known) / self.std
        return cell_mean_error(error, observed)


@dataclass(frozen=True, slots=True)
class AnomalyError(_MeanOverCells):
    """Squared error of a store's anomaly.

    The target refers to its own mean over all observed steps, whatever their role, the prediction to its
    mean over all simulated days.
    """

    name: str
    variable: str
    output: str
    std: float

    @property
    def reads(self) -> tuple[str, ...]:
        """Outputs that the statistics are made of."""
        return (self.output,)

    def statistics(self, result: Result, batch: Batch) -> Tensor:
        """Sums over cells, [2]."""
        target = batch.targets[self.variable]
        observed = ~target.values.isnan()
        known = _known(target.values, observed)
        store = result.daily[self.output]
        predicted = target.steps.mean(store - store.mean(dim=1, keepdim=True))
        return cell_mean_error((predicted - (known - target.mean().unsqueeze(1))) / self.std, observed)


class LossValue(NamedTuple):
    """The sum of all terms, and each of them, [term]."""

    total: Tensor
    terms: Tensor


@dataclass(frozen=True, slots=True)
class LossSum:
    """The unweighted sum of several terms."""

    terms: Sequence[LossTerm]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the terms, in order."""
        return tuple(term.name for term in self.terms)

    @property
    def reads(self) -> frozenset[str]:
        """Outputs that any term reads."""
        return frozenset(name for term in self.terms for name in term.reads)

    def statistics(self, result: Result, batch: Batch) -> Tensor:
        """Statistics of all terms, [term, 2]; additive over cells, batches and ranks."""
        return torch.stack([term.statistics(result, batch) for term in self.terms])

    def observed(self, statistics: Tensor) -> Tensor:
        """Which terms any observation counted in, [term], bool."""
        return statistics[:, 1] > 0

    def value(self, statistics: Tensor) -> LossValue:
        """The loss from summed statistics, [term, 2]."""
        values = torch.stack([t.value(s) for t, s in zip(self.terms, statistics, strict=True)])
        return LossValue(values.sum(), values)


def summed_over_ranks(local: Tensor, all_reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Global sum of ``local`` whose gradient is this rank's share only.

    Every rank then goes backward through its own cells, and the sum of the ranks' gradients is the gradient
    of the global loss: the derivative of the reduction is counted once.

    Args:
        local: this rank's statistics.
        all_reduce: sums a tensor without graph over all ranks.
    """
    total = all_reduce(local.detach().clone())
    return local + (total - local.detach())
