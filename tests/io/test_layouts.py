"""What data sets may look like, and what is refused: names, axes, time, units, packing."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from h2mv_dist.config import DataSettings, StorageOptions, VariableSource
from h2mv_dist.errors import ConfigError, DataError, StoreError
from h2mv_dist.grid import Period, Tile, as_date
from h2mv_dist.io.source import Source, StepAxis, open_source
from h2mv_dist.io.stores import open_store
from tests.conftest import Place

FORCING = ("net_radiation", "precipitation", "air_temperature")
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
        attrs, names = dict(stored.attrs), {"dimension_names": stored.dims}
        if zarr_format == 2:
            attrs, names = {**attrs, "_ARRAY_DIMENSIONS": list(stored.dims)}, {}
        fill = (
            stored.fill if stored.fill is not None else (np.nan if stored.values.dtype.kind == "f" else None)
        )
        array = root.create_array(
            path,
            shape=stored.values.shape,
            dtype=stored.values.dtype,
            chunks=stored.chunks or stored.values.shape,
            attributes=attrs,
            fill_value=fill,
            **names,  # type: ignore[arg-type]
        )
        array[...] = stored.values
    for path, group_attributes in (attributes or {}).items():
        root[path].attrs.update(group_attributes)
    if consolidate:
        with warnings.catch_warnings():
            # format 3 has no agreed place for them yet
            warnings.simplefilter("ignore")
            zarr.consolidate_metadata(store)


@pytest.fixture
def folder(tmp_path: Path) -> Place:
    return Place(str(tmp_path / "store"), StorageOptions())


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


def whole(source: Source) -> Tile:
    return Tile((0,) * len(source.grid.shape), source.grid.shape)


def read(source: Source) -> NDArray[np.float32]:
    """All forcing, [time, *space, var]."""
    return source.read_forcing(whole(source), source.period)


# -------------------- the published layout


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("consolidate", [False, True])
def test_the_published_layout_opens_in_both_formats(
    folder: Place, zarr_format: int, consolidate: bool
) -> None:
    arrays, attributes = published()
    write(folder, arrays, attributes=attributes, zarr_format=zarr_format, consolidate=consolidate)
    source = open_source(
        DataSettings(url=folder.url),
        forcing=FORCING,
        targets=("evapotranspiration", "snow_water_equivalent"),
        options=folder.options,
    )
    expected = np.stack([arrays[f"{g}/data"].values for g in ("rn", "prec", "tair")], -1)
    np.testing.assert_array_equal(read(source), expected)
    np.testing.assert_array_equal(source.grid.mask, LAND)
    np.testing.assert_array_equal(source.grid.lon, LON)
    assert source.static == ("feature_0", "feature_1", "feature_2")
    assert source.period == Period(FIRST, as_date(Period(FIRST, date(2005, 1, 1)).first + N_DAYS))
    monthly, daily = (source.targets[t] for t in ("evapotranspiration", "snow_water_equivalent"))
    # January begins before the forcing does; March 2004 ends inside it
    assert [as_date(d) for d in monthly.days] == [date(2004, 2, 1), date(2004, 3, 1)]
    assert (daily.frequency, len(daily)) == ("daily", N_DAYS)
    np.testing.assert_array_equal(
        source.read_targets(whole(source))["evapotranspiration"], arrays["et/data"].values[1:]
    )
    scaler = source.published_scaler()
    assert scaler.forcing.mean == (1.5, 1.5, 1.5)
    assert scaler.static.std == (1.0, 2.0, 4.0)
    assert scaler.targets["evapotranspiration"].std == (2.5,)


def test_a_setting_renames_a_published_group(folder: Place) -> None:
    arrays, attributes = published()
    arrays |= {
        path.replace("et/", "et_xbase/"): stored for path, stored in arrays.items() if path[:3] == "et/"
    }
    arrays["et_xbase/data"] = Stored(arrays["et/data"].values + 1, ("time", "lat", "lon"))
    write(folder, arrays, attributes=attributes, zarr_format=2)
    data = DataSettings(url=folder.url, variables={"evapotranspiration": VariableSource(name="et_xbase")})
    source = open_source(data, forcing=FORCING, targets=("evapotranspiration",), options=folder.options)
    values = source.read_targets(whole(source))["evapotranspiration"]
    np.testing.assert_array_equal(values, arrays["et/data"].values[1:] + 1)


def test_published_statistics_follow_a_conversion(folder: Place) -> None:
    arrays, attributes = published()
    write(folder, arrays, attributes=attributes)
    data = DataSettings(url=folder.url, variables={"air_temperature": VariableSource(units="degC")})
    source = open_source(data, forcing=("air_temperature",), targets=(), options=folder.options)
    assert source.published_scaler().forcing.mean == pytest.approx((274.65,))
    assert source.published_scaler().forcing.std == pytest.approx((2.5,))


def test_feature_names_come_from_the_attribute(folder: Place) -> None:
    arrays, attributes = published()
    attributes["static"]["names"] = ["clay", "sand", "slope"]
    write(folder, arrays, attributes=attributes, zarr_format=2)
    source = open_source(DataSettings(url=folder.url), forcing=FORCING, targets=(), options=folder.options)
    assert source.static == ("clay", "sand", "slope")


def test_statistics_that_are_not_published_are_asked_for_in_vain(folder: Place) -> None:
    with pytest.raises(DataError, match=r'publishes no statistics(.|\n)*training\.scaler = "fit"'):
        open_cf(folder, cf()).published_scaler()


# -------------------- names


def test_a_missing_variable_is_named_with_the_nearest_one(folder: Place) -> None:
    arrays = cf()
    arrays["precipitaton"] = arrays.pop("precipitation")
    with pytest.raises(
        DataError, match=r"variable precipitation is missing(.|\n)*did you mean 'precipitaton'"
    ):
        open_cf(folder, arrays)


def test_a_missing_published_group_is_named(folder: Place) -> None:
    arrays, _ = published()
    write(folder, {path: a for path, a in arrays.items() if not path.startswith("tair/")})
    with pytest.raises(DataError, match=r"group 'tair' is missing(.|\n)*prec, rn"):
        open_source(DataSettings(url=folder.url), forcing=FORCING, targets=(), options=folder.options)
    with pytest.raises(DataError, match=r"'fapar' is missing"):
        open_source(
            DataSettings(url=folder.url), forcing=FORCING[:2], targets=("fapar",), options=folder.options
        )


def test_a_misspelt_setting_is_named(folder: Place) -> None:
    with pytest.raises(ConfigError, match="did you mean 'runoff'"):
        open_cf(folder, cf(), variables={"runof": VariableSource(name="q")})


@pytest.mark.parametrize("missing", ["forcing", "static"])
def test_nothing_to_read_is_refused(folder: Place, missing: str) -> None:
    with pytest.raises(ConfigError, match="at least one forcing variable and one static"):
        open_cf(folder, cf(), **{missing: ()})


def test_variables_may_lie_in_groups_and_other_stores(folder: Place) -> None:
    arrays = cf()
    other = Place(folder.url + "-rain", folder.options)
    write(other, {**axes(np.arange(N_DAYS)), "deep/rain": arrays["precipitation"]})
    arrays["drivers/rad"] = arrays.pop("net_radiation")
    del arrays["precipitation"]
    source = open_cf(
        folder,
        arrays,
        variables={
            "net_radiation": VariableSource(name="rad", group="drivers"),
            "precipitation": VariableSource(name="rain", group="/deep/", url=other.url),
        },
    )
    np.testing.assert_array_equal(read(source), read_of(cf()))


def read_of(arrays: Arrays) -> NDArray[np.float32]:
    return np.stack([arrays[name].values for name in FORCING], -1)


def test_a_store_that_is_one_array_is_refused(folder: Place) -> None:
    zarr.create_array(open_store(folder.url, folder.options, read_only=False), data=np.zeros(3))
    with pytest.raises(DataError, match="the store is a single array"):
        open_source(DataSettings(url=folder.url), forcing=FORCING, targets=(), options=folder.options)


def test_arrays_without_dimension_names_are_refused(folder: Place) -> None:
    root = zarr.create_group(open_store(folder.url, folder.options, read_only=False))
    root.create_array("air_temperature", data=np.zeros((2, 2)))
    with pytest.raises(DataError, match=r"no consistent axes(.|\n)*dimension_names"):
        open_source(
            DataSettings(url=folder.url, layout="cf", static=("x",)),
            forcing=("air_temperature",),
            targets=(),
            options=folder.options,
        )


# -------------------- space


def test_any_dimension_order_comes_out_as_time_lat_lon(folder: Place) -> None:
    arrays = cf()
    rain, clay = arrays["precipitation"], arrays["clay"]
    arrays["precipitation"] = Stored(rain.values.transpose(1, 2, 0), ("lat", "lon", "time"), rain.attrs)
    arrays["clay"] = Stored(clay.values.T, ("lon", "lat"))
    source = open_cf(folder, arrays)
    np.testing.assert_array_equal(read(source), read_of(cf()))
    np.testing.assert_array_equal(source.read_static(whole(source))[..., 1], cf()["clay"].values)


def test_coordinates_are_found_by_their_attributes(folder: Place) -> None:
    renamed = {"lat": "north", "lon": "east", "time": "when"}
    arrays = {}
    for name, a in cf().items():
        arrays[renamed.get(name, name)] = Stored(
            a.values, tuple(renamed[d] for d in a.dims), a.attrs, a.chunks
        )
    arrays["north"].attrs["standard_name"] = "latitude"
    arrays["east"].attrs["units"] = "degrees_east"
    np.testing.assert_array_equal(read(open_cf(folder, arrays)), read_of(cf()))


@pytest.mark.parametrize("flipped", ["lat", "lon"])
def test_an_array_stored_the_other_way_round_is_turned(folder: Place, flipped: str) -> None:
    arrays = cf()
    axis = ("lat", "lon").index(flipped)
    statics = {name: arrays.pop(name) for name in ("elevation", "clay")}
    for name, stored in statics.items():
        arrays[f"static/{name}"] = Stored(np.flip(stored.values, axis), stored.dims)
    for name, stored in axes(None).items():
        arrays[f"static/{name}"] = Stored(stored.values[::-1] if name == flipped else stored.values, (name,))
    group = VariableSource(group="static")
    source = open_cf(folder, arrays, variables={"elevation": group, "clay": group})
    np.testing.assert_array_equal(source.grid.lat, LAT)
    tile = Tile((1, 2), (3, 5))
    expected = np.stack([cf()[name].values for name in ("elevation", "clay")], -1)[tile.slices]
    land = source.grid.mask[tile.slices]
    np.testing.assert_array_equal(source.read_static(tile)[land], expected[land])


@pytest.mark.parametrize("wrong", [LAT + 1e-9, LAT + 360.0, np.append(LAT, 44.5)])
def test_forcing_and_static_on_different_grids_are_both_named(folder: Place, wrong: NDArray[Any]) -> None:
    arrays = cf()
    shape = (wrong.size, LON.size)
    arrays |= {"s/lat": Stored(wrong, ("lat",)), "s/lon": Stored(LON, ("lon",))}
    arrays["s/elevation"] = Stored(np.ones(shape, np.float32), ("lat", "lon"))
    with pytest.raises(DataError, match=r"different grids(.|\n)*elevation(.|\n)*net_radiation"):
        open_cf(folder, arrays, static=("elevation",), variables={"elevation": VariableSource(group="s")})


def test_a_map_of_latitudes_is_refused(folder: Place) -> None:
    arrays = cf()
    for short, name, values in (("lat", "latitude", LAT[:, None]), ("lon", "longitude", LON)):
        del arrays[short]
        grid = np.broadcast_to(values, LAND.shape).copy()
        arrays[name] = Stored(grid, ("lat", "lon"), {"standard_name": name})
    with pytest.raises(DataError, match=r"maps themselves(.|\n)*regrid"):
        open_cf(folder, arrays)


def test_missing_coordinates_are_named(folder: Place) -> None:
    arrays = cf()
    del arrays["lon"]
    with pytest.raises(DataError, match="no longitude coordinate"):
        open_cf(folder, arrays)


def test_a_further_axis_must_have_length_one(folder: Place) -> None:
    arrays = cf()
    tair = arrays["air_temperature"]
    arrays["air_temperature"] = Stored(tair.values[:, None], ("time", "height", "lat", "lon"), tair.attrs)
    np.testing.assert_array_equal(read(open_cf(folder, arrays)), read_of(cf()))
    two = np.repeat(tair.values[:, None], 2, 1)
    arrays["air_temperature"] = Stored(two, ("time", "height", "lat", "lon"), tair.attrs)
    other = Place(folder.url + "2", folder.options)
    with pytest.raises(DataError, match=r"other axes than it should(.|\n)*'height': 2"):
        open_cf(other, arrays)


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


def open_basins(place: Place, area: Stored | None) -> Source:
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "The data type", category=Warning
        )  # text in format 3 has no specification
        return open_cf(place, basins(area), forcing=("precipitation",), static=("attributes",))


def test_basins_have_one_cell_axis(folder: Place) -> None:
    source = open_basins(folder, Stored(np.linspace(1, 2, 7), ("cell",), {"units": "km2"}))
    arrays = basins(None)
    assert source.grid.dims == ("cell",)
    assert source.static == ("slope", "clay")
    np.testing.assert_allclose(source.grid.area, np.linspace(1e6, 2e6, 7))
    np.testing.assert_array_equal(source.grid.lat, arrays["lat"].values)
    tile = Tile((2,), (5,))
    expected = arrays["precipitation"].values[2:5].T.astype(np.float32)
    np.testing.assert_array_equal(source.read_forcing(tile, source.period)[..., 0], expected)


def test_basins_without_area_count_the_same_and_bad_areas_are_refused(folder: Place) -> None:
    np.testing.assert_array_equal(open_basins(folder, None).grid.area, np.ones(7))
    bad = np.where(np.arange(7) == 3, np.nan, 1.0)
    with pytest.raises(DataError, match=r"area.*not positive"):
        open_basins(Place(folder.url + "2", folder.options), Stored(bad, ("cell",)))


# -------------------- mask


def test_without_a_mask_land_is_where_all_features_are_finite(folder: Place) -> None:
    arrays = cf()
    arrays["clay"].values[np.nonzero(LAND)[0][0], np.nonzero(LAND)[1][0]] = np.nan
    mask = open_cf(folder, arrays).grid.mask
    np.testing.assert_array_equal(mask, LAND & np.isfinite(arrays["clay"].values))
    assert mask.sum() == LAND.sum() - 1


def test_a_stored_mask_wins(folder: Place) -> None:
    arrays = cf()
    arrays["land"] = Stored(np.where(LAND, 0.25, 0.0), ("lat", "lon"))
    arrays["land"].values[np.nonzero(LAND)[0][-1], np.nonzero(LAND)[1][-1]] = np.nan
    mask = open_cf(folder, arrays, mask=VariableSource(name="land")).grid.mask
    assert mask.sum() == LAND.sum() - 1
    assert not (mask & ~LAND).any()


def test_a_mask_without_land_is_refused(folder: Place) -> None:
    arrays = {**cf(), "mask": Stored(np.zeros(LAND.shape, np.int8), ("lat", "lon"))}
    with pytest.raises(DataError, match="the mask has no land"):
        open_cf(folder, arrays, mask=VariableSource())


# -------------------- time


def with_time(days: NDArray[Any], **attrs: str) -> Arrays:
    """The CF data set with another time axis."""
    arrays = cf()
    arrays["time"] = Stored(days, ("time",), {**DAYS, **attrs})
    return arrays


@pytest.mark.parametrize(
    ("days", "message"),
    [
        (
            np.where(np.arange(N_DAYS) < 10, np.arange(N_DAYS), np.arange(N_DAYS) + 1),
            "no 2004-01-25 after 2004-01-24",
        ),
        (np.where(np.arange(N_DAYS) < 10, np.arange(N_DAYS), np.arange(N_DAYS) - 1), "2004-01-24 twice"),
        (np.arange(N_DAYS)[::-1].copy(), "days are out of order"),
        (np.arange(N_DAYS) / 8, "shorter than a day(.|\n)*steps of 3 hours"),
        (np.arange(N_DAYS) * 30, "a day is missing"),
    ],
    ids=["missing", "doubled", "reversed", "hourly", "monthly"],
)
def test_forcing_has_every_day_once(folder: Place, days: NDArray[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_cf(folder, with_time(days))


@pytest.mark.parametrize("calendar", ["noleap", "365_day", "360_day", "julian", "all_leap"])
def test_other_calendars_are_refused_with_the_reason(folder: Place, calendar: str) -> None:
    with pytest.raises(DataError, match=rf"calendar '{calendar}' is not supported(.|\n)*convert_calendar"):
        open_cf(folder, with_time(np.arange(N_DAYS), calendar=calendar))


def test_time_without_units_is_refused(folder: Place) -> None:
    arrays = cf()
    arrays["time"].attrs.clear()
    with pytest.raises(DataError, match="time coordinate cannot be read"):
        open_cf(folder, arrays)


def test_missing_time_is_named(folder: Place) -> None:
    arrays = cf()
    del arrays["time"]
    with pytest.raises(DataError, match="no time coordinate"):
        open_cf(folder, arrays)


@pytest.mark.parametrize("hour", [0, 9, 12, 23])
def test_the_hour_of_a_daily_stamp_does_not_count(folder: Place, hour: int) -> None:
    hours = np.arange(N_DAYS) * 24 + hour
    source = open_cf(folder, with_time(hours, units=f"hours since {FIRST}"))
    assert source.period.start == FIRST
    assert source.period.n_days == N_DAYS


def test_a_period_cuts_the_forcing_across_a_leap_day(folder: Place) -> None:
    period = Period(date(2004, 2, 27), date(2004, 3, 3))
    source = open_cf(folder, cf(), period=period)
    first = (period.start - FIRST).days
    np.testing.assert_array_equal(read(source), read_of(cf())[first : first + 5])
    assert period.n_days == 5


def test_a_period_beyond_the_forcing_is_refused(folder: Place) -> None:
    with pytest.raises(DataError, match=r"other days(.|\n)*2004-01-01\.\.2004-02-01(.|\n)*2004-01-15\.\."):
        open_cf(folder, cf(), period=Period(date(2004, 1, 1), date(2004, 2, 1)))


def longer_rain() -> Arrays:
    """Precipitation in a group of its own, with five more days in front."""
    arrays = cf()
    rain = arrays.pop("precipitation")
    more = np.concatenate([rain.values[:5] + 1, rain.values])
    own = axes(np.arange(-5, N_DAYS))
    return {**arrays, **{f"p/{n}": a for n, a in own.items()}, "p/rain": Stored(more, rain.dims, rain.attrs)}


def test_forcing_with_different_days_needs_a_common_period(folder: Place) -> None:
    rain = {"precipitation": VariableSource(name="rain", group="p")}
    with pytest.raises(DataError, match=r"other days(.|\n)*set data\.period"):
        open_cf(folder, longer_rain(), variables=rain)
    period = Period(date(2004, 2, 1), date(2004, 2, 11))
    other = Place(folder.url + "2", folder.options)
    source = open_cf(other, longer_rain(), variables=rain, period=period)
    np.testing.assert_array_equal(read(source), read_of(cf())[17:27])


def target(days: NDArray[Any], units: str = "mm d-1") -> Arrays:
    """The CF data set and runoff with its own time axis."""
    values = field_of(9, days.size)
    own = {f"obs/{name}": stored for name, stored in axes(days).items()}
    return {**cf(), **own, "obs/runoff": Stored(values, ("time", "lat", "lon"), {"units": units})}


def open_target(place: Place, days: NDArray[Any]) -> Source:
    return open_cf(
        place, target(days), targets=("runoff",), variables={"runoff": VariableSource(group="obs")}
    )


def test_months_are_stamped_anywhere_and_may_be_missing(folder: Place) -> None:
    """Stamps: 16 December, 31 January, 1 February, 16 March, 30 April; two months lie inside the forcing."""
    stamps = np.array([-30, 16, 17, 61, 106])
    source = open_target(folder, stamps)
    axis = source.targets["runoff"]
    assert axis.frequency == "monthly"
    assert [as_date(d) for d in axis.days] == [date(2004, 2, 1), date(2004, 3, 1)]
    first, stop = axis.ranges()
    assert (stop - first).tolist() == [29, 31]
    np.testing.assert_array_equal(
        source.read_targets(whole(source))["runoff"], target(stamps)["obs/runoff"].values[2:4]
    )


def test_daily_targets_may_have_gaps_and_are_cut_to_the_forcing(folder: Place) -> None:
    days = np.array([-2, -1, 0, 3, 4, 5, 40, 41, 79, 80])
    axis = open_target(folder, days).targets["runoff"]
    assert axis.frequency == "daily"
    assert (axis.days - Period(FIRST, as_date(99999)).first).tolist() == [0, 3, 4, 5, 40, 41, 79]


@pytest.mark.parametrize(
    ("days", "message"),
    [
        (np.array([0, 1, 1, 2]), "a day is there twice"),
        (np.array([0, 2, 1, 3]), "days are out of order"),
        (np.array([-14, 17, 20, 46, 77, 107]), "a month is there twice"),
        (np.array([46, 17, -14]), "months are out of order"),
        (np.arange(0, 80, 8), "neither daily nor monthly(.|\n)*8 days apart"),
        (np.arange(40) / 24, "shorter than a day"),
        (np.array([900, 931, 960]), "no step inside the days"),
    ],
)
def test_target_steps_that_are_refused(folder: Place, days: NDArray[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_target(folder, days)


@given(st.integers(-20_000, 20_000), st.integers(1, 40), st.integers(1, 1000))
def test_a_month_is_inside_a_period_when_all_its_days_are(first: int, n_months: int, n_days: int) -> None:
    months = np.arange(n_months) + np.datetime64(as_date(first), "M")
    axis = StepAxis(months.astype("datetime64[D]").astype(np.int64), "monthly")
    period = Period(as_date(first + 100), as_date(first + 100 + n_days))
    kept = set(axis.cut(axis.within(period)).days.tolist())
    days = set(period.days().tolist())
    expected = {int(a) for a, b in zip(*axis.ranges(), strict=True) if set(range(a, b)) <= days}
    assert kept == expected


# -------------------- units and packing


@pytest.mark.parametrize(
    ("name", "units", "scale", "offset"),
    [
        ("precipitation", "kg m-2 s-1", 86_400.0, 0.0),
        ("precipitation", "m s-1", 86_400_000.0, 0.0),
        ("precipitation", "mm/day", 1.0, 0.0),
        ("precipitation", "mm day-1", 1.0, 0.0),
        ("precipitation", "kg m-2 d-1", 1.0, 0.0),
        ("air_temperature", "degC", 1.0, 273.15),
        ("air_temperature", "celsius", 1.0, 273.15),
        ("net_radiation", "J m-2 d-1", 1 / 86_400, 0.0),
        ("net_radiation", "W/m^2", 1.0, 0.0),
    ],
)
def test_units_become_ours(folder: Place, name: str, units: str, scale: float, offset: float) -> None:
    arrays = cf()
    arrays[name].attrs["units"] = units
    expected = arrays[name].values.astype(np.float64) * scale + offset
    values = read(open_cf(folder, arrays, forcing=(name,)))[..., 0]
    np.testing.assert_allclose(values, expected, rtol=2e-7)


@pytest.mark.parametrize(
    ("name", "units", "scale"),
    [
        ("snow_water_equivalent", "kg m-2", 1.0),
        ("snow_water_equivalent", "m", 1000.0),
        ("terrestrial_water_storage_anomaly", "cm", 10.0),
        ("fapar", "percent", 0.01),
        ("fapar", "%", 0.01),
        ("fapar", "1", 1.0),
    ],
)
def test_units_of_targets_become_ours(folder: Place, name: str, units: str, scale: float) -> None:
    arrays = cf()
    arrays[name] = Stored(field_of(9, N_DAYS), ("time", "lat", "lon"), {"units": units})
    source = open_cf(folder, arrays, targets=(name,))
    expected = arrays[name].values.astype(np.float64) * scale
    np.testing.assert_allclose(source.read_targets(whole(source))[name], expected, rtol=2e-7)


def test_a_setting_gives_units_and_wins(folder: Place) -> None:
    arrays = cf()
    del arrays["air_temperature"].attrs["units"]
    arrays["precipitation"].attrs["units"] = "furlong"
    given_units = {
        "air_temperature": VariableSource(units="degC"),
        "precipitation": VariableSource(units="mm d-1"),
    }
    values = read(open_cf(folder, arrays, variables=given_units))
    np.testing.assert_allclose(values[..., 2], arrays["air_temperature"].values + 273.15, rtol=2e-7)


@pytest.mark.parametrize("units", [None, "", "  "])
def test_absent_units_say_which_setting_is_needed(folder: Place, units: str | None) -> None:
    arrays = cf()
    arrays["precipitation"].attrs = {} if units is None else {"units": units}
    with pytest.raises(
        DataError, match=r"does not say its units(.|\n)*data\.variables\.precipitation\.units"
    ):
        open_cf(folder, arrays)


@pytest.mark.parametrize("units", ["K", "W m-2", "mm", "m of water equivalent", "-", "kg", "mm d-1)"])
def test_wrong_units_name_both(folder: Place, units: str) -> None:
    arrays = cf()
    arrays["precipitation"].attrs["units"] = units
    with pytest.raises(DataError, match=r"cannot be converted(.|\n)*mm d-1(.|\n)*actual:") as caught:
        open_cf(folder, arrays)
    assert repr(units) in str(caught.value)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_packed_values_are_unpacked(folder: Place, zarr_format: int) -> None:
    arrays = cf()
    packed = np.where(LAND, np.arange(N_DAYS)[:, None, None] * 3 - 100, -32767).astype(np.int16)
    attrs = {"units": "degC", "scale_factor": 0.01, "add_offset": 5.0, "_FillValue": -32767}
    fill = None
    if zarr_format == 2:
        fill = attrs.pop("_FillValue")  # format 2 keeps it in the array's own metadata
    arrays["air_temperature"] = Stored(packed, ("time", "lat", "lon"), attrs, fill=fill)
    write(folder, arrays, zarr_format=zarr_format)
    data = DataSettings(url=folder.url, layout="cf", static=("elevation", "clay"))
    source = open_source(data, forcing=("air_temperature",), targets=(), options=folder.options)
    values = read(source)[..., 0]
    expected = packed.astype(np.float64) * 0.01 + 5.0 + 273.15
    np.testing.assert_allclose(values[:, LAND], expected[:, LAND], rtol=2e-7)
    assert np.isnan(values[:, ~LAND]).all()


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_true_zeros_survive_a_fill_value_of_zero(folder: Place, zarr_format: int) -> None:
    """Zarr's default fill value is 0; read as "missing" it would delete every dry day."""
    arrays = cf()
    rain = arrays["precipitation"]
    rain.values[rain.values < 5] = 0.0
    rain.fill = 0.0
    write(folder, arrays, zarr_format=zarr_format)
    data = DataSettings(url=folder.url, layout="cf", static=("elevation", "clay"))
    source = open_source(data, forcing=("precipitation",), targets=(), options=folder.options)
    np.testing.assert_array_equal(read(source)[..., 0], rain.values)


