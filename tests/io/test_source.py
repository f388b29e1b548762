"""Reading boxes: one suite over folders, memory and a real object store; each chunk once, several at once."""

import itertools
import pickle
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from h2mv_dist.config import DataSettings, StorageOptions, VariableSource
from h2mv_dist.errors import DataError, StoreError
from h2mv_dist.grid import Period, Tile
from h2mv_dist.io import handles
from h2mv_dist.io import stores as stores_module
from h2mv_dist.io.fast_reads import with_fast_reads
from h2mv_dist.io.source import Source, open_source
from h2mv_dist.io.stores import get_object, join, list_objects, open_store, put_object
from tests.conftest import PLACES, SECRET, Place, S3Server, new_place, storage_options
from tests.io.builders import (
    FIRST,
    FORCING,
    LAND,
    N_DAYS,
    TARGETS,
    Stored,
    cf,
    open_cf,
    open_published,
    published,
    whole,
    write,
)
from tests.io.counting import CountingFileSystem, chunk_reads, forget_reads


def open_written_cf(place: Place) -> Source:
    data = DataSettings(url=place.url, layout="cf", static=("clay",))
    return open_source(data, forcing=FORCING, targets=(), options=place.options)


@pytest.fixture(scope="module", params=PLACES)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The small published data set, written once to each kind of store."""
    place = new_place(request.param, request, tmp_path_factory)
    arrays, attributes = published()
    write(place, arrays, attributes=attributes, zarr_format=2, consolidate=True)
    return place


@pytest.fixture
def source(world: Place) -> Source:
    return open_published(world)


@contextmanager
def replaced(place: Place, group: str, data: bytes) -> Iterator[None]:
    """Put other bytes where the first chunk of a group's data is, for a while."""
    listed = list_objects(join(place.url, group), place.options)
    chunk = join(place.url, group, next(name for name in listed if name.startswith("data/0")))
    before = get_object(chunk, place.options)
    put_object(chunk, data, place.options)
    try:
        yield
    finally:
        put_object(chunk, before, place.options)


def test_a_box_holds_what_the_store_holds(source: Source) -> None:
    arrays, _ = published()
    tile, period = Tile((1, 2), (4, 5)), Period(date(2004, 2, 27), date(2004, 3, 5))
    days = slice((period.start - FIRST).days, (period.stop - FIRST).days)
    expected = np.stack([arrays[f"{g}/data"].values for g in ("rn", "prec", "tair")], -1)
    values = source.read_forcing(tile, period)
    assert values.dtype == np.float32
    assert values.shape == (period.n_days, *tile.shape, 3)
    np.testing.assert_array_equal(values, expected[(days, *tile.slices)])
    np.testing.assert_array_equal(source.read_static(tile), arrays["static/data"].values[tile.slices])
    observed = source.read_targets(tile)["snow_water_equivalent"]
    np.testing.assert_array_equal(observed, arrays["swe/data"].values[(slice(None), *tile.slices)])


def test_chunk_aligned_tiles_cover_the_grid(source: Source) -> None:
    assert source.chunk_shape == (2, 3)
    joined = np.full((N_DAYS, *LAND.shape, 3), -1, np.float32)
    for tile in source.grid.tiles(source.chunk_shape):
        joined[(slice(None), *tile.slices)] = source.read_forcing(tile, source.period)
    np.testing.assert_array_equal(joined, source.read_forcing(whole(source), source.period))


def test_the_fingerprint_follows_the_data_and_what_is_asked_of_them(world: Place, source: Source) -> None:
    first = source.fingerprint()
    assert open_published(world).fingerprint() == first
    assert open_published(world, targets=()).fingerprint() != first
    period = Period(date(2004, 2, 1), date(2004, 3, 1))
    assert open_published(world, period=period).fingerprint() != first
    with replaced(world, "tair", b"others"):
        assert source.fingerprint() != first


