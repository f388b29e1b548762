"""Small data sets in both layouts, written as they are, and opened."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from h2mv_dist.config import DataSettings
from h2mv_dist.grid import Tile
from h2mv_dist.io.source import Source, open_source
from h2mv_dist.io.stores import open_store
from tests.conftest import Place

FORCING = ("net_radiation", "precipitation", "air_temperature")
TARGETS = ("evapotranspiration", "snow_water_equivalent")
FIRST = date(2004, 1, 15)
N_DAYS = 80
LAT = np.array([48.5, 47.5, 46.5, 45.5])
LON = np.array([10.0, 11.0, 12.5, 13.0, 14.0, 16.0])
LAND = np.random.default_rng(0).random((LAT.size, LON.size)) > 0.3
DAYS = {"units": f"days since {FIRST}", "calendar": "standard"}


@dataclass
class Stored:
    """One array of a store that a test is about to write."""

    values: NDArray[Any]
    dims: tuple[str, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    chunks: tuple[int, ...] | None = None
    shards: tuple[int, ...] | None = None
    fill: Any = None


Arrays = dict[str, Stored]


def field_of(seed: int, *shape: int, low: float = 0.0, high: float = 10.0) -> NDArray[np.float32]:
    """Plausible values over land, NaN over sea, [*shape, lat, lon]."""
    values = np.random.default_rng(seed).uniform(low, high, (*shape, *LAND.shape)).astype(np.float32)
    return np.where(LAND, values, np.float32(np.nan))


def axes(days: NDArray[Any] | None, attrs: Mapping[str, Any] = DAYS) -> Arrays:
    """Coordinates of one group or store."""
    coordinates = {"lat": Stored(LAT, ("lat",)), "lon": Stored(LON, ("lon",))}
    if days is not None:
        coordinates["time"] = Stored(days, ("time",), dict(attrs))
    return coordinates


def published() -> tuple[Arrays, dict[str, dict[str, Any]]]:
    """A small data set in the published layout, and its group attributes."""
    day = np.arange(N_DAYS)
    contents = {
        "rn": Stored(field_of(1, N_DAYS, low=-20, high=150), ("time", "lat", "lon"), chunks=(40, 2, 3)),
        "prec": Stored(field_of(2, N_DAYS), ("time", "lat", "lon"), chunks=(40, 2, 3)),
        "tair": Stored(field_of(3, N_DAYS, low=250, high=300), ("time", "lat", "lon"), chunks=(40, 2, 3)),
        "static": Stored(np.stack([field_of(k) for k in (4, 5, 6)], -1), ("lat", "lon", "feature")),
        "mask": Stored(LAND.astype(np.int8), ("lat", "lon")),
        "swe": Stored(field_of(7, N_DAYS), ("time", "lat", "lon"), chunks=(40, 2, 3)),
        "et": Stored(field_of(8, 3), ("time", "lat", "lon")),
    }
    times = {"et": np.array([-14, 17, 46]), "mask": None, "static": None}
    arrays: Arrays = {}
    for name, stored in contents.items():
        own = axes(times.get(name, day))
        arrays |= {f"{name}/data": stored, **{f"{name}/{axis}": a for axis, a in own.items()}}
    attributes = {name: {"mean": 1.5, "std": 2.5} for name in contents if name not in {"static", "mask"}}
    return arrays, {**attributes, "static": {"mean": [1.0, 2.0, 3.0], "std": [1.0, 2.0, 4.0]}}


def cf() -> Arrays:
    """A small CF data set in one group, in the usual units."""
    space = ("time", "lat", "lon")
    return {
        **axes(np.arange(N_DAYS)),
        "net_radiation": Stored(field_of(1, N_DAYS, high=150), space, {"units": "W m-2"}, (40, 2, 3)),
        "precipitation": Stored(field_of(2, N_DAYS), space, {"units": "mm d-1"}, (40, 2, 3)),
        "air_temperature": Stored(field_of(3, N_DAYS, low=250, high=300), space, {"units": "K"}, (40, 2, 3)),
        "elevation": Stored(field_of(4), ("lat", "lon"), {"units": "m"}),
        "clay": Stored(field_of(5), ("lat", "lon"), {"units": "1"}),
    }


def basins(area: Stored | None) -> Arrays:
    """Seven basins in the CF layout."""
    n = 7
    rng = np.random.default_rng(3)
    arrays = {
        "time": Stored(np.arange(N_DAYS), ("time",), dict(DAYS)),
        "lat": Stored(rng.uniform(40, 50, n), ("cell",)),
        "lon": Stored(rng.uniform(0, 10, n), ("cell",)),
        "precipitation": Stored(rng.random((n, N_DAYS)), ("cell", "time"), {"units": "mm/day"}),
        "attributes": Stored(rng.random((n, 2)), ("cell", "attribute")),
        "attribute": Stored(np.array(["slope", "clay"], dtype="<U5"), ("attribute",)),
    }
    return arrays if area is None else {**arrays, "area": area}


def write(
    place: Place,
    arrays: Arrays,
    *,
    attributes: Mapping[str, Mapping[str, Any]] | None = None,
    zarr_format: Any = 3,
    consolidate: bool = False,
) -> None:
    """Write arrays as they are, with the dimension names of either Zarr format."""
    store = open_store(place.url, place.options, read_only=False)
    root = zarr.create_group(store, zarr_format=zarr_format)
    for path, stored in arrays.items():
        in_attributes = {"_ARRAY_DIMENSIONS": list(stored.dims)} if zarr_format == 2 else {}
        fill = (
            stored.fill if stored.fill is not None else (np.nan if stored.values.dtype.kind == "f" else None)
        )
        array = root.create_array(
            path,
            shape=stored.values.shape,
            dtype=stored.values.dtype,
            chunks=stored.chunks or stored.values.shape,
            shards=stored.shards,
            attributes={**stored.attrs, **in_attributes},
            fill_value=fill,
            dimension_names=None if zarr_format == 2 else stored.dims,
        )
        array[...] = stored.values
    for path, group_attributes in (attributes or {}).items():
        root[path].attrs.update(group_attributes)
    if consolidate:
        with warnings.catch_warnings():
            # format 3 has no agreed place for them yet
            warnings.simplefilter("ignore")
            zarr.consolidate_metadata(store)


def open_cf(
    place: Place,
    arrays: Arrays,
    *,
    targets: tuple[str, ...] = (),
    static: tuple[str, ...] = ("elevation", "clay"),
    forcing: tuple[str, ...] = FORCING,
    **settings: Any,
) -> Source:
    """Write a CF data set and open it."""
    write(place, arrays)
    data = DataSettings(url=place.url, layout="cf", static=static, **settings)
    return open_source(data, forcing=forcing, targets=targets, options=place.options)


def open_basins(place: Place, area: Stored | None) -> Source:
    with warnings.catch_warnings():
        # text in format 3 has no specification
        warnings.filterwarnings("ignore", "The data type", category=Warning)
        return open_cf(place, basins(area), forcing=("precipitation",), static=("attributes",))


def open_published(place: Place, targets: tuple[str, ...] = TARGETS, **settings: Any) -> Source:
    data = DataSettings(url=place.url, **settings)
    return open_source(data, forcing=FORCING, targets=targets, options=place.options)


def whole(source: Source) -> Tile:
    """The tile that is the whole grid."""
    return Tile((0,) * len(source.grid.shape), source.grid.shape)


def read(source: Source) -> NDArray[np.float32]:
    """All forcing, [time, *space, var]."""
    return source.read_forcing(whole(source), source.period)


def read_of(arrays: Arrays) -> NDArray[np.float32]:
    """What :func:`read` should return of a CF data set, [time, *space, var]."""
    return np.stack([arrays[name].values for name in FORCING], -1)
