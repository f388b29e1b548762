"""Days of hourly forcing: against pandas, for all time stamps, with each chunk read once; bad series."""

from datetime import date

import numpy as np
import pandas as pd
import pytest

from h2mv_dist.config import DataSettings, Stamp, VariableSource
from h2mv_dist.errors import ConfigError, DataError
from h2mv_dist.grid import Period
from h2mv_dist.io import daily as daily_module
from h2mv_dist.io.daily import open_daily
from tests.conftest import Place
from tests.io.builders import FORCING, Stored, cf, open_cf, read
from tests.io.counting import CountingFileSystem, forget_reads
from tests.io.subdaily import (
    AMOUNTS,
    MEANS,
    days_of,
    expected,
    hourly,
    hours_since,
    opened,
    stamped,
    starts,
)

STAMPS: tuple[Stamp, ...] = ("start", "middle", "end")


def all_stamped(stamp: Stamp) -> dict[str, Stamp]:
    return dict.fromkeys(FORCING, stamp)


@pytest.mark.parametrize("stamp", STAMPS)
@pytest.mark.parametrize("hours", [1, 3, 6, 24])
def test_days_are_those_of_pandas(folder: Place, stamp: Stamp, hours: int) -> None:
    begin = starts("2004-02-27T18:00" if hours < 24 else "2004-02-27", hours, 5 * 24 // hours + 2)
    arrays = hourly(stamped(begin, hours, stamp), AMOUNTS)
    daily = opened(folder, arrays, all_stamped(stamp))
    for column, (name, how, scale, offset) in enumerate(
        (
            ("net_radiation", "sum", 1 / 86_400, 0.0),
            ("precipitation", "sum", 1.0, 0.0),
            ("air_temperature", "mean", 1.0, 273.15),
        )
    ):
        table = expected(arrays[name].values, begin, how)
        ours = days_of(daily, column, 7)
        assert daily.period == Period(table.index[0].date(), (table.index[-1] + pd.Timedelta("1D")).date())
        want = (table.to_numpy() * scale + offset).astype(np.float32).reshape(ours.shape)
        np.testing.assert_array_max_ulp(ours, want, maxulp=1)
        assert daily.forcing[column].amounts == (how == "sum")


def test_the_hour_that_ends_at_midnight_belongs_to_the_day_before(folder: Place) -> None:
    ends = pd.date_range("2004-01-01T01:00", "2004-01-03T00:00", freq="1h")
    arrays = hourly(hours_since(ends), AMOUNTS)
    rain = np.zeros((48, 4, 6), np.float32)
    rain[23], rain[24] = 5.0, 7.0  # stamped 2004-01-02 00:00 and 01:00
    arrays["precipitation"].values = rain
    daily = opened(folder, arrays, all_stamped("end"))
    assert daily.period == Period(date(2004, 1, 1), date(2004, 1, 3))
    assert days_of(daily, 1)[:, 0, 0].tolist() == [5.0, 7.0]


def test_rates_are_averaged_and_stamped_at_the_start_if_nothing_says_otherwise(folder: Place) -> None:
    begin = starts("2004-01-01", 1, 48)
    arrays = hourly(hours_since(begin), MEANS)
    daily = opened(folder, arrays)
    rain = expected(arrays["precipitation"].values, begin, "mean").to_numpy() * 86_400
    np.testing.assert_allclose(days_of(daily, 1).reshape(2, -1), rain, rtol=1e-6)
    assert {(series.amounts, series.stamp) for series in daily.forcing} == {(False, "start")}


@pytest.mark.parametrize("fractions", [False, True], ids=["hours", "fractions of a day"])
def test_bounds_say_which_interval_is_meant(folder: Place, fractions: bool) -> None:
    begin = starts("2004-01-01", 1, 72)
    end = hours_since(begin + pd.Timedelta("1h"))
    bounds = np.stack([hours_since(begin).values, end.values], axis=1)
    scale, unit = (24.0, "days") if fractions else (1.0, "hours")
    time = Stored(end.values / scale, ("time",), {"units": f"{unit} since 2000-01-01", "bounds": "limits"})
    arrays = {**hourly(time, AMOUNTS), "limits": Stored(bounds / scale, ("time", "side"))}
    daily = opened(folder, arrays)
    assert daily.period.n_days == 3
    assert {series.stamp for series in daily.forcing} == {"bounds"}
    rain = expected(arrays["precipitation"].values, begin, "sum").to_numpy()
    np.testing.assert_allclose(days_of(daily, 1).reshape(3, -1), rain, rtol=1e-6)


def test_bounds_put_daily_states_and_amounts_on_the_same_day(folder: Place) -> None:
    begin = starts("2004-01-01", 24, 10)
    end = hours_since(begin + pd.Timedelta("24h"))
    bounds = np.stack([hours_since(begin).values, end.values], axis=1)
    time = Stored(end.values, ("time",), {**end.attrs, "bounds": "limits"})
    arrays = {**hourly(time, {**MEANS, "precipitation": "mm"}), "limits": Stored(bounds, ("time", "side"))}
    daily = opened(folder, arrays)
    assert daily.period == Period(date(2004, 1, 1), date(2004, 1, 11))
    assert [series.left_out for series in daily.forcing] == [(0, 0)] * 3
    assert {series.stamp for series in daily.forcing} == {"bounds"}


def test_days_at_the_ends_count_if_every_variable_has_them_whole(folder: Place) -> None:
    stamps = hours_since(starts("2004-01-01", 1, 96))
    arrays = hourly(stamps, AMOUNTS)
    daily = opened(folder, arrays, {"net_radiation": "end", "precipitation": "end"})
    # the last hour of the 4th is stamped 00:00 of the 5th, which is not there
    assert daily.period == Period(date(2004, 1, 1), date(2004, 1, 4))
    assert [series.left_out for series in daily.forcing] == [(1, 23), (1, 23), (0, 24)]
    np.testing.assert_array_equal(
        days_of(daily, 1)[0], arrays["precipitation"].values[1:25].sum(0, dtype=np.float64).astype(np.float32)
    )


def test_a_wanted_period_is_taken_as_it_is(folder: Place) -> None:
    begin = starts("2004-01-01T05:00", 1, 100)
    arrays = hourly(hours_since(begin), MEANS)
    wanted = Period(date(2004, 1, 3), date(2004, 1, 4))
    daily = opened(folder, arrays, period=wanted)
    assert daily.period == wanted
    temperature = expected(arrays["air_temperature"].values, begin, "mean").loc["2004-01-03"].to_numpy()
    np.testing.assert_allclose(days_of(daily, 2).ravel(), temperature + 273.15, rtol=1e-6)


def test_daily_values_stay_as_they_are(folder: Place) -> None:
    source = open_cf(folder, cf())
    settings = DataSettings(url=folder.url, layout="cf", static=("elevation", "clay"))
    daily = open_daily(settings, forcing=FORCING, stamps={}, options=folder.options)
    ours = np.stack([days_of(daily, column) for column in range(3)], axis=-1)
    np.testing.assert_array_equal(ours, read(source))


@pytest.mark.parametrize("chunk", [(1, 4, 6), (7, 2, 3), (24, 4, 6), (50, 3, 4), (200, 2, 2)], ids=str)
@pytest.mark.parametrize("at_once", [1, 100, 2**23])
def test_every_chunk_is_read_once(
    counting: Place, chunk: tuple[int, int, int], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daily_module, "READ_VALUES", at_once)
    begin = starts("2004-01-01", 1, 96)
    arrays = hourly(stamped(begin, 1, "end"), AMOUNTS, chunk)
    daily = opened(counting, arrays, all_stamped("end"))
    series = daily.forcing[1]
    n_steps, *cells = series.read_shape(4, daily.grid.shape)
    forget_reads()
    for box in daily.grid.tiles(tuple(cells)):
        parts = list(series.days(slice(0, 4), box.slices, n_steps))
        want = arrays["precipitation"].values[:, *box.slices].reshape(4, 24, *box.shape)
        np.testing.assert_array_equal(np.concatenate(parts), want.sum(1, dtype=np.float64).astype(np.float32))
    reads = {path: n for path, n in CountingFileSystem.reads.items() if "/precipitation/c/" in path}
    assert set(reads.values()) == {1}
    assert len(reads) == np.prod([-(-n // c) for n, c in zip((96, 4, 6), chunk, strict=True)])


@pytest.mark.parametrize(
    ("lengths", "times"), [([10, 10], 1.0), ([5, 5, 5, 5], 2.0), ([10, 5, 5], 1.5), ([20], 1.0)], ids=str
)
def test_how_often_chunks_are_read_is_known_before(folder: Place, lengths: list[int], times: float) -> None:
    arrays = hourly(hours_since(starts("2004-01-01", 6, 80)), MEANS, (40, 4, 6))
    assert opened(folder, arrays).forcing[0].chunk_reads(lengths) == times


def broken(change: str) -> pd.DatetimeIndex:
    good = starts("2004-01-01", 1, 72)
    if change == "missing":
        return good.delete([30, 31])
    if change == "twice":
        return good.insert(31, good[30]).delete(50)
    if change == "out of order":
        return good[[*range(30), 31, 30, *range(32, 72)]]
    if change == "five hours":
        return starts("2004-01-01", 5, 40)
    if change == "odd":
        return good + pd.Timedelta("20min")
    return starts("2004-01-01T01:00", 1, 30)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "step is missing(.|\n)*2004-01-02T05:00, the next at 2004-01-02T08:00"),
        ("twice", "is there twice"),
        ("out of order", "step is missing|out of order"),
        ("five hours", "do not fill days(.|\n)*steps of 5 h"),
        ("odd", "do not begin at midnight(.|\n)*2004-01-01T00:20(.|\n)*prepare.stamps.net_radiation"),
        ("short", "no day is whole"),
    ],
)
def test_days_without_all_their_hours_are_refused(folder: Place, change: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        opened(folder, hourly(hours_since(broken(change)), MEANS))


@pytest.mark.parametrize("hours", [1, 24])
def test_amounts_are_refused_where_nothing_says_what_their_stamps_are(folder: Place, hours: int) -> None:
    arrays = hourly(hours_since(starts("2004-01-01", hours, 48)), {**MEANS, "precipitation": "mm"})
    with pytest.raises(DataError, match=r'first stamped 2004-01-01T00:00(.|\n)*stamps.precipitation = "end"'):
        opened(folder, arrays)


def test_bounds_that_are_not_the_steps_are_refused(folder: Place) -> None:
    time = hours_since(starts("2004-01-01", 1, 48))
    time.attrs["bounds"] = "limits"
    limits = Stored(np.stack([time.values, time.values + 2], axis=1), ("time", "side"))
    with pytest.raises(DataError, match=r"not its intervals(.|\n)*00:00 to 2004-01-01T02:00; 48 such"):
        opened(folder, {**hourly(time, MEANS), "limits": limits})


def test_stamps_of_unknown_variables_are_refused(folder: Place) -> None:
    with pytest.raises(ConfigError, match="did you mean 'precipitation'"):
        opened(folder, cf(), {"precipitaton": "end"})


def test_units_that_are_neither_rate_nor_amount_are_refused(folder: Place) -> None:
    arrays = hourly(hours_since(starts("2004-01-01", 1, 48)), {**MEANS, "precipitation": "K"})
    with pytest.raises(DataError, match=r"'K'(.|\n)*data.variables.precipitation.units"):
        opened(folder, arrays)


def test_days_that_one_series_lacks_are_left_out(folder: Place) -> None:
    arrays = hourly(hours_since(starts("2004-01-01", 1, 240)), MEANS)
    other = arrays.pop("air_temperature")
    short = {k: v for k, v in arrays.items() if k in ("lat", "lon")}
    short |= {"time": hours_since(starts("2004-01-01", 1, 48))}
    short |= {"t": Stored(other.values[:48], other.dims, other.attrs)}
    arrays |= {f"other/{name}": stored for name, stored in short.items()}
    daily = opened(folder, arrays, variables={"air_temperature": VariableSource(group="other", name="t")})
    assert daily.period == Period(date(2004, 1, 1), date(2004, 1, 3))
    assert [series.left_out for series in daily.forcing] == [(0, 192), (0, 192), (0, 0)]
