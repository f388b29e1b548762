"""Whole data sets: the published layout, CF data sets, their mask and statistics."""

from datetime import date

import numpy as np
import pytest
import xarray as xr

from h2mv_dist.config import DataSettings, VariableSource
from h2mv_dist.errors import ConfigError, DataError
from h2mv_dist.grid import Period, as_date
from h2mv_dist.io.source import open_source
from tests.conftest import Place
from tests.io.builders import (
    FIRST,
    FORCING,
    LAND,
    LAT,
    LON,
    N_DAYS,
    Stored,
    cf,
    field_of,
    open_cf,
    published,
    read,
    whole,
    write,
)


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


def test_xarray_writes_what_we_read(folder: Place) -> None:
    """A data set as most people make it: xarray, packed, compressed, hours since 1900."""
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


def test_published_statistics_follow_a_conversion(folder: Place) -> None:
    arrays, attributes = published()
    write(folder, arrays, attributes=attributes)
    data = DataSettings(url=folder.url, variables={"air_temperature": VariableSource(units="degC")})
    source = open_source(data, forcing=("air_temperature",), targets=(), options=folder.options)
    assert source.published_scaler().forcing.mean == pytest.approx((274.65,))
    assert source.published_scaler().forcing.std == pytest.approx((2.5,))


def test_statistics_that_are_not_published_are_asked_for_in_vain(folder: Place) -> None:
    with pytest.raises(DataError, match=r'publishes no statistics(.|\n)*training\.scaler = "fit"'):
        open_cf(folder, cf()).published_scaler()


def test_a_misspelt_setting_is_named(folder: Place) -> None:
    with pytest.raises(ConfigError, match="did you mean 'runoff'"):
        open_cf(folder, cf(), variables={"runof": VariableSource(name="q")})


@pytest.mark.parametrize("missing", ["forcing", "static"])
def test_nothing_to_read_is_refused(folder: Place, missing: str) -> None:
    with pytest.raises(ConfigError, match="at least one forcing variable and one static"):
        open_cf(folder, cf(), **{missing: ()})


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
