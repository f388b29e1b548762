"""Layouts: the published layout and CF data sets become the same handles on the same axes.

Both layouts are found by name, decoded by CF rules, put on the grid of the first forcing variable and cut to
the days that are used. Handles give [time, *space], [*space] or [*space, feature], float32, in the units of
:mod:`h2mv_dist.variables`; ``space`` is (lat, lon) or (cell,). Only coordinates and the mask are read here.
"""

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Final, Literal, NamedTuple

import numpy as np
import xarray as xr
import zarr
from cf_xarray.units import units as cf_units
from numpy.typing import NDArray
from xarray.backends import ZarrStore
from zarr.errors import ContainsArrayError

from h2mv_dist.config import DataSettings, StorageOptions, VariableSource
from h2mv_dist.errors import ConfigError, DataError, StoreError, describe
from h2mv_dist.grid import BoolArray, FloatArray, Grid, IntArray, Period, as_date
from h2mv_dist.io.stores import displayed, explained, open_store
from h2mv_dist.spec import Float32Array
from h2mv_dist.variables import VARIABLES, nearest, variable

Frequency = Literal["daily", "monthly"]

PUBLISHED_GROUPS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "net_radiation": "rn",
        "precipitation": "prec",
        "air_temperature": "tair",
        "terrestrial_water_storage_anomaly": "tws",
        "evapotranspiration": "et",
        "runoff": "q",
        "snow_water_equivalent": "swe",
        "fapar": "fapar",
    }
)
"""Variable -> its group in the published layout; every other name is its own group."""

_CALENDARS: Final = frozenset({"standard", "gregorian", "proleptic_gregorian"})
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
_SECONDS_A_DAY: Final = 86_400
_AREA: Final = frozenset({"area", "cell_area", "grid_area"})
_WATER_DENSITY: Final = cf_units.Quantity(1000.0, "kg m-3")
"""Turns a mass of water on an area into a depth."""


# -------------------- types


@dataclass(frozen=True, slots=True, eq=False)
class StepAxis:
    """Steps of an observed series.

    Attributes:
        days: first day of each step, [step], days since 1970-01-01.
        frequency: a step is a day or a calendar month.
    """

    days: IntArray
    frequency: Frequency

    def __len__(self) -> int:
        return int(self.days.size)

    def ranges(self) -> tuple[IntArray, IntArray]:
        """First day of each step and the day after its last one, each [step].

        >>> first, stop = StepAxis(np.array([31]), "monthly").ranges()  # February 1970
        >>> int(first[0]), int(stop[0])
        (31, 59)
        """
        if self.frequency == "daily":
            return self.days, self.days + 1
        months = self.days.astype("datetime64[D]").astype("datetime64[M]")
        return self.days, (months + 1).astype("datetime64[D]").astype(np.int64)

    def within(self, period: Period) -> slice:
        """The steps that lie wholly inside ``period``."""
        first, stop = self.ranges()
        start = int(np.searchsorted(first, period.first))
        return slice(start, max(start, int(np.searchsorted(stop, period.first + period.n_days, "right"))))

    def cut(self, steps: slice) -> "StepAxis":
        """Some of the steps."""
        return StepAxis(self.days[steps], self.frequency)


class Conversion(NamedTuple):
    """``ours = theirs * scale + offset``."""

    scale: float = 1.0
    offset: float = 0.0

    def apply(self, values: NDArray[np.generic]) -> Float32Array:
        """Values in our units; computed in float64, so that an offset costs no digits."""
        if self == Conversion():
            return values.astype(np.float32, copy=False)
        return (values.astype(np.float64) * self.scale + self.offset).astype(np.float32)


