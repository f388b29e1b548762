import hashlib
import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import cf_xarray  # noqa: F401  (registers the .cf accessor)
import numpy as np
import pytest
import xarray as xr
from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import WrapperStore

from h2mv_dist.config import StorageOptions
from h2mv_dist.errors import ConfigError, DataError, StoreError
from h2mv_dist.grid import Grid, Period, Tile
from h2mv_dist.io.ledger import Ledger, Receipt
from h2mv_dist.io.sink import (
    FINGERPRINT,
    CubeLayout,
    Float32Array,
    Sink,
    block_bytes,
    consolidate,
    create_cube,
    projected_bytes,
    stored_checksum,
)
from h2mv_dist.io.stores import (
    content_fingerprint,
    delete_tree,
    get_object,
    join,
    list_objects,
    open_store,
    put_object,
)
from tests.conftest import S3Server

DAILY = ("runoff", "snow_water_equivalent", "terrestrial_water_storage_anomaly")
STATIC = ("soil_moisture_capacity",)
CONSTANTS = ("baseflow_recession",)
KINDS = ("disk", "memory", "s3")
PERIOD = Period(date(2000, 2, 27), date(2000, 3, 8))


@dataclass(frozen=True)
class Place:
    """Where a cube is tried: its URL, and what opens it."""

    url: str
    options: StorageOptions

    def open(self) -> xr.Dataset:
        cube: xr.Dataset = xr.open_zarr(self.url, storage_options=dict(self.options.get("s3", {})) or None)
        return cube

    def hashes(self) -> dict[str, str]:
        names = list_objects(self.url, self.options)
        return {
            name: hashlib.sha256(get_object(join(self.url, name), self.options)).hexdigest() for name in names
        }

    def versions(self) -> str:
        """Changes when any object is written again, even with the same bytes."""
        return content_fingerprint(self.url, self.options, ("",))


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server) -> str:
    return s3_server.new_bucket()


def places(kind: str, request: pytest.FixtureRequest) -> Callable[[], Place]:
    """Makes places of one kind, each empty."""
    if kind == "s3":
        options = request.getfixturevalue("s3_server").options
        root = request.getfixturevalue("bucket")
    else:
        options = StorageOptions()
        root = str(request.getfixturevalue("tmp_path")) if kind == "disk" else "memory://"
    return lambda: Place(join(root, uuid.uuid4().hex, "cube.zarr"), options)


@pytest.fixture(params=KINDS)
def new_place(request: pytest.FixtureRequest) -> Callable[[], Place]:
    return places(request.param, request)


@pytest.fixture
def place(new_place: Callable[[], Place]) -> Place:
    return new_place()


@pytest.fixture
def on_disk(tmp_path: Path) -> Place:
    return Place(str(tmp_path / "cube.zarr"), StorageOptions())


def map_grid() -> Grid:
    """7 x 11 cells from the pole southwards, ragged in both directions; the north-western tile is all sea."""
    mask = np.random.default_rng(1).random((7, 11)) < 0.6
    mask[:4, :4] = False
    return Grid.lat_lon(np.linspace(90.0, 84.0, 7), np.arange(0.5, 11), mask)


def basin_grid() -> Grid:
    mask = np.array([True, True, False, True, True])
    lat, lon = np.array([50.0, -3.0, 7.5, 60.0, 1.0]), np.array([8.0, 120.0, -60.0, 25.0, 3.0])
    return Grid(("cell",), lat, lon, mask, np.linspace(1e8, 5e9, 5))


def map_layout(**changes: Any) -> CubeLayout:
    layout = CubeLayout(
        grid=map_grid(),
        period=PERIOD,
        daily=DAILY,
        static=STATIC,
        constants=CONSTANTS,
        members=(0, 3, 7),
        member_axis=False,
        chunk=(2, 2),
        shard=(4, 4),
        chunk_days=2,
        shard_days=4,
        tile=(4, 8),
        attributes={FINGERPRINT: "abc", "h2mv_dist_model": "h2mv"},
    )
    return replace(layout, **changes)


def basin_layout(**changes: Any) -> CubeLayout:
    return map_layout(grid=basin_grid(), chunk=(1,), shard=(2,), tile=(4,), **changes)


LAYOUTS = {
    "spread": map_layout(),
    "members": map_layout(member_axis=True),
    "one member": map_layout(members=(5,)),
    "one shard": map_layout(chunk=(10, 10), shard=(20, 20), tile=(20, 20), chunk_days=30, shard_days=30),
    "basins": basin_layout(),
    "basin members": basin_layout(member_axis=True),
}


