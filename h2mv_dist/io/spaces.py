"""Space: the spatial axes of an array, compared with those of the first forcing variable, and the grid.

``space`` is (lat, lon) or (cell,); coordinates are in degrees: a latitude a row and a longitude a column, or
both a cell.
"""

import posixpath
from dataclasses import dataclass
from typing import Final

import numpy as np

from h2mv_dist.errors import DataError, describe
from h2mv_dist.grid import UNKNOWN_AREA, BoolArray, FloatArray, Grid
from h2mv_dist.io.cf import Coordinate, coordinate_of, values_of
from h2mv_dist.io.library import Found, attribute
from h2mv_dist.io.units import conversion_between

_AREA: Final = frozenset({"area", "cell_area", "grid_area"})


@dataclass(frozen=True, eq=False)
class Space:
    """The spatial axes of one array.

    Attributes:
        dims: their stored names.
        lat: degrees, [row] or [cell].
        lon: degrees, [column] or [cell].
        coordinate_paths: where both coordinates are in the store.
        where: the array, for messages.
    """

    dims: tuple[str, ...]
    lat: FloatArray
    lon: FloatArray
    coordinate_paths: tuple[str, ...]
    where: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of cells along each axis."""
        return (self.lat.size, self.lon.size) if len(self.dims) == 2 else (self.lat.size,)


def space_of(found: Found) -> Space:
    """The spatial axes of an array.

    Raises:
        DataError: coordinates are missing, two-dimensional or not finite.
        StoreError: they cannot be read.
    """
    lat = coordinate_of(found, "latitude")
    lon = coordinate_of(found, "longitude")
    if lat is None or lon is None:
        raise DataError(
            describe(
                f"no {'latitude' if lat is None else 'longitude'} coordinate",
                where=found.where,
                expected="lat and lon beside the array, on its dimensions",
                actual=", ".join(path for path, _ in found.neighbours()) or "no coordinates",
                fix="add them beside the array, with standard_name latitude and longitude",
            )
        )
    if lat.array.ndim != 1 or lon.array.ndim != 1:
        raise DataError(
            describe(
                "latitude and longitude are maps themselves",
                where=found.where,
                expected="one latitude a row and one longitude a column, or one of each a cell",
                actual=f"lat on {lat.array.dims}, lon on {lon.array.dims}",
                fix="regrid to lat x lon, or stack the cells into one dimension",
            )
        )
    dims = tuple(dict.fromkeys(str(c.array.dims[0]) for c in (lat, lon)))
    return Space(dims, _degrees(lat, found), _degrees(lon, found), (lat.path, lon.path), found.where)


def _degrees(coordinate: Coordinate, found: Found) -> FloatArray:
    values = values_of(found, coordinate).astype(np.float64)
    if not np.isfinite(values).all():
        raise DataError(f"coordinate {coordinate.path} of {found.where} holds values that are not finite")
    return values


def flipped_dims(space: Space, reference: Space) -> tuple[str, ...]:
    """Stored dimensions that run the other way than the reference's.

    Raises:
        DataError: the coordinates differ in anything but direction.
    """
    if len(space.dims) != len(reference.dims):
        raise _other_grid(space, reference)
    if len(space.dims) == 1:
        same = np.array_equal(space.lat, reference.lat) and np.array_equal(space.lon, reference.lon)
        if not same:
            raise _other_grid(space, reference)
        return ()
    flipped = []
    pairs = ((space.lat, reference.lat), (space.lon, reference.lon))
    for dim, (ours, theirs) in zip(space.dims, pairs, strict=True):
        if not np.array_equal(ours, theirs):
            if not np.array_equal(ours[::-1], theirs):
                raise _other_grid(space, reference)
            flipped.append(dim)
    return tuple(flipped)


def _other_grid(space: Space, reference: Space) -> DataError:
    return DataError(
        describe(
            "two arrays are on different grids",
            where=f"{space.where} and {reference.where}",
            expected=f"the same coordinates to the last digit: {_outline(reference)}",
            actual=_outline(space),
            fix="regrid one of them, or write the coordinates of both from one source",
        )
    )


def _outline(space: Space) -> str:
    axes = (("lat", space.lat), ("lon", space.lon))
    return ", ".join(f"{name} {a.size} values {a[0]!s} .. {a[-1]!s}" for name, a in axes)


def grid_of(space: Space, mask: BoolArray, found: Found) -> Grid:
    """The grid of ``found``, whose axes are ``space``; ``mask`` is True on land, [*space].

    Raises:
        DataError: the mask has no land, or areas are not positive or their units cannot be converted.
    """
    if len(space.dims) == 2:
        return Grid.lat_lon(space.lat, space.lon, mask)
    return Grid(("cell",), space.lat, space.lon, mask, _cell_areas(space, found))


def _cell_areas(space: Space, found: Found) -> FloatArray:
    """Area of each cell, m2, [cell]; ones where the data set does not say."""
    for path, array in found.neighbours():
        known = posixpath.basename(path).lower() in _AREA or array.attrs.get("standard_name") == "cell_area"
        if known and array.dims == space.dims:
            units = attribute(array, "units") or "m2"
            conversion = conversion_between(
                units, "m2", f"{path} of {found.where}", "write its units attribute"
            )
            values = values_of(found, Coordinate(path, array)).astype(np.float64)
            areas = values * conversion.scale + conversion.offset
            if not (areas > 0).all():
                raise DataError(f"{path} of {found.where} holds areas that are not positive numbers")
            return areas
    return np.full(space.lat.size, UNKNOWN_AREA)
