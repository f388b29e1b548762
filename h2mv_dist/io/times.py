"""Time: the days of forcing, every one once, and the steps of targets, daily or monthly."""

import posixpath
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from h2mv_dist.errors import DataError, describe
from h2mv_dist.grid import BoolArray, IntArray, Period, as_date
from h2mv_dist.io.cf import Coordinate, coordinate_of
from h2mv_dist.io.library import Found, attribute
from h2mv_dist.io.stores import explained

Frequency = Literal["daily", "monthly"]

_CALENDARS: Final = frozenset({"standard", "gregorian", "proleptic_gregorian"})
_SECONDS_A_DAY: Final = 86_400


@dataclass(frozen=True, slots=True, eq=False)
class StepAxis:
    """Steps of an observed series.

    Attributes:
        days: first day of each step, [step], days since 1970-01-01.
        frequency: a step is a day or a calendar month.
    """

    days: IntArray
    frequency: Frequency

    def __len__(self) -> int:
        return int(self.days.size)

    def ranges(self) -> tuple[IntArray, IntArray]:
        """First day of each step and the day after its last one, each [step].

        >>> first, stop = StepAxis(np.array([31]), "monthly").ranges()  # February 1970
        >>> int(first[0]), int(stop[0])
        (31, 59)
        """
        if self.frequency == "daily":
            return self.days, self.days + 1
        months = self.days.astype("datetime64[D]").astype("datetime64[M]")
        return self.days, (months + 1).astype("datetime64[D]").astype(np.int64)

    def within(self, period: Period) -> slice:
        """The steps that lie wholly inside ``period``."""
        first, stop = self.ranges()
        start = int(np.searchsorted(first, period.first))
        return slice(start, max(start, int(np.searchsorted(stop, period.first + period.n_days, "right"))))

    def cut(self, steps: slice) -> "StepAxis":
        """Some of the steps."""
        return StepAxis(self.days[steps], self.frequency)


class Times(NamedTuple):
    """Time stamps of an array, datetime64, [step], its time dimension and the path of the coordinate."""

    dim: str
    stamps: NDArray[np.datetime64]
    path: str

    def days(self) -> IntArray:
        """Days since 1970-01-01; the hour does not count."""
        return self.stamps.astype("datetime64[D]").astype(np.int64)

    def seconds(self) -> IntArray:
        """Seconds since 1970 to the nearest minute: hours stored as fractions of a day are not exact."""
        return _seconds(self.stamps)


def _seconds(stamps: NDArray[np.datetime64]) -> IntArray:
    seconds = stamps.astype("datetime64[us]").astype(np.int64) / 1e6
    return np.asarray(np.rint(seconds / 60) * 60, np.int64)


def times_of(found: Found) -> Times:
    """The time stamps of an array.

    Raises:
        DataError: there are none, or they cannot be understood.
        StoreError: they cannot be read.
    """
    coordinate = coordinate_of(found, "time")
    if coordinate is None or coordinate.array.ndim != 1:
        raise DataError(
            describe(
                "no time coordinate",
                where=found.where,
                expected="a 1-D array with units such as 'days since 2001-01-01'",
                actual=", ".join(path for path, _ in found.neighbours()) or "no coordinates",
                fix="add it beside the array, named like its time dimension",
            )
        )
    return Times(str(coordinate.array.dims[0]), stamps_of(found, coordinate), coordinate.path)


def stamps_of(found: Found, coordinate: Coordinate) -> NDArray[np.datetime64]:
    """Decoded values of a time coordinate, or of its bounds, [*coordinate].

    Raises:
        DataError: they cannot be understood.
        StoreError: they cannot be read.
    """
    calendar = attribute(coordinate.array, "calendar", "standard").lower()
    if calendar not in _CALENDARS:
        raise DataError(
            describe(
                f"calendar {calendar!r} is not supported",
                where=found.where,
                expected=", ".join(sorted(_CALENDARS)),
                actual=calendar,
                fix="convert it (xarray: convert_calendar('standard')); a simulated day must exist",
            )
        )
    reader = xr.coders.CFDatetimeCoder(time_unit="s")
    try:
        with explained(found.group.url, found.options), warnings.catch_warnings():
            # hours as fractions are never exact to the second, nor do they have to be
            warnings.filterwarnings("ignore", "Can't decode floating point", xr.SerializationWarning)
            decoded = xr.conventions.decode_cf_variable("time", coordinate.array, decode_times=reader)
            stamps: NDArray[np.datetime64] = decoded.to_numpy()
    except (ValueError, OverflowError) as error:
        raise _unreadable_time(found, coordinate, str(error)) from error
    if stamps.dtype.kind != "M" or np.isnat(stamps).any():
        raise _unreadable_time(found, coordinate, f"values of type {stamps.dtype}, or missing ones")
    return stamps


