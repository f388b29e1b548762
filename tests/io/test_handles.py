"""Handles: any order of axes becomes ours; features have names."""

from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.codecs import GzipCodec

from h2mv_dist.config import DataSettings, StorageOptions
from h2mv_dist.errors import DataError, StoreError
from h2mv_dist.grid import Period
from h2mv_dist.io.handles import Beyond, Touched
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


def test_what_reading_a_box_takes_is_counted_in_whole_chunks(counting: Place) -> None:
    arrays = cf()
    for name, shards in (("net_radiation", None), ("precipitation", (60, 4, 8))):
        arrays[name].chunks, arrays[name].shards = (30, 2, 4), shards
    source = open_cf(counting, arrays, period=Period(date(2004, 2, 10), date(2004, 4, 3)))
    plain, sharded, _ = source.arrays.forcing
    # days 25 to 35 of the store; rows 1 and 2; columns 3 and 4, whose second chunk the grid's edge cuts
    box = (slice(0, 10 - 1), slice(1, 3), slice(3, 5))
    assert plain.origin == sharded.origin == 26
    assert plain.touched(*box) == sharded.touched(*box) == Touched(8, 60 * 4 * 6)
    assert plain.touched(slice(40, 41), *box[1:]).cells == 20 * 4 * 6, "the store ends there"
    beyond = (30 * 2 * 4 - 9 * 2 * 2) * arrays["precipitation"].values.itemsize
    assert plain.beyond(*box) == sharded.beyond(*box) == Beyond(8, beyond)
    assert replace(plain, at_once=1).beyond(*box).held == 1
    assert replace(sharded, at_once=1).beyond(*box).held == 8, "chunks of a shard"
    assert plain.beyond(slice(0, 50), slice(0, 4), slice(0, 6)).n_bytes == 0


def test_local_chunks_come_one_by_one(folder: Place, counting: Place) -> None:
    ours, zarrs = (open_cf(place, cf()).arrays.forcing[0].at_once for place in (folder, counting))
    assert zarrs == zarr.config.get("async.concurrency")
    assert ours == (1 if "://" not in folder.url else zarrs)


@pytest.mark.parametrize(
    "damaged",
    [lambda data: data[:-20], lambda data: data[:10] + b"\xff" + data[11:]],
    ids=["cut off", "another byte"],
)
def test_damaged_gzip_is_explained(damaged: Callable[[bytes], bytes], tmp_path: Path) -> None:
    place, arrays = Place(str(tmp_path), StorageOptions()), cf()
    rain = arrays.pop("precipitation")
    write(place, arrays)
    zarr.open_group(tmp_path).create_array(
        "precipitation",
        data=rain.values,
        compressors=GzipCodec(),
        dimension_names=rain.dims,
        attributes=rain.attrs,
    )
    chunk = tmp_path / "precipitation" / "c" / "0" / "0" / "0"
    chunk.write_bytes(damaged(chunk.read_bytes()))
    data = DataSettings(url=place.url, layout="cf", static=("elevation", "clay"))
    source = open_source(data, forcing=FORCING, targets=(), options=place.options)
    with pytest.raises(StoreError, match=r"a chunk cannot be decoded(.|\n)*precipitation"):
        read(source)
