"""What every model shares: the Batch it reads, the Result it gives, the ProcessModel it is.

Axes: [cell, time, var] for forcing, [cell, feature] for static features, [cell, step] for targets. Only
targets may hold NaN (not observed). Units are those of ``variables.py``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from h2mv_dist.spec import ModelSpec, Scaler

State = tuple[Tensor, ...]
"""One tensor [cell, ...] for each name in ``ModelSpec.state``, in that order."""


class Steps(NamedTuple):
    """Where the steps of a target lie among the simulated days.

    Attributes:
        days: positions of the days that belong to any step, [day].
        weights: share of each of those days in the mean of each step, [day, step]; None for daily steps.
    """

    days: Tensor
    weights: Tensor | None

    def mean(self, daily: Tensor) -> Tensor:
        """Average [cell, time] over the days of each step, [cell, step]."""
        chosen = daily.index_select(1, self.days)
        return chosen if self.weights is None else chosen @ self.weights

    def to(self, device: torch.device) -> "Steps":
        """The same steps on another device."""
        weights = None if self.weights is None else self.weights.to(device)
        return Steps(self.days.to(device), weights)


def steps_between(first: Tensor, stop: Tensor) -> Steps:
    """Steps from half-open ranges of day positions, each [step].

    >>> steps_between(torch.tensor([0, 2]), torch.tensor([2, 3])).mean(torch.tensor([[1.0, 3.0, 5.0]]))
    tensor([[2., 5.]])
    """
    lengths = stop - first
    step = torch.repeat_interleave(torch.arange(len(first)), lengths)
    offset = torch.arange(int(lengths.sum())) - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    days = first[step] + offset
    if bool((lengths == 1).all()):
        return Steps(days, None)
    weights = torch.zeros(len(days), len(first))
    weights[torch.arange(len(days)), step] = 1.0 / lengths[step].to(weights.dtype)
    return Steps(days, weights)


class Target(NamedTuple):
    """Observed values [cell, step], NaN where there is none or it must not count, and their steps."""

    values: Tensor
    steps: Steps


@dataclass(frozen=True, slots=True)
class Batch:
    """Some cells over some days.

    Attributes:
        forcing: [cell, time, var], columns in the order of ``ModelSpec.forcing``, never NaN.
        static: [cell, feature], never NaN.
        targets: name -> Target.
    """

    forcing: Tensor
    static: Tensor
    targets: Mapping[str, Target]

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return self.forcing.shape[0]

    @property
    def n_days(self) -> int:
        """Number of days."""
        return self.forcing.shape[1]

    def first_days(self, n_days: int) -> "Batch":
        """The first ``n_days`` days, without targets."""
        return replace(self, forcing=self.forcing[:, :n_days], targets={})

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        targets = {k: Target(t.values.to(device), t.steps.to(device)) for k, t in self.targets.items()}
        return Batch(self.forcing.to(device), self.static.to(device), targets)


@dataclass(frozen=True, slots=True)
class Result:
    """What a model makes of a batch.

    Attributes:
        daily: output -> [cell, time].
        static: output -> [cell].
        constants: output -> scalar.
        state: after the last day; resumes the run.
    """

    daily: Mapping[str, Tensor]
    static: Mapping[str, Tensor]
    constants: Mapping[str, Tensor]
    state: State


class ProcessModel(nn.Module, ABC):
    """A differentiable land model that maps (Batch, State) to a Result.

    A model z-scores what its networks read with its own ``scaler``; physics uses the inputs as they are.
    """

    spec: ModelSpec
    scaler: Scaler

    @abstractmethod
    def initial_state(self, n_cells: int) -> State:
        """Empty stores and untouched memory, each [cell, ...]."""

    @abstractmethod
    def forward(self, batch: Batch, state: State) -> Result:
        """Run every day of the batch, starting from ``state``."""


def detach(state: State) -> State:
    """The same values, cut off from the graph that made them."""
    return tuple(tensor.detach() for tensor in state)
