"""Day steps: which steps of a series make up each whole day (UTC); steps are days or an even part of one.

A step stands for an interval. Its time stamp may name the interval's start, middle or end: an hour that ends
at midnight belongs to the day before.
"""

from typing import Final, NamedTuple

import numpy as np

from h2mv_dist.config import Stamp
from h2mv_dist.errors import DataError, describe
from h2mv_dist.grid import IntArray, Period, as_date
from h2mv_dist.io.library import Found
from h2mv_dist.io.times import Times, begin_on_another_day, bounds_of, daily_times, times_of

DAY: Final = 86_400
"""Seconds."""
_ELAPSED: Final = {"start": 0.0, "middle": 0.5, "end": 1.0}
"""Stamp -> share of the interval that has passed then."""


class DaySteps(NamedTuple):
    """The whole days of a series.

    Attributes:
        times: of all its steps.
        period: the days of which every step is there.
        first: position of the first step of the first of these days.
        per_day: steps of a day.
        stamp: what time stamps name, in a word for the user.
    """

    times: Times
    period: Period
    first: int
    per_day: int
    stamp: str


def day_steps(found: Found, *, amounts: bool, stamp: Stamp | None) -> DaySteps:
    """The steps of each whole day of a forcing variable.

    Args:
        found: the variable.
        amounts: whether values are amounts of an interval; else they are states or rates.
        stamp: which moment of its interval a time stamp names. If None: what CF bounds of the time axis say;
            without bounds the start, or of daily values the day, but amounts are refused. Of daily states and
            rates the day is also taken where bounds begin on it, whatever their hours.

    Raises:
        DataError: a step is missing, doubled or out of order, steps do not fill days, no day is whole, or
            nothing says which interval an amount belongs to.
        StoreError: the time axis cannot be read.
    """
    times = times_of(found)
    stamps = times.seconds()
    bounds = bounds_of(found, times) if stamp is None else None
    of_stamps = bounds is None or not begin_on_another_day(times, bounds).any()
    step = int(np.median(np.diff(stamps))) if stamps.size > 1 else DAY
    if step >= DAY and stamp is None and not amounts and of_stamps:
        stored = daily_times(found)
        return DaySteps(stored.times, stored.period, 0, 1, "day")
    if step < 1 or DAY % step:
        raise _uneven(found, step)
    if bounds is not None:
        return _whole_days(found, times, _interval_starts(found, bounds, step), step, "bounds")
    if stamp is None and amounts:
        raise _untold(found, times, step)
    named = stamp or "start"
    return _whole_days(found, times, stamps - int(step * _ELAPSED[named]), step, named)


def _interval_starts(found: Found, bounds: IntArray, step: int) -> IntArray:
    wrong = np.flatnonzero(bounds[:, 1] - bounds[:, 0] != step)
    if wrong.size:
        start, end = bounds[wrong[0]]
        raise DataError(
            describe(
                "the bounds of the time axis are not its intervals",
                where=found.where,
                expected=f"intervals as long as the steps, {_hours(step)}",
                actual=f"{_moment(start)} to {_moment(end)}; {wrong.size} such intervals",
                fix=f'correct the bounds, or set prepare.stamps.{found.name} = "start", "middle" or "end"',
            )
        )
    return bounds[:, 0]


def _whole_days(found: Found, times: Times, starts: IntArray, step: int, stamp: str) -> DaySteps:
    """The whole days in intervals of ``step`` seconds that begin at ``starts``."""
    _refuse_gaps(found, starts, step)
    per_day = DAY // step
    before, uneven = divmod(int(-starts[0] % DAY), step)
    n_days = (starts.size - before) // per_day
    if uneven or n_days < 1:
        raise DataError(
            describe(
                "intervals do not begin at midnight (UTC)" if uneven else "no day is whole",
                where=found.where,
                expected=f"intervals of {_hours(step)} that fill days from 00:00 UTC on",
                actual=f"the first begins at {_moment(starts[0])}, the last at {_moment(starts[-1])}, taking "
                f"{stamp} for what time stamps say",
                fix=f'set prepare.stamps.{found.name} to what they name ("start", "middle" or "end"), or '
                "give whole days",
            )
        )
    first_day = int(starts[before]) // DAY
    period = Period(as_date(first_day), as_date(first_day + n_days))
    return DaySteps(times, period, before, per_day, stamp)


def _refuse_gaps(found: Found, starts: IntArray, step: int) -> None:
    jumps = np.diff(starts)
    wrong = np.flatnonzero(jumps != step)
    if wrong.size:
        jump = int(jumps[wrong[0]])
        what = "is there twice" if jump == 0 else "is missing" if jump > 0 else "is out of order"
        before, after = starts[wrong[0]], starts[wrong[0] + 1]
        raise DataError(
            describe(
                f"a time step {what}",
                where=found.where,
                expected=f"an interval every {_hours(step)}: every one of each day, once and in order",
                actual=f"one begins at {_moment(before)}, the next at {_moment(after)}; {wrong.size} places",
                fix="complete or sort the series; a day is never made of fewer steps than it has",
            )
        )


def _uneven(found: Found, step: int) -> DataError:
    return DataError(
        describe(
            "time steps do not fill days",
            where=found.where,
            expected="steps of a day, or of an even part of it (1, 3, 6 hours ...)",
            actual=f"steps of {_hours(step)}",
            fix="resample the series first",
        )
    )


def _untold(found: Found, times: Times, step: int) -> DataError:
    return DataError(
        describe(
            "nothing says which interval an amount belongs to",
            where=found.where,
            expected="CF bounds of the time axis, or a setting",
            actual=f"amounts of {_hours(step)}, the first stamped {times.stamps[0].astype('datetime64[m]')}; "
            "no bounds",
            fix=f'set prepare.stamps.{found.name} = "end" if a stamp is the end of its interval (most '
            'accumulated fields), otherwise "start" or "middle"',
        )
    )


def _hours(seconds: int) -> str:
    return f"{seconds / 3600:g} h"


def _moment(seconds: int) -> str:
    return str(np.datetime64(int(seconds), "s").astype("datetime64[m]"))
