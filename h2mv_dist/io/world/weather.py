"""Daily forcing of the made-up world, with its static features.

Packed arrays are [cell, time] with land cells row-major.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final, NamedTuple

import numpy as np

from h2mv_dist.grid import FloatArray, Period
from h2mv_dist.io.world.climate import Field, Sites, generator, make_sites, weather_field
from h2mv_dist.io.world.features import static_features
from h2mv_dist.io.world.land import Land
from h2mv_dist.spec import Float32Array

FORCING: Final = ("net_radiation", "precipitation", "air_temperature")
"""Columns of :attr:`Weather.forcing`."""

_BLOCK_CELLS: Final = 256
"""Cells simulated at once; bounds the memory."""

_SUMMER_PEAK: Final = 0.55
"""Warmest time of a northern year, as a share of it."""

_STEFAN_BOLTZMANN: Final = 5.67e-8
_SOLAR_CONSTANT: Final = 1361.0

_NORMAL_RANKS: Final = np.linspace(0.0005, 0.9995, 2000)
_NORMAL_QUANTILES: Final = np.array([NormalDist().inv_cdf(rank) for rank in _NORMAL_RANKS])

_HUMIDITY: Final = np.array([0.78, 0.35, 0.70, 0.75, 0.80])
"""Relative humidity, of each climate."""

_ALBEDO: Final = np.array([0.17, 0.32, 0.19, 0.18, 0.24])
"""Albedo without snow, of each climate."""


@dataclass(frozen=True, slots=True, eq=False)
class Weather:
    """Inputs of a model.

    Attributes:
        forcing: in the order of :data:`FORCING` (W m-2, mm d-1, K), [cell, time, 3].
        static: features of each cell, in the units their names say (``_m``) or else 1, [cell, feature].
        static_names: names of the features.
    """

    forcing: Float32Array
    static: Float32Array
    static_names: tuple[str, ...]


class _Systems(NamedTuple):
    """Regional weather systems that neighbours share."""

    synoptic: Field
    occurrence: Field
    amounts: tuple[Field, Field]
    slow: Field


class _Rain(NamedTuple):
    """Precipitation and the clouds it falls from, each [cell, time].

    Attributes:
        amount: mm d-1.
        sunshine: share of the possible hours.
    """

    amount: FloatArray
    sunshine: FloatArray


def make_weather(land: Land, period: Period, seed: int) -> Weather:
    """Daily forcing and static features of every land cell.

    Temperature follows latitude, season, distance from the sea and height; precipitation is a latent Gaussian
    (occurrence) times exponential amounts with the climate's seasonality; net radiation is FAO-56's (Allen et
    al. 1998) with clouds on wet days and bright snow. Anomalies are AR(1) in days, smooth in space, and
    stronger or weaker from year to year. Work is done in blocks of cells, so the result is most of the memory
    it takes.

    Args:
        land: from :func:`load_land`.
        period: days to make.
        seed: 0 or more.
    """
    sites = make_sites(land, seed)
    systems = _systems(sites.position, period.n_days, seed)
    phase = year_phase(period)
    forcing = np.empty((sites.lat.size, period.n_days, len(FORCING)), np.float32)
    for number, first in enumerate(range(0, sites.lat.size, _BLOCK_CELLS)):
        cells = slice(first, first + _BLOCK_CELLS)
        local = generator(seed, "local", number)
        forcing[cells] = _block_weather(_at(sites, cells), systems, cells, phase, local)
    return Weather(forcing, *static_features(sites))


def year_phase(period: Period) -> FloatArray:
    """Middle of each day as a share of its own (leap or common) year, [time]."""
    days = period.days().astype("datetime64[D]")
    years = days.astype("datetime64[Y]")
    starts, ends = years.astype("datetime64[D]"), (years + 1).astype("datetime64[D]")
    return np.asarray(((days - starts).astype(np.float64) + 0.5) / (ends - starts).astype(np.float64))


def _systems(position: FloatArray, n_days: int, seed: int) -> _Systems:
    def field(stream: str, length: float, memory: float) -> Field:
        return weather_field(position, n_days, length, memory, generator(seed, stream))

    return _Systems(
        synoptic=field("synoptic", 0.16, 0.82),
        occurrence=field("occurrence", 0.09, 0.65),
        amounts=(field("amount_1", 0.07, 0.3), field("amount_2", 0.07, 0.3)),
        slow=field("slow", 0.35, math.exp(-1.0 / 150.0)),
    )


def _at(sites: Sites, cells: slice) -> Sites:
    return Sites(*(values[cells] for values in sites))


def _block_weather(
    sites: Sites, systems: _Systems, cells: slice, phase: FloatArray, local: np.random.Generator
) -> Float32Array:
    """Forcing of some cells, [cell, time, 3]."""
    season = np.cos(2.0 * np.pi * (phase - _SUMMER_PEAK))
    slow = systems.slow.at(cells)
    rain = _precipitation(sites, systems, cells, season, slow, local)
    temperature = _temperature(sites, systems.synoptic.at(cells) + 0.2 * slow, season)
    radiation = _net_radiation(sites, temperature, rain.sunshine, phase)
    return np.stack([radiation, rain.amount, temperature + 273.15], axis=2).astype(np.float32)


def _temperature(sites: Sites, anomaly: FloatArray, season: FloatArray) -> FloatArray:
    """Air temperature, degC, [cell, time]; anomalies are larger in winter and far from the equator."""
    hemisphere = np.tanh(sites.lat / 5.0)[:, None]
    spread = 1.0 + 3.0 * np.abs(np.sin(np.deg2rad(sites.lat[:, None]))) ** 1.5
    cycle = sites.mean_temperature[:, None] + sites.half_range[:, None] * season
    return cycle + spread * (1.0 - 0.3 * hemisphere * season) * anomaly


def _precipitation(
    sites: Sites,
    systems: _Systems,
    cells: slice,
    season: FloatArray,
    slow: FloatArray,
    local: np.random.Generator,
) -> _Rain:
    """Wet where a latent Gaussian passes a threshold; amounts are exponential with the mean still due."""
    expected = _expected_rain(sites, season, slow)
    share_wet = _wet_share(sites, expected)
    latent = _partly_local(systems.occurrence.at(cells), 0.2, local)
    threshold = np.interp(1.0 - share_wet, _NORMAL_RANKS, _NORMAL_QUANTILES)
    parts = [_partly_local(field.at(cells), 0.3, local) for field in systems.amounts]
    exponential = 0.5 * (parts[0] ** 2 + parts[1] ** 2)
    amount = np.where(latent > threshold, expected / share_wet * exponential, 0.0)
    cover = 1.0 / (1.0 + np.exp(-1.8 * (latent - threshold + 0.3)))
    return _Rain(amount, 0.93 - 0.75 * cover)


def _expected_rain(sites: Sites, season: FloatArray, slow: FloatArray) -> FloatArray:
    """Mean precipitation of each day in its season and year, mm d-1, [cell, time]."""
    strength = (sites.summer_rain * np.tanh(sites.lat / 5.0))[:, None]
    seasonal = np.exp(strength * season) / np.i0(strength)
    variability = np.exp(0.22 * slow - 0.5 * 0.22**2)
    return (sites.annual_rain / 365.25)[:, None] * seasonal * variability


def _wet_share(sites: Sites, expected: FloatArray) -> FloatArray:
    """Probability of a wet day, [cell, time]; it takes up about half of a season's relative change."""
    typical = 0.65 * (1.0 - np.exp(-sites.annual_rain / 650.0))[:, None]
    relative = expected / (sites.annual_rain / 365.25)[:, None]
    return np.clip(typical * np.sqrt(relative), 0.005, 0.9)