def test_the_identity_follows_values_and_not_files(tmp_path: Path) -> None:
    """Growing in place, copies, other chunks, and values on sea do not count."""
    place = Place(str(tmp_path / "data"), StorageOptions())
    first = open_cf(place, cf()).identity
    with xr.open_zarr(place.url, chunks=None, consolidated=False) as opened:
        later = opened.drop_vars(["elevation", "clay"]).isel(time=slice(0, 3)).load()
    later["time"] = later["time"] + np.timedelta64(N_DAYS, "D")
    for variable in later.variables.values():
        variable.encoding.clear()
    by_objects = open_written_cf(place).identity_by_objects()
    before = open_written_cf(place)
    later.to_zarr(place.url, append_dim="time", consolidated=False)
    after = open_written_cf(place)
    assert after.period.n_days == N_DAYS + 3
    assert after.identity == before.identity
    assert after.identity_by_objects() != by_objects, "coordinates were written again"
    for number, (name, at, same) in enumerate(
        (
            (None, None, True),
            ("clay", ~LAND, True),
            ("clay", LAND, False),
            ("elevation", np.argwhere(LAND)[0], False),
        )
    ):
        arrays = cf()
        arrays["clay"].chunks = (3, 2)
        arrays["mask"] = Stored(LAND, ("lat", "lon"))
        if name is not None:
            arrays[name].values[tuple(at) if at.ndim == 1 else at] = 3.25
        other = Place(str(tmp_path / str(number)), StorageOptions())
        source = open_cf(other, arrays, mask=VariableSource())
        assert (source.identity == first) == same, name
    arrays = cf()
    arrays["lat"].values[0] += 0.25
    assert open_cf(Place(str(tmp_path / "moved"), StorageOptions()), arrays).identity != first


def test_the_reference_store_reads_like_plain_zarr(shared: Path) -> None:
    url = str(shared / "reference_layout.zarr")
    source = open_source(
        DataSettings(url=url),
        forcing=FORCING,
        targets=("terrestrial_water_storage_anomaly", "fapar", "runoff", *TARGETS),
        options=StorageOptions(),
    )
    root = zarr.open_group(url, mode="r")

    def plain(name: str) -> Any:
        array = root[f"{name}/data"]
        assert isinstance(array, zarr.Array)
        return array[...]

    forcing = source.read_forcing(whole(source), source.period)
    np.testing.assert_array_equal(forcing, np.stack([plain(g) for g in ("rn", "prec", "tair")], -1))
    np.testing.assert_array_equal(source.read_static(whole(source)), plain("static"))
    np.testing.assert_array_equal(source.grid.mask, plain("mask") != 0)
    observed = source.read_targets(whole(source))
    names = {"terrestrial_water_storage_anomaly": "tws", "runoff": "q", "fapar": "fapar"}
    for name, group in names.items():
        np.testing.assert_array_equal(observed[name], plain(group))
    assert source.chunk_shape == (6, 6)
    assert source.published_scaler().forcing.mean[0] == root["rn"].attrs["mean"]


# -------------------- each chunk once, several at once


def test_aligned_tiles_read_each_chunk_once_and_several_at_once(counting: Place) -> None:
    arrays, attributes = published()
    write(counting, arrays, attributes=attributes)
    source = open_published(counting)
    forget_reads()
    for tile in source.grid.tiles(source.chunk_shape):
        source.read_forcing(tile, source.period)
        source.read_targets(tile)
    for group in ("rn", "prec", "tair", "swe"):
        counts = chunk_reads(group)
        assert set(counts.values()) == {1}, group
        assert len(counts) == 2 * 2 * 2
    assert CountingFileSystem.most_at_once >= 3


