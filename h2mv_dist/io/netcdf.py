"""A selection of a cube as one NetCDF file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import xarray as xr
import zarr

from h2mv_dist.config import StorageOptions
from h2mv_dist.errors import ConfigError, StoreError, describe
from h2mv_dist.grid import BoolArray, Period
from h2mv_dist.io.cube import COMPLETE
from h2mv_dist.io.stores import displayed, explained, open_store
from h2mv_dist.variables import nearest

_COMPRESSION: Final[dict[str, Any]] = {"zlib": True, "complevel": 4, "shuffle": True}
_STEPS: Final = {"time": "D", "month": "M"}
"""Time axis -> length of its steps, as numpy calls it."""


def write_netcdf(dataset: xr.Dataset, path: Path) -> None:
    """Write a dataset as NetCDF 4, compressed; a file that is there is not overwritten.

    Raises:
        StoreError: there is a file already.
    """
    if path.exists():
        raise StoreError(f"{path} is there already; choose another name, or delete it first")
    # what a Zarr store says of chunks and codecs means nothing to NetCDF
    plain = dataset.drop_encoding()
    for name in {f"{axis}{end}" for axis in _STEPS for end in ("", "_bnds")} & set(plain.variables):
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
            store = open_store(url, options, read_only=True)
            # first: before it is shown, the metadata that xarray looks for are not all there
            _require_complete(zarr.open_group(store, mode="r").attrs, url)
            opened: xr.Dataset = xr.open_zarr(store, chunks=None)
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


def _require_complete(attributes: Mapping[str, object], url: str) -> None:
    """A cube is complete from its first publication on, also while days are appended or computed anew."""
    if attributes.get(COMPLETE) == "no":
        raise StoreError(
            describe(
                "the cube is not finished: what is missing would look like sea",
                where=displayed(url),
                expected="a cube whose first days readers are shown",
                actual=f"{COMPLETE} = no",
                fix="run h2mv-dist infer again, then extract",
            )
        )


def select(
    url: str,
    options: StorageOptions,
    *,
    variables: tuple[str, ...] = (),
    period: Period | None = None,
    box: tuple[float, float, float, float] | None = None,
) -> xr.Dataset:
    """Part of a cube, lazy; chosen variables come with the bounds and cell measures their attributes name.

    Args:
        url: of the cube.
        options: of its store.
        variables: names; all if left out.
        period: days, and the months that lie in it as a whole; all if left out.
        box: (south, north, west, east), degrees; everywhere if left out.

    Raises:
        ConfigError: the cube does not have it.
        StoreError: the cube cannot be opened, or was never finished.
    """
    cube = _opened(url, options)
    for name in variables:
        if name not in cube:
            raise ConfigError(f"the cube has no {name!r}; {nearest(name, tuple(map(str, cube.data_vars)))}")
    part = cube.isel({**_within_period(cube, period), **_within_box(cube, box)})
    empty = {axis for axis, length in part.sizes.items() if length == 0}
    # some days without a whole month are no mistake, unless it is months that were asked for
    part = _only(part, variables) if variables else part.drop_dims(empty & {"month"})
    if empty - {"month"} or empty & set(part.sizes):
        raise ConfigError("nothing of the cube lies in this period and box (a month counts as a whole)")
    return part


def _within_period(cube: xr.Dataset, period: Period | None) -> dict[str, BoolArray]:
    """Time axis -> which of its steps lie in the period from their first day to their last one."""
    if period is None:
        return {}
    steps = {axis: cube[axis].values.astype(f"M8[{unit}]") for axis, unit in _STEPS.items() if axis in cube}
    start, stop = np.datetime64(period.start), np.datetime64(period.stop)
    return {axis: (first >= start) & (first + 1 <= stop) for axis, first in steps.items()}


def _within_box(cube: xr.Dataset, box: tuple[float, float, float, float] | None) -> dict[str, BoolArray]:
    """Axis of space -> which of its cells have their centres in the box."""
    if box is None:
        return {}
    south, north, west, east = box
    lat, lon = cube["lat"], cube["lon"]
    rows, columns = ((lat >= south) & (lat <= north)).values, ((lon >= west) & (lon <= east)).values
    return {"cell": rows & columns} if lat.dims == ("cell",) else {"lat": rows, "lon": columns}


def _only(cube: xr.Dataset, names: tuple[str, ...]) -> xr.Dataset:
    """Some variables, and what CF wants beside them."""
    arrays = [array for name in names for array in (cube[name], *cube[name].coords.values())]
    bounds = [array.attrs["bounds"] for array in arrays if "bounds" in array.attrs]
    # "area: cell_area volume: ..."
    measures = [name for array in arrays for name in array.attrs.get("cell_measures", "").split()[1::2]]
    part = cube[list(dict.fromkeys([*names, *bounds, *measures]))]
    for array in part.data_vars.values():
        if array.attrs.get("ancillary_variables") not in part:
            array.attrs.pop("ancillary_variables", None)
    return part
