"""Creating, resuming and replacing a cube; what is not one is never touched."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.abc.store import Store
from zarr.core.buffer import Buffer
from zarr.storage import WrapperStore

from h2mv_dist.config import StorageOptions
from h2mv_dist.errors import JobError, StoreError
from h2mv_dist.grid import Grid, Period
from h2mv_dist.io import cube_store
from h2mv_dist.io.cube import FINGERPRINT, CubeLayout, Progress
from h2mv_dist.io.cube_store import create_cube, publish, publish_further, read_cube
from h2mv_dist.io.ledger import Ledger
from h2mv_dist.io.sink import Sink
from h2mv_dist.io.stores import delete_tree, join, list_objects, open_store, put_object, swap_object
from h2mv_dist.spec import Float32Array
from tests.io.cubes import DAILY, PERIOD, Case, CubePlace, fill, map_grid, map_layout, receipt, truth


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
        ({"period": Period(date(2000, 2, 26), PERIOD.stop)}, "layout.start"),
        ({"grid": moved_grid()}, "layout.lon_sha256"),
        ({"members": (0, 3, 8)}, "layout.members"),
        ({"members_as": "all"}, "layout.members_as"),
        ({"compression": "blosc"}, "layout.compression"),
        ({"daily": DAILY[:2]}, "layout.daily"),
        ({"chunk_days": 4}, "layout.chunk_days"),
    ],
)
def test_another_cube_is_left_alone(on_disk: CubePlace, changes: Mapping[str, Any], named: str) -> None:
    fill(on_disk, map_layout())
    before = on_disk.versions()
    other = map_layout(**changes)
    with pytest.raises(StoreError, match=rf"nothing was touched[^$]*{named}[^$]*inference\.overwrite"):
        create_cube(on_disk.url, other, on_disk.options, overwrite=False)
    with pytest.raises(StoreError, match=named):
        Sink.open(on_disk.url, other, on_disk.options)
    assert on_disk.versions() == before


def test_overwrite_replaces_a_cube_and_its_receipts(new_cube_place: Callable[[], CubePlace]) -> None:
    place, fresh = new_cube_place(), new_cube_place()
    fill(place, map_layout())
    ledger = Ledger(place.url, place.options)
    ledger.record("0-4_0-8", PERIOD, receipt())
    other = map_layout(period=Period(PERIOD.start, date(2000, 3, 3)), daily=("fapar",))
    create_cube(place.url, other, place.options, overwrite=True)
    create_cube(fresh.url, other, fresh.options, overwrite=False)
    assert place.hashes() == fresh.hashes()
    assert not ledger.covered()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("notes.txt", b"mine"),
        ("zarr.json", b"{"),
        ("zarr.json", b'{"zarr_format": 3, "node_type": "group", "attributes": {}}'),
    ],
)
def test_what_is_not_a_cube_is_never_touched(
    cube_place: CubePlace, name: str, data: bytes, overwrite: bool
) -> None:
    put_object(join(cube_place.url, name), data, cube_place.options)
    before = cube_place.versions()
    with pytest.raises(StoreError, match=r"not a cube of h2mv_dist; nothing was touched"):
        create_cube(cube_place.url, map_layout(), cube_place.options, overwrite=overwrite)
    assert cube_place.versions() == before


def test_receipts_of_a_lost_cube_do_not_count_for_a_new_one(cube_place: CubePlace) -> None:
    fill(cube_place, map_layout())
    ledger = Ledger(cube_place.url, cube_place.options)
    ledger.record("0-4_0-8", PERIOD, receipt())
    delete_tree(cube_place.url, cube_place.options)
    with pytest.raises(StoreError, match="receipts but no cube"):
        create_cube(cube_place.url, map_layout(), cube_place.options, overwrite=False)
    assert set(ledger.covered()) == {"0-4_0-8"}
    create_cube(cube_place.url, map_layout(), cube_place.options, overwrite=True)
    assert not ledger.covered()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("names", [("world", "world.zarr"), ("world.zarr", "world")])
def test_cubes_whose_names_differ_by_their_ending_only_do_not_share_receipts(
    cube_place: CubePlace, names: tuple[str, str], overwrite: bool
) -> None:
    one, other = (CubePlace(join(cube_place.url, name), cube_place.options) for name in names)
    create_cube(one.url, map_layout(), one.options, overwrite=False)
    ledger = Ledger(one.url, one.options)
    ledger.record("0-4_0-8", PERIOD, receipt())
    with pytest.raises(StoreError, match=r"same name but for \.zarr(.|\n)*choose another path"):
        create_cube(other.url, map_layout(), other.options, overwrite=overwrite)
    assert set(ledger.covered()) == {"0-4_0-8"}
    assert not list_objects(other.url, other.options)


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


def test_the_same_inputs_may_lie_elsewhere_when_a_run_is_resumed(on_disk: CubePlace) -> None:
    attributes = {FINGERPRINT: "abc", "data_url": "/here", "training_job": "/job"}
    fill(on_disk, map_layout(attributes=attributes))
    before = on_disk.versions()
    moved = map_layout(attributes={**attributes, "data_url": "s3://there"})
    create_cube(on_disk.url, moved, on_disk.options, overwrite=False)
    Sink.open(on_disk.url, moved, on_disk.options)
    assert on_disk.versions() == before
    with on_disk.open() as cube:
        assert cube.attrs["data_url"] == "/here"


def test_a_layout_is_read_back(case: Case) -> None:
    place, layout = case.new_place(), case.layout
    create_cube(place.url, layout, place.options, overwrite=False)
    found, progress = read_cube(place.url, place.options)
    assert progress == Progress(layout.period)
    np.testing.assert_array_equal(found.grid.mask, layout.grid.mask)
    assert replace(found, grid=layout.grid) == layout


def test_changed_coordinates_are_seen(on_disk: CubePlace) -> None:
    create_cube(on_disk.url, map_layout(), on_disk.options, overwrite=False)
    array = zarr.open_array(on_disk.url, path="land_mask", mode="r+")
    array[6, 10] = 1 - int(np.asarray(array[6, 10]))
    with pytest.raises(StoreError, match=r"coordinates of a cube were changed(.|\n)*mask_sha256"):
        read_cube(on_disk.url, on_disk.options)


@pytest.mark.parametrize("n_writes", [1, 2, 3, 20])
def test_an_interrupted_creation_is_completed(
    tmp_path: Path, n_writes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(url: str, options: StorageOptions, *, read_only: bool) -> Store:
        store = DyingStore(open_store(url, options, read_only=read_only))
        store.writes_left = n_writes
        return store

    broken, whole = (CubePlace(str(tmp_path / name), StorageOptions()) for name in ("broken", "whole"))
    layout = map_layout()
    with monkeypatch.context() as patch:
        patch.setattr("h2mv_dist.io.cube_store.open_store", dying)
        with pytest.raises(KilledError):
            create_cube(broken.url, layout, broken.options, overwrite=False)
    with pytest.raises(StoreError, match="no complete cube"):
        Sink.open(broken.url, layout, broken.options)
    create_cube(broken.url, layout, broken.options, overwrite=False)
    create_cube(whole.url, layout, whole.options, overwrite=False)
    assert broken.hashes() == whole.hashes()


@pytest.mark.parametrize("n_deletions", [0, 1, 2, 5, 17])
def test_an_interrupted_replacement_is_completed(
    on_disk: CubePlace, tmp_path: Path, n_deletions: int, monkeypatch: pytest.MonkeyPatch
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
        patch.setattr("h2mv_dist.io.cube_store.delete_tree", dying)
        with pytest.raises(KilledError):
            create_cube(on_disk.url, other, on_disk.options, overwrite=True)
    with pytest.raises(StoreError, match=r"layout\.daily"):
        create_cube(on_disk.url, other, on_disk.options, overwrite=False)
    if n_deletions > 1:
        with pytest.raises(StoreError, match="no complete cube"):
            Sink.open(on_disk.url, map_layout(), on_disk.options)
    create_cube(on_disk.url, other, on_disk.options, overwrite=True)
    whole = CubePlace(str(tmp_path / "whole.zarr"), on_disk.options)
    create_cube(whole.url, other, whole.options, overwrite=False)
    assert on_disk.hashes() == whole.hashes()


def test_creating_again_deletes_nothing(on_disk: CubePlace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The root of another run is there, but not all arrays; it has finished when this one has, too."""
    layout = map_layout()
    done: list[str] = []

    def interrupted(*_: Any) -> None:
        raise KilledError

    def overtaken(*given: Any) -> None:
        if not done:
            done.append("by the other run")
            fill(on_disk, layout)
        write_arrays(*given)

    write_arrays = cube_store._write_arrays
    with monkeypatch.context() as patch:
        patch.setattr(cube_store, "_write_arrays", interrupted)
        with pytest.raises(KilledError):
            create_cube(on_disk.url, layout, on_disk.options, overwrite=False)
    monkeypatch.setattr(cube_store, "_write_arrays", overtaken)
    create_cube(on_disk.url, layout, on_disk.options, overwrite=False)
    assert read_cube(on_disk.url, on_disk.options).progress.complete
    with on_disk.open() as cube:
        np.testing.assert_array_equal(cube["runoff"].values, truth_of(layout, "runoff"))


