"""A selection of a cube as one NetCDF file."""

from pathlib import Path
from typing import Any, Final

import xarray as xr

from h2mv_dist.config import StorageOptions
from h2mv_dist.errors import ConfigError, StoreError, describe
from h2mv_dist.grid import Period
from h2mv_dist.io.stores import displayed, explained, open_store
from h2mv_dist.variables import nearest

_COMPRESSION: Final[dict[str, Any]] = {"zlib": True, "complevel": 4, "shuffle": True}


def write_netcdf(dataset: xr.Dataset, path: Path) -> None:
    """Write a dataset as NetCDF 4, compressed; a file that is there is not overwritten.

    Raises:
        StoreError: there is a file already.
    """
    if path.exists():
        raise StoreError(f"{path} is there already; choose another name, or delete it first")
    # what a Zarr store says of chunks and codecs means nothing to NetCDF
    plain = dataset.drop_encoding()
    for name in {"time", "time_bnds"} & set(plain.variables):
        plain[name].encoding = {"units": "days since 1970-01-01", "dtype": "int64"}
    floats = [name for name, array in plain.data_vars.items() if array.dtype.kind == "f" and array.ndim]
    part = path.with_name(f".{path.name}.part")
    try:
        plain.to_netcdf(part, engine="netcdf4", encoding={name: dict(_COMPRESSION) for name in floats})
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


def _opened(url: str, options: StorageOptions) -> xr.Dataset:
    with explained(url, options):
        try:
            opened: xr.Dataset = xr.open_zarr(open_store(url, options, read_only=True), chunks=None)
        except (ValueError, TypeError, KeyError) as error:
            raise StoreError(
                describe(
                    "what is there cannot be opened as a cube",
                    where=displayed(url),
                    expected="a Zarr group of arrays of numbers with named axes",
                    actual=f"{type(error).__name__}: {error}",
                    fix="check the URL, or fetch a fresh copy",
                )
            ) from error
    return opened


def select(
    url: str,
    options: StorageOptions,
    *,
    variables: tuple[str, ...] = (),
    period: Period | None = None,
    box: tuple[float, float, float, float] | None = None,
) -> xr.Dataset:
    """Part of a cube, lazy.

    Args:
        url: of the cube.
        options: of its store.
        variables: names; all if left out.
        period: days; all if left out.
        box: (south, north, west, east), degrees; everywhere if left out.

    Raises:
        ConfigError: the cube does not have it.
        StoreError: the cube cannot be opened.
    """
    cube = _opened(url, options)
    for name in variables:
        if name not in cube:
            raise ConfigError(f"the cube has no {name!r}; {nearest(name, tuple(map(str, cube.data_vars)))}")
    if variables:
        cube = cube[list(variables)]
    if period is not None:
        days = cube["time"].values.astype("datetime64[D]").astype(int)
        cube = cube.isel(time=(days >= period.first) & (days < period.first + period.n_days))
    if box is not None:
        south, north, west, east = box
        lat, lon = cube["lat"], cube["lon"]
        inside = {"lat": (lat >= south) & (lat <= north), "lon": (lon >= west) & (lon <= east)}
        along = {str(c.dims[0]) for c in (lat, lon)}
        cells = {"cell": inside["lat"] & inside["lon"]} if along == {"cell"} else inside
        cube = cube.isel({axis: chosen.values for axis, chosen in cells.items()})
    if 0 in cube.sizes.values():
        raise ConfigError("nothing of the cube lies in this period and box")
    return cube
