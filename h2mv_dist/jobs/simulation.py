"""Members over the cells of one tile: spin-up, baseline and outputs, block by block; nothing is written.

A tile of a cube and :func:`h2mv_dist.run` use the same code. Outputs are [member, time, cell].
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import partial
from itertools import product
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from h2mv_dist.grid import FloatArray, Period, Tile, as_date
from h2mv_dist.io.source import Source
from h2mv_dist.io.tile_forcing import TileForcing
from h2mv_dist.model.base import Batch, Result, State
from h2mv_dist.model.ensemble import Ensemble
from h2mv_dist.model.transfer import Transfer
from h2mv_dist.spec import Budget, Float32Array, ModelSpec

PART_DAYS: Final = 64
"""Days that go through a model at once, so that what it remembers of each stays small (and in caches): whole
multiples of the blocks of days a model runs."""
PART_CELLS: Final = 512
"""Cells that go through a model at once on a CPU, for the same reason; a GPU takes all of a tile."""
_REFERENCE: Final = "reference/"
_STATE: Final = "state/"
_SUM: Final = "sum/"


class Carried(NamedTuple):
    """What is remembered when a day begins.

    Attributes:
        day: that day.
        state: of all members, stacked.
        references: daily output -> what its anomalies refer to, [member, cell].
        sums: daily output -> its sum over the month so far, [member, cell].
    """

    day: date
    state: State
    references: Mapping[str, torch.Tensor]
    sums: Mapping[str, FloatArray]

    def arrays(self, names: Sequence[str]) -> dict[str, NDArray[np.generic]]:
        """For a snapshot, each [member, cell, ...]."""
        parts = {_STATE + name: part for name, part in zip(names, self.state, strict=True)}
        parts |= {_REFERENCE + name: mean for name, mean in self.references.items()}
        arrays: dict[str, NDArray[np.generic]] = {name: part.cpu().numpy() for name, part in parts.items()}
        return arrays | {_SUM + name: total for name, total in self.sums.items()}

    @staticmethod
    def of(
        day: date, arrays: Mapping[str, NDArray[Any]], names: Sequence[str], device: torch.device
    ) -> "Carried":
        """Inverse of :meth:`arrays`."""

        def called(prefix: str) -> dict[str, NDArray[Any]]:
            return {n.removeprefix(prefix): array for n, array in arrays.items() if n.startswith(prefix)}

        states = {name: torch.from_numpy(array).to(device) for name, array in called(_STATE).items()}
        means = {name: torch.from_numpy(array).to(device) for name, array in called(_REFERENCE).items()}
        return Carried(day, tuple(states[name] for name in names), means, called(_SUM))


@dataclass(frozen=True, slots=True)
class Values:
    """Outputs of all members for one block.

    Attributes:
        daily: output -> [member, time, cell].
        static: output -> [member, cell].
        months: month that ends in the block -> output -> mean, [member, cell].
        residual: largest gap of the model's budget, mm; None for a model without one.
    """

    daily: Mapping[str, Float32Array]
    static: Mapping[str, Float32Array]
    months: Mapping[Period, Mapping[str, Float32Array]]
    residual: float | None

    def n_missing(self) -> int:
        """Daily values that are not finite."""
        return sum(int((~np.isfinite(values)).sum()) for values in self.daily.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Days:
    """Which days are simulated, and what they refer to.

    Attributes:
        period: days of the outputs.
        block: days that are computed at once.
        baseline: days whose mean anomalies refer to.
        spinup: days run first, from the period's first one on; None for no spin-up.
    """

    period: Period
    block: int
    baseline: Period
    spinup: Period | None


class _Part(NamedTuple):
    """Some days of a block over some cells of a tile, of one member.

    Attributes:
        member: which one.
        cells: positions in the tile.
        days: positions in the block.
        before: the member's state of these cells when the days begin.
    """

    member: int
    cells: slice
    days: slice
    before: State


_Receive = Callable[[_Part, Result], None]


class TileSimulation:
    """All members over the same forcing, each with its own state."""

    def __init__(
        self,
        source: Source,
        spec: ModelSpec,
        ensemble: Ensemble,
        tile: Tile,
        days: Days,
        outputs: Sequence[str],
        monthly: Sequence[str] = (),
        between: Callable[[], None] = lambda: None,
    ) -> None:
        """``between`` is called before each part of a block, a fraction of a second."""
        self.source, self.spec, self.ensemble, self.tile, self.days = source, spec, ensemble, tile, days
        self.daily = [name for name in outputs if name in spec.daily or name in spec.anomalies]
        self.monthly, self.between = monthly, between
        self.kept = kept_outputs(spec, self.daily)
        self.once = [name for name in outputs if name in spec.static]
        land = source.grid.mask[tile.slices]
        self.static = torch.from_numpy(source.read_static(tile)[land])
        self.forcing: TileForcing | None = None
        self.transfer = Transfer(ensemble.device)

    def start(self) -> Carried:
        """After the spin-up, from empty stores."""
        state = self.ensemble.initial_state(self.static.shape[0])
        for _, batch in self.blocks(self.days.spinup) if self.days.spinup is not None else ():
            state = self._run(batch, state, _nothing)
        return Carried(self.days.period.start, state, self._baseline_means(state), {})

    def advance(self, carried: Carried, day: date) -> Carried:
        """Go on until ``day`` begins, without outputs."""
        if carried.day == day:
            return carried
        for block, batch in self.blocks(Period(carried.day, day)):
            carried, _ = self.step(block, batch, carried)
        return carried

    def _baseline_means(self, state: State) -> dict[str, torch.Tensor]:
        """Mean of each store whose anomaly is asked for over the baseline, [member, cell].

        Costs one more run up to the baseline's end, and no memory that grows with the period.
        """
        baseline = self.days.baseline
        wanted = {n: s for n, s in self.spec.anomalies.items() if n in self.daily}
        if not wanted:
            return {}
        shape, device = (len(self.ensemble.models), self.static.shape[0]), self.ensemble.device
        sums = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name in wanted}
        for block, batch in self.blocks(Period(self.days.period.start, baseline.stop)):
            inside = torch.from_numpy(np.isin(block.days(), baseline.days())).to(device)

            def add(part: _Part, result: Result, inside: torch.Tensor = inside) -> None:
                chosen = inside[part.days]
                for name, store in wanted.items():
                    found = result.daily[store][:, chosen]
                    sums[name][part.member, part.cells] += found.sum(dim=1, dtype=torch.float64)

            state = self._run(batch, state, add)
        return {name: (s / baseline.n_days).float() for name, s in sums.items()}

    def blocks(self, period: Period) -> Iterator[tuple[Period, Batch]]:
        """Days of the source, block by block; a pass from where one began before may find them in memory."""
        if self.forcing is None or not self.forcing.begins(period):
            whole = Period(period.start, max(period.stop, self.days.period.stop))
            self.forcing = TileForcing(self.source, self.tile, whole, self.days.block)
        forcing = self.forcing.blocks(period.n_days)
        for block in period.blocks(self.days.block):
            yield block, Batch(torch.from_numpy(next(forcing)), self.static, {})

    def step(self, block: Period, batch: Batch, carried: Carried) -> tuple[Carried, Values]:
        """Run a block: what is remembered afterwards, and its outputs."""
        members = len(self.ensemble.models)
        daily = {n: np.empty((members, batch.n_days, batch.n_cells), np.float32) for n in self.daily}
        static = {n: np.empty((members, batch.n_cells), np.float32) for n in self.once}
        residuals: list[float] = []

        def keep(part: _Part, result: Result) -> None:
            for name, values in daily.items():
                found = result.daily[self.spec.anomalies.get(name, name)]
                if name in carried.references:
                    found = found - carried.references[name][part.member, part.cells].unsqueeze(1)
                self.transfer.bring([found.T], partial(_fill, values[part.member, part.days, part.cells]))
            for name, once in static.items():
                self.transfer.bring([result.static[name]], partial(_fill, once[part.member, part.cells]))
            if (budget := self.spec.budget) is not None:
                terms = [result.daily[name].T for name in budget.terms]
                stores = [part.before[self.spec.state.index(name)] for name in budget.states]
                self.transfer.bring(
                    [*terms, *stores], lambda found: residuals.append(_residual(budget, found))
                )

        state = self._run(batch, carried.state, keep)
        sums, months = self._months(block, daily, carried.sums)
        values = Values(daily, static, months, max(residuals, default=None))
        return carried._replace(day=block.stop, state=state, sums=sums), values

    def _before_part(self) -> None:
        self.between()
        if self.forcing is not None:
            self.forcing.require_readable()

    def _months(
        self, block: Period, daily: Mapping[str, Float32Array], sums: Mapping[str, FloatArray]
    ) -> tuple[dict[str, FloatArray], dict[Period, dict[str, Float32Array]]]:
        """Sums over the month that goes on after a block, and means over the months that end in it."""
        ended: dict[Period, dict[str, Float32Array]] = {}
        going_on = dict(sums)
        for month in _months_of(block):
            part = month.common(block)
            assert part is not None, "a month of the block"
            days = slice(part.first - block.first, part.first - block.first + part.n_days)
            for name in self.monthly:
                total = daily[name][:, days].sum(axis=1, dtype=np.float64)
                going_on[name] = total if part.start == month.start else going_on.get(name, 0.0) + total
            if part.stop == month.stop and month.start >= self.days.period.start:
                ended[month] = {n: np.asarray(going_on[n] / month.n_days, np.float32) for n in self.monthly}
        return going_on, ended

    def _run(self, batch: Batch, state: State, receive: _Receive) -> State:
        """Run a block, some of its days over some of its cells at a time."""
        at_once = PART_CELLS if self.ensemble.device.type == "cpu" else batch.n_cells
        parts = list(product(even_parts(batch.n_cells, at_once), _parts(batch.n_days, PART_DAYS)))
        pieces = (batch.cells(*_ends(cells)).days(*_ends(days)) for cells, days in parts)
        after: list[State] = []
        for piece, (cells, days) in zip(self.transfer.ahead(pieces), parts, strict=True):
            self._before_part()
            before = tuple(values[:, cells] for values in state) if days.start == 0 else after.pop()

            def take(
                member: int, result: Result, cells: slice = cells, days: slice = days, before: State = before
            ) -> None:
                receive(_Part(member, cells, days, tuple(values[member] for values in before)), result)

            after.append(self.ensemble.run(piece, before, take, self.kept))
        return tuple(torch.cat(values, dim=1) for values in zip(*after, strict=True))


def kept_outputs(spec: ModelSpec, daily: Sequence[str]) -> frozenset[str]:
    """What a model must compute for these outputs, and for the check of its budget."""
    stores = (spec.anomalies.get(name, name) for name in daily)
    return frozenset((*stores, *(spec.budget.terms if spec.budget else ())))


def even_parts(n_items: int, at_most: int) -> list[slice]:
    """As few parts as may be, of nearly the same size.

    >>> even_parts(10, 4)
    [slice(0, 4, None), slice(4, 8, None), slice(8, 10, None)]
    >>> even_parts(9, 8)
    [slice(0, 5, None), slice(5, 9, None)]
    """
    n_parts = -(-n_items // at_most)
    return _parts(n_items, -(-n_items // n_parts))


def _parts(n_items: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, n_items)) for first in range(0, n_items, size)]


def _ends(part: slice) -> tuple[int, int]:
    return part.start, part.stop


def _months_of(block: Period) -> tuple[Period, ...]:
    """The calendar months that hold days of a block."""
    after = (as_date(block.first + block.n_days - 1).replace(day=1) + timedelta(days=31)).replace(day=1)
    return Period(block.start.replace(day=1), after).months()


def constants_of(ensemble: Ensemble, source: Source, names: Sequence[str]) -> dict[str, Float32Array]:
    """Outputs without axes, each [member]."""
    no_cells = Batch(torch.zeros(0, 1, len(source.forcing)), torch.zeros(0, len(source.static)), {})
    results: list[Result] = []
    ensemble.run(no_cells, ensemble.initial_state(0), lambda _, result: results.append(result))
    return {name: np.stack([r.constants[name].cpu().numpy() for r in results]) for name in names}


def _residual(budget: Budget, found: Sequence[torch.Tensor]) -> float:
    """From a budget's terms, each [time, cell], and the stores of the state before, each [cell]."""
    values = [tensor.double().numpy() for tensor in found]
    n_terms = len(budget.terms)
    daily = dict(zip(budget.terms, values[:n_terms], strict=True))
    return budget.residual(daily, np.sum(values[n_terms:], axis=0))


def _fill(into: Float32Array, found: Sequence[torch.Tensor]) -> None:
    into[...] = found[0].numpy()


def _nothing(_part: _Part, _result: Result) -> None:
    """Of a spin-up only the states are kept."""
