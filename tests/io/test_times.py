"""Time: forcing has every day once; targets are daily or monthly, with gaps."""

from datetime import date
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from h2mv_dist.config import VariableSource
from h2mv_dist.errors import DataError
from h2mv_dist.grid import Period, as_date
from h2mv_dist.io.source import Source
from h2mv_dist.io.times import StepAxis
from tests.conftest import Place
from tests.io.builders import (
    DAYS,
    FIRST,
    N_DAYS,
    Arrays,
    Stored,
    axes,
    cf,
    field_of,
    open_cf,
    read,
    read_of,
    whole,
)


def with_time(days: NDArray[Any], **attrs: str) -> Arrays:
    """The CF data set with another time axis."""
    arrays = cf()
    arrays["time"] = Stored(days, ("time",), {**DAYS, **attrs})
    return arrays


@pytest.mark.parametrize(
    ("days", "message"),
    [
        (
            np.where(np.arange(N_DAYS) < 10, np.arange(N_DAYS), np.arange(N_DAYS) + 1),
            "no 2004-01-25 after 2004-01-24",
        ),
        (np.where(np.arange(N_DAYS) < 10, np.arange(N_DAYS), np.arange(N_DAYS) - 1), "2004-01-24 twice"),
        (np.arange(N_DAYS)[::-1].copy(), "days are out of order"),
        (np.arange(N_DAYS) / 8, "shorter than a day(.|\n)*steps of 3 hours"),
        (np.arange(N_DAYS) * 30, "a day is missing"),
    ],
    ids=["missing", "doubled", "reversed", "hourly", "monthly"],
)
def test_forcing_has_every_day_once(folder: Place, days: NDArray[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_cf(folder, with_time(days))


@pytest.mark.parametrize("calendar", ["noleap", "365_day", "360_day", "julian", "all_leap"])
def test_other_calendars_are_refused_with_the_reason(folder: Place, calendar: str) -> None:
    with pytest.raises(DataError, match=rf"calendar '{calendar}' is not supported(.|\n)*convert_calendar"):
        open_cf(folder, with_time(np.arange(N_DAYS), calendar=calendar))


def test_time_without_units_is_refused(folder: Place) -> None:
    arrays = cf()
    arrays["time"].attrs.clear()
    with pytest.raises(DataError, match="time coordinate cannot be read"):
        open_cf(folder, arrays)


def test_missing_time_is_named(folder: Place) -> None:
    arrays = cf()
    del arrays["time"]
    with pytest.raises(DataError, match="no time coordinate"):
        open_cf(folder, arrays)


@pytest.mark.parametrize("hour", [0, 9, 12, 23])
def test_the_hour_of_a_daily_stamp_does_not_count(folder: Place, hour: int) -> None:
    hours = np.arange(N_DAYS) * 24 + hour
    source = open_cf(folder, with_time(hours, units=f"hours since {FIRST}"))
    assert source.period.start == FIRST
    assert source.period.n_days == N_DAYS


def with_bounds(first: float, stop: float, stamp: float) -> Arrays:
    """The CF data set with intervals from ``first`` to ``stop`` of each day, stamped ``stamp``, in days."""
    day = np.arange(N_DAYS)
    arrays = with_time(day + stamp, bounds="time_bnds")
    return {**arrays, "time_bnds": Stored(np.stack([day + first, day + stop], 1), ("time", "bnds"))}


def test_daily_stamps_that_bounds_say_are_of_the_day_before_are_refused(folder: Place) -> None:
    with pytest.raises(DataError, match=r"2004-01-16T00:00 for 2004-01-15T00:00 to (.|\n)*h2mv-dist prepare"):
        open_cf(folder, with_bounds(0, 1, 1))


@pytest.mark.parametrize(("first", "stop"), [(0, 1), (0.5, 0.5), (0.25, 1.25), (0, 3)])
def test_bounds_that_begin_on_the_day_of_the_stamp_are_of_that_day(
    folder: Place, first: float, stop: float
) -> None:
    assert open_cf(folder, with_bounds(first, stop, 0.5)).period.start == FIRST


def test_a_period_cuts_the_forcing_across_a_leap_day(folder: Place) -> None:
    period = Period(date(2004, 2, 27), date(2004, 3, 3))
    source = open_cf(folder, cf(), period=period)
    first = (period.start - FIRST).days
    np.testing.assert_array_equal(read(source), read_of(cf())[first : first + 5])
    assert period.n_days == 5


def test_a_period_beyond_the_forcing_is_refused(folder: Place) -> None:
    with pytest.raises(DataError, match=r"other days(.|\n)*2004-01-01\.\.2004-02-01(.|\n)*2004-01-15\.\."):
        open_cf(folder, cf(), period=Period(date(2004, 1, 1), date(2004, 2, 1)))


def longer_rain() -> Arrays:
    """Precipitation in a group of its own, with five more days in front."""
    arrays = cf()
    rain = arrays.pop("precipitation")
    more = np.concatenate([rain.values[:5] + 1, rain.values])
    own = axes(np.arange(-5, N_DAYS))
    return {**arrays, **{f"p/{n}": a for n, a in own.items()}, "p/rain": Stored(more, rain.dims, rain.attrs)}


def test_days_that_all_forcing_has_are_used(folder: Place, caplog: pytest.LogCaptureFixture) -> None:
    rain = {"precipitation": VariableSource(name="rain", group="p")}
    source = open_cf(folder, longer_rain(), variables=rain)
    assert source.period == Period(FIRST, as_date(source.period.first + N_DAYS))
    np.testing.assert_array_equal(read(source), read_of(cf()))
    source.tell_uneven_days()
    (told,) = caplog.messages
    assert "2004-01-15..2004-04-04" in told
    assert told.endswith(
        "net_radiation begins 2004-01-15, air_temperature begins 2004-01-15, others 2004-01-10"
    )
    period = Period(date(2004, 2, 1), date(2004, 2, 11))
    other = Place(folder.url + "2", folder.options)
    source = open_cf(other, longer_rain(), variables=rain, period=period)
    np.testing.assert_array_equal(read(source), read_of(cf())[17:27])
    source.tell_uneven_days()
    assert len(caplog.messages) == 1, "days that were asked for are no surprise"


def test_forcing_without_a_common_day_is_refused(folder: Place) -> None:
    arrays = longer_rain()
    arrays["p/time"].values[...] -= 90
    rain = {"precipitation": VariableSource(name="rain", group="p")}
    with pytest.raises(DataError, match=r"p/rain(.|\n)*days of 2004-01-15(.|\n)*2003-10-12\.\.2004-01-05"):
        open_cf(folder, arrays, variables=rain)


def target(days: NDArray[Any], units: str = "mm d-1", bounds: NDArray[Any] | None = None) -> Arrays:
    """The CF data set and runoff with its own time axis."""
    values = field_of(9, days.size)
    own = {f"obs/{name}": stored for name, stored in axes(days).items()}
    if bounds is not None:
        own["obs/time"] = Stored(days, ("time",), {**DAYS, "bounds": "time_bnds"})
        own["obs/time_bnds"] = Stored(bounds, ("time", "bnds"))
    return {**cf(), **own, "obs/runoff": Stored(values, ("time", "lat", "lon"), {"units": units})}


def open_target(place: Place, days: NDArray[Any], bounds: NDArray[Any] | None = None) -> Source:
    variables = {"runoff": VariableSource(group="obs")}
    return open_cf(place, target(days, bounds=bounds), targets=("runoff",), variables=variables)


def test_months_are_stamped_anywhere_and_may_be_missing(folder: Place) -> None:
    """Stamps: 16 December, 31 January, 1 February, 16 March, 30 April; two months lie inside the forcing."""
    stamps = np.array([-30, 16, 17, 61, 106])
    source = open_target(folder, stamps)
    axis = source.targets["runoff"]
    assert axis.frequency == "monthly"
    assert [as_date(d) for d in axis.days] == [date(2004, 2, 1), date(2004, 3, 1)]
    first, stop = axis.ranges()
    assert (stop - first).tolist() == [29, 31]
    np.testing.assert_array_equal(
        source.read_targets(whole(source))["runoff"], target(stamps)["obs/runoff"].values[2:4]
    )


@pytest.mark.parametrize(
    ("days", "bounds", "step"),
    [
        (np.array([1, 2, 3]), np.array([[0, 1], [1, 2], [2, 3]]), "day"),
        # 1 February for January, 1 March for February
        (np.array([17, 46]), np.array([[-14, 17], [17, 46]]), "month"),
    ],
    ids=["days", "months"],
)
def test_targets_stamped_at_the_end_of_their_bounds_are_refused(
    folder: Place, days: NDArray[Any], bounds: NDArray[Any], step: str
) -> None:
    with pytest.raises(DataError, match=f"name other days(.|\n)*in the {step} (.|\n)*correct the stamps"):
        open_target(folder, days, bounds)


def test_an_observed_month_is_the_one_its_middle_is_in(folder: Place) -> None:
    """From 28 January to 4 March, and from 5 March to 6 April."""
    bounds = np.array([[13, 49], [50, 82]])
    assert len(open_target(folder, np.array([30, 66]), bounds).targets["runoff"]) == 2


def test_daily_targets_may_have_gaps_and_are_cut_to_the_forcing(folder: Place) -> None:
    days = np.array([-2, -1, 0, 3, 4, 5, 40, 41, 79, 80])
    axis = open_target(folder, days).targets["runoff"]
    assert axis.frequency == "daily"
    assert (axis.days - Period(FIRST, as_date(99999)).first).tolist() == [0, 3, 4, 5, 40, 41, 79]


@pytest.mark.parametrize(
    ("days", "message"),
    [
        (np.array([0, 1, 1, 2]), "a day is there twice"),
        (np.array([0, 2, 1, 3]), "days are out of order"),
        (np.array([-14, 17, 20, 46, 77, 107]), "a month is there twice"),
        (np.array([46, 17, -14]), "months are out of order"),
        (np.arange(0, 80, 8), "neither daily nor monthly(.|\n)*8 days apart"),
        (np.arange(40) / 24, "shorter than a day"),
        (np.array([900, 931, 960]), "no step inside the days"),
    ],
)
def test_target_steps_that_are_refused(folder: Place, days: NDArray[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_target(folder, days)


@given(st.integers(-20_000, 20_000), st.integers(1, 40), st.integers(1, 1000))
def test_a_month_is_inside_a_period_when_all_its_days_are(first: int, n_months: int, n_days: int) -> None:
    months = np.arange(n_months) + np.datetime64(as_date(first), "M")
    axis = StepAxis(months.astype("datetime64[D]").astype(np.int64), "monthly")
    period = Period(as_date(first + 100), as_date(first + 100 + n_days))
    kept = set(axis.cut(axis.within(period)).days.tolist())
    days = set(period.days().tolist())
    expected = {int(a) for a, b in zip(*axis.ranges(), strict=True) if set(range(a, b)) <= days}
    assert kept == expected
