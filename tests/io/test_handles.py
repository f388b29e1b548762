"""Handles: any order of axes becomes ours; features have names."""

import numpy as np
import pytest

from h2mv_dist.config import DataSettings
from h2mv_dist.errors import DataError
from h2mv_dist.io.source import open_source
from tests.conftest import Place
from tests.io.builders import FORCING, Stored, cf, open_cf, published, read, read_of, whole, write


def test_any_dimension_order_comes_out_as_time_lat_lon(folder: Place) -> None:
    arrays = cf()
    rain, clay = arrays["precipitation"], arrays["clay"]
    arrays["precipitation"] = Stored(rain.values.transpose(1, 2, 0), ("lat", "lon", "time"), rain.attrs)
    arrays["clay"] = Stored(clay.values.T, ("lon", "lat"))
    source = open_cf(folder, arrays)
    np.testing.assert_array_equal(read(source), read_of(cf()))
    np.testing.assert_array_equal(source.read_static(whole(source))[..., 1], cf()["clay"].values)


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


def test_feature_names_come_from_the_attribute(folder: Place) -> None:
    arrays, attributes = published()
    attributes["static"]["names"] = ["clay", "sand", "slope"]
    write(folder, arrays, attributes=attributes, zarr_format=2)
    source = open_source(DataSettings(url=folder.url), forcing=FORCING, targets=(), options=folder.options)
    assert source.static == ("clay", "sand", "slope")


def test_static_names_are_checked_against_their_axis(folder: Place) -> None:
    arrays, attributes = published()
    attributes["static"]["names"] = ["clay", "sand"]
    write(folder, arrays, attributes=attributes)
    with pytest.raises(DataError, match="has 3 features, but the names"):
        open_source(DataSettings(url=folder.url), forcing=FORCING, targets=(), options=folder.options)
