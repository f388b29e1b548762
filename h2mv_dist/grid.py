"""Where and when: Grid, Tile, Period.

A grid has either the axes (lat, lon) or the single axis (cell,) with auxiliary coordinates. ``shape``
is the shape of its spatial axes; arrays elsewhere are [time, *shape] or, packed, [cell, time].
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from itertools import pairwise, product
from typing import Final

import numpy as np
from numpy.typing import NDArray

from h2mv_dist.errors import ConfigError, DataError, describe

EARTH_RADIUS_M: Final = 6_371_000.0
"""Mean radius of the Earth (IUGG), m."""
UNKNOWN_AREA: Final = 1.0
"""Area of every cell where the data set says none, so that all count the same."""

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Period:
    """Half-open span of whole days: ``start`` belongs to it, ``stop`` does not.

    >>> Period(date(2001, 1, 1), date(2002, 1, 1)).n_days
    365
    """

    start: date
    stop: date

    def __post_init__(self) -> None:
        if self.stop <= self.start:
            raise ConfigError(
                f"period {self} holds no day: its first day must come before its end, "
                "and the end itself is not part of it"
            )

    def __str__(self) -> str:
        return f"{self.start}..{self.stop}"

    @property
    def n_days(self) -> int:
        """Number of days."""
        return (self.stop - self.start).days

    @property
    def first(self) -> int:
        """First day, days since 1970-01-01."""
        return (self.start - date(1970, 1, 1)).days

    def days(self) -> IntArray:
        """Its days, [time], days since 1970-01-01."""
        return np.arange(self.first, self.first + self.n_days, dtype=np.int64)

    def contains(self, other: "Period") -> bool:
        """Whether every day of ``other`` is a day of this period."""
        return self.start <= other.start and other.stop <= self.stop

    def blocks(self, n_days: int) -> Iterator["Period"]:
        """Consecutive parts of ``n_days`` days; the last one may be shorter.

        >>> [b.n_days for b in Period(date(2001, 1, 1), date(2001, 1, 8)).blocks(3)]
        [3, 3, 1]
        """
        for first in range(self.first, self.first + self.n_days, n_days):
            stop = min(first + n_days, self.first + self.n_days)
            yield Period(as_date(first), as_date(stop))

    def months(self) -> tuple["Period", ...]:
        """The calendar months that lie wholly inside, in order.

        >>> [str(m) for m in Period(date(2001, 1, 2), date(2001, 4, 1)).months()]
        ['2001-02-01..2001-03-01', '2001-03-01..2001-04-01']
        """
        starts = [self.start.replace(day=1)]
        while starts[-1] < self.stop:
            starts.append((starts[-1] + timedelta(days=31)).replace(day=1))
        every = (Period(first, following) for first, following in pairwise(starts))
        return tuple(month for month in every if self.contains(month))

    def common(self, other: "Period") -> "Period | None":
        """The days of both, if there are any.

        >>> str(Period(date(2001, 1, 1), date(2001, 1, 5)).common(Period(date(2001, 1, 3), date(2001, 2, 1))))
        '2001-01-03..2001-01-05'
        """
        start, stop = max(self.start, other.start), min(self.stop, other.stop)
        return Period(start, stop) if start < stop else None

    @staticmethod
    def parse(text: str) -> "Period":
        """Read ``START..END`` (ISO dates, END not included).

        >>> Period.parse("2001-01-01..2001-01-03").n_days
        2
        """
        try:
            start, stop = (date.fromisoformat(part.strip()) for part in text.split(".."))
        except ValueError as error:
            raise ConfigError(
                f"period {text!r} is not START..END with ISO dates, such as 2001-01-01..2004-01-01"
            ) from error
        return Period(start, stop)


def as_date(day: int) -> date:
    """The date of a day counted from 1970-01-01.

    >>> as_date(31)
    datetime.date(1970, 2, 1)
    """
    return date.fromordinal(date(1970, 1, 1).toordinal() + int(day))


@dataclass(frozen=True, slots=True)
class Tile:
    """A box of grid cells, one half-open range for each spatial axis."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index into an array of the grid's shape."""
        return tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True))

    @property
    def shape(self) -> tuple[int, ...]:
        """Cells along each spatial axis."""
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def name(self) -> str:
        """Stable identifier, used for receipts and progress.

        >>> Tile((0, 20), (10, 30)).name
        '0-10_20-30'
        """
        return "_".join(f"{a}-{b}" for a, b in zip(self.start, self.stop, strict=True))


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """The spatial axes of a data set.

    Attributes:
        dims: ``("lat", "lon")`` or ``("cell",)``.
        lat: degrees north, [lat] or [cell]; monotonic either way on a lat x lon grid.
        lon: degrees east, [lon] or [cell]; any convention.
        mask: True on land, [*shape].
        area: cell area, m2, [*shape].
    """

    dims: tuple[str, ...]
    lat: FloatArray
    lon: FloatArray
    mask: BoolArray
    area: FloatArray

    def __post_init__(self) -> None:
        if self.mask.shape != self.shape or self.area.shape != self.shape:
            raise DataError(
                f"mask {self.mask.shape} and area {self.area.shape} must have the grid's shape {self.shape}"
            )
        if not self.mask.any():
            raise DataError(
                describe(
                    "the mask has no land",
                    where=f"grid of shape {self.shape}",
                    expected="at least one non-zero mask value",
                    actual="only zeros",
                    fix="check that the mask belongs to this grid and marks land with 1",
                )
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Cells along each spatial axis."""
        return (self.lat.size, self.lon.size) if self.dims == ("lat", "lon") else (self.lat.size,)

    @property
    def n_land(self) -> int:
        """Number of land cells."""
        return int(self.mask.sum())

    def land_index(self) -> IntArray:
        """Row-major index of each land cell in the flattened grid, [cell]."""
        return np.flatnonzero(self.mask)

    def cell_coordinates(self) -> tuple[FloatArray, FloatArray]:
        """Latitude and longitude of every land cell, degrees, each [cell]."""
        if self.dims == ("cell",):
            return self.lat[self.mask], self.lon[self.mask]
        lat, lon = np.meshgrid(self.lat, self.lon, indexing="ij")
        return lat[self.mask], lon[self.mask]

    def tiles(self, tile_shape: tuple[int, ...]) -> tuple[Tile, ...]:
        """Cover the grid with tiles that start at multiples of ``tile_shape``; ragged edges are kept."""
        starts = product(*(range(0, n, t) for n, t in zip(self.shape, tile_shape, strict=True)))
        return tuple(
            Tile(
                start,
                tuple(min(s + t, n) for s, t, n in zip(start, tile_shape, self.shape, strict=True)),
            )
            for start in starts
        )

    def land_tiles(self, tile_shape: tuple[int, ...]) -> tuple[Tile, ...]:
        """The tiles that hold at least one land cell."""
        return tuple(t for t in self.tiles(tile_shape) if self.mask[t.slices].any())

    @staticmethod
    def lat_lon(lat: FloatArray, lon: FloatArray, mask: BoolArray) -> "Grid":
        """A lat x lon grid whose areas follow from its cell bounds."""
        for name, axis in (("lat", lat), ("lon", lon)):
            steps = np.diff(axis)
            if not (np.all(steps > 0) or np.all(steps < 0)):
                raise DataError(f"{name} must be strictly monotonic, found steps {np.unique(steps)}")
        return Grid(("lat", "lon"), lat, lon, mask, cell_area(lat, lon))


def cell_bounds(centre: FloatArray) -> FloatArray:
    """Edges half way between neighbours, extrapolated at both ends, [n + 1].

    >>> cell_bounds(np.array([0.5, 1.5, 3.5])).tolist()
    [0.0, 1.0, 2.5, 4.5]
    """
    if centre.size == 1:
        return np.array([centre[0] - 0.5, centre[0] + 0.5])
    middle = (centre[1:] + centre[:-1]) / 2
    return np.concatenate([[2 * centre[0] - middle[0]], middle, [2 * centre[-1] - middle[-1]]])


def cell_area(lat: FloatArray, lon: FloatArray) -> FloatArray:
    """Area of each cell of a lat x lon grid on the sphere, m2, [lat, lon].

    >>> lat, lon = np.arange(-89.5, 90), np.arange(-179.5, 180)
    >>> bool(np.isclose(cell_area(lat, lon).sum(), 4 * np.pi * EARTH_RADIUS_M**2))
    True
    """
    lat_edges = np.clip(cell_bounds(lat), -90.0, 90.0)
    height = np.abs(np.diff(np.sin(np.deg2rad(lat_edges))))
    width = np.abs(np.diff(np.deg2rad(cell_bounds(lon))))
    return EARTH_RADIUS_M**2 * np.outer(height, width)
