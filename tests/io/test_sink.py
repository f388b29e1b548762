"""Writing a cube: what a reader finds, the same bytes each time, whole shards only."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import WrapperStore

from h2mv_dist.errors import DataError, StoreError
from h2mv_dist.grid import Period, Tile
from h2mv_dist.io.cube_store import create_cube
from h2mv_dist.io.sink import Sink, StoredValues, _formed, rounded
from h2mv_dist.io.stores import get_object, join, open_store, put_object
from tests.io.cubes import (
    CONSTANTS,
    DAILY,
    LAYOUTS,
    PERIOD,
    STATIC,
    Case,
    CubePlace,
    block,
    fill,
    map_layout,
    truth,
)


def test_a_reader_finds_what_the_members_said(case: Case) -> None:
    place, layout = case.new_place(), case.layout
    fill(place, layout)
    with place.open() as cube:
        for name, members in truth(layout).items():
            error = 2.0 ** -(layout.rounded[name] + 1) if name in layout.rounded else 0.0
            exact = members.astype(np.float64)
            centre = exact.sum(axis=0) / len(layout.members)
            spread = np.sqrt(((exact - centre) ** 2).sum(axis=0) / len(layout.members))
            if layout.member_axis:
                np.testing.assert_allclose(cube[name], members, rtol=error, atol=0)
            else:
                np.testing.assert_allclose(cube[name], centre, rtol=1e-7)
            if layout.members_as == "both":
                np.testing.assert_allclose(cube[f"{name}_mean"], centre, rtol=1e-7 + error)
            if layout.members_as != "all" and len(layout.members) > 1:
                np.testing.assert_allclose(cube[f"{name}_spread"], spread, rtol=1e-6 + error)


@pytest.mark.parametrize("n_members", [1, 2, 10])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (5, 7), (6, 6)])
def test_mean_and_spread_are_the_same_however_many_values_are_taken_at_a_time(
    monkeypatch: pytest.MonkeyPatch, n_members: int, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr("h2mv_dist.io.sink.VALUES_AT_ONCE", 5)
    values = np.random.default_rng(0).normal(1e3, 1.0, (n_members, *shape)).astype(np.float32)
    exact = values.astype(np.float64)
    for found, expected in (
        (_formed(values, "mean"), exact.mean(axis=0)),
        (_formed(values, "spread"), exact.std(axis=0)),
    ):
        np.testing.assert_array_equal(found, np.asarray(expected, np.float32), strict=True)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(1, 22))
def test_rounding_keeps_bits_and_is_near(value: float, bits: int) -> None:
    given_value = np.array([value], np.float32)
    found = rounded(given_value, bits)
    assert not found.view(np.uint32)[0] & ((1 << (23 - bits)) - 1), "only kept bits are set"
    assert rounded(found, bits) == found
    if 2.0**-120 < abs(value) < 2.0**126:
        assert abs(found[0] - value) <= 2.0 ** -(bits + 1) * abs(value)


def test_rounding_leaves_what_is_not_finite() -> None:
    values = np.array([np.nan, np.inf, -np.inf], np.float32)
    np.testing.assert_array_equal(rounded(values, 12), values)


def test_each_variable_keeps_its_bits(on_disk: CubePlace) -> None:
    layout = LAYOUTS["members"]
    fill(on_disk, layout)
    with on_disk.open() as cube:
        for name, bits in layout.rounded.items():
            assert f"Rounded to {bits} bits" in cube[name].attrs["comment"]
            stored = cube[name].values.view(np.uint32)[np.isfinite(cube[name])]
            assert not (stored & ((1 << (23 - bits)) - 1)).any()
            assert (stored & (1 << (23 - bits))).any()


def test_rounded_arrays_say_so(on_disk: CubePlace) -> None:
    layout = LAYOUTS["both"]
    fill(on_disk, layout)
    with on_disk.open() as cube:
        for name in ("runoff", "runoff_mean", "runoff_spread"):
            assert "Rounded to 12 bits" in cube[name].attrs["comment"]
            assert not (cube[name].values.view(np.uint32)[np.isfinite(cube[name])] & 0x7FF).any()
        assert "comment" not in cube["snow_water_equivalent"].attrs
        assert cube["runoff"].dims[0] == "member"
        assert cube["runoff_mean"].dims[0] == "time"


def test_two_cubes_are_equal_to_the_byte(case: Case) -> None:
    first, second, layout = case.new_place(), case.new_place(), case.layout
    assert fill(first, layout) == fill(second, layout, backwards=True)
    assert first.hashes() == second.hashes()


def test_writing_a_tile_again_changes_no_byte(cube_place: CubePlace) -> None:
    layout = LAYOUTS["spread"]
    fill(cube_place, layout)
    before = cube_place.hashes()
    tile, period = layout.grid.land_tiles(layout.tile)[0], next(layout.period.blocks(4))
    Sink.open(cube_place.url, layout, cube_place.options).write(tile, period, block(layout, tile, period))
    assert cube_place.hashes() == before


def test_receipts_can_be_checked_against_the_store(case: Case) -> None:
    place, layout = case.new_place(), case.layout
    checksums = fill(place, layout)
    stored = StoredValues.open(place.url, layout, place.options)
    for tile in layout.tiles:
        assert stored.checksum(tile=tile) == checksums[tile.name]
        for period in layout.period.blocks(layout.shard_days):
            assert stored.checksum(tile=tile, period=period) == checksums[f"{tile.name} {period}"]
    assert stored.checksum() == checksums["constants"]


@pytest.mark.parametrize("member", [0, 2])
def test_a_checksum_sees_one_changed_value(on_disk: CubePlace, member: int) -> None:
    layout = LAYOUTS["spread"]
    create_cube(on_disk.url, layout, on_disk.options, overwrite=False)
    sink = Sink.open(on_disk.url, layout, on_disk.options)
    tile, period = layout.grid.land_tiles(layout.tile)[0], next(layout.period.blocks(4))
    values = block(layout, tile, period)
    before = sink.write(tile, period, values)
    values[DAILY[1]][member, 3, -1] += 1
    assert sink.write(tile, period, values) != before


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: _flipped(d, 10),
        lambda d: _flipped(d, -10),
        lambda d: d[:-1],
        lambda d: d[:20],
        lambda d: b"x",
    ],
    ids=["bit in a chunk", "bit in the index", "cut by one byte", "cut short", "one byte"],
)
def test_a_damaged_shard_is_seen(on_disk: CubePlace, damage: Callable[[bytes], bytes]) -> None:
    layout = LAYOUTS["one shard"]
    fill(on_disk, layout)
    shard = join(on_disk.url, "runoff", "c", "0", "0", "0")
    put_object(shard, damage(get_object(shard, on_disk.options)), on_disk.options)
    (tile,) = layout.grid.tiles(layout.tile)
    with pytest.raises(StoreError, match=r"damaged[^$]*runoff"):
        StoredValues.open(on_disk.url, layout, on_disk.options).checksum(tile=tile, period=layout.period)


def _flipped(data: bytes, position: int) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 1
    return bytes(changed)


class CountingStore(WrapperStore[Store]):
    """Passes everything on and counts what is asked about array data."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.reads: Counter[str] = Counter()
        self.writes: Counter[str] = Counter()

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        self.reads[key] += not key.endswith("zarr.json")
        return await super().get(key, prototype, byte_range)

    async def set(self, key: str, value: Buffer) -> None:
        self.writes[key] += 1
        await super().set(key, value)