def test_arrays_of_large_chunks_come_one_after_the_other(
    counting: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays, attributes = published()
    write(counting, arrays, attributes=attributes)
    source = open_published(counting)
    (first, *_), period = source.grid.tiles((2, 2)), source.period
    together = source.bytes_beyond(first, period)
    assert (
        together
        == 3 * 2 * 2 * source.arrays.forcing[0].beyond(slice(0, period.n_days), *first.slices).n_bytes
    )
    monkeypatch.setattr(handles, "_BEYOND_BYTES", together - 1)
    assert source.bytes_beyond(first, period) == together / 3
    forget_reads()
    source.read_forcing(first, period)
    read = [path.split("/")[2] for path in CountingFileSystem.reads if "/data/c/" in path]
    assert [group for group, _ in itertools.groupby(read)] == ["rn", "prec", "tair"]


def test_a_box_holds_whole_shards(tmp_path: Path) -> None:
    place = Place(str(tmp_path), StorageOptions())
    arrays = cf()
    rain = arrays.pop("precipitation")
    write(place, arrays)
    root = zarr.open_group(open_store(place.url, place.options, read_only=False), use_consolidated=False)
    sharded = root.create_array(
        "precipitation",
        shape=rain.values.shape,
        dtype="f4",
        chunks=(20, 1, 1),
        shards=(40, 4, 2),
        dimension_names=rain.dims,
        attributes=rain.attrs,
    )
    sharded[...] = rain.values
    source = open_written_cf(place)
    assert source.chunk_shape == (4, 6)  # shards of (4, 2) and chunks of (2, 3)
    values = source.read_forcing(whole(source), source.period)
    np.testing.assert_array_equal(values[..., 1], rain.values)


def test_opening_reads_no_forcing(counting: Place) -> None:
    arrays, attributes = published()
    write(counting, arrays, attributes=attributes)
    forget_reads()
    open_published(counting)
    assert not [group for group in ("rn", "prec", "tair", "swe", "et") if chunk_reads(group)]


def test_time_blocks_start_where_chunks_start(counting: Place) -> None:
    """The period starts inside the first chunk of 40 days."""
    write(counting, published()[0])
    period = Period(date(2004, 1, 25), date(2004, 4, 1))
    source = open_published(counting, targets=(), period=period)
    blocks = list(source.time_blocks(period, 10))
    assert [block.n_days for block in blocks] == [30, 37]
    assert [day for block in blocks for day in block.days()] == list(period.days())
    forget_reads()
    for block in blocks:
        source.read_forcing(whole(source), block)
    assert set(chunk_reads("rn").values()) == {1}


def test_time_blocks_fit_the_chunks_of_every_variable(counting: Place) -> None:
    arrays, _ = published()
    arrays["rn/data"].chunks = (10, 4, 6)
    arrays["prec/data"].chunks = (15, 4, 6)
    arrays["tair/data"].chunks = (5, 4, 6)
    write(counting, arrays)
    source = open_published(counting, targets=())
    assert [block.n_days for block in source.time_blocks(source.period, 20)] == [30, 30, 20]
    assert [block.n_days for block in source.time_blocks(source.period, 60)] == [60, 20]
    part = Period(date(2004, 2, 1), date(2004, 3, 20))
    assert [block.n_days for block in source.time_blocks(part, 1)] == [13, 30, 5]
    forget_reads()
    for block in source.time_blocks(source.period, 20):
        source.read_forcing(whole(source), block)
    for group in ("rn", "prec", "tair"):
        assert set(chunk_reads(group).values()) == {1}, group


def test_land_cells_come_packed(source: Source) -> None:
    tile, period = Tile((1, 2), (4, 5)), Period(date(2004, 2, 27), date(2004, 3, 5))
    boxes = source.read_forcing(tile, period)[:, source.grid.mask[tile.slices]]
    np.testing.assert_array_equal(source.read_land_forcing(tile, period), boxes.swapaxes(0, 1))


def test_opening_reads_each_time_axis_once(counting: Place) -> None:
    write(counting, published()[0])
    forget_reads()
    open_published(counting)
    reads = {path: n for path, n in CountingFileSystem.reads.items() if "/time/c/" in path}
    assert len(reads) == 5
    assert set(reads.values()) == {1}


# -------------------- what is refused


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_forcing_that_is_not_finite_on_land_is_located(tmp_path: Path, value: float) -> None:
    place = Place(str(tmp_path), StorageOptions())
    arrays = cf()
    rows, columns = np.nonzero(LAND)
    arrays["precipitation"].values[3:5, rows[2], columns[2]] = value
    arrays["precipitation"].values[7, rows[5], columns[5]] = value
    source = open_cf(place, arrays)
    lat, lon = source.grid.lat[rows[2]], source.grid.lon[columns[2]]
    with pytest.raises(DataError) as caught:
        source.read_forcing(whole(source), source.period)
    message = str(caught.value)
    assert "precipitation is not finite on land" in message
    assert f"lat {lat:g}, lon {lon:g} on 2004-01-18" in message
    assert "3 values that are not, in 2 cells" in message
    clean = Period(date(2004, 2, 1), date(2004, 3, 1))
    assert np.isfinite(source.read_forcing(whole(source), clean)[:, LAND]).all()


def test_static_that_is_not_finite_on_land_is_located(tmp_path: Path) -> None:
    arrays = cf()
    arrays["mask"] = Stored(LAND, ("lat", "lon"))
    rows, columns = np.nonzero(LAND)
    arrays["clay"].values[rows[1], columns[1]] = np.nan
    source = open_cf(Place(str(tmp_path), StorageOptions()), arrays, mask=VariableSource())
    with pytest.raises(
        DataError, match=r"static feature clay is not finite on land(.|\n)*first at lat"
    ) as caught:
        source.read_static(whole(source))
    assert f"lon {source.grid.lon[columns[1]]:g}" in str(caught.value)


def test_infinite_observations_are_refused_and_missing_ones_are_not(tmp_path: Path) -> None:
    arrays = cf()
    values = arrays["precipitation"].values.copy()
    values[:5] = np.nan
    arrays["runoff"] = Stored(values, ("time", "lat", "lon"), {"units": "mm d-1"})
    source = open_cf(Place(str(tmp_path / "a"), StorageOptions()), arrays, targets=("runoff",))
    assert np.isnan(source.read_targets(whole(source))["runoff"][:5]).all()
    values[9][LAND] = np.inf
    source = open_cf(Place(str(tmp_path / "b"), StorageOptions()), arrays, targets=("runoff",))
    with pytest.raises(DataError, match=r"runoff holds infinite observations"):
        source.read_targets(whole(source))


def test_boxes_outside_the_data_are_refused(tmp_path: Path) -> None:
    source = open_cf(Place(str(tmp_path), StorageOptions()), cf())
    with pytest.raises(DataError, match="is not part of a grid"):
        source.read_forcing(Tile((0, 0), (5, 2)), source.period)
    with pytest.raises(DataError, match="is not part of a grid"):
        source.read_static(Tile((0,), (2,)))
    with pytest.raises(DataError, match="not part of the days"):
        source.read_forcing(whole(source), Period(date(2003, 12, 1), date(2004, 1, 20)))


def test_a_damaged_chunk_is_named(source: Source, world: Place) -> None:
    with (
        replaced(world, "prec", b"not a chunk at all"),
        pytest.raises(StoreError, match=r"a chunk cannot be decoded(.|\n)*precipitation"),
    ):
        source.read_forcing(whole(source), source.period)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_a_flipped_bit_in_a_checked_chunk_is_never_used(
    kind: str,
    sharded: bool,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = new_place(kind, request, tmp_path_factory)
    through_obstore: list[Any] = []

    def noted(*given: Any) -> Any:
        through_obstore.append(with_fast_reads(*given))
        return through_obstore[-1]

    monkeypatch.setattr(stores_module, "with_fast_reads", noted)
    arrays = cf()
    rain = arrays.pop("precipitation")
    write(place, arrays)
    shape = rain.values.shape
    store = open_store(place.url, place.options, read_only=False)
    created = zarr.open_group(store, mode="r+", use_consolidated=False).create_array(
        "precipitation",
        shape=shape,
        dtype=np.float32,
        chunks=(40, 2, 3),
        shards=shape if sharded else None,
        compressors=(ZstdCodec(), Crc32cCodec()),
        attributes={"units": "mm d-1"},
        dimension_names=rain.dims,
    )
    created[...] = rain.values
    source = open_written_cf(place)
    np.testing.assert_array_equal(source.read_forcing(whole(source), source.period)[..., 1], rain.values)
    chunk = join(place.url, "precipitation", "c", "0", "0", "0")
    good = get_object(chunk, place.options)
    for position in range(0, len(good), len(good) // 7):
        flipped = bytearray(good)
        flipped[position] ^= 4
        put_object(chunk, bytes(flipped), place.options)
        with pytest.raises(StoreError, match="precipitation"):
            source.read_forcing(whole(source), source.period)
    put_object(chunk, good, place.options)
    np.testing.assert_array_equal(source.read_forcing(whole(source), source.period)[..., 1], rain.values)
    assert any(store._worked for store in through_obstore) == (kind == "s3")


def test_wrong_credentials_are_found_when_opening_and_stay_secret(s3_server: S3Server) -> None:
    bucket = s3_server.new_bucket()
    good = Place(f"{bucket}/world", s3_server.options)
    write(good, cf())
    wrong = storage_options(s3_server.endpoint, secret="wrong" + "-canary")
    with pytest.raises(StoreError, match="access to the store was refused") as caught:
        open_written_cf(Place(good.url, wrong))
    told = "".join(traceback.format_exception(caught.value)).encode() + pickle.dumps(caught.value)
    assert b"wrong-canary" not in told
    assert SECRET not in repr(open_written_cf(good))


def test_an_unreachable_store_is_found_when_opening() -> None:
    place = Place("s3://bucket/world", storage_options("http://127.0.0.1:9"))
    with pytest.raises(StoreError, match="the store cannot be reached") as caught:
        open_published(place)
    assert SECRET not in "".join(traceback.format_exception(caught.value))