class Statistics(NamedTuple):
    """Published mean and standard deviation in our units, each [column]."""

    mean: FloatArray
    std: FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class Handle:
    """An array that can be read box by box; its axes are ours, its days those that are used.

    Attributes:
        name: variable, or static array.
        where: store and array, for messages.
        url: its store.
        paths: what it is made of inside the store: the array and its coordinates, or its group.
        variable: the decoded array, lazy, in the axis order of the store.
        dims: the stored names of our axes, in our order.
        chunks: cells of a shard, or of a chunk where there are none, along our axes.
        origin: step of the store that is the first one here.
        conversion: from the stored units to ours.
        columns: names along the feature axis of a static array; its own name without such an axis.
        has_features: whether the last axis is a feature axis.
        options: how its store is opened.
    """

    name: str
    where: str
    url: str
    paths: tuple[str, ...]
    variable: xr.Variable = field(repr=False)
    dims: tuple[str, ...]
    chunks: tuple[int, ...]
    origin: int
    conversion: Conversion
    columns: tuple[str, ...]
    has_features: bool
    options: StorageOptions

    def read(self, *box: slice) -> Float32Array:
        """Values of a box along our axes; axes left out are read whole.

        Raises:
            StoreError: the store cannot be read, or a chunk of it cannot be decoded.
        """
        along = dict(zip(self.dims, box, strict=False))
        stored = tuple(str(d) for d in self.variable.dims)
        lazy = self.variable[tuple(along.get(d, slice(None)) for d in stored)]
        with explained(self.url, self.options):
            try:
                values = lazy.to_numpy()
            except (RuntimeError, ValueError) as error:
                raise StoreError(
                    describe(
                        "a chunk cannot be decoded",
                        where=self.where,
                        expected="the bytes that were written",
                        actual=f"{type(error).__name__}: {error}",
                        fix="write the array again, or fetch a fresh copy",
                    )
                ) from error
        return self.conversion.apply(values.transpose([stored.index(d) for d in self.dims]))

    def time_blocks(self, length: int, n_steps: int) -> Iterator[slice]:
        """Cut ``length`` steps into blocks of about ``n_steps`` that start where chunks in time start."""
        chunk = self.chunks[0]
        block = max(n_steps // chunk, 1) * chunk
        start = self.origin
        edges = (start, *range(start // chunk * chunk + block, start + length, block), start + length)
        for begin, stop in pairwise(edges):
            yield slice(begin - start, stop - start)


class Target(NamedTuple):
    """A target's steps and its array [step, *space]."""

    axis: StepAxis
    handle: Handle


@dataclass(frozen=True, kw_only=True, eq=False)
class Arrays:
    """A data set, found and checked; nothing but coordinates and the mask has been read.

    Attributes:
        grid: where.
        period: the days of the forcing that are used.
        forcing: [time, *space] each, in column order.
        static: [*space] or [*space, feature] each.
        targets: variable -> its steps inside the period and its array.
        statistics: name -> published statistics, where there are any.
    """

    grid: Grid
    period: Period
    forcing: tuple[Handle, ...]
    static: tuple[Handle, ...]
    targets: Mapping[str, Target]
    statistics: Mapping[str, Statistics]


# -------------------- the one entry


def open_arrays(
    data: DataSettings, *, forcing: tuple[str, ...], targets: tuple[str, ...], options: StorageOptions
) -> Arrays:
    """Find and check every array of a data set.

    On a lat x lon grid areas follow from the coordinates. On a cell grid they are the array ``area`` (or the
    one with standard name ``cell_area``); without one every cell counts the same: its area is 1.

    Raises:
        ConfigError: a name in ``data.variables`` is not a variable, or no forcing or static is asked for.
        DataError: something is missing or is not on the axes and in the units it should have.
        StoreError: a store cannot be reached or read.
    """
    _check_names(data, forcing)
    library = _Library(options)
    found = [_find(data, name, library) for name in forcing]
    space = _space(found[0])
    period = _common_period(found, data.period)
    drivers = tuple(_forcing_handle(f, period, space) for f in found)
    static_found = [_find_static(data, name, library) for name in data.static]
    static = tuple(_static_handle(f, space) for f in static_found)
    observed = {name: _find(data, name, library) for name in targets}
    return Arrays(
        grid=_grid(space, _mask(data, library, space, static), found[0]),
        period=period,
        forcing=drivers,
        static=static,
        targets={name: _target(f, period, space) for name, f in observed.items()},
        statistics=dict(_statistics([*found, *static_found, *observed.values()])),
    )


def _check_names(data: DataSettings, forcing: tuple[str, ...]) -> None:
    if not forcing or not data.static:
        raise ConfigError(
            "a data set needs at least one forcing variable and one static feature (data.static)"
        )
    for name in data.variables:
        if name not in VARIABLES and name not in data.static:
            raise ConfigError(f"data.variables.{name}: unknown variable; {nearest(name, VARIABLES)}")


# -------------------- finding arrays


@dataclass(frozen=True, eq=False)
class _Group:
    """One opened group of a store; ``arrays`` are lazy and not yet decoded."""

    url: str
    path: str
    arrays: Mapping[str, xr.Variable]
    attributes: Mapping[str, object]

    @property
    def where(self) -> str:
        return f"{displayed(self.url)} {self.path or '/'}"


@dataclass(frozen=True, eq=False)
class _Found:
    """An array before it is put on our axes; ``units`` are the stored ones, None for a static array."""

    name: str
    array: str
    group: _Group
    root: _Group | None
    variable: xr.Variable
    units: str | None
    published: bool
    options: StorageOptions

    @property
    def where(self) -> str:
        return f"{self.name} ({displayed(self.group.url)} {self.path})"

    @property
    def path(self) -> str:
        return posixpath.join(self.group.path, self.array)

    def neighbours(self) -> Iterator[tuple[str, xr.Variable]]:
        """Arrays that can be its coordinates: on its own axes, in its group first, then at the root."""
        for group in (self.group, self.root):
            for name, array in group.arrays.items() if group is not None else ():
                if array is not self.variable and set(array.dims) <= set(self.variable.dims):
                    yield posixpath.join(group.path if group is not None else "", name), array


class _Library:
    """Opens each group once."""

    def __init__(self, options: StorageOptions) -> None:
        self.options = options
        self._roots: dict[str, zarr.Group] = {}
        self._groups: dict[tuple[str, str], _Group] = {}

    def group(self, url: str, path: str) -> _Group:
        """The group at ``path`` of a store, with its arrays."""
        path = path.strip("/")
        if (url, path) not in self._groups:
            with explained(url, self.options):
                self._groups[url, path] = _read_group(url, path, self._node(url, path))
        return self._groups[url, path]

    def _node(self, url: str, path: str) -> zarr.Group:
        if url not in self._roots:
            self._roots[url] = _open_root(url, self.options)
        root = self._roots[url]
        node = root.get(path) if path else root
        if isinstance(node, zarr.Group):
            return node
        raise _missing(f"group {path!r}", displayed(url), _below(root, posixpath.dirname(path)), path)


def _open_root(url: str, options: StorageOptions) -> zarr.Group:
    try:
        return zarr.open_group(open_store(url, options, read_only=True), mode="r")
    except ContainsArrayError as error:
        raise DataError(
            describe(
                "the store is a single array",
                where=displayed(url),
                expected="a Zarr group",
                actual="a Zarr array",
                fix="give the URL of the group that holds it",
            )
        ) from error


def _below(root: zarr.Group, folder: str) -> tuple[str, ...]:
    node = root.get(folder) if folder else root
    return tuple(posixpath.join(folder, name) for name in node) if isinstance(node, zarr.Group) else ()


def _read_group(url: str, path: str, node: zarr.Group) -> _Group:
    # Format 2 has one fill value for "never written" and "missing"; format 3 has an attribute for the latter.
    store = ZarrStore(node, mode="r", use_zarr_fill_value_as_mask=node.metadata.zarr_format == 2)
    try:
        dataset = xr.open_dataset(store, decode_cf=False, chunks=None, cache=False)
    except (KeyError, ValueError) as error:
        raise DataError(
            describe(
                "the arrays of a group have no consistent axes",
                where=f"{displayed(url)} {path or '/'}",
                expected="named dimensions, each of one length",
                actual=str(error),
                fix="write them with xarray, or add dimension_names (format 2: _ARRAY_DIMENSIONS)",
            )
        ) from error
    arrays = {str(name): array for name, array in dataset.variables.items()}
    return _Group(url, path, arrays, {str(k): v for k, v in dataset.attrs.items()})


def _missing(what: str, where: str, present: Sequence[str], asked: str) -> DataError:
    hint = nearest(asked, tuple(present)) if present else "it is empty"
    return DataError(
        describe(
            f"{what} is missing",
            where=where,
            expected=asked,
            actual=", ".join(sorted(present)[:30]) or "nothing",
            fix=f"{hint}; say where it is with data.variables.NAME.name (and .group, .url)",
        )
    )


def _find(data: DataSettings, name: str, library: _Library) -> _Found:
    """A forcing or target variable and the units it is stored in."""
    found = _locate(data, name, data.variables.get(name), library)
    given = data.variables.get(name, VariableSource()).units
    units = given or _text(found.variable.attrs.get("units"))
    if not units and data.layout == "published":
        units = variable(name).units
    if not units:
        raise DataError(
            describe(
                "an array does not say its units",
                where=found.where,
                expected=f"an attribute units that can be converted to {variable(name).units}",
                actual="none",
                fix=f"set data.variables.{name}.units",
            )
        )
    return replace(found, units=units)


def _find_static(data: DataSettings, name: str, library: _Library) -> _Found:
    return _locate(data, name, data.variables.get(name), library)


def _locate(data: DataSettings, name: str, source: VariableSource | None, library: _Library) -> _Found:
    source = source or VariableSource()
    url = source.url or data.url
    published = data.layout == "published"
    stored = source.name or (PUBLISHED_GROUPS.get(name, name) if published else name)
    path = posixpath.join(source.group or "", stored) if published else source.group or ""
    array = "data" if published else stored
    group = library.group(url, path)
    if array not in group.arrays:
        raise _missing(f"variable {name}", group.where, tuple(group.arrays), array)
    root = library.group(url, "") if group.path and not published else None
    return _Found(name, array, group, root, group.arrays[array], None, published, library.options)


def _text(value: object) -> str:
    return "" if value is None else str(value).strip()


# -------------------- coordinates


@dataclass(frozen=True, eq=False)
class _Space:
    """The spatial axes of one array: stored names, and coordinates in degrees."""

    dims: tuple[str, ...]
    lat: FloatArray
    lon: FloatArray
    coordinate_paths: tuple[str, ...]
    where: str


class _Coordinate(NamedTuple):
    path: str
    array: xr.Variable


def _coordinate(found: _Found, kind: str) -> _Coordinate | None:
    """The coordinate of one kind: by CF attributes, else by a usual name; a dimension's own one first."""
    neighbours = [_Coordinate(path, array) for path, array in found.neighbours() if array.dims]
    neighbours.sort(key=lambda c: posixpath.basename(c.path) not in c.array.dims)
    by_attribute = [c for c in neighbours if _is_kind(c.array, kind)]
    by_name = [c for c in neighbours if posixpath.basename(c.path).lower() in _USUAL_NAMES[kind]]
    return next(iter((*by_attribute, *by_name)), None)


def _is_kind(array: xr.Variable, kind: str) -> bool:
    units = _text(array.attrs.get("units")).lower()
    if array.attrs.get("standard_name") == kind or units in _USUAL_UNITS[kind]:
        return True
    return kind == "time" and (array.attrs.get("axis") == "T" or " since " in units)


def _space(found: _Found) -> _Space:
    lat = _coordinate(found, "latitude")
    lon = _coordinate(found, "longitude")
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
    return _Space(dims, _degrees(lat, found), _degrees(lon, found), (lat.path, lon.path), found.where)


def _degrees(coordinate: _Coordinate, found: _Found) -> FloatArray:
    values = _values(found, coordinate).astype(np.float64)
    if not np.isfinite(values).all():
        raise DataError(f"coordinate {coordinate.path} of {found.where} holds values that are not finite")
    return values


def _values(found: _Found, coordinate: _Coordinate) -> NDArray[np.generic]:
    with explained(found.group.url, found.options):
        decoded: NDArray[np.generic] = _decode(coordinate.path, coordinate.array).to_numpy()
    return decoded


def _decode(name: str, array: xr.Variable) -> xr.Variable:
    """Lazily unpack and mask an array, as CF says."""
    attributes = dict(array.attrs)
    packed = "scale_factor" in attributes or "add_offset" in attributes
    # Zarr's own default fill value is 0. Taken for "missing" it would delete every true zero.
    if attributes.get("_FillValue") == 0 and not packed:
        del attributes["_FillValue"]
    bare = xr.Variable(array.dims, array._data, attributes, array.encoding, fastpath=True)
    return xr.conventions.decode_cf_variable(name, bare, decode_times=False)


def _flips(space: _Space, reference: _Space) -> tuple[str, ...]:
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


def _other_grid(space: _Space, reference: _Space) -> DataError:
    return DataError(
        describe(
            "two arrays are on different grids",
            where=f"{space.where} and {reference.where}",
            expected=f"the same coordinates to the last digit: {_outline(reference)}",
            actual=_outline(space),
            fix="regrid one of them, or write the coordinates of both from one source",
        )
    )


def _outline(space: _Space) -> str:
    axes = (("lat", space.lat), ("lon", space.lon))
    return ", ".join(f"{name} {a.size} values {a[0]!s} .. {a[-1]!s}" for name, a in axes)


def _grid(space: _Space, mask: BoolArray, found: _Found) -> Grid:
    if len(space.dims) == 2:
        return Grid.lat_lon(space.lat, space.lon, mask)
    return Grid(("cell",), space.lat, space.lon, mask, _cell_areas(space, found))


def _cell_areas(space: _Space, found: _Found) -> FloatArray:
    """Area of each cell, m2, [cell]; ones where the data set does not say."""
    for path, array in found.neighbours():
        known = posixpath.basename(path).lower() in _AREA or array.attrs.get("standard_name") == "cell_area"
        if known and array.dims == space.dims:
            units = _text(array.attrs.get("units")) or "m2"
            conversion = _conversion(units, "m2", f"{path} of {found.where}", "write its units attribute")
            values = _values(found, _Coordinate(path, array)).astype(np.float64)
            areas = values * conversion.scale + conversion.offset
            if not (areas > 0).all():
                raise DataError(f"{path} of {found.where} holds areas that are not positive numbers")
            return areas
    return np.ones(space.lat.size)


# -------------------- time


class _Times(NamedTuple):
    """Time stamps of an array, datetime64, [step], its time dimension and the path of the coordinate."""

    dim: str
    stamps: NDArray[np.datetime64]
    path: str

    def days(self) -> IntArray:
        """Days since 1970-01-01; the hour does not count."""
        return self.stamps.astype("datetime64[D]").astype(np.int64)


def _times(found: _Found) -> _Times:
    coordinate = _coordinate(found, "time")
    if coordinate is None or coordinate.array.ndim != 1:
        raise DataError(
            describe(
                "no time coordinate",
                where=found.where,
                expected="a 1-D array with units such as 'days since 2001-01-01'",
                actual=", ".join(path for path, _ in found.neighbours()) or "no coordinates",
                fix="add it beside the array, named like its time dimension",
            )
        )
    return _Times(str(coordinate.array.dims[0]), _stamps(found, coordinate), coordinate.path)


def _stamps(found: _Found, coordinate: _Coordinate) -> NDArray[np.datetime64]:
    calendar = _text(coordinate.array.attrs.get("calendar", "standard")).lower()
    if calendar not in _CALENDARS:
        raise DataError(
            describe(
                f"calendar {calendar!r} is not supported",
                where=found.where,
                expected=", ".join(sorted(_CALENDARS)),
                actual=calendar,
                fix="convert it (xarray: convert_calendar('standard')); a simulated day must exist",
            )
        )
    reader = xr.coders.CFDatetimeCoder(time_unit="s")
    try:
        with explained(found.group.url, found.options):
            decoded = xr.conventions.decode_cf_variable("time", coordinate.array, decode_times=reader)
            stamps: NDArray[np.datetime64] = decoded.to_numpy()
    except (ValueError, OverflowError) as error:
        raise _unreadable_time(found, coordinate, str(error)) from error
    if stamps.dtype.kind != "M" or np.isnat(stamps).any():
        raise _unreadable_time(found, coordinate, f"values of type {stamps.dtype}, or missing ones")
    return stamps


def _unreadable_time(found: _Found, coordinate: _Coordinate, reason: str) -> DataError:
    return DataError(
        describe(
            "the time coordinate cannot be read",
            where=found.where,
            expected="units such as 'days since 2001-01-01'",
            actual=f"units {_text(coordinate.array.attrs.get('units')) or 'absent'}: {reason}",
            fix="write CF time units",
        )
    )


def _daily(found: _Found) -> tuple[_Times, Period]:
    """Time stamps of a forcing variable, which has every day exactly once."""
    times = _times(found)
    days = times.days()
    if days.size == 0:
        raise DataError(f"{found.where} has no time step")
    _refuse_sub_daily(found, times)
    jumps = np.diff(days)
    if (jumps != 1).any():
        at = int(np.argmax(jumps != 1))
        raise _broken_days(found, int(days[at]), int(jumps[at]))
    return times, Period(as_date(int(days[0])), as_date(int(days[-1]) + 1))


def _refuse_sub_daily(found: _Found, times: _Times) -> None:
    """Several stamps on most days are hours, not doubled days."""
    steps = np.diff(times.stamps.astype("datetime64[s]").astype(np.int64))
    typical = float(np.median(steps)) if steps.size else _SECONDS_A_DAY
    if 0 < typical < _SECONDS_A_DAY:
        raise DataError(
            describe(
                "time steps are shorter than a day",
                where=found.where,
                expected="one step a day",
                actual=f"steps of {typical / 3600:g} hours",
                fix="aggregate to daily values first",
            )
        )


def _broken_days(found: _Found, day: int, jump: int) -> DataError:
    if jump > 1:
        what, actual = "a day is missing", f"no {as_date(day + 1)} after {as_date(day)}"
    elif jump == 0:
        what, actual = "a day is there twice", f"{as_date(day)} twice"
    else:
        what, actual = "days are out of order", f"{as_date(day + jump)} after {as_date(day)}"
    return DataError(
        describe(
            what,
            where=found.where,
            expected="every day exactly once, in increasing order",
            actual=actual,
            fix="complete or sort the series; it must be daily, since the simulation cannot skip a day",
        )
    )


def _steps(found: _Found) -> tuple[_Times, StepAxis]:
    """Time stamps of a target, and its steps: daily or monthly, gaps allowed."""
    times = _times(found)
    days = times.days()
    if days.size == 0:
        raise DataError(f"{found.where} has no time step")
    _refuse_sub_daily(found, times)
    frequency = _frequency(found, days)
    if frequency == "monthly":
        days = days.astype("datetime64[D]").astype("datetime64[M]").astype("datetime64[D]").astype(np.int64)
    wrong = np.diff(days) <= 0
    if wrong.any():
        at = int(np.argmax(wrong))
        raise _unsorted_steps(found, frequency, int(days[at]), int(days[at + 1]))
    return times, StepAxis(days, frequency)


def _frequency(found: _Found, days: IntArray) -> Frequency:
    """Months where steps are mostly four weeks apart or more (a single step too), days where some are one."""
    jumps = np.abs(np.diff(days))
    typical = float(np.median(jumps)) if jumps.size else 30.0
    if typical >= 28:
        return "monthly"
    if (jumps == 1).any():
        return "daily"
    raise DataError(
        describe(
            "a target is neither daily nor monthly",
            where=found.where,
            expected="a step a day or a calendar month; gaps are allowed",
            actual=f"steps mostly {typical:g} days apart",
            fix="average it to months first",
        )
    )


def _unsorted_steps(found: _Found, frequency: Frequency, before: int, after: int) -> DataError:
    noun = "day" if frequency == "daily" else "month"
    what = f"a {noun} is there twice" if before == after else f"{noun}s are out of order"
    return DataError(
        describe(
            what,
            where=found.where,
            expected=f"each {noun} at most once, in increasing order",
            actual=f"{as_date(after)} after {as_date(before)}",
            fix="drop or sort the steps",
        )
    )


def _common_period(found: list[_Found], wanted: Period | None) -> Period:
    """The days that are used; every forcing variable has them."""
    periods = [_daily(f)[1] for f in found]
    for f, period in zip(found, periods, strict=True):
        if wanted is None and period != periods[0]:
            raise _other_period(
                f, f"{periods[0]}, as {found[0].where}", period, "set data.period to common days"
            )
        if wanted is not None and not period.contains(wanted):
            raise _other_period(f, f"every day of data.period = {wanted}", period, "shorten data.period")
    return wanted or periods[0]


def _other_period(found: _Found, expected: str, actual: Period, fix: str) -> DataError:
    return DataError(
        describe(
            "a forcing variable has other days",
            where=found.where,
            expected=expected,
            actual=str(actual),
            fix=fix,
        )
    )


# -------------------- units


def _conversion(units: str, ours: str, where: str, fix: str) -> Conversion:
    """How to convert ``units`` to ``ours``; a mass of water on an area counts as its depth."""
    if units == ours:
        return Conversion()
    try:
        zero, one = (_magnitude(value, units, ours) for value in (0.0, 1.0))
    except Exception as error:  # pint raises its own, AttributeError, AssertionError and TokenError
        raise DataError(
            describe(
                "units cannot be converted",
                where=where,
                expected=f"units that can be converted to {ours}",
                actual=f"{units!r} ({error})" if str(error) else repr(units),
                fix=fix,
            )
        ) from error
    return Conversion(one - zero, zero)


def _magnitude(value: float, units: str, ours: str) -> float:
    quantity = cf_units.Quantity(value, cf_units.Unit(units))
    target = cf_units.Unit(ours)
    if (quantity.units / target).dimensionality == _WATER_DENSITY.dimensionality:
        quantity = quantity / _WATER_DENSITY
    return float(quantity.to(target).magnitude)


# -------------------- handles


def _unit_conversion(found: _Found) -> Conversion:
    if found.units is None:
        return Conversion()
    ours = variable(found.name).units
    return _conversion(
        found.units, ours, found.where, f"set data.variables.{found.name}.units or convert the data"
    )


def _handle(
    found: _Found, space: _Space, reference: _Space, leading: tuple[str, ...], last: str | None
) -> Handle:
    """Put an array on our axes: time and a feature axis where it has them, space as the reference has it."""
    dims = (*leading, *space.dims, *((last,) if last else ()))
    decoded = _decode(found.array, _without_unit_axes(found, dims))
    flips = _flips(space, reference)
    lazy = decoded[tuple(slice(None, None, -1) if d in flips else slice(None) for d in decoded.dims)]
    coordinates = (found.path, *space.coordinate_paths)
    return Handle(
        name=found.name,
        where=found.where,
        url=found.group.url,
        paths=(found.group.path,) if found.published else coordinates,
        variable=lazy,
        dims=dims,
        chunks=_chunks(found.variable, dims),
        origin=0,
        conversion=_unit_conversion(found),
        columns=(found.name,),
        has_features=last is not None,
        options=found.options,
    )


def _without_unit_axes(found: _Found, dims: tuple[str, ...]) -> xr.Variable:
    """Drop further axes of length one, such as a height.

    Raises:
        DataError: an axis is missing, or a further one is longer.
    """
    array = found.variable
    further = [str(d) for d in array.dims if d not in dims]
    if set(dims) - set(map(str, array.dims)) or any(array.sizes[d] != 1 for d in further):
        raise DataError(
            describe(
                "an array has other axes than it should",
                where=found.where,
                expected=str(dims),
                actual=str(dict(array.sizes)),
                fix="select or average over the further axis, or name the axes in the store",
            )
        )
    return array[tuple(0 if d in further else slice(None) for d in array.dims)]


def _chunks(array: xr.Variable, dims: tuple[str, ...]) -> tuple[int, ...]:
    """What a store hands out at once, along ``dims``."""
    sizes = array.encoding.get("shards") or array.encoding.get("chunks") or array.shape
    along = dict(zip(map(str, array.dims), sizes, strict=True))
    return tuple(int(along[d]) for d in dims)


def _forcing_handle(found: _Found, period: Period, reference: _Space) -> Handle:
    times, stored = _daily(found)
    handle = _handle(found, _space(found), reference, (times.dim,), None)
    first = period.first - stored.first
    return _cut(handle, times, slice(first, first + period.n_days))


def _target(found: _Found, period: Period, reference: _Space) -> Target:
    times, axis = _steps(found)
    steps = axis.within(period)
    if steps.stop <= steps.start:
        raise DataError(
            describe(
                "a target has no step inside the days that are used",
                where=found.where,
                expected=f"a whole {'month' if axis.frequency == 'monthly' else 'day'} inside {period}",
                actual=f"{as_date(int(axis.days[0]))} to {as_date(int(axis.days[-1]))}",
                fix="choose another data.period, or leave the target out",
            )
        )
    handle = _handle(found, _space(found), reference, (times.dim,), None)
    return Target(axis.cut(steps), _cut(handle, times, steps))


def _cut(handle: Handle, times: _Times, steps: slice) -> Handle:
    index = tuple(steps if d == times.dim else slice(None) for d in handle.variable.dims)
    paths = handle.paths if times.path.startswith(handle.paths[0] + "/") else (*handle.paths, times.path)
    return replace(handle, variable=handle.variable[index], origin=steps.start, paths=paths)


def _static_handle(found: _Found, reference: _Space) -> Handle:
    space = _space(found)
    further = [str(d) for d in found.variable.dims if d not in space.dims]
    feature = further[0] if len(further) == 1 else None
    handle = _handle(found, space, reference, (), feature)
    return replace(handle, columns=_feature_names(found, feature)) if feature else handle


def _feature_names(found: _Found, feature: str) -> tuple[str, ...]:
    """From attribute ``names``, else a coordinate of text, else numbered."""
    size = found.variable.sizes[feature]
    names = found.variable.attrs.get("names", found.group.attributes.get("names"))
    coordinate = found.group.arrays.get(feature)
    if names is None and coordinate is not None and coordinate.dtype.kind in "OSUT":
        names = [str(v) for v in _values(found, _Coordinate(feature, coordinate))]
    if names is None:
        return tuple(f"feature_{i}" for i in range(size))
    if not isinstance(names, Sequence) or isinstance(names, str) or len(set(names)) != size:
        raise DataError(f"{found.where} has {size} features, but the names {names!r}")
    return tuple(map(str, names))


def _mask(data: DataSettings, library: _Library, space: _Space, static: tuple[Handle, ...]) -> BoolArray:
    """True on land, [*space]: a stored mask, or where every static feature is finite."""
    if data.mask is None and data.layout == "cf":
        finite = [np.isfinite(handle.read()).reshape(*_shape(space), -1).all(-1) for handle in static]
        return np.asarray(np.logical_and.reduce(finite))
    found = _locate(data, "mask", data.mask, library)
    values = _handle(found, _space(found), space, (), None).read()
    return np.asarray(np.isfinite(values) & (values != 0))


def _shape(space: _Space) -> tuple[int, ...]:
    return (space.lat.size, space.lon.size) if len(space.dims) == 2 else (space.lat.size,)


def _statistics(found: list[_Found]) -> Iterator[tuple[str, Statistics]]:
    """Published group attributes, in our units."""
    for f in found:
        attributes = f.group.attributes
        if f.published and "mean" in attributes and "std" in attributes:
            conversion = _unit_conversion(f)
            mean, std = (np.atleast_1d(np.asarray(attributes[k], np.float64)) for k in ("mean", "std"))
            yield f.name, Statistics(mean * conversion.scale + conversion.offset, std * conversion.scale)