def _partly_local(regional: FloatArray, share: float, rng: np.random.Generator) -> FloatArray:
    """Mix of regional and local variance, unit variance in all, [cell, time]."""
    local = rng.standard_normal(regional.shape, dtype=np.float32)
    return math.sqrt(1.0 - share) * regional + math.sqrt(share) * local


def _net_radiation(
    sites: Sites, temperature: FloatArray, sunshine: FloatArray, phase: FloatArray
) -> FloatArray:
    """Net radiation after FAO-56, with bright snow and winter inversions, W m-2, [cell, time]."""
    frost = 1.0 / (1.0 + np.exp(temperature / 2.0))
    albedo = (sites.shares @ _ALBEDO)[:, None] + 0.3 * frost
    solar = (0.25 + 0.5 * sunshine) * _top_of_atmosphere(sites.lat, phase)
    saturation = 0.6108 * np.exp(17.27 * temperature / (temperature + 237.3))
    vapour = (sites.shares @ _HUMIDITY)[:, None] * saturation
    emissivity = (0.34 - 0.14 * np.sqrt(vapour)) * (0.1 + 0.9 * sunshine) * (1.0 - 0.5 * frost)
    thermal = emissivity * _STEFAN_BOLTZMANN * (temperature + 273.15) ** 4
    return np.asarray((1.0 - albedo) * solar - thermal)


def declination(phase: FloatArray) -> FloatArray:
    """Latitude where the sun stands in the zenith at noon, radians, for shares of a year."""
    return np.asarray(0.409 * np.sin(2.0 * np.pi * phase - 1.39))


def _top_of_atmosphere(lat: FloatArray, phase: FloatArray) -> FloatArray:
    """Daily mean solar radiation on a level plane without air (FAO-56, eq. 21), W m-2, [cell, time].

    Args:
        lat: degrees north, [cell].
        phase: shares of a year, [time].

    >>> _top_of_atmosphere(np.array([0.0, 80.0]), np.array([0.0])).round().tolist()
    [[412.0], [0.0]]
    """
    phi, delta = np.deg2rad(lat)[:, None], declination(phase)[None, :]
    distance = 1.0 + 0.033 * np.cos(2.0 * np.pi * phase)
    sunset = np.arccos(np.clip(-np.tan(phi) * np.tan(delta), -1.0, 1.0))
    level = sunset * np.sin(phi) * np.sin(delta) + np.cos(phi) * np.cos(delta) * np.sin(sunset)
    return np.asarray(_SOLAR_CONSTANT / np.pi * distance * level.clip(min=0.0))
