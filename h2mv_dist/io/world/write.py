"""The file of the made-up world, in the published layout (Zarr format 2)."""

from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal

import numpy as np
import zarr

from h2mv_dist.config import StorageOptions
from h2mv_dist.errors import ConfigError, DataError, StoreError, describe
from h2mv_dist.grid import Grid, IntArray, Period, as_date
from h2mv_dist.io.library import PUBLISHED_GROUPS
from h2mv_dist.io.stores import displayed, exists, explained, list_objects, local_path, open_store
from h2mv_dist.io.world.land import Land
from h2mv_dist.io.world.observe import TARGETS, ObservedTarget
from h2mv_dist.io.world.weather import FORCING, Weather
from h2mv_dist.spec import Float32Array
from h2mv_dist.variables import nearest

_CHUNK: Final = 6
"""Cells along each edge of a published chunk, which holds all its days."""

_COMPRESSOR: Final[dict[str, Any]] = {
    "id": "blosc",
    "cname": "lz4",
    "clevel": 5,
    "shuffle": 1,
    "blocksize": 0,
}


def write_world(
    url: str,
    land: Land,
    period: Period,
    weather: Weather,
    targets: Mapping[str, ObservedTarget],
    options: StorageOptions,
) -> None:
    """Write a data set in the published layout (Zarr format 2); consolidated metadata come last.

    Each group has its ``data``, NaN over sea, its axes, and as attributes the mean and standard deviation
    over all finite values; ``static`` also lists its feature ``names``.

    Args:
        url: any fsspec URL where there is nothing yet.
        land: grid and mask.
        period: days of the forcing.
        weather: from :func:`make_weather`.
        targets: from :func:`observe`; variable -> observations.
        options: fsspec options a protocol.

    Raises:
        StoreError: something is there already (nothing is touched), or the store cannot be written.
        DataError: arrays do not belong to this land and period.
        ConfigError: a target has no group in the published layout.
    """
    _check_world(land, period, weather, targets)
    require_free(url, options)
    with explained(url, options):
        store = open_store(url, options, read_only=False)
        root = zarr.create_group(store, zarr_format=2)
        _write_mask(root, land.grid)
        _write_static(root, land.grid, weather)
        for column, name in enumerate(FORCING):
            series = ObservedTarget(weather.forcing[:, :, column], period.days(), "daily")
            _write_series(root, land.grid, PUBLISHED_GROUPS[name], series)
        for name, series in targets.items():
            _write_series(root, land.grid, PUBLISHED_GROUPS[name], series)
        zarr.consolidate_metadata(store, zarr_format=2)


def _check_world(land: Land, period: Period, weather: Weather, targets: Mapping[str, ObservedTarget]) -> None:
    n_land = land.grid.n_land
    _check_shape("forcing", weather.forcing.shape, (n_land, period.n_days, len(FORCING)))
    _check_shape("static", weather.static.shape, (n_land, len(weather.static_names)))
    for name, series in targets.items():
        if name not in TARGETS:
            raise ConfigError(
                f"target {name!r} has no group in the published layout; {nearest(name, TARGETS)}"
            )
        _check_shape(name, series.values.shape, (n_land, series.days.size))
        if not np.isfinite(series.values).any():
            raise DataError(f"target {name!r} has no observation at all; leave it out of the data set")