def test_a_shard_is_one_write_and_no_read(case: Case) -> None:
    place, layout = case.new_place(), case.layout
    fill(place, layout)
    store = CountingStore(open_store(place.url, place.options, read_only=False))
    sink = Sink.over(store, place.url, layout, place.options)
    tile, period = layout.grid.land_tiles(layout.tile)[-1], next(layout.period.blocks(layout.shard_days))
    sink.write(tile, period, block(layout, tile, period))
    land = layout.grid.mask[tile.slices]
    shards = [Tile(t.start, t.stop) for t in layout.grid.tiles(layout.shard)]
    inside = [
        shard
        for shard in shards
        if all(a <= s < b for a, s, b in zip(tile.start, shard.start, tile.stop, strict=True))
    ]
    assert land.any()
    n_arrays = sum(len(layout.arrays_of(name)) for name in layout.daily)
    n_land_shards = sum(bool(layout.grid.mask[shard.slices].any()) for shard in inside)
    assert store.reads.total() == 0
    assert set(store.writes.values()) == {1}
    assert store.writes.total() == n_arrays * n_land_shards


def test_a_torn_shard_is_replaced(cube_place: CubePlace) -> None:
    layout = LAYOUTS["spread"]
    fill(cube_place, layout)
    before = cube_place.hashes()
    put_object(join(cube_place.url, "runoff", "c", "0", "0", "1"), b"torn", cube_place.options)
    tile, period = layout.grid.land_tiles(layout.tile)[0], next(layout.period.blocks(4))
    Sink.open(cube_place.url, layout, cube_place.options).write(tile, period, block(layout, tile, period))
    assert cube_place.hashes() == before