# Every layout on disk; elsewhere, where requests take their time, the two that differ most.
CASES = [
    (kind, name)
    for kind in KINDS
    for name in LAYOUTS
    if kind == "disk" or name in ("spread", "basin members")
]


@dataclass(frozen=True)
class Case:
    """A layout and where it is tried."""

    new_place: Callable[[], Place]
    layout: CubeLayout


@pytest.fixture(params=CASES, ids=": ".join)
def case(request: pytest.FixtureRequest) -> Case:
    kind, name = request.param
    return Case(places(kind, request), LAYOUTS[name])


def truth(layout: CubeLayout) -> dict[str, Float32Array]:
    """What every member says everywhere: [member, (time,) *space], NaN over sea."""
    generator = np.random.default_rng(7)
    shape, members, days = layout.grid.shape, len(layout.members), layout.period.n_days
    shapes: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(layout.daily, (members, days, *shape)),
        **dict.fromkeys(layout.static, (members, *shape)),
        **dict.fromkeys(layout.constants, (members,)),
    }
    values = {
        name: generator.normal(1e3, 50, shape).astype(np.float32) for name, shape in sorted(shapes.items())
    }
    for name in (*layout.daily, *layout.static):
        values[name][..., ~layout.grid.mask] = np.nan
    return values


def packed(layout: CubeLayout, name: str, tile: Tile, days: slice | None = None) -> Float32Array:
    """The tile's land cells of one variable."""
    values = truth(layout)[name]
    part = values[(slice(None), *([days] if days else []), *tile.slices)]
    return part[..., layout.grid.mask[tile.slices]]


def block(layout: CubeLayout, tile: Tile, period: Period) -> dict[str, Float32Array]:
    first = period.first - layout.period.first
    return {name: packed(layout, name, tile, slice(first, first + period.n_days)) for name in layout.daily}


def fill(place: Place, layout: CubeLayout, *, backwards: bool = False) -> dict[str, str]:
    """Create and write a whole cube, tiles at the same time; checksum of every unit."""
    create_cube(place.url, layout, place.options, overwrite=False)
    sink = Sink.open(place.url, layout, place.options)
    units: dict[str, Callable[[], str]] = {}
    for tile in layout.grid.land_tiles(layout.tile):
        static = {name: packed(layout, name, tile) for name in layout.static}
        units[tile.name] = partial(sink.write_static, tile, static)
        for period in layout.period.blocks(layout.shard_days):
            values = block(layout, tile, period)
            units[f"{tile.name} {period}"] = partial(sink.write, tile, period, values)
    names = list(units)[:: -1 if backwards else 1]
    with ThreadPoolExecutor(3) as pool:
        checksums = dict(zip(names, pool.map(lambda name: units[name](), names), strict=True))
    constants = {name: truth(layout)[name] for name in layout.constants}
    checksums["constants"] = sink.write_constants(constants)
    consolidate(place.url, place.options)
    return checksums


# --- what a reader sees -----------------------------------------------------------------------------------


def test_a_reader_finds_what_the_members_said(case: Case) -> None:
    place, layout = case.new_place(), case.layout
    fill(place, layout)
    with place.open() as cube:
        for name, members in truth(layout).items():
            if layout.member_axis:
                np.testing.assert_array_equal(cube[name], members)
                continue
            exact = members.astype(np.float64)
            centre = exact.sum(axis=0) / len(layout.members)
            spread = np.sqrt(((exact - centre) ** 2).sum(axis=0) / len(layout.members))
            np.testing.assert_allclose(cube[name], centre, rtol=1e-7)
            if len(layout.members) > 1:
                np.testing.assert_allclose(cube[name + "_spread"], spread, rtol=1e-6)


def test_a_reader_finds_decoded_axes(case: Case) -> None:
    place, layout = case.new_place(), case.layout
    fill(place, layout)
    with place.open() as cube:
        days = layout.period.days().astype("datetime64[D]")
        np.testing.assert_array_equal(cube.time, days)
        np.testing.assert_array_equal(cube.time_bnds, np.stack([days, days + 1], axis=1))
        np.testing.assert_array_equal(cube.lat, layout.grid.lat)
        np.testing.assert_array_equal(cube.lon, layout.grid.lon)
        np.testing.assert_array_equal(cube.cell_area, layout.grid.area)
        np.testing.assert_array_equal(cube.land_mask, layout.grid.mask)
        assert {"time", "lat", "lon"} <= set(cube.coords)
        assert cube["runoff"].dims == (
            *(("member",) if layout.member_axis else ()),
            "time",
            *layout.grid.dims,
        )
        assert ("member" in cube.coords) == layout.member_axis
        assert ("runoff_spread" in cube) == (not layout.member_axis and len(layout.members) > 1)