def _check_shape(name: str, actual: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if actual != expected:
        raise DataError(
            describe(
                "an array does not belong to this land and period",
                where=name,
                expected=f"shape {expected}",
                actual=f"shape {actual}",
                fix="make land, weather and targets for the same grid and period",
            )
        )


def require_free(url: str, options: StorageOptions) -> None:
    """Make sure that there is nothing yet at ``url``; an empty folder is nothing.

    Raises:
        StoreError: there is something, or the store cannot be reached.
    """
    local = local_path(url)
    found = list_objects(url, options)
    if not found and exists(url, options) and not (local is not None and local.is_dir()):
        found = (displayed(url),)
    if found:
        raise StoreError(
            describe(
                "will not write over what is there",
                where=displayed(url),
                expected="nothing at this place",
                actual=f"objects such as {found[0]} ({len(found)} in all)",
                fix="choose another place, or delete this one yourself",
            )
        )


def _write_mask(root: zarr.Group, grid: Grid) -> None:
    group = _new_group(root, "mask", grid, {})
    data = _new_array(group, "data", ("lat", "lon"), grid.shape, grid.shape, "int8")
    data[:] = grid.mask.astype(np.int8)


def _write_static(root: zarr.Group, grid: Grid, weather: Weather) -> None:
    values = weather.static.astype(np.float64)
    moments = {"mean": values.mean(axis=0).tolist(), "std": values.std(axis=0).tolist()}
    group = _new_group(root, "static", grid, moments | {"names": list(weather.static_names)})
    shape = (*grid.shape, len(weather.static_names))
    chunks = (_CHUNK, _CHUNK, len(weather.static_names))
    data = _new_array(group, "data", ("lat", "lon", "feature"), shape, chunks, "float32")
    packed = np.full(shape, np.nan, np.float32)
    packed[grid.mask] = weather.static
    data[:] = packed


def _write_series(root: zarr.Group, grid: Grid, name: str, series: ObservedTarget) -> None:
    group = _new_group(root, name, grid, _moments(series.values))
    n_steps = series.days.size
    _write_time(group, series.days)
    data = _new_array(
        group, "data", ("time", "lat", "lon"), (n_steps, *grid.shape), (n_steps, _CHUNK, _CHUNK), "float32"
    )
    for rows, values in _bands(grid, series.values):
        data[:, rows] = values


def _bands(grid: Grid, packed: Float32Array) -> Iterator[tuple[slice, Float32Array]]:
    """One row of chunks after the other, [time, lat, lon] with NaN over sea, so that memory stays small."""
    first_cell = np.concatenate([[0], np.cumsum(grid.mask.sum(axis=1))])
    for first in range(0, grid.shape[0], _CHUNK):
        rows = slice(first, min(first + _CHUNK, grid.shape[0]))
        mask = grid.mask[rows]
        band = np.full((packed.shape[1], *mask.shape), np.nan, np.float32)
        band[:, mask] = packed[first_cell[rows.start] : first_cell[rows.stop]].T
        yield rows, band


def _moments(values: Float32Array) -> dict[str, object]:
    """Mean and standard deviation of all finite values."""
    finite = values[np.isfinite(values)].astype(np.float64)
    return {"mean": float(finite.mean()), "std": float(finite.std())}


def _new_group(root: zarr.Group, name: str, grid: Grid, attributes: Mapping[str, Any]) -> zarr.Group:
    group = root.create_group(name, attributes=dict(attributes))
    for axis, values in (("lat", grid.lat), ("lon", grid.lon)):
        _new_array(group, axis, (axis,), values.shape, values.shape, "float32")[:] = values.astype(np.float32)
    return group


def _write_time(group: zarr.Group, days: IntArray) -> None:
    """Whole days since the first step, as the published files count them."""
    time = _new_array(group, "time", ("time",), days.shape, days.shape, "int64")
    time[:] = days - days[0]
    time.attrs.update(
        {"units": f"days since {as_date(int(days[0]))} 00:00:00", "calendar": "proleptic_gregorian"}
    )


def _new_array(
    group: zarr.Group,
    name: str,
    dims: tuple[str, ...],
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dtype: Literal["int8", "int64", "float32"],
) -> zarr.Array[Any]:
    return group.create_array(
        name,
        shape=shape,
        chunks=tuple(min(chunk, size) for chunk, size in zip(chunks, shape, strict=True)),
        dtype=dtype,
        compressors=_COMPRESSOR,
        fill_value=np.nan if dtype == "float32" else None,
        attributes={"_ARRAY_DIMENSIONS": list(dims)},
    )
