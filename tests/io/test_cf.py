"""CF rules: coordinates by their attributes, packed and missing values."""

import numpy as np
import pytest

from h2mv_dist.config import DataSettings
from h2mv_dist.io.source import open_source
from tests.conftest import Place
from tests.io.builders import LAND, N_DAYS, Stored, cf, open_cf, read, read_of, whole, write


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


def test_zeros_that_an_attribute_of_format_3_says_are_missing(folder: Place) -> None:
    """There the fill value of chunks never written has a place of its own."""
    arrays = cf()
    packed = np.where(LAND, np.arange(N_DAYS)[:, None, None] % 5, 0).astype(np.int16)
    attrs = {"units": "mm d-1", "_FillValue": 0}
    arrays["runoff"] = Stored(packed, ("time", "lat", "lon"), attrs, (40, 2, 3))
    source = open_cf(folder, arrays, targets=("runoff",))
    values = source.read_targets(whole(source))["runoff"]
    np.testing.assert_array_equal(values, np.where(packed == 0, np.nan, packed))


def test_the_first_day_of_format_2_may_be_zero(folder: Place) -> None:
    """Days since the first one, under Zarr's own fill value."""
    arrays = cf()
    arrays["time"].fill = 0
    write(folder, arrays, zarr_format=2)
    data = DataSettings(url=folder.url, layout="cf", static=("elevation", "clay"))
    source = open_source(data, forcing=("precipitation",), targets=(), options=folder.options)
    assert source.period.n_days == N_DAYS
