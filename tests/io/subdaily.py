"""Small CF data sets with steps of hours, and their days worked out by pandas."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from h2mv_dist.config import DataSettings, Stamp
from h2mv_dist.io.daily import DailyInput, open_daily
from tests.conftest import Place
from tests.io.builders import FORCING, LAND, Arrays, Stored, cf, field_of, write

ELAPSED: Mapping[Stamp, float] = {"start": 0.0, "middle": 0.5, "end": 1.0}
SPACE = ("time", "lat", "lon")
MEANS = {"net_radiation": "W m-2", "precipitation": "kg m-2 s-1", "air_temperature": "degC"}
AMOUNTS = {"net_radiation": "J m**-2", "precipitation": "kg m-2", "air_temperature": "degC"}


def starts(first: str, hours: int, n_steps: int) -> pd.DatetimeIndex:
    """When intervals begin."""
    return pd.date_range(first, periods=n_steps, freq=f"{hours}h")


def hours_since(moments: pd.DatetimeIndex) -> Stored:
    """A time axis."""
    hours = (moments - pd.Timestamp("2000-01-01")) / pd.Timedelta("1h")
    return Stored(np.asarray(hours, np.float64), ("time",), {"units": "hours since 2000-01-01"})


def stamped(begin: pd.DatetimeIndex, hours: float, stamp: Stamp) -> Stored:
    """The time axis of intervals that begin then."""
    return hours_since(begin + pd.Timedelta(hours=hours * ELAPSED[stamp]))


def hourly(time: Stored, units: Mapping[str, str], chunks: tuple[int, int, int] = (1, 4, 6)) -> Arrays:
    """Forcing on a time axis."""
    n_steps = len(time.values)
    arrays = {**cf(), "time": time}
    for seed, name in enumerate(FORCING):
        arrays[name] = Stored(field_of(seed, n_steps), SPACE, {"units": units[name]}, chunks)
    return arrays


def opened(
    place: Place, arrays: Arrays, stamps: Mapping[str, Stamp] | None = None, **data: Any
) -> DailyInput:
    """Write a data set and find its days."""
    write(place, arrays)
    settings = DataSettings(url=place.url, layout="cf", static=("elevation", "clay"), **data)
    return open_daily(settings, forcing=FORCING, stamps=stamps or {}, options=place.options)


def days_of(daily: DailyInput, variable: int, n_steps: int = 100) -> NDArray[np.float32]:
    """All days of a variable, [day, lat, lon]."""
    box = tuple(slice(0, n) for n in daily.grid.shape)
    return np.concatenate(list(daily.forcing[variable].days(slice(0, daily.period.n_days), box, n_steps)))


def expected(values: NDArray[Any], begin: pd.DatetimeIndex, how: str) -> pd.DataFrame:
    """Whole days, [day, cell], by the interval's start."""
    table = pd.DataFrame(values.reshape(len(values), LAND.size).astype(np.float64), index=begin)
    by_day = table.groupby(table.index.floor("D"))
    counts = by_day.size()
    days = by_day.mean() if how == "mean" else by_day.sum(min_count=1)
    whole: pd.DataFrame = days[counts == counts.max()]
    return whole