def _unreadable_time(found: Found, coordinate: Coordinate, reason: str) -> DataError:
    return DataError(
        describe(
            "the time coordinate cannot be read",
            where=found.where,
            expected="units such as 'days since 2001-01-01'",
            actual=f"units {attribute(coordinate.array, 'units') or 'absent'}: {reason}",
            fix="write CF time units",
        )
    )


def bounds_of(found: Found, times: Times) -> IntArray | None:
    """Start and end of each interval, seconds since 1970, [step, 2], if the time axis has CF bounds.

    Raises:
        DataError: they cannot be understood.
        StoreError: they cannot be read.
    """
    time = coordinate_of(found, "time")
    assert time is not None, "times_of has found it"
    name = attribute(time.array, "bounds")
    folder = posixpath.dirname(time.path)
    group = next((g for g in (found.group, found.root) if g is not None and g.path == folder), found.group)
    if name not in group.arrays or group.arrays[name].shape != (times.stamps.size, 2):
        return None
    # CF: bounds have the units and calendar of their coordinate, whatever they say themselves
    array = group.arrays[name].copy(deep=False)
    array.attrs = dict(time.array.attrs)
    return _seconds(stamps_of(found, Coordinate(posixpath.join(folder, name), array)))


def begin_on_another_day(times: Times, bounds: IntArray) -> BoolArray:
    """Which intervals begin on another day than their time stamp names, [step]."""
    return np.asarray(bounds[:, 0] // _SECONDS_A_DAY != times.days())


class DailyTimes(NamedTuple):
    """Time stamps of a forcing variable, and the days they cover."""

    times: Times
    period: Period


def daily_times(found: Found) -> DailyTimes:
    """The time axis of a forcing variable, which has every day exactly once, under a stamp of its own.

    Raises:
        DataError: a day is missing, doubled or out of order, CF bounds say that stamps name another day, or
            the time coordinate cannot be understood.
        StoreError: it cannot be read.
    """
    times = times_of(found)
    days = times.days()
    if days.size == 0:
        raise DataError(f"{found.where} has no time step")
    _refuse_sub_daily(found, times)
    jumps = np.diff(days)
    if (jumps != 1).any():
        at = int(np.argmax(jumps != 1))
        raise _broken_days(found, int(days[at]), int(jumps[at]))
    _refuse_stamps_of_other_days(found, times)
    return DailyTimes(times, Period(as_date(int(days[0])), as_date(int(days[-1]) + 1)))


def _refuse_sub_daily(found: Found, times: Times) -> None:
    """Several stamps on most days are hours, not doubled days."""
    steps = np.diff(times.stamps.astype("datetime64[s]").astype(np.int64))
    typical = float(np.median(steps)) if steps.size else _SECONDS_A_DAY
    if 0 < typical < _SECONDS_A_DAY:
        raise DataError(
            describe(
                "time steps are shorter than a day",
                where=found.where,
                expected="one step a day",
                actual=f"steps of {typical / 3600:g} hours",
                fix="make daily values of them first: h2mv-dist prepare",
            )
        )


def _refuse_stamps_of_other_days(found: Found, times: Times) -> None:
    """Nobody sees from the values that a day is taken for the next one."""
    bounds = bounds_of(found, times)
    if bounds is None:
        return
    wrong = np.flatnonzero(begin_on_another_day(times, bounds))
    if wrong.size:
        expected = "stamps on the day that their bounds begin"
        fix = "run h2mv-dist prepare first, which goes by the bounds, or correct the stamps"
        raise _misnamed(found, times, bounds, wrong, expected, fix)


def _refuse_stamps_of_other_steps(found: Found, times: Times, frequency: Frequency) -> None:
    """By the middle of each interval: observed months need not begin where the calendar's do."""
    bounds = bounds_of(found, times)
    if bounds is None:
        return
    noun, unit = ("day", "datetime64[D]") if frequency == "daily" else ("month", "datetime64[M]")
    middles = (bounds.sum(axis=1) // 2).astype("datetime64[s]")
    wrong = np.flatnonzero(middles.astype(unit) != times.stamps.astype(unit))
    if wrong.size:
        expected = f"stamps in the {noun} that the middle of their bounds is in"
        raise _misnamed(found, times, bounds, wrong, expected, "correct the stamps, or the bounds")


def _misnamed(
    found: Found, times: Times, bounds: IntArray, wrong: IntArray, expected: str, fix: str
) -> DataError:
    stamp, start, end = (
        moment.astype("datetime64[m]")
        for moment in (times.stamps[wrong[0]], *bounds[wrong[0]].astype("datetime64[s]"))
    )
    return DataError(
        describe(
            "time stamps name other days than the bounds of the time axis",
            where=found.where,
            expected=expected,
            actual=f"{stamp} for {start} to {end}; {wrong.size} such steps",
            fix=fix,
        )
    )


def _broken_days(found: Found, day: int, jump: int) -> DataError:
    if jump > 1:
        what, actual = "a day is missing", f"no {as_date(day + 1)} after {as_date(day)}"
    elif jump == 0:
        what, actual = "a day is there twice", f"{as_date(day)} twice"
    else:
        what, actual = "days are out of order", f"{as_date(day + jump)} after {as_date(day)}"
    return DataError(
        describe(
            what,
            where=found.where,
            expected="every day exactly once, in increasing order",
            actual=actual,
            fix="complete or sort the series; it must be daily, since the simulation cannot skip a day",
        )
    )


def target_steps(found: Found) -> tuple[Times, StepAxis]:
    """Time stamps of a target, and its steps: daily or monthly, gaps allowed.

    Raises:
        DataError: steps are of another length, doubled or out of order, CF bounds say that stamps name other
            steps, or the time coordinate cannot be understood.
        StoreError: it cannot be read.
    """
    times = times_of(found)
    days = times.days()
    if days.size == 0:
        raise DataError(f"{found.where} has no time step")
    _refuse_sub_daily(found, times)
    frequency = _frequency(found, days)
    if frequency == "monthly":
        days = days.astype("datetime64[D]").astype("datetime64[M]").astype("datetime64[D]").astype(np.int64)
    wrong = np.diff(days) <= 0
    if wrong.any():
        at = int(np.argmax(wrong))
        raise _unsorted_steps(found, frequency, int(days[at]), int(days[at + 1]))
    _refuse_stamps_of_other_steps(found, times, frequency)
    return times, StepAxis(days, frequency)


def _frequency(found: Found, days: IntArray) -> Frequency:
    """Months where steps are mostly four weeks apart or more (a single step too), days where some are one."""
    jumps = np.abs(np.diff(days))
    typical = float(np.median(jumps)) if jumps.size else 30.0
    if typical >= 28:
        return "monthly"
    if (jumps == 1).any():
        return "daily"
    raise DataError(
        describe(
            "a target is neither daily nor monthly",
            where=found.where,
            expected="a step a day or a calendar month; gaps are allowed",
            actual=f"steps mostly {typical:g} days apart",
            fix="average it to months first",
        )
    )


def _unsorted_steps(found: Found, frequency: Frequency, before: int, after: int) -> DataError:
    noun = "day" if frequency == "daily" else "month"
    what = f"a {noun} is there twice" if before == after else f"{noun}s are out of order"
    return DataError(
        describe(
            what,
            where=found.where,
            expected=f"each {noun} at most once, in increasing order",
            actual=f"{as_date(after)} after {as_date(before)}",
            fix="drop or sort the steps",
        )
    )


def common_period(found: Sequence[Found], periods: Sequence[Period], wanted: Period | None) -> Period:
    """The days that are used: ``wanted``, else all that every forcing variable has.

    Args:
        found: the forcing variables.
        periods: the days of each.
        wanted: the days asked for; None for all.

    Raises:
        DataError: a variable lacks wanted days, or there is no day that all of them have.
    """
    common = wanted or periods[0]
    for f, period in zip(found, periods, strict=True):
        if wanted is not None and not period.contains(wanted):
            raise _other_period(f, f"every day of data.period = {wanted}", period, "shorten data.period")
        shared = common.common(period)
        if shared is None:
            raise _other_period(f, f"days of {common}, as other variables", period, "give it those days")
        common = shared
    return common


def _other_period(found: Found, expected: str, actual: Period, fix: str) -> DataError:
    return DataError(
        describe(
            "a forcing variable has other days",
            where=found.where,
            expected=expected,
            actual=str(actual),
            fix=fix,
        )
    )


def uneven_days(periods: Mapping[str, Period]) -> str:
    """Which variables begin after others, or end before them, in words; empty if none does.

    >>> long, short = (Period.parse(f"2001-01-01..2001-01-0{day}") for day in (9, 8))
    >>> uneven_days({"runoff": short, "precipitation": long}), uneven_days({"runoff": long})
    ('runoff ends 2001-01-08, others 2001-01-09', '')
    """
    first, last = min(p.start for p in periods.values()), max(p.stop for p in periods.values())
    begins = [f"{name} begins {p.start}" for name, p in periods.items() if p.start > first]
    ends = [f"{name} ends {p.stop}" for name, p in periods.items() if p.stop < last]
    sides = ((begins, first), (ends, last))
    return "; ".join(f"{', '.join(late)}, others {day}" for late, day in sides if late)
