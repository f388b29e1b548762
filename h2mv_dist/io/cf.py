"""CF rules: which array is a coordinate of another one, and how stored numbers become values."""

import posixpath
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from h2mv_dist.io.library import Found, attribute
from h2mv_dist.io.stores import explained

_USUAL_NAMES: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    {
        "latitude": frozenset({"lat", "latitude", "y", "nav_lat", "ylat"}),
        "longitude": frozenset({"lon", "longitude", "x", "nav_lon", "xlon"}),
        "time": frozenset({"time", "t", "date", "day", "month"}),
    }
)
_USUAL_UNITS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "latitude": ("degrees_north", "degree_north", "degrees_n", "degree_n", "degreesn", "degreen"),
        "longitude": ("degrees_east", "degree_east", "degrees_e", "degree_e", "degreese", "degreee"),
        "time": (),
    }
)


class Coordinate(NamedTuple):
    """An array that gives positions in space or time, and where it is in its store."""

    path: str
    array: xr.Variable


def coordinate_of(found: Found, kind: str) -> Coordinate | None:
    """The coordinate of one kind: by CF attributes, else by a usual name; a dimension's own one first."""
    neighbours = [Coordinate(path, array) for path, array in found.neighbours() if array.dims]
    neighbours.sort(key=lambda c: posixpath.basename(c.path) not in c.array.dims)
    by_attribute = [c for c in neighbours if _is_kind(c.array, kind)]
    by_name = [c for c in neighbours if posixpath.basename(c.path).lower() in _USUAL_NAMES[kind]]
    return next(iter((*by_attribute, *by_name)), None)


def _is_kind(array: xr.Variable, kind: str) -> bool:
    units = attribute(array, "units").lower()
    if array.attrs.get("standard_name") == kind or units in _USUAL_UNITS[kind]:
        return True
    return kind == "time" and (array.attrs.get("axis") == "T" or " since " in units)


def values_of(found: Found, coordinate: Coordinate) -> NDArray[np.generic]:
    """Decoded values of a coordinate of ``found``.

    Raises:
        StoreError: the store cannot be reached or read.
    """
    with explained(found.group.url, found.options):
        values: NDArray[np.generic] = decode(coordinate.path, coordinate.array).to_numpy()
    return values


def decode(name: str, array: xr.Variable) -> xr.Variable:
    """Lazily unpack and mask an array, as CF says."""
    stored = array.to_base_variable()
    if "scale_factor" not in stored.attrs and "add_offset" not in stored.attrs:
        _look_for_no_nan(stored)
    return xr.conventions.decode_cf_variable(name, stored, decode_times=False)


def _look_for_no_nan(stored: xr.Variable) -> None:
    """NaN is missing anyway, and need not be compared with value by value."""
    fill = stored.attrs.get("_FillValue")
    if isinstance(fill, float | np.floating) and np.isnan(fill):
        del stored.attrs["_FillValue"]