def test_static_names_are_checked_against_their_axis(folder: Place) -> None:
    arrays, attributes = published()
    attributes["static"]["names"] = ["clay", "sand"]
    write(folder, arrays, attributes=attributes)
    with pytest.raises(DataError, match="has 3 features, but the names"):
        open_source(DataSettings(url=folder.url), forcing=FORCING, targets=(), options=folder.options)


def test_a_store_that_is_not_there_is_named(folder: Place) -> None:
    with pytest.raises(StoreError, match="nothing is stored there"):
        open_source(DataSettings(url=folder.url), forcing=FORCING, targets=(), options=folder.options)


def test_xarray_writes_what_we_read(folder: Place) -> None:
    """A data set as most people make it: xarray, packed, compressed, hours since 1900."""
    import xarray as xr

    times = np.arange(N_DAYS) * np.timedelta64(24, "h") + np.datetime64(f"{FIRST}T12", "s")
    coordinates = {"time": times, "lat": LAT, "lon": LON}
    tair = field_of(3, N_DAYS, low=-20, high=25)
    dataset = xr.Dataset(
        {
            "t2m": (("time", "lat", "lon"), tair, {"units": "degC"}),
            "elevation": (("lat", "lon"), field_of(4)),
        },
        coords=coordinates,
    )
    packing = {"dtype": "int16", "scale_factor": 0.01, "_FillValue": -9999}
    dataset.to_zarr(
        folder.url,
        encoding={"t2m": packing, "time": {"units": "hours since 1900-01-01"}},
        zarr_format=2,
        consolidated=True,
    )
    data = DataSettings(
        url=folder.url,
        layout="cf",
        static=("elevation",),
        variables={"air_temperature": VariableSource(name="t2m")},
    )
    source = open_source(data, forcing=("air_temperature",), targets=(), options=folder.options)
    np.testing.assert_allclose(read(source)[..., 0], tair + 273.15, atol=0.006)
    assert source.period.start == FIRST