@pytest.fixture
def sink(on_disk: CubePlace) -> Iterator[Sink]:
    """An empty cube; a refused call must leave it so."""
    create_cube(on_disk.url, map_layout(), on_disk.options, overwrite=False)
    before = on_disk.versions()
    yield Sink.open(on_disk.url, map_layout(), on_disk.options)
    assert on_disk.versions() == before


@pytest.mark.parametrize(
    "tile",
    [
        Tile((0, 2), (4, 8)),
        Tile((0, 0), (4, 6)),
        Tile((4, 0), (6, 8)),
        Tile((4, 0), (8, 8)),
        Tile((0,), (4,)),
    ],
    ids=["starts inside", "stops inside", "ragged too early", "beyond the grid", "one axis"],
)
def test_part_of_a_spatial_shard_is_refused(sink: Sink, tile: Tile) -> None:
    period = next(PERIOD.blocks(4))
    with pytest.raises(StoreError, match="two writers in one shard lose data"):
        sink.write(tile, period, block(sink.layout, Tile((0, 0), (4, 8)), period))
    with pytest.raises(StoreError, match="two writers in one shard lose data"):
        sink.write_static(tile, {})


@pytest.mark.parametrize(
    "days",
    ["02-28..03-03", "02-27..03-01", "02-27..03-06", "03-06..03-09", "02-23..02-27", "03-10..03-12"],
    ids=["starts inside", "too short", "two shards", "beyond the end", "before the start", "outside"],
)
def test_part_of_a_time_shard_is_refused(sink: Sink, days: str) -> None:
    start, stop = days.split("..")
    period = Period.parse(f"2000-{start}..2000-{stop}")
    tile = Tile((0, 0), (4, 8))
    n_land = int(sink.layout.grid.mask[tile.slices].sum())
    values = {name: np.zeros((3, period.n_days, n_land), np.float32) for name in DAILY}
    with pytest.raises(StoreError, match=r"two writers in one shard lose data[^$]*2000-02-27\.\.2000-03-08"):
        sink.write(tile, period, values)


def test_values_that_do_not_fit_are_refused(sink: Sink) -> None:
    tile, period = Tile((0, 0), (4, 8)), next(PERIOD.blocks(4))
    good = block(sink.layout, tile, period)
    runoff = good["runoff"]
    with pytest.raises(DataError, match=r"lack \['runoff'\] and hold unknown \['x'\]"):
        sink.write(tile, period, {**{n: v for n, v in good.items() if n != "runoff"}, "x": runoff})
    double: Any = runoff.astype(np.float64)
    for wrong in (runoff[:2], runoff[:, :3], runoff[..., 1:], double):
        with pytest.raises(DataError, match=r"runoff[^$]*float32 \[member"):
            sink.write(tile, period, {**good, "runoff": wrong})
    with pytest.raises(DataError, match="soil_moisture_capacity"):
        sink.write_static(tile, {STATIC[0]: np.zeros((3, 1), np.float32)})
    with pytest.raises(DataError, match="baseflow_recession"):
        sink.write_constants({CONSTANTS[0]: np.zeros(2, np.float32)})