def test_a_map_follows_cf(on_disk: Place) -> None:
    fill(on_disk, LAYOUTS["spread"])
    with on_disk.open() as cube:
        assert cube.attrs["Conventions"] == "CF-1.11"
        assert cube.attrs["h2mv_dist_model"] == "h2mv"
        assert cube.cf["latitude"].name == cube.cf["Y"].name == "lat"
        assert cube.cf["longitude"].name == cube.cf["X"].name == "lon"
        assert cube.cf["T"].name == "time"
        np.testing.assert_allclose(cube.cf.get_bounds("lat")[:2], [[90.0, 89.5], [89.5, 88.5]])
        np.testing.assert_allclose(cube.cf.get_bounds("lon")[-1], [10.0, 11.0])
        assert cube.cf["runoff"].cf["area"].name == "cell_area"
        # The standard name finds the mean alone: a spread is not the quantity itself.
        assert cube.cf["lwe_thickness_of_surface_snow_amount"].name == "snow_water_equivalent"
        assert cube["runoff"].attrs["cell_methods"] == "time: mean realization: mean"
        spread = cube["snow_water_equivalent_spread"].attrs
        assert spread["units"] == "mm"
        assert "over folds" in spread["long_name"]
        assert "not an uncertainty" in spread["long_name"]
        assert spread["cell_methods"].endswith("realization: standard_deviation")


def test_a_single_member_is_not_called_a_mean(on_disk: Place) -> None:
    fill(on_disk, LAYOUTS["one member"])
    with on_disk.open() as cube:
        assert cube["runoff"].attrs["cell_methods"] == "time: mean"
        assert "ancillary_variables" not in cube["runoff"].attrs


def test_members_carry_their_fold_numbers(on_disk: Place) -> None:
    fill(on_disk, LAYOUTS["members"])
    with on_disk.open() as cube:
        np.testing.assert_array_equal(cube.member, [0, 3, 7])
        assert cube.member.attrs["standard_name"] == "realization"


def test_only_core_codecs_are_stored(on_disk: Place) -> None:
    fill(on_disk, LAYOUTS["spread"])
    metadata = json.loads(get_object(join(on_disk.url, "runoff", "zarr.json"), on_disk.options))
    (sharding,) = metadata["codecs"]
    assert sharding["name"] == "sharding_indexed"
    assert [codec["name"] for codec in sharding["configuration"]["codecs"]] == ["bytes", "zstd", "crc32c"]
    assert metadata["fill_value"] == "NaN"
    assert metadata["chunk_grid"]["configuration"]["chunk_shape"] == [4, 4, 4]
    root = json.loads(get_object(join(on_disk.url, "zarr.json"), on_disk.options))
    assert root["consolidated_metadata"]["metadata"]["runoff"] == metadata


# --- bytes ------------------------------------------------------------------------------------------------


def test_two_cubes_are_equal_to_the_byte(case: Case) -> None:
    first, second, layout = case.new_place(), case.new_place(), case.layout
    assert fill(first, layout) == fill(second, layout, backwards=True)
    assert first.hashes() == second.hashes()


def test_writing_a_tile_again_changes_no_byte(place: Place) -> None:
    layout = LAYOUTS["spread"]
    fill(place, layout)
    before = place.hashes()
    tile, period = layout.grid.land_tiles(layout.tile)[0], next(layout.period.blocks(4))
    Sink.open(place.url, layout, place.options).write(tile, period, block(layout, tile, period))
    assert place.hashes() == before


def test_receipts_can_be_checked_against_the_store(case: Case) -> None:
    place, layout = case.new_place(), case.layout
    checksums = fill(place, layout)
    for tile in layout.grid.land_tiles(layout.tile):
        for period in layout.period.blocks(layout.shard_days):
            expected = checksums[f"{tile.name} {period}"]
            found = stored_checksum(place.url, layout, place.options, tile=tile, period=period)
            assert found == expected
        assert stored_checksum(place.url, layout, place.options, tile=tile) == checksums[tile.name]
    assert stored_checksum(place.url, layout, place.options) == checksums["constants"]


