"""Means of a cube over time, members and land, read block by block so that memory stays small.

Cube arrays are [(member,) (time,) *space] with space (lat, lon) or (cell); means are
[*space] or [band, month]. Values that are not finite count as missing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from h2mv_dist.errors import DataError
from h2mv_dist.grid import BoolArray, FloatArray
from h2mv_dist.variables import nearest

BANDS: Final = ("north", "tropics", "south")
"""Rows of :func:`seasonal_means`: poleward of 23.5 N, between the tropics, poleward of 23.5 S."""

TROPIC: Final = 23.5
"""Latitude of the tropics, degrees."""

_BLOCK_VALUES: Final = 8 * 2**20
"""Values read at once, unless one stored chunk holds more."""


@dataclass(frozen=True, kw_only=True)
class MapMean:
    """A variable's mean over time and members, for a map.

    Attributes:
        name: of the variable in the cube.
        long_name: what it is, for plots.
        units: UDUNITS string.
        values: float64 [*space] with coordinates lat and lon; NaN where there is no value at all.
        land: cells the model was run for, [*space].
        n_gaps: land cells that lack some of their values, or all.
        scope: what the mean is taken over, in words; empty for a single static map.
        land_mean: area-weighted mean of ``values``.
    """

    name: str
    long_name: str
    units: str
    values: xr.DataArray
    land: BoolArray
    n_gaps: int
    scope: str
    land_mean: float


def require(cube: xr.Dataset, name: str) -> xr.DataArray:
    """An array of the cube.

    Raises:
        DataError: there is none of that name; the message names the nearest one.
    """
    if name not in cube.variables:
        names = tuple(str(n) for n in cube.data_vars if not str(n).endswith("_bnds"))
        raise DataError(f"the cube has no variable {name!r}; {nearest(name, names)}")
    return cube[name]


def time_mean(cube: xr.Dataset, name: str) -> MapMean:
    """Mean of a variable over the days and members for which it has a value.

    Raises:
        DataError: the cube lacks the variable, or it has no spatial axis or no value.
    """
    array = require(cube, name)
    area, space = require(cube, "cell_area"), _space(cube)
    if not set(space) <= set(array.dims):
        raise DataError(f"{name!r} has axes {array.dims}: without {space} there is nothing to map")
    land = require(cube, "land_mask").to_numpy() > 0
    total, count = _sum_and_count(array, space)
    if not count.any():
        raise DataError(f"{name!r} has no value anywhere: no part of the cube was written yet")
    mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    weight = np.where(count > 0, area.to_numpy(), 0.0)
    return MapMean(
        name=name,
        long_name=str(array.attrs.get("long_name", name)),
        units=str(array.attrs.get("units", "1")),
        values=xr.DataArray(mean, area.coords, space),
        land=land,
        n_gaps=int((land & (count < array.size // area.size)).sum()),
        scope=_scope(array),
        land_mean=float((np.nan_to_num(mean) * weight).sum() / weight.sum()),
    )


def seasonal_means(cube: xr.Dataset, name: str) -> FloatArray:
    """Area-weighted land mean of each calendar month, [band, month]; NaN where there is no value.

    Raises:
        DataError: the cube lacks the variable, or it has no time axis.
    """
    array = require(cube, name)
    weight = _band_weights(cube)
    if "time" not in array.dims:
        raise DataError(f"{name!r} has axes {array.dims}: without time there is no seasonal cycle")
    space = _space(cube)
    month = cube["time"].dt.month.to_numpy() - 1
    total, count = np.zeros((2, 12, len(BANDS)))
    for where, block in _blocks(array.transpose(..., "time", *space)):
        local = weight[(slice(None), *(where[d] for d in space))].reshape(len(BANDS), -1).T
        packed = block.reshape(-1, block.shape[-len(space) - 1], local.shape[0])
        finite = np.isfinite(packed)
        np.add.at(total, month[where["time"]], (np.where(finite, packed, 0.0) @ local).sum(axis=0))
        np.add.at(count, month[where["time"]], (finite @ local).sum(axis=0))
    means: FloatArray = np.where(count > 0, total / np.where(count > 0, count, 1.0), np.nan).T
    return means


def _space(cube: xr.Dataset) -> tuple[str, ...]:
    """Names of the spatial axes, (lat, lon) or (cell)."""
    return tuple(str(d) for d in require(cube, "cell_area").dims)


def _band_weights(cube: xr.Dataset) -> FloatArray:
    """Area of each land cell in its band and 0 elsewhere, m2, [band, *space]."""
    area = require(cube, "cell_area")
    lat = require(cube, "lat").broadcast_like(area).transpose(*area.dims).to_numpy()
    weight = area.to_numpy() * (require(cube, "land_mask").to_numpy() > 0)
    bands = np.stack([lat > TROPIC, np.abs(lat) <= TROPIC, lat < -TROPIC])
    return np.asarray(bands * weight, np.float64)


def _sum_and_count(array: xr.DataArray, space: tuple[str, ...]) -> tuple[FloatArray, FloatArray]:
    """Sum and number of finite values over all axes but those of space, each [*space]."""
    shape = tuple(array.sizes[d] for d in space)
    total, count = np.zeros((2, *shape))
    for where, block in _blocks(array.transpose(..., *space)):
        cells = tuple(where[d] for d in space)
        axes = tuple(range(block.ndim - len(space)))
        finite = np.isfinite(block)
        total[cells] += np.sum(block, axis=axes, where=finite, dtype=np.float64)
        count[cells] += finite.sum(axis=axes)
    return total, count


def _blocks(array: xr.DataArray) -> Iterator[tuple[dict[str, slice], NDArray[np.float32]]]:
    """Parts of an array that are made of whole stored chunks, and where each of them lies."""
    step = _block_shape(array.shape, array.encoding.get("chunks"))
    starts = (range(0, size, n) for size, n in zip(array.shape, step, strict=True))
    for first in product(*starts):
        slices = (slice(a, min(a + n, size)) for a, n, size in zip(first, step, array.shape, strict=True))
        where = dict(zip((str(d) for d in array.dims), slices, strict=True))
        yield where, array.isel(where).to_numpy()


def _block_shape(shape: tuple[int, ...], chunks: tuple[int, ...] | None) -> tuple[int, ...]:
    """Multiples of the chunk, the last axes grown first, that hold at most :data:`_BLOCK_VALUES`.

    >>> _block_shape((1000, 600, 1200), (30, 60, 60))
    (30, 180, 1200)
    """
    chunk = chunks if chunks and len(chunks) == len(shape) else (1,) * len(shape)
    step = [min(c, n) for c, n in zip(chunk, shape, strict=True)]
    for axis in reversed(range(len(shape))):
        n_chunks = max(1, _BLOCK_VALUES // prod(step))
        step[axis] = min(step[axis] * n_chunks, shape[axis])
    return tuple(step)


def _scope(array: xr.DataArray) -> str:
    """What a mean over time and members is taken over, in words."""
    parts = []
    if "time" in array.dims:
        parts.append(f"mean over {span(array)}")
    if array.sizes.get("member", 1) > 1:
        parts.append(f"mean of {array.sizes['member']} folds")
    elif "realization: mean" in array.attrs.get("cell_methods", ""):
        parts.append("mean of all folds")
    return ", ".join(parts)


def span(array: xr.DataArray | xr.Dataset) -> str:
    """First and last day of an array with a time axis, in words."""
    first, last = (str(array["time"].to_numpy()[i])[:10] for i in (0, -1))
    return f"{first} to {last}"