@pytest.mark.parametrize("theirs", [map_layout(), map_layout(daily=DAILY[:2])], ids=["same", "another"])
def test_of_two_creations_at_once_one_joins_or_is_refused(
    on_disk: CubePlace, monkeypatch: pytest.MonkeyPatch, theirs: CubeLayout
) -> None:
    refuse = cube_store._refuse_orphaned_receipts

    def overtaken(*given: Any) -> None:
        """Both have found nothing."""
        refuse(*given)
        monkeypatch.setattr(cube_store, "_refuse_orphaned_receipts", refuse)
        fill(on_disk, theirs)

    monkeypatch.setattr(cube_store, "_refuse_orphaned_receipts", overtaken)
    if theirs.daily == DAILY:
        create_cube(on_disk.url, map_layout(), on_disk.options, overwrite=False)
    else:
        with pytest.raises(StoreError, match=r"nothing was touched(.|\n)*layout\.daily"):
            create_cube(on_disk.url, map_layout(), on_disk.options, overwrite=False)
    assert read_cube(on_disk.url, on_disk.options).progress.complete


def test_nothing_can_be_written_where_no_cube_is(cube_place: CubePlace) -> None:
    with pytest.raises(StoreError, match="no complete cube"):
        Sink.open(cube_place.url, map_layout(), cube_place.options)