@pytest.mark.parametrize("member", [0, 2])
def test_a_checksum_sees_one_changed_value(on_disk: Place, member: int) -> None:
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
def test_a_damaged_shard_is_seen(on_disk: Place, damage: Callable[[bytes], bytes]) -> None:
    layout = LAYOUTS["one shard"]
    fill(on_disk, layout)
    shard = join(on_disk.url, "runoff", "c", "0", "0", "0")
    put_object(shard, damage(get_object(shard, on_disk.options)), on_disk.options)
    (tile,) = layout.grid.tiles(layout.tile)
    with pytest.raises(StoreError, match=r"damaged[^$]*runoff"):
        stored_checksum(on_disk.url, layout, on_disk.options, tile=tile, period=layout.period)


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


def test_a_torn_shard_is_replaced(place: Place) -> None:
    layout = LAYOUTS["spread"]
    fill(place, layout)
    before = place.hashes()
    put_object(join(place.url, "runoff", "c", "0", "0", "1"), b"torn", place.options)
    tile, period = layout.grid.land_tiles(layout.tile)[0], next(layout.period.blocks(4))
    Sink.open(place.url, layout, place.options).write(tile, period, block(layout, tile, period))
    assert place.hashes() == before


# --- creating and resuming --------------------------------------------------------------------------------


def test_resuming_writes_nothing(case: Case) -> None:
    place, layout = case.new_place(), case.layout
    fill(place, layout)
    before = place.versions()
    create_cube(place.url, layout, place.options, overwrite=False)
    create_cube(place.url, layout, place.options, overwrite=True)
    assert place.versions() == before


def moved_grid() -> Grid:
    grid = map_grid()
    return Grid.lat_lon(grid.lat, grid.lon + 0.25, grid.mask)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attributes": {FINGERPRINT: "xyz", "h2mv_dist_model": "h2mv"}}, FINGERPRINT),
        ({"attributes": {FINGERPRINT: "abc", "h2mv_dist_model": "h2cm"}}, "h2mv_dist_model"),
        ({"attributes": {FINGERPRINT: "abc"}}, "h2mv_dist_model"),
        ({"period": Period(PERIOD.start, date(2000, 3, 9))}, "layout.period"),
        ({"grid": moved_grid()}, "layout.lon_sha256"),
        ({"members": (0, 3, 8)}, "layout.members"),
        ({"member_axis": True}, "layout.member_axis"),
        ({"daily": DAILY[:2]}, "layout.daily"),
        ({"chunk_days": 4}, "layout.chunk_days"),
    ],
)
def test_another_cube_is_left_alone(on_disk: Place, changes: Mapping[str, Any], named: str) -> None:
    fill(on_disk, map_layout())
    before = on_disk.versions()
    other = map_layout(**changes)
    with pytest.raises(StoreError, match=rf"nothing was touched[^$]*{named}[^$]*inference\.overwrite"):
        create_cube(on_disk.url, other, on_disk.options, overwrite=False)
    with pytest.raises(StoreError, match=named):
        Sink.open(on_disk.url, other, on_disk.options)
    assert on_disk.versions() == before


def test_overwrite_replaces_a_cube_and_its_receipts(new_place: Callable[[], Place]) -> None:
    place, fresh = new_place(), new_place()
    fill(place, map_layout())
    ledger = Ledger(place.url, place.options)
    ledger.record(Receipt("tile", "abc", "checksum", 1.0))
    other = map_layout(period=Period(PERIOD.start, date(2000, 3, 3)), daily=("fapar",))
    create_cube(place.url, other, place.options, overwrite=True)
    create_cube(fresh.url, other, fresh.options, overwrite=False)
    assert place.hashes() == fresh.hashes()
    assert not ledger.receipts()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("notes.txt", b"mine"),
        ("zarr.json", b"{"),
        ("zarr.json", b'{"zarr_format": 3, "node_type": "group", "attributes": {}}'),
    ],
)
def test_what_is_not_a_cube_is_never_touched(place: Place, name: str, data: bytes, overwrite: bool) -> None:
    put_object(join(place.url, name), data, place.options)
    before = place.versions()
    with pytest.raises(StoreError, match=r"not a cube of h2mv_dist; nothing was touched"):
        create_cube(place.url, map_layout(), place.options, overwrite=overwrite)
    assert place.versions() == before


def test_receipts_of_a_lost_cube_do_not_count_for_a_new_one(place: Place) -> None:
    fill(place, map_layout())
    ledger = Ledger(place.url, place.options)
    ledger.record(Receipt("tile", "abc", "checksum", 1.0))
    delete_tree(place.url, place.options)
    with pytest.raises(StoreError, match="receipts but no cube"):
        create_cube(place.url, map_layout(), place.options, overwrite=False)
    assert set(ledger.receipts()) == {"tile"}
    create_cube(place.url, map_layout(), place.options, overwrite=True)
    assert not ledger.receipts()


