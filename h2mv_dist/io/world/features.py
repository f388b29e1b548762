"""Static features of the made-up world: climate, terrain, soil, cover and vegetation, [cell, feature]."""

from collections.abc import Mapping
from typing import Final

import numpy as np

from h2mv_dist.grid import FloatArray
from h2mv_dist.io.world.climate import Sites
from h2mv_dist.io.world.land import CLIMATES
from h2mv_dist.spec import Float32Array

COVERS: Final = (
    "forest_broadleaf",
    "forest_needleleaf",
    "shrub",
    "grass",
    "crop",
    "bare",
    "wetland",
    "water",
)

_COVER_SCORES: Final = np.array(
    [
        # tropical, arid, temperate, cold, polar
        [3.0, -1.5, 1.2, 0.6, -3.0],
        [-2.0, -2.0, 0.8, 2.4, -1.5],
        [0.6, 1.2, 0.4, 0.3, 1.2],
        [1.2, 1.0, 1.2, 0.8, 1.5],
        [1.0, -0.5, 2.0, 1.0, -4.0],
        [-2.0, 2.2, -1.5, -1.0, 1.5],
        [0.0, -3.0, -1.0, 0.6, 0.3],
        [-1.5, -3.0, -1.5, -0.8, -1.0],
    ]
)
"""Log-odds of each cover, [cover, climate]."""


def static_features(sites: Sites) -> tuple[Float32Array, tuple[str, ...]]:
    """All features, [cell, 30], and their names."""
    columns = _climate_features(sites) | _terrain_features(sites) | _soil_features(sites)
    columns |= dict(zip(COVERS, _cover_fractions(sites).T, strict=True))
    columns |= _vegetation_features(sites, columns)
    return np.stack(list(columns.values()), axis=1).astype(np.float32), tuple(columns)


def _climate_features(sites: Sites) -> dict[str, FloatArray]:
    own = sites.shares.argmax(axis=1)
    one_hot = {f"climate_{name}": (own == k).astype(np.float64) for k, name in enumerate(CLIMATES)}
    frozen = 1.0 / (1.0 + np.exp((sites.mean_temperature + 3.0) / 2.0))
    return one_hot | {"permafrost": frozen, "inland": sites.inland}


def _terrain_features(sites: Sites) -> dict[str, FloatArray]:
    relief = sites.elevation / 1000.0 * np.exp(0.3 * sites.landscape[:, 3])
    return {
        "elevation_m": sites.elevation,
        "relief_m": 400.0 * relief,
        "slope": np.tanh(0.06 * relief),
        "wetness_index": 9.0 - 2.0 * np.log1p(relief) + 0.5 * sites.landscape[:, 4],
        "bedrock_depth_m": 30.0 * np.exp(-relief + 0.3 * sites.landscape[:, 4]),
    }


def _soil_features(sites: Sites) -> dict[str, FloatArray]:
    texture = np.stack([0.9 * sites.landscape[:, 5] + 0.5 * sites.shares[:, 1], 0.7 * sites.landscape[:, 6]])
    texture = np.exp([texture[0], texture[1] + 0.4 * sites.shares[:, 0], np.zeros(sites.lat.size)])
    sand, clay, silt = texture / texture.sum(axis=0)
    cool_and_wet = sites.annual_rain / 800.0 * np.exp(-sites.mean_temperature / 15.0)
    organic = 0.01 + 0.25 * np.tanh(0.3 * cool_and_wet * np.exp(0.5 * sites.landscape[:, 7]))
    return {
        "sand": sand,
        "clay": clay,
        "silt": silt,
        "organic_carbon": organic,
        "bulk_density": 1.1 + 0.45 * sand - 2.0 * organic,
        "water_capacity": 0.08 + 0.10 * silt + 0.06 * clay + 0.3 * organic,
    }


def _cover_fractions(sites: Sites) -> FloatArray:
    """Fractions that sum to 1, [cell, cover]: the climate's, moved by smooth fields and by rain."""
    thirst = np.log(sites.annual_rain / 600.0)[:, None] * np.array([0.8, 0.5, 0.0, 0.2, 0.3, -1.0, 0.6, 0.2])
    scores = sites.shares @ _COVER_SCORES.T + 0.7 * sites.landscape[:, -len(COVERS) :] + thirst
    odds = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(odds / odds.sum(axis=1, keepdims=True))


def _vegetation_features(sites: Sites, columns: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    forest = columns["forest_broadleaf"] + columns["forest_needleleaf"]
    green = 1.0 - columns["bare"] - columns["water"]
    seasonality = np.abs(sites.summer_rain) * columns["climate_arid"] + np.abs(sites.half_range) / 25.0
    return {
        "forest": forest,
        "root_depth_m": 0.3 + 1.7 * forest * (1.0 - columns["permafrost"]) + 0.4 * columns["shrub"],
        "canopy_height_m": 25.0 * forest + columns["shrub"] + 0.4 * columns["grass"],
        "greenness": green / (1.0 + seasonality),
    }