def test_a_longer_cube_is_seen_with_the_root_and_not_before(case: Case) -> None:
    place, layout = case.new_place(), case.layout
    fill(place, layout)
    before = place.hashes()
    longer = replace(layout, period=Period(PERIOD.start, date(2000, 3, 14)))
    with place.open() as early:
        publish(place.url, longer, Progress(longer.period, True), place.options)
        assert early.sizes["time"] == 10
        np.testing.assert_array_equal(
            early["snow_water_equivalent"].values, truth_of(layout, "snow_water_equivalent")
        )
    with place.open() as late:
        assert late.sizes["time"] == 16
        assert str(late["time"].values[-1])[:10] == "2000-03-13" == late.attrs["time_coverage_end"]
        assert late["time_bnds"].shape == (16, 2)
    after = place.hashes()
    changed = {name for name in after if after[name] != before.get(name)}
    assert {name.rpartition("/")[2] for name in changed} == {"zarr.json"}, "no data were written again"


def test_time_goes_on_beyond_what_was_stored_at_first(
    new_cube_place: Callable[[], CubePlace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten days and no whole month at first; the end moves there and back, and further."""
    monkeypatch.setattr("h2mv_dist.io.cube.HORIZON_DAYS", 8)
    monkeypatch.setattr("h2mv_dist.io.cube.HORIZON_MONTHS", 1)
    place, layout = new_cube_place(), map_layout(monthly=("runoff",))
    fill(place, layout)
    for stop in (date(2000, 4, 2), PERIOD.stop, date(2000, 5, 14)):
        before = place.hashes()
        period = Period(PERIOD.start, stop)
        publish(place.url, replace(layout, period=period), Progress(period, True), place.options)
        after = place.hashes()
        assert {name for name in before if after[name] != before[name]} <= {
            name for name in after if name.endswith("zarr.json")
        }
        with place.open() as cube:
            days = np.arange(np.datetime64(PERIOD.start), np.datetime64(stop)).astype("datetime64[ns]")
            np.testing.assert_array_equal(cube["time"].values, days)
            np.testing.assert_array_equal(cube["time_bnds"].values[:, 0], days)
            months = [str(month.start) for month in period.months()]
            assert [str(month)[:10] for month in cube["month"].values] == months


def shown(place: CubePlace, layout: CubeLayout, stop: date, *rollbacks: date) -> None:
    """Show readers the days until ``stop``."""
    period = Period(PERIOD.start, stop)
    progress = Progress(period, True, rollbacks)
    publish(place.url, replace(layout, period=period), progress, place.options)


@pytest.mark.parametrize("rolled_back", [True, False])
def test_what_another_run_shows_at_the_same_moment_stays(
    cube_place: CubePlace, monkeypatch: pytest.MonkeyPatch, rolled_back: bool
) -> None:
    layout, longer = map_layout(), Period(PERIOD.start, date(2000, 3, 14))
    theirs = date(2000, 3, 2) if rolled_back else date(2000, 3, 18)
    rollbacks = (theirs,) if rolled_back else ()
    fill(cube_place, layout)

    def overtaken(*given: Any) -> str | None:
        monkeypatch.setattr(cube_store, "swap_object", swap_object)
        shown(cube_place, layout, theirs, *rollbacks)
        return swap_object(*given)

    monkeypatch.setattr(cube_store, "swap_object", overtaken)
    ours = replace(layout, period=longer)
    lost = pytest.raises(JobError, match="rolled back while it was worked on")
    with lost if rolled_back else nullcontext():
        publish_further(cube_place.url, ours, Progress(longer, True), cube_place.options)
    assert read_cube(cube_place.url, cube_place.options).progress.period.stop == theirs
    store = open_store(cube_place.url, cube_place.options, read_only=True)
    assert zarr.open_array(store, path="time").shape == ((theirs - PERIOD.start).days,)


def test_a_cube_that_changed_meanwhile_is_not_rolled_back(on_disk: CubePlace) -> None:
    layout = map_layout()
    fill(on_disk, layout)
    before = read_cube(on_disk.url, on_disk.options).progress
    shown(on_disk, layout, date(2000, 3, 14))
    shorter = replace(before, period=Period(PERIOD.start, date(2000, 3, 2)), rollbacks=(date(2000, 3, 2),))
    with pytest.raises(JobError, match="another run has changed"):
        publish(on_disk.url, layout, shorter, on_disk.options, before=before)
    assert read_cube(on_disk.url, on_disk.options).progress.period.stop == date(2000, 3, 14)


def test_no_lock_is_taken_for_a_member(on_disk: CubePlace) -> None:
    fill(on_disk, map_layout())
    group = zarr.open_group(on_disk.url, mode="r", use_consolidated=False)
    assert "runoff" in sorted(group), "warnings are errors"


@pytest.mark.parametrize("until", [None, PERIOD.stop])
def test_how_far_a_cube_is_can_be_read_back(until: date | None) -> None:
    progress = Progress(PERIOD, True, (PERIOD.start,), "c", until)
    attributes = progress.attributes()
    assert Progress.of(attributes) == progress
    assert ("h2mv_dist_until" in attributes) == (until is not None), "what cubes made before do not have"


def truth_of(layout: CubeLayout, name: str) -> Float32Array:
    values = truth(layout)[name]
    if layout.member_axis:
        return values
    return np.asarray(values.mean(axis=0, dtype=np.float64), np.float32)


def test_a_rollback_hides_days_at_once(on_disk: CubePlace) -> None:
    layout = map_layout()
    fill(on_disk, layout)
    shorter = Period(PERIOD.start, date(2000, 3, 2))
    progress = Progress(shorter, True, (shorter.stop,), "c")
    publish(on_disk.url, layout, progress, on_disk.options)
    found, known = read_cube(on_disk.url, on_disk.options)
    assert known == progress
    assert replace(found, grid=layout.grid) == replace(layout, period=shorter)
    with on_disk.open() as cube:
        assert cube.sizes["time"] == 4
        np.testing.assert_array_equal(cube["runoff"].values, truth_of(layout, "runoff")[:4])


@pytest.mark.parametrize("n_puts", [0, 1, 5])
def test_a_crash_while_days_are_shown_leaves_the_old_ones(
    on_disk: CubePlace, n_puts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = n_puts

    def dying(url: str, data: bytes, options: StorageOptions) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KilledError
        put_object(url, data, options)

    layout = map_layout()
    fill(on_disk, layout)
    longer = replace(layout, period=Period(PERIOD.start, date(2000, 3, 14)))
    with monkeypatch.context() as patch:
        patch.setattr("h2mv_dist.io.cube_store.put_object", dying)
        with pytest.raises(KilledError):
            publish(on_disk.url, longer, Progress(longer.period, True), on_disk.options)
    with on_disk.open() as cube:
        np.testing.assert_array_equal(cube["runoff"].values, truth_of(layout, "runoff"))
    publish(on_disk.url, longer, Progress(longer.period, True), on_disk.options)
    with on_disk.open() as cube:
        assert cube.sizes["time"] == 16
