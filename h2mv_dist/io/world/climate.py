"""Random fields and the climatology of each land cell that weather and static features grow from.

Arrays are [cell] or [cell, time] with land cells row-major; maps are [lat, lon].
"""

import math
from typing import Final, NamedTuple

import numpy as np

from h2mv_dist.errors import ConfigError
from h2mv_dist.grid import FloatArray, Grid
from h2mv_dist.io.world.land import CLIMATES, Land
from h2mv_dist.spec import Float32Array

# -------------------- random fields

_WAVES: Final = 128
"""Plane waves a smooth field is made of."""

_STREAMS: Final = (
    "synoptic",
    "occurrence",
    "amount_1",
    "amount_2",
    "slow",
    "landscape",
    "local",
    "observation",
)
"""Independent random streams of one seed."""


def generator(seed: int, stream: str, *key: int) -> np.random.Generator:
    """The generator of one stream of a seed; ``key`` tells its parts apart.

    Raises:
        ConfigError: the seed is negative.
    """
    if seed < 0:
        raise ConfigError(f"the seed of a world must be 0 or more, not {seed}")
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_STREAMS.index(stream), *key)))


class Field(NamedTuple):
    """A field smooth in space and red in time, with zero mean and unit variance everywhere.

    Its waves do not depend on the cells, so that two resolutions see the same weather.

    Attributes:
        pattern: value of each wave, [cell, wave].
        amplitude: standard normal coefficients, [wave, time].
    """

    pattern: Float32Array
    amplitude: Float32Array

    def at(self, cells: slice) -> FloatArray:
        """Values of some cells, [cell, time]."""
        return (self.pattern[cells] @ self.amplitude).astype(np.float64)


def _smooth_pattern(position: FloatArray, length: float, rng: np.random.Generator) -> Float32Array:
    """Random Fourier features of a Gaussian covariance on the sphere, [cell, 2 * waves].

    Args:
        position: unit vectors, [cell, 3].
        length: distance at which correlation falls to exp(-1/2), Earth radii.
        rng: generator.
    """
    phase = position @ (rng.standard_normal((3, _WAVES)) / length)
    waves = np.concatenate([np.cos(phase), np.sin(phase)], axis=1)
    return (waves / math.sqrt(_WAVES)).astype(np.float32)


def _red_noise(n_series: int, n_days: int, memory: float, rng: np.random.Generator) -> Float32Array:
    """Stationary AR(1) series of unit variance and lag-1 correlation ``memory``, [series, time]."""
    series = rng.standard_normal((n_days, n_series))
    series[1:] *= math.sqrt(1.0 - memory**2)
    for day in range(1, n_days):
        series[day] += memory * series[day - 1]
    return np.ascontiguousarray(series.T, dtype=np.float32)


def weather_field(
    position: FloatArray, n_days: int, length: float, memory: float, rng: np.random.Generator
) -> Field:
    """A new field over ``position`` (unit vectors, [cell, 3]); ``memory`` is its daily lag-1 correlation."""
    pattern = _smooth_pattern(position, length, rng)
    return Field(pattern, _red_noise(pattern.shape[1], n_days, memory, rng))


def _smoothed(values: FloatArray, passes: int) -> FloatArray:
    """Means of 3 x 3 cells, taken again and again; round the globe in lon, [lat, lon]."""
    for _ in range(passes):
        rows = np.pad(values, ((1, 1), (0, 0)), mode="edge")
        columns = (rows[:-2] + rows[1:-1] + rows[2:]) / 3.0
        values = (np.roll(columns, 1, axis=1) + columns + np.roll(columns, -1, axis=1)) / 3.0
    return values


# -------------------- climatology

_LAPSE: Final = 0.0065
"""Cooling with height, K m-1."""

_ANNUAL_RAIN: Final = np.array([1750.0, 110.0, 900.0, 520.0, 260.0])
"""Precipitation typical of each climate, mm a-1."""

_WARMING: Final = np.array([0.0, 2.0, 3.0, -0.5, -1.5])
"""Annual mean temperature of each climate compared with its latitude, K."""

_COLDEST_SUMMER: Final = 4.5
"""No sea-level summer is colder, degC, so that snow cannot pile up for ever."""

_RANGE: Final = np.array([0.7, 1.1, 0.75, 1.1, 1.0])
"""Annual temperature range of each climate compared with its latitude."""

_SUMMER_RAIN: Final = np.array([1.8, 0.2, 0.0, 0.7, 0.5])
"""Concentration of precipitation on the warm season in each climate; see :class:`Sites`."""

_RAIN_REGIME_SPREAD: Final = np.array([0.0, 0.8, 0.7, 0.2, 0.1])
"""How much that concentration differs between regions of one climate."""

_N_LANDSCAPE: Final = 16
"""Smooth fields: hills, two for precipitation, five for soils and relief, eight for covers."""


class Sites(NamedTuple):
    """What the weather of each land cell depends on; every array is [cell] unless it says otherwise.

    Attributes:
        lat: degrees north.
        position: unit vectors, [cell, 3].
        shares: share of each climate in the neighbourhood, sums to 1, [cell, 5].
        inland: 0 at an open coast .. 1 far from the sea.
        landscape: smooth standard normal fields, [cell, field].
        elevation: m.
        mean_temperature: annual mean at that elevation, degC.
        half_range: half of the annual temperature range, K; negative in the south.
        annual_rain: mm a-1.
        summer_rain: concentration k of precipitation exp(k cos) on the warm season; dry summers if negative.
    """

    lat: FloatArray
    position: FloatArray
    shares: FloatArray
    inland: FloatArray
    landscape: FloatArray
    elevation: FloatArray
    mean_temperature: FloatArray
    half_range: FloatArray
    annual_rain: FloatArray
    summer_rain: FloatArray