class KilledError(Exception):
    """The process ends here."""


class DyingStore(WrapperStore[Store]):
    """A store whose process is killed before its n-th write."""

    writes_left: int

    async def set(self, key: str, value: Buffer) -> None:
        self.writes_left -= 1
        if self.writes_left < 0:
            raise KilledError
        await super().set(key, value)


@pytest.mark.parametrize("n_writes", [1, 2, 3, 20])
def test_an_interrupted_creation_is_completed(
    tmp_path: Path, n_writes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(url: str, options: StorageOptions, *, read_only: bool) -> Store:
        store = DyingStore(open_store(url, options, read_only=read_only))
        store.writes_left = n_writes
        return store

    broken, whole = (Place(str(tmp_path / name), StorageOptions()) for name in ("broken", "whole"))
    layout = map_layout()
    with monkeypatch.context() as patch:
        patch.setattr("h2mv_dist.io.sink.open_store", dying)
        with pytest.raises(KilledError):
            create_cube(broken.url, layout, broken.options, overwrite=False)
    with pytest.raises(StoreError, match="no complete cube"):
        Sink.open(broken.url, layout, broken.options)
    create_cube(broken.url, layout, broken.options, overwrite=False)
    create_cube(whole.url, layout, whole.options, overwrite=False)
    assert broken.hashes() == whole.hashes()


@pytest.mark.parametrize("n_deletions", [0, 1, 2, 5, 17])
def test_an_interrupted_replacement_is_completed(
    on_disk: Place, tmp_path: Path, n_deletions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = n_deletions

    def dying(url: str, options: StorageOptions) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KilledError
        delete_tree(url, options)

    fill(on_disk, map_layout())
    other = map_layout(daily=("fapar",))
    with monkeypatch.context() as patch:
        patch.setattr("h2mv_dist.io.sink.delete_tree", dying)
        with pytest.raises(KilledError):
            create_cube(on_disk.url, other, on_disk.options, overwrite=True)
    with pytest.raises(StoreError, match=r"layout\.daily"):
        create_cube(on_disk.url, other, on_disk.options, overwrite=False)
    if n_deletions > 0:
        with pytest.raises(StoreError, match="no complete cube"):
            Sink.open(on_disk.url, map_layout(), on_disk.options)
    create_cube(on_disk.url, other, on_disk.options, overwrite=True)
    whole = Place(str(tmp_path / "whole.zarr"), on_disk.options)
    create_cube(whole.url, other, whole.options, overwrite=False)
    assert on_disk.hashes() == whole.hashes()


def test_nothing_can_be_written_where_no_cube_is(place: Place) -> None:
    with pytest.raises(StoreError, match="create_cube"):
        Sink.open(place.url, map_layout(), place.options)


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.fixture
def sink(on_disk: Place) -> Iterator[Sink]:
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shard": (4, 5), "tile": (4, 10)}, r"shard is not a multiple of chunk[^$]*inference\.shard"),
        ({"shard_days": 5}, "shard is not a multiple of chunk"),
        ({"tile": (4, 6)}, r"tile is not a multiple of shard: two writers in one shard lose data"),
        ({"tile": (4,)}, r"tile does not fit the grid[^$]*lat, lon"),
        ({"chunk": (0, 2)}, r"chunk does not fit the grid"),
        ({"chunk_days": 0}, "shard is not a multiple of chunk"),
        ({"daily": ("runof",)}, "did you mean 'runoff'"),
        ({"daily": ("runoff", "runoff")}, "named twice"),
        ({"members": (1, 1)}, "named twice"),
        ({"members": ()}, "at least one"),
        ({"attributes": {}}, FINGERPRINT),
    ],
)
def test_a_layout_that_cannot_work_is_refused(changes: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        map_layout(**changes)


# --- sizes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_projected_sizes_are_the_real_ones(on_disk: Place, layout: CubeLayout) -> None:
    fill(on_disk, layout)
    with on_disk.open() as cube:
        assert projected_bytes(layout) == cube.nbytes
        block_size = {"time": layout.shard_days, **dict(zip(layout.grid.dims, layout.tile, strict=True))}
        ranges = {name: slice(0, size) for name, size in block_size.items()}
        written = [a for name in layout.daily for a in layout.arrays_of(name)]
        assert block_bytes(layout) == cube[written].isel(ranges).drop_vars(list(cube.coords)).nbytes
