"""Daily: forcing as whole days in our units, made of stored steps of a day or of parts of one.

States and rates are averaged over a day; amounts of an interval (their units say so) are summed. Axes are
[day, *space], float32; sums are formed in float64 and converted last, so that values are rounded once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Final

import numpy as np

from h2mv_dist.config import DataSettings, Stamp, StorageOptions
from h2mv_dist.errors import ConfigError, DataError
from h2mv_dist.grid import Grid, Period
from h2mv_dist.io.day_steps import DaySteps, day_steps
from h2mv_dist.io.handles import Handle, series_handle, whole_chunks
from h2mv_dist.io.layouts import check_names, open_land
from h2mv_dist.io.library import Found, Library, find_variable
from h2mv_dist.io.spaces import Space, space_of
from h2mv_dist.io.times import common_period
from h2mv_dist.io.units import Conversion, conversion_between
from h2mv_dist.spec import Float32Array
from h2mv_dist.variables import nearest, variable

READ_VALUES: Final = 2**23
"""About so many stored values are read at once, or one chunk if that is more."""
_VALUE_BYTES: Final = 32
"""Of a value while it is read, decoded and converted in float64; 25 were measured where it is stored so."""


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """A forcing variable as whole days.

    Attributes:
        name: its name.
        handle: its steps from the first of the first day on, [step, *space].
        per_day: steps of a day.
        amounts: whether steps are summed; else they are averaged.
        stamp: what time stamps name.
        conversion: what is left to be done once days are made: nothing to values that are daily as stored.
        left_out: stored steps before the first day and after the last one.
    """

    name: str
    handle: Handle
    per_day: int
    amounts: bool
    stamp: str
    conversion: Conversion
    left_out: tuple[int, int]

    def days(self, days: slice, box: tuple[slice, ...], n_steps: int) -> Iterator[Float32Array]:
        """Daily values of a box of cells, [day, *box], some days after the other.

        Args:
            days: which ones, counted from the first.
            box: along the spatial axes.
            n_steps: most stored steps that are read at once, if chunks are no longer.

        Raises:
            StoreError: the store cannot be read.
        """
        first = days.start * self.per_day
        starts = self.handle.chunk_starts(slice(first, days.stop * self.per_day))
        begun = None
        for part in whole_chunks([starts], n_steps):
            steps = self.handle.read(slice(first + part.start, first + part.stop), *box)
            # chunks need not end with a day
            steps = steps if begun is None else np.concatenate([begun, steps])
            whole = len(steps) - len(steps) % self.per_day
            begun = steps[whole:].copy() if whole < len(steps) else None
            yield self._aggregated(steps[:whole])

    def read_shape(self, n_days: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Steps and cells to read at once, [step, *space]: whole chunks, about READ_VALUES of them."""
        limits = (n_days * self.per_day, *shape)
        sizes = [min(pair) for pair in zip(self.handle.chunks, limits, strict=True)]
        for axis in (*reversed(range(1, len(sizes))), 0):
            sizes[axis] = min(limits[axis], sizes[axis] * max(1, READ_VALUES // prod(sizes)))
        return tuple(sizes)

    def read_bytes(self, n_days: int, shape: tuple[int, ...]) -> int:
        """Most bytes that reading takes, beside the days that are handed out."""
        return _VALUE_BYTES * prod(self.read_shape(n_days, shape))

    def chunk_reads(self, lengths: Sequence[int]) -> float:
        """How often a chunk is read, on average, if stretches of so many days are read one by one."""
        stops = np.cumsum(lengths) * self.per_day + self.handle.origin
        starts = np.concatenate([[self.handle.origin], stops[:-1]])
        first, last = starts // self.handle.chunks[0], (stops - 1) // self.handle.chunks[0]
        return float((last - first + 1).sum() / (last[-1] - first[0] + 1))

    def _aggregated(self, steps: Float32Array) -> Float32Array:
        """Whole days, [day, *box], of their steps, [step, *box]."""
        if self.per_day == 1:
            return steps
        by_day = steps.reshape(-1, self.per_day, *steps.shape[1:])
        combine = np.sum if self.amounts else np.mean
        return self.conversion.apply(combine(by_day, axis=1, dtype=np.float64))


@dataclass(frozen=True, kw_only=True, eq=False)
class DailyInput:
    """A data set as whole days; nothing but coordinates and the mask has been read.

    Attributes:
        grid: where.
        period: the days that every forcing variable has whole.
        forcing: in column order.
        static: [*space] or [*space, feature] each.
    """

    grid: Grid
    period: Period
    forcing: tuple[Series, ...]
    static: tuple[Handle, ...]


def open_daily(
    data: DataSettings, *, forcing: tuple[str, ...], stamps: Mapping[str, Stamp], options: StorageOptions
) -> DailyInput:
    """Find and check forcing with steps of a day or an even part of one, and what does not change with time.

    Args:
        data: where it is and how it is laid out.
        forcing: variables, in column order.
        stamps: variable -> which moment of its interval a time stamp names, where it is known.
        options: credentials of its stores.

    Raises:
        ConfigError: a setting names an unknown variable.
        DataError: something is missing or is not on the axes and in the units it should have.
        StoreError: a store cannot be reached or read.
    """
    check_names(data, forcing)
    for name in set(stamps) - set(forcing):
        raise ConfigError(f"prepare.stamps.{name}: not a forcing variable; {nearest(name, forcing)}")
    library = Library(options)
    rates = [_as_rate(find_variable(data, name, library)) for name in forcing]
    found = [rate.found for rate in rates]
    space = space_of(found[0])
    steps = [day_steps(r.found, amounts=r.amounts, stamp=stamps.get(r.found.name)) for r in rates]
    period = common_period(found, [s.period for s in steps], data.period)
    land = open_land(data, found[0], space, library)
    series = tuple(_series(r, s, period, space) for r, s in zip(rates, steps, strict=True))
    return DailyInput(grid=land.grid, period=period, forcing=series, static=land.static)


@dataclass(frozen=True, slots=True)
class _Rate:
    """A variable whose units are those of a state or rate; ``amounts`` if stored ones are per interval."""

    found: Found
    amounts: bool


def _as_rate(found: Found) -> _Rate:
    """Tell amounts by their units: those that become ours when summed over a day.

    Raises:
        DataError: the units can be converted in neither way.
    """
    ours, daily = variable(found.name).units, f"({found.units}) d-1"
    fix = f"set data.variables.{found.name}.units or convert the data"
    try:
        conversion_between(str(found.units), ours, found.where, fix)
        return _Rate(found, amounts=False)
    except DataError as refused:
        try:
            conversion_between(daily, ours, found.where, fix)
        except DataError:
            raise refused from None
    return _Rate(replace(found, units=daily), amounts=True)


def _series(rate: _Rate, steps: DaySteps, period: Period, space: Space) -> Series:
    first = steps.first + (period.first - steps.period.first) * steps.per_day
    stored = slice(first, first + period.n_days * steps.per_day)
    handle = series_handle(rate.found, steps.times, stored, space)
    conversion = Conversion()
    if steps.per_day > 1:
        handle, conversion = replace(handle, conversion=conversion), handle.conversion
    left_out = (stored.start, steps.times.stamps.size - stored.stop)
    return Series(rate.found.name, handle, steps.per_day, rate.amounts, steps.stamp, conversion, left_out)
