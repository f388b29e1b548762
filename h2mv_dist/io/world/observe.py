"""Imperfect observations of a hidden truth, the way satellites and gauges would make them.

Packed arrays are [cell, time], [cell, month] or [cell, step] with land cells row-major.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, NamedTuple

import numpy as np

from h2mv_dist.errors import ConfigError, DataError, describe
from h2mv_dist.grid import FloatArray, IntArray, Period, as_date
from h2mv_dist.io.world.climate import generator
from h2mv_dist.io.world.land import ClassArray, Land, MaskArray
from h2mv_dist.io.world.weather import declination, year_phase
from h2mv_dist.spec import Float32Array
from h2mv_dist.variables import nearest

TRUTH: Final = (
    "terrestrial_water_storage",
    "evapotranspiration",
    "runoff",
    "fapar",
    "snow_water_equivalent",
)
"""Daily outputs of a hidden model that :func:`observe` needs."""

TARGETS: Final = ("terrestrial_water_storage_anomaly", *TRUTH[1:])
"""What :func:`observe` makes of each of them."""


@dataclass(frozen=True, slots=True, eq=False)
class ObservedTarget:
    """One observed variable.

    Attributes:
        values: mm, mm d-1 or 1, NaN where nothing was observed, [cell, step].
        days: first day of each step, days since 1970-01-01, [step]; steps may be absent.
        frequency: length of a step.
    """

    values: Float32Array
    days: IntArray
    frequency: Literal["daily", "monthly"]


class _Scene(NamedTuple):
    """What an observing system depends on.

    Attributes:
        lat: degrees north, [cell].
        climate: class 1..5, [cell].
        period: all days of the truth.
        months: its whole months.
        rng: generator.
    """

    lat: FloatArray
    climate: ClassArray
    period: Period
    months: "_Months"
    rng: np.random.Generator


class _Months(NamedTuple):
    """Whole calendar months.

    Attributes:
        days: first day of each month and of the one after the last, days since 1970-01-01, [month + 1].
        first: column of the first day among the period's days.
    """

    days: IntArray
    first: int

    def means(self, daily: Float32Array) -> FloatArray:
        """Averages of a daily series [cell, time], [cell, month]."""
        lengths = np.diff(self.days)
        whole = daily[:, self.first : self.first + int(lengths.sum())].astype(np.float64)
        return np.asarray(np.add.reduceat(whole, self.days[:-1] - self.days[0], axis=1) / lengths)


def observe(
    land: Land, period: Period, daily: Mapping[str, Float32Array], seed: int
) -> Mapping[str, ObservedTarget]:
    """Observe a hidden truth the way satellites and gauges would: with noise, limits and gaps.

    - terrestrial_water_storage_anomaly: from its own mean, noise 17 mm; one month in 12 is absent from the
      axis and one in 18 is all NaN (both rounded down).
    - evapotranspiration: 12 % and 0.1 mm d-1; 30 % of the arid and polar cells are never seen.
    - runoff: a factor exp(0.22 e - 0.0242), mean 1; 10 % of the cells have no gauge.
    - fapar: 0.04; no value where the noon sun stands below 10 degrees in mid-month or snow exceeds 20 mm.
    - snow_water_equivalent: 10 % and 3 mm, blind beyond 150 to 200 mm (one limit a cell); 0 where there is no
      snow; 10 % of the days missing; no value in the tropics and in mountains (polar climate within 55
      degrees of the equator).

    Monthly values are means of whole months; days of broken months at either end are not used. Noise that
    would leave the physical range (below 0, fapar beyond 1) is cut there, which biases values near a bound
    inwards.

    Args:
        land: cells, row-major.
        period: days of the truth; at least one whole month.
        daily: the five names of :data:`TRUTH`, mm, mm d-1 or 1, no NaN, each [cell, time].
        seed: 0 or more.

    Raises:
        DataError: a name is missing, or its values have another shape or hold NaN.
        ConfigError: no whole month in the period.
    """
    for name in TRUTH:
        _check_truth(name, daily, (land.grid.n_land, period.n_days))
    months = _whole_months(period)
    lat = land.grid.cell_coordinates()[0]

    def scene(number: int) -> _Scene:
        rng = generator(seed, "observation", number)
        return _Scene(lat, land.cell_climate(), period, months, rng)

    snow = daily["snow_water_equivalent"]
    observed = (
        _observe_storage(scene(0), daily["terrestrial_water_storage"]),
        _observe_evapotranspiration(scene(1), daily["evapotranspiration"]),
        _observe_runoff(scene(2), daily["runoff"]),
        _observe_fapar(scene(3), daily["fapar"], snow),
        _observe_snow(scene(4), snow),
    )
    return MappingProxyType(dict(zip(TARGETS, observed, strict=True)))


def _whole_months(period: Period) -> _Months:
    """The calendar months that lie in the period from their first day to their last.

    Raises:
        ConfigError: there is none.

    >>> _whole_months(Period.parse("2001-01-31..2001-04-02")).days.tolist()
    [11354, 11382, 11413]
    """
    all_days = np.arange(period.first, period.first + period.n_days + 1)
    dates = all_days.astype("datetime64[D]")
    starts = all_days[dates == dates.astype("datetime64[M]").astype("datetime64[D]")]
    if starts.size < 2:
        raise ConfigError(f"period {period} holds no whole month; monthly targets need at least one")
    return _Months(starts, int(starts[0] - period.first))


def _check_truth(name: str, daily: Mapping[str, Float32Array], shape: tuple[int, int]) -> None:
    if name not in daily:
        raise DataError(f"the truth lacks {name!r}; {nearest(name, tuple(daily))}")
    values = daily[name]
    gaps = int(np.isnan(values).sum())
    if values.shape == shape and not gaps:
        return
    raise DataError(
        describe(
            "the truth to observe is not complete",
            where=name,
            expected=f"shape {shape} [cell, time] without NaN",
            actual=f"shape {values.shape} with {gaps} NaN",
            fix="give the daily outputs of every land cell, row-major, on every day of the period",
        )
    )


def _monthly(scene: _Scene, values: FloatArray) -> ObservedTarget:
    return ObservedTarget(values.astype(np.float32), scene.months.days[:-1], "monthly")


def _noise(scene: _Scene, values: FloatArray, relative: float, absolute: float) -> FloatArray:
    """Noise of a value, of its own size and of a fixed one, [cell, step]."""
    first, second = (scene.rng.standard_normal(values.shape) for _ in range(2))
    return relative * values * first + absolute * second


def _pick(rng: np.random.Generator, n: int, share: float) -> MaskArray:
    """Exactly ``floor(share * n)`` of ``n`` items, so never all of them, [n]."""
    return np.asarray(rng.permutation(n) < math.floor(share * n))


def _observe_storage(scene: _Scene, truth: Float32Array) -> ObservedTarget:
    monthly = scene.months.means(truth)
    anomaly = monthly - monthly.mean(axis=1, keepdims=True)
    values = anomaly + _noise(scene, anomaly, 0.0, 17.0)
    n_months = values.shape[1]
    order = scene.rng.permutation(n_months)
    n_absent, n_blank = n_months // 12, n_months // 18
    values[:, order[n_absent : n_absent + n_blank]] = np.nan
    present = np.sort(order[n_absent:])
    return ObservedTarget(values[:, present].astype(np.float32), scene.months.days[:-1][present], "monthly")


def _observe_evapotranspiration(scene: _Scene, truth: Float32Array) -> ObservedTarget:
    monthly = scene.months.means(truth)
    values = np.maximum(monthly + _noise(scene, monthly, 0.12, 0.1), 0.0)
    barren = np.flatnonzero(np.isin(scene.climate, (2, 5)))
    values[barren[_pick(scene.rng, barren.size, 0.3)]] = np.nan
    return _monthly(scene, values)


def _observe_runoff(scene: _Scene, truth: Float32Array) -> ObservedTarget:
    monthly = scene.months.means(truth)
    spread = 0.22
    values = monthly * np.exp(spread * scene.rng.standard_normal(monthly.shape) - 0.5 * spread**2)
    values[_pick(scene.rng, monthly.shape[0], 0.1)] = np.nan
    return _monthly(scene, values)


def _observe_fapar(scene: _Scene, truth: Float32Array, snow: Float32Array) -> ObservedTarget:
    monthly = scene.months.means(truth)
    values = np.clip(monthly + _noise(scene, monthly, 0.0, 0.04), 0.0, 1.0)
    hidden = _noon_sun(scene.lat, scene.months) < 10.0
    hidden |= scene.months.means(snow) > 20.0
    return _monthly(scene, np.where(hidden, np.nan, values))


def _noon_sun(lat: FloatArray, months: _Months) -> FloatArray:
    """Height of the sun at noon in the middle of each month, degrees, [cell, month]."""
    middle = (months.days[:-1] + months.days[1:]) // 2
    phase = np.array([year_phase(Period(as_date(int(d)), as_date(int(d) + 1)))[0] for d in middle])
    return 90.0 - np.abs(lat[:, None] - np.rad2deg(declination(phase))[None, :])


def _observe_snow(scene: _Scene, truth: Float32Array) -> ObservedTarget:
    snow = truth.astype(np.float64)
    limit = scene.rng.uniform(150.0, 200.0, (snow.shape[0], 1))
    seen = np.clip(snow + _noise(scene, snow, 0.1, 3.0), 0.0, limit)
    values = np.where(snow > 0.0, seen, 0.0)
    mountains = (scene.climate == 5) & (np.abs(scene.lat) < 55.0)
    missing = scene.rng.random(snow.shape) < 0.1
    values[missing | (mountains | (scene.climate == 1))[:, None]] = np.nan
    return ObservedTarget(values.astype(np.float32), scene.period.days(), "daily")