def make_sites(land: Land, seed: int) -> Sites:
    """What the weather of each land cell of ``land`` depends on."""
    lat, lon = land.grid.cell_coordinates()
    position = _unit_vectors(lat, lon)
    shares = _climate_shares(land)
    inland = _inlandness(land.grid)
    landscape = _landscape(position, seed)
    sea_level, half_range = _temperature_climate(lat, shares, inland)
    elevation = _elevation(sea_level, np.abs(half_range), shares, landscape[:, 0])
    return Sites(
        lat=lat,
        position=position,
        shares=shares,
        inland=inland,
        landscape=landscape,
        elevation=elevation,
        mean_temperature=sea_level - _LAPSE * elevation,
        half_range=half_range,
        annual_rain=_annual_rain(lat, shares, landscape[:, 1]),
        summer_rain=_summer_rain(lat, shares, landscape[:, 2]),
    )


def _unit_vectors(lat: FloatArray, lon: FloatArray) -> FloatArray:
    """Places on the unit sphere, [cell, 3]."""
    phi, lam = np.deg2rad(lat), np.deg2rad(lon)
    return np.stack([np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)], axis=1)


def _climate_shares(land: Land) -> FloatArray:
    """Each climate's share of the cell and its neighbours, the cell itself counting half, [cell, 5]."""
    mask = land.grid.mask
    own = np.stack([land.climate == k for k in range(1, len(CLIMATES) + 1)]).astype(np.float64)
    around = np.stack([_smoothed(one, 1) for one in own])
    around /= np.where(mask, around.sum(axis=0), 1.0)
    return (0.5 * own + 0.5 * around)[:, mask].T


def _inlandness(grid: Grid) -> FloatArray:
    """Share of land within some 8 degrees, stretched to 0..1, [cell]."""
    spacing = abs(float(grid.lat[1] - grid.lat[0]))
    passes = max(1, round(1.5 * (8.0 / spacing) ** 2))
    share = _smoothed(grid.mask.astype(np.float64), passes)[grid.mask]
    return np.clip((share - 0.3) / 0.6, 0.0, 1.0)


def _landscape(position: FloatArray, seed: int) -> FloatArray:
    """Smooth standard normal fields that shape soils, covers and regional climate, [cell, field]."""
    rng = generator(seed, "landscape")
    pattern = _smooth_pattern(position, 0.15, rng)
    return (pattern @ _red_noise(pattern.shape[1], _N_LANDSCAPE, 0.0, rng)).astype(np.float64)


def _temperature_climate(
    lat: FloatArray, shares: FloatArray, inland: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Annual mean at sea level (degC) and half of the annual range (K, negative in the south), [cell]."""
    poleward = np.abs(np.sin(np.deg2rad(lat)))
    half_range = (1.5 + 25.0 * poleward**1.5 * (0.4 + 0.6 * inland)) * (shares @ _RANGE)
    mean = 28.0 - 44.0 * poleward**3 + shares @ _WARMING
    mean = np.maximum(mean, _COLDEST_SUMMER - half_range)
    return mean, half_range * np.tanh(lat / 5.0)


def _elevation(
    mean: FloatArray, half_range: FloatArray, shares: FloatArray, relief: FloatArray
) -> FloatArray:
    """Height (m, [cell]): hills, and mountains where it takes them to be that cool at that latitude.

    No mountain is so high that its summer stays below 5 degC.
    """
    warmest, coldest = mean + half_range, mean - half_range
    excess = np.stack([coldest - 14.0, coldest + 4.0, warmest - 8.0], axis=1).clip(min=0.0)
    mountains = np.minimum((shares[:, 2:] * excess).sum(axis=1), (warmest - 5.0).clip(min=0.0)) / _LAPSE
    return np.asarray(160.0 * np.exp(0.5 * relief) + mountains)


def _annual_rain(lat: FloatArray, shares: FloatArray, region: FloatArray) -> FloatArray:
    """Mean precipitation, mm a-1, [cell]; wettest at the equator, drier towards the edge of the tropics."""
    typical = np.exp(shares @ np.log(_ANNUAL_RAIN))
    tropical = np.exp(shares[:, 0] * (0.25 - (lat / 18.0) ** 2 * 0.6).clip(min=-0.7))
    return np.asarray(np.clip(typical * tropical * np.exp(0.25 * region - 0.03), 20.0, 4500.0))


def _summer_rain(lat: FloatArray, shares: FloatArray, region: FloatArray) -> FloatArray:
    """Concentration of precipitation on the warm season, [cell]: monsoons, and dry summers in places."""
    monsoon = np.where(shares[:, 0] > 0, np.tanh(np.abs(lat) / 10.0), 1.0)
    typical = shares @ _SUMMER_RAIN - shares[:, 0] * _SUMMER_RAIN[0] * (1.0 - monsoon)
    return np.asarray(typical + (shares @ _RAIN_REGIME_SPREAD) * region)
