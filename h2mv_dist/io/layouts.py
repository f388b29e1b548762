"""Layouts: the published layout and CF data sets become the same handles on the same axes.

Both layouts are found by name, decoded by CF rules, put on the grid of the first forcing variable and cut to
the days that are used. Only coordinates and the mask are read here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from h2mv_dist.config import DataSettings, StorageOptions
from h2mv_dist.errors import ConfigError
from h2mv_dist.grid import BoolArray, FloatArray, Grid, Period
from h2mv_dist.io.handles import Handle, Target, forcing_handle, map_handle, static_handle, target_of
from h2mv_dist.io.library import Found, Library, find_array, find_variable
from h2mv_dist.io.spaces import Space, grid_of, space_of
from h2mv_dist.io.times import common_period, daily_times, uneven_days
from h2mv_dist.io.units import conversion_of
from h2mv_dist.variables import VARIABLES, nearest


class Statistics(NamedTuple):
    """Published mean and standard deviation in our units, each [column]."""

    mean: FloatArray
    std: FloatArray


@dataclass(frozen=True, kw_only=True, eq=False)
class Arrays:
    """A data set, found and checked; nothing but coordinates and the mask has been read.

    Attributes:
        grid: where.
        period: the days of the forcing that are used.
        uneven: which forcing variables have fewer days than others, in words, if that decides the period.
        forcing: [time, *space] each, in column order.
        static: [*space] or [*space, feature] each.
        targets: variable -> its steps inside the period and its array.
        statistics: name -> published statistics, where there are any.
    """

    grid: Grid
    period: Period
    uneven: str
    forcing: tuple[Handle, ...]
    static: tuple[Handle, ...]
    targets: Mapping[str, Target]
    statistics: Mapping[str, Statistics]


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
    check_names(data, forcing)
    library = Library(options)
    found = [find_variable(data, name, library) for name in forcing]
    space = space_of(found[0])
    times = [daily_times(f) for f in found]
    periods = {name: stored.period for name, stored in zip(forcing, times, strict=True)}
    period = common_period(found, list(periods.values()), data.period)
    drivers = tuple(forcing_handle(f, t, period, space) for f, t in zip(found, times, strict=True))
    land = open_land(data, found[0], space, library)
    observed = {name: find_variable(data, name, library) for name in targets}
    return Arrays(
        grid=land.grid,
        period=period,
        uneven=uneven_days(periods) if data.period is None else "",
        forcing=drivers,
        static=land.static,
        targets={name: target_of(f, period, space) for name, f in observed.items()},
        statistics=dict(_statistics([*found, *land.found, *observed.values()])),
    )


class Land(NamedTuple):
    """The grid with its mask and areas, and the static arrays, each [*space] or [*space, feature]."""

    grid: Grid
    static: tuple[Handle, ...]
    found: tuple[Found, ...]


def open_land(data: DataSettings, reference: Found, space: Space, library: Library) -> Land:
    """What does not change with time, on the axes of the first forcing variable (see :func:`open_arrays`).

    Args:
        data: where it is.
        reference: the first forcing variable.
        space: its axes.
        library: of the data set's stores.

    Raises:
        DataError: an array is missing or on other axes, or there is no land.
        StoreError: a store cannot be reached or read.
    """
    found = tuple(find_array(data, name, data.variables.get(name), library) for name in data.static)
    static = tuple(static_handle(f, space) for f in found)
    return Land(grid_of(space, _mask(data, library, space, static), reference), static, found)


def check_names(data: DataSettings, forcing: tuple[str, ...]) -> None:
    """Make sure that settings name variables that exist.

    Raises:
        ConfigError: a name is unknown, or no forcing or static feature is asked for.
    """
    if not forcing or not data.static:
        raise ConfigError(
            "a data set needs at least one forcing variable and one static feature (data.static)"
        )
    for name in data.variables:
        if name not in VARIABLES and name not in data.static:
            raise ConfigError(f"data.variables.{name}: unknown variable; {nearest(name, VARIABLES)}")


def _mask(data: DataSettings, library: Library, space: Space, static: tuple[Handle, ...]) -> BoolArray:
    """True on land, [*space]: a stored mask, or where every static feature is finite."""
    if data.mask is None and data.layout == "cf":
        finite = [np.isfinite(handle.read()).reshape(*space.shape, -1).all(-1) for handle in static]
        return np.asarray(np.logical_and.reduce(finite))
    found = find_array(data, "mask", data.mask, library)
    values = map_handle(found, space).read()
    return np.asarray(np.isfinite(values) & (values != 0))


def _statistics(found: list[Found]) -> Iterator[tuple[str, Statistics]]:
    """Published group attributes, in our units."""
    for f in found:
        attributes = f.group.attributes
        if f.published and "mean" in attributes and "std" in attributes:
            conversion = conversion_of(f)
            mean, std = (np.atleast_1d(np.asarray(attributes[k], np.float64)) for k in ("mean", "std"))
            yield f.name, Statistics(mean * conversion.scale + conversion.offset, std * conversion.scale)
