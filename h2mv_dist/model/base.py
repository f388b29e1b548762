"""What every model shares: the Batch it reads, the Result it gives, the ProcessModel it is.

Axes: [cell, time, var] for forcing, [cell, feature] for static features, [cell, step] for targets. Only
targets may hold NaN (not observed). Units are those of ``variables.py``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from h2mv_dist.model.days import CompiledBlock, DayBlock, Prepared, compiled_width, padded, run_days
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


def _known_mean(values: Tensor) -> Tensor:
    known = ~values.isnan()
    return torch.where(known, values, 0.0).sum(dim=1) / known.sum(dim=1).clamp(min=1)


class Target(NamedTuple):
    """Observations of one variable.

    Attributes:
        values: [cell, step], NaN where there is none or it must not count.
        steps: of the values.
        known_mean: over all observations of each cell, also those that must not count here, [cell]; None
            if all count.
    """

    values: Tensor
    steps: Steps
    known_mean: Tensor | None = None

    def mean(self) -> Tensor:
        """What anomalies of each cell refer to, [cell]; 0 where nothing was observed."""
        return _known_mean(self.values) if self.known_mean is None else self.known_mean

    def each(self, change: Callable[[Tensor], Tensor]) -> "Target":
        """Values and means changed; the same steps."""
        mean = None if self.known_mean is None else change(self.known_mean)
        return Target(change(self.values), self.steps, mean)


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

    def days(self, first: int, stop: int) -> "Batch":
        """Days from ``first`` up to ``stop``, without targets."""
        return replace(self, forcing=self.forcing[:, first:stop], targets={})

    def cells(self, first: int, stop: int) -> "Batch":
        """Cells from ``first`` up to ``stop``, with their targets."""
        targets = {k: t.each(lambda values: values[first:stop]) for k, t in self.targets.items()}
        return Batch(self.forcing[first:stop], self.static[first:stop], targets)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        targets = {
            name: target.each(lambda values: values.to(device))._replace(steps=target.steps.to(device))
            for name, target in self.targets.items()
        }
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

    def only(self, names: Collection[str]) -> "Result":
        """The outputs called ``names``; the same state."""

        def chosen(group: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            return {name: value for name, value in group.items() if name in names}

        return Result(chosen(self.daily), chosen(self.static), chosen(self.constants), self.state)

    def each(self, change: Callable[[Tensor], Tensor]) -> "Result":
        """Every output changed, in the order of :meth:`outputs`; the same state."""
        groups = (self.daily, self.static, self.constants)
        daily, static, constants = ({name: change(value) for name, value in g.items()} for g in groups)
        return Result(daily, static, constants, self.state)

    def outputs(self) -> list[Tensor]:
        """All outputs: daily, static, constants."""
        return [value for group in (self.daily, self.static, self.constants) for value in group.values()]

    def cells(self, first: int, stop: int) -> "Result":
        """Cells from ``first`` up to ``stop``."""
        daily, static = ({k: v[first:stop] for k, v in g.items()} for g in (self.daily, self.static))
        return Result(daily, static, self.constants, tuple(s[first:stop] for s in self.state))


class ProcessModel(nn.Module, ABC):
    """A differentiable land model that maps (Batch, State) to a Result.

    A model z-scores what its networks read with its own ``scaler``; physics uses the inputs as they are.

    Attributes:
        compiled: whether blocks of days run as compiled code.
        width: cells that batches are filled up to where they run with gradients and compiled; those of each
            batch if None.
        recompute: whether the way back computes blocks of days once more, instead of remembering them.
    """

    spec: ModelSpec
    scaler: Scaler
    compiled: bool = False
    width: int | None = None
    recompute: bool = False

    @abstractmethod
    def initial_state(self, n_cells: int) -> State:
        """Empty stores and untouched memory, each [cell, ...]."""

    @abstractmethod
    def prepare(self, static: Tensor) -> Prepared:
        """Everything that is the same every day, from static features [feature, cell]."""

    @staticmethod
    @abstractmethod
    def outputs_without_days(prepared: Prepared) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Static outputs [cell], and constants."""

    @classmethod
    @abstractmethod
    def day_block(
        cls, prepared: Prepared, forcing: Tensor, state: State, names: tuple[str, ...]
    ) -> tuple[tuple[Tensor, ...], State]:
        """Run some days; see :data:`h2mv_dist.model.days.DayBlock`."""

    def forward(self, batch: Batch, state: State, keep: Collection[str] | None = None) -> Result:
        """Run every day of the batch.

        Args:
            batch: forcing and static features; targets are ignored.
            state: before the first day.
            keep: daily outputs to return; all if None.
        """
        names = tuple(name for name in self.spec.daily if keep is None or name in keep)
        # nothing to compute: what is compiled would be compiled once more for it
        compiled = self.compiled and batch.n_cells > 0
        block: DayBlock = CompiledBlock(type(self).day_block) if compiled else self.day_block
        wanted = self.width if torch.is_grad_enabled() else None
        width = compiled_width(batch.n_cells, wanted) if compiled else batch.n_cells

        def columns(tensor: Tensor) -> Tensor:
            """Cells last."""
            return padded(tensor.movedim(0, -1), width)

        prepared = self.prepare(columns(batch.static))
        daily, last = run_days(
            block,
            prepared,
            columns(batch.forcing),
            tuple(columns(part) for part in state),
            names,
            recompute=self.recompute,
        )
        static, constants = self.outputs_without_days(prepared)

        def rows(tensor: Tensor) -> Tensor:
            """Cells first."""
            return tensor[..., : batch.n_cells].movedim(-1, 0)

        return Result(
            daily={name: rows(values) for name, values in daily.items()},
            static={name: rows(values) for name, values in static.items()},
            constants=constants,
            state=tuple(rows(part) for part in last),
        )


def detach(state: State) -> State:
    """The same values, cut off from the graph that made them."""
    return tuple(tensor.detach() for tensor in state)
