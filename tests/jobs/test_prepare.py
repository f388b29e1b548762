"""Preparing forcing: the same values as the original, on real workers and stores, only what is missing."""

import shutil
import tracemalloc
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from distributed import Client

from h2mv_dist import cli
from h2mv_dist.config import Settings, StorageOptions, load, validate
from h2mv_dist.errors import ConfigError, DataError, JobError, StoreError
from h2mv_dist.grid import Period, as_date
from h2mv_dist.io import daily as daily_module
from h2mv_dist.io import prepared as prepared_module
from h2mv_dist.io.ledger import ledger_url
from h2mv_dist.io.prepared import FINISH, PreparedStore
from h2mv_dist.io.source import Source, open_source
from h2mv_dist.io.stores import delete_tree, list_objects
from h2mv_dist.jobs import prepare as prepare_module
from h2mv_dist.jobs.messages import Message
from h2mv_dist.jobs.prepare import PreparePlan, plan_prepare, prepare_days, start_prepare
from h2mv_dist.model.h2mv import SPEC
from tests.conftest import PLACES, Place, S3Server, new_place
from tests.io.builders import (
    FIRST,
    FORCING,
    LAND,
    Arrays,
    Stored,
    basins,
    cf,
    field_of,
    published,
    read,
    whole,
    write,
)
from tests.io.counting import chunk_reads, counting_place, forget_reads
from tests.io.subdaily import AMOUNTS, expected, hourly, hours_since, stamped, starts
from tests.jobs.conftest import NO_OPTIONS

SMALL = {"shard": [2, 3], "chunk": [2, 3], "shard_days": 30, "chunk_days": 10}


def settings_of(url: str, prepare: dict[str, Any] | None = None, **data: Any) -> Settings:
    return validate({"data": {**data, "url": url}, "prepare": {**SMALL, **(prepare or {})}}, where="test")


def cf_settings(url: str, prepare: dict[str, Any] | None = None, **data: Any) -> Settings:
    return settings_of(url, prepare, layout="cf", static=["elevation", "clay"], **data)


def prepare_here(plan: PreparePlan, to: str, options: StorageOptions = NO_OPTIONS) -> PreparedStore:
    """The whole job in this process."""
    store = PreparedStore(to, plan.layout, options)
    store.create(overwrite=plan.settings.prepare.overwrite)
    for block in plan.layout.blocks:
        store.record(str(block), prepare_days(plan, store, block), 0.0)
    store.finish(plan.daily.static)
    return store


def reopened(plan: PreparePlan, to: str, options: StorageOptions = NO_OPTIONS) -> Source:
    return open_source(plan.layout.data(to), forcing=SPEC.forcing, targets=(), options=options)


def original(settings: Settings) -> Source:
    return open_source(settings.data, forcing=SPEC.forcing, targets=(), options=NO_OPTIONS)


def require_same(ours: Source, theirs: Source) -> None:
    """The same to the bit, over sea too."""
    assert (ours.period, ours.forcing, ours.static) == (theirs.period, theirs.forcing, theirs.static)
    for one, other in (
        (ours.grid.lat, theirs.grid.lat),
        (ours.grid.lon, theirs.grid.lon),
        (ours.grid.mask, theirs.grid.mask),
        (ours.grid.area, theirs.grid.area),
        (ours.read_static(whole(ours)), theirs.read_static(whole(theirs))),
        *((a.read(), b.read()) for a, b in zip(ours.arrays.forcing, theirs.arrays.forcing, strict=True)),
    ):
        np.testing.assert_array_equal(one, other, strict=True)


def run(client: Client, plan: PreparePlan, to: str, options: StorageOptions = NO_OPTIONS) -> list[str]:
    """Prepare on workers; returns the names of the units."""
    handle = start_prepare(client, plan, to, options)
    assert handle is not None
    return [unit["name"] for unit in handle.wait()["units"]]


def test_daily_forcing_is_the_same_to_the_bit(client: Client, world_url: str, tmp_path: Path) -> None:
    to = str(tmp_path / "to.zarr")
    cut = {"shard": [6, 12], "chunk": [3, 6], "shard_days": 120, "chunk_days": 40}
    plan = plan_prepare(settings_of(world_url, cut), NO_OPTIONS)
    assert run(client, plan, to) == [*map(str, plan.layout.blocks), FINISH]
    ours = reopened(plan, to)
    require_same(ours, original(plan.settings))
    assert ours.chunk_shape == (6, 12)
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    assert start_prepare(client, plan, to, NO_OPTIONS) is None
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_from_and_to_an_object_store(client: Client, s3_server: S3Server, s3_bucket: str) -> None:
    place = Place(f"{s3_bucket}/prepare/data", s3_server.options)
    write(place, cf())
    plan = plan_prepare(cf_settings(place.url), place.options)
    run(client, plan, f"{s3_bucket}/prepare/to.zarr", place.options)
    source = open_source(plan.settings.data, forcing=SPEC.forcing, targets=(), options=place.options)
    require_same(reopened(plan, f"{s3_bucket}/prepare/to.zarr", place.options), source)


def test_hourly_forcing_becomes_daily_through_the_command_line(
    client: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    begin = starts("2004-01-01", 1, 24 * 20)
    ends = hours_since(begin)  # the first hour is one of the day before
    arrays = hourly(ends, AMOUNTS, (1, 4, 6))
    write(Place(str(tmp_path / "hourly"), NO_OPTIONS), arrays)
    assert client.scheduler is not None
    (tmp_path / "settings.toml").write_text(
        f'[data]\nurl = "{tmp_path / "hourly"}"\nlayout = "cf"\nstatic = ["elevation", "clay"]\n'
        "[prepare]\nshard = [4, 3]\nchunk = [2, 3]\nshard_days = 8\nchunk_days = 4\n"
        'stamps = { net_radiation = "end", precipitation = "end" }\n'
        f'[cluster]\nkind = "address"\naddress = "{client.scheduler.address}"\n'
    )
    to = str(tmp_path / "daily.zarr")
    cli.app(["prepare", str(tmp_path / "settings.toml"), "--to", to], standalone_mode=False)
    printed = capsys.readouterr().out
    assert "precipitation: sum of 24 steps a day, stamped by end" in printed
    assert "left out: 1 steps before 2004-01-01, 23 from 2004-01-20 on" in caplog.text
    (tmp_path / "next.toml").write_text(printed[printed.index("[data]") :])
    data = load(tmp_path / "next.toml")[0].data
    source = open_source(data, forcing=SPEC.forcing, targets=(), options=NO_OPTIONS)
    assert str(source.period) == "2004-01-01..2004-01-20"
    forcing = read(source).reshape(19, -1, 3)
    for column, (name, how, scale, offset) in enumerate(
        (
            ("net_radiation", "sum", 1 / 86_400, 0.0),
            ("precipitation", "sum", 1.0, 0.0),
            ("air_temperature", "mean", 1.0, 273.15),
        )
    ):
        moments = begin - np.timedelta64(1, "h") if how == "sum" else begin
        days = expected(arrays[name].values, moments, how).loc["2004-01-01":"2004-01-19"]
        np.testing.assert_allclose(forcing[..., column], days * scale + offset, rtol=1e-6)


def test_only_what_has_no_receipt_is_done_again(client: Client, world_url: str, tmp_path: Path) -> None:
    to = tmp_path / "to.zarr"
    plan = plan_prepare(settings_of(world_url, {"shard": [6, 12], "chunk": [6, 12]}), NO_OPTIONS)
    run(client, plan, str(to))
    shards = [path for name in SPEC.forcing for path in (to / name / "c").rglob("*") if path.is_file()]
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in shards}
    receipts = tmp_path / "to.ledger" / plan.layout.fingerprint
    lost = [str(plan.layout.blocks[i]) for i in (3, 7)]
    for unit in lost:
        (receipts / f"{unit}.json").unlink()
    torn = to / "precipitation" / "c" / "3" / "1" / "1"
    torn.write_bytes(before[torn][1][:-7])
    assert run(client, plan, str(to)) == [*lost, FINISH]
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before}
    assert {path for path in before if before[path][0] != after[path][0]} == {
        path for path in before if path.parts[-3] in ("3", "7")
    }
    assert all(before[path][1] == after[path][1] for path in before)
    require_same(reopened(plan, str(to)), original(plan.settings))


def first_steps(arrays: Arrays, n_steps: int) -> Arrays:
    """The same data set when it was shorter."""
    return {
        name: replace(stored, values=stored.values[:n_steps] if "time" in stored.dims else stored.values)
        for name, stored in arrays.items()
    }


def rewrite(url: str, arrays: Arrays) -> None:
    """All files get new times."""
    shutil.rmtree(url, ignore_errors=True)
    write(Place(url, NO_OPTIONS), arrays)


def data_objects(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Time and bytes of all objects but metadata."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "zarr.json"]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def test_days_are_added_when_the_input_has_grown(
    client: Client, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Hours are stamped at their end, the last one of a day at midnight, where the first input ends."""
    data, to = str(tmp_path / "hourly"), tmp_path / "to.zarr"
    begin = starts("2004-01-01", 1, 24 * 33)
    arrays = hourly(stamped(begin, 1, "end"), AMOUNTS, (36, 4, 6))
    cut = {"shard_days": 8, "chunk_days": 4, "stamps": dict.fromkeys(FORCING, "end")}

    def planned(n_hours: int) -> PreparePlan:
        rewrite(data, first_steps(arrays, n_hours))
        return plan_prepare(cf_settings(data, cut), NO_OPTIONS)

    run(client, first := planned(24 * 16), str(to))
    before, reader = data_objects(to), reopened(first, str(to))
    values = read(reader)
    assert reader.period.n_days == 16
    assert start_prepare(client, planned(24 * 24 - 1), str(to), NO_OPTIONS) is None
    assert "from 2004-01-17 on are left out until a stretch of 8 days (prepare.shard_days)" in caplog.text

    third = planned(24 * 24)
    store, block = PreparedStore(str(to), third.layout, NO_OPTIONS), third.layout.blocks[2]
    store.record(str(block), prepare_days(third, store, block), 0.0)
    assert reopened(first, str(to)).period.n_days == 16, "nothing is shown before all is there"

    assert run(client, planned(24 * 33 - 1), str(to)) == ["2004-01-25..2004-02-02", FINISH]
    after = data_objects(to)
    assert {path: after[path] for path in before} == before
    np.testing.assert_array_equal(read(reader), values)
    fresh = plan_prepare(cf_settings(data, cut, period="2004-01-01..2004-02-02"), NO_OPTIONS)
    prepare_here(fresh, str(tmp_path / "fresh"))
    ours = reopened(fresh, str(to))
    require_same(ours, reopened(fresh, str(tmp_path / "fresh")))
    days = expected(arrays["precipitation"].values, begin, "sum").loc["2004-01-01":"2004-02-01"]
    np.testing.assert_allclose(read(ours).reshape(32, -1, 3)[..., 1], days, rtol=1e-6)
    with xr.open_zarr(to, chunks=None) as opened:
        assert opened.sizes["time"] == 32
        assert str(opened["time"].values[-1])[:10] == "2004-02-01"
        assert str(opened["time_bnds"].values[-1, 1])[:10] == "2004-02-02"


def test_a_stretch_that_was_cut_off_is_made_whole(client: Client, tmp_path: Path) -> None:
    data, to = str(tmp_path / "data"), tmp_path / "to.zarr"
    arrays = cf()
    for name in FORCING:
        arrays[name].values = np.concatenate([arrays[name].values, arrays[name].values[:20] + 1])
    arrays["time"].values = np.arange(100)

    def planned(n_days: int) -> PreparePlan:
        rewrite(data, first_steps(arrays, n_days))
        return plan_prepare(cf_settings(data), NO_OPTIONS)

    run(client, planned(80), str(to))
    before = data_objects(to)
    assert start_prepare(client, planned(89), str(to), NO_OPTIONS) is None, "not whole yet"
    last = planned(95)
    assert run(client, last, str(to)) == ["2004-03-15..2004-04-14", FINISH]
    after = data_objects(to)
    changed = {path.relative_to(to) for path in before if after[path] != before[path]}
    assert changed == {p.relative_to(to) for p in before if p.relative_to(to).parts[1:3] == ("c", "2")}
    period = Period(FIRST, as_date(last.layout.period.first + 90))
    require_same(reopened(last, str(to)), original(cf_settings(data, period=str(period))))


def test_what_was_begun_goes_on_with_a_longer_or_shorter_input(client: Client, tmp_path: Path) -> None:
    data, to = str(tmp_path / "data"), str(tmp_path / "to.zarr")
    write(Place(data, NO_OPTIONS), cf())

    def planned(n_days: int) -> PreparePlan:
        period = Period(FIRST, as_date(Period(FIRST, date(2005, 1, 1)).first + n_days))
        return plan_prepare(cf_settings(data, period=str(period)), NO_OPTIONS)

    begun = planned(60)
    store = PreparedStore(to, begun.layout, NO_OPTIONS)
    store.create(overwrite=False)
    for block in begun.layout.blocks:
        store.record(str(block), prepare_days(begun, store, block), 0.0)
    # the last stretch is written shorter, which its longer receipt must not outlive
    shorter = planned(50)
    assert run(client, shorter, to) == ["2004-02-14..2004-03-05", FINISH]
    require_same(reopened(shorter, to), original(shorter.settings))
    assert run(client, planned(60), to) == ["2004-02-14..2004-03-15", FINISH]
    require_same(reopened(begun, to), original(begun.settings))
    with pytest.raises(DataError, match=r"ends before the store(.|\n)*at least 60 days(.|\n)*50"):
        start_prepare(client, shorter, to, NO_OPTIONS)


def test_other_fixed_values_are_refused_and_forcing_from_elsewhere_is_told(
    client: Client, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, other, to = str(tmp_path / "data"), str(tmp_path / "other"), str(tmp_path / "to.zarr")
    rewrite(data, first_steps(cf(), 60))
    run(client, plan_prepare(cf_settings(data), NO_OPTIONS), to)
    assert "same product" not in caplog.text
    arrays = cf()
    rewrite(other, first_steps(arrays, 70))
    assert start_prepare(client, plan_prepare(cf_settings(other), NO_OPTIONS), to, NO_OPTIONS) is None
    assert f"forcing from {data} and goes on with that from {other}" in caplog.text
    arrays["clay"].values[LAND] += 1
    rewrite(data, arrays)
    with pytest.raises(StoreError, match=r"another prepared store(.|\n)*differs in fixed\n"):
        start_prepare(client, plan_prepare(cf_settings(data), NO_OPTIONS), to, NO_OPTIONS)


def test_each_map_of_the_input_is_read_once(tmp_path: Path) -> None:
    arrays, _ = published()
    for group in ("rn", "prec", "tair"):
        arrays[f"{group}/data"].chunks = (1, 4, 6)
    with counting_place() as counting:
        write(counting, arrays)
        settings = settings_of(counting.url)
        plan = plan_prepare(settings, counting.options)
        forget_reads()
        prepare_here(plan, str(tmp_path / "to"))
        for group in ("rn", "prec", "tair"):
            reads = chunk_reads(group)
            assert set(reads.values()) == {1}
            assert len(reads) == 80
        require_same(reopened(plan, str(tmp_path / "to")), original(settings))


@pytest.mark.parametrize("kind", PLACES)
def test_stores_of_every_kind_are_resumed_and_replaced(
    kind: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = new_place(kind, request, tmp_path_factory)
    source = Place(str(tmp_path_factory.mktemp("data") / "data"), NO_OPTIONS)
    write(source, cf())
    plan = plan_prepare(cf_settings(source.url), NO_OPTIONS)
    store = PreparedStore(place.url, plan.layout, place.options)
    store.create(overwrite=False)
    store.record(str(plan.layout.blocks[0]), prepare_days(plan, store, plan.layout.blocks[0]), 0.0)
    with pytest.raises(DataError, match="elevation is missing"):
        reopened(plan, place.url, place.options)
    store.create(overwrite=False)
    assert store.done() == {str(plan.layout.blocks[0])}
    other = plan_prepare(cf_settings(source.url, {"shard_days": 20, "overwrite": True}), NO_OPTIONS)
    with pytest.raises(StoreError, match=r"another prepared store(.|\n)*differs in shard\n(.|\n)*overwrite"):
        PreparedStore(place.url, other.layout, place.options).create(overwrite=False)
    prepare_here(other, place.url, place.options)
    require_same(reopened(other, place.url, place.options), original(other.settings))
    assert {name.split("/")[0] for name in list_objects(ledger_url(place.url), place.options)} == {
        other.layout.fingerprint
    }


def test_a_replacement_that_was_interrupted_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(Place(str(tmp_path / "data"), NO_OPTIONS), cf())
    first = plan_prepare(cf_settings(str(tmp_path / "data")), NO_OPTIONS)
    other = plan_prepare(cf_settings(str(tmp_path / "data"), {"shard_days": 20}), NO_OPTIONS)
    store, to = prepare_here(first, str(tmp_path / "to")), str(tmp_path / "to")

    def fail(url: str, options: StorageOptions) -> None:
        if url.endswith("lon"):
            raise StoreError("gone")
        delete_tree(url, options)

    with monkeypatch.context() as patched:
        patched.setattr(prepared_module, "delete_tree", fail)
        with pytest.raises(StoreError, match="gone"):
            PreparedStore(to, other.layout, NO_OPTIONS).create(overwrite=True)
    assert store.done() == frozenset(), "what was there does not count any more"
    prepare_here(first, to)
    require_same(reopened(first, to), original(first.settings))


def test_nothing_that_is_not_ours_is_touched(tmp_path: Path) -> None:
    write(Place(str(tmp_path / "data"), NO_OPTIONS), cf())
    plan = plan_prepare(cf_settings(str(tmp_path / "data")), NO_OPTIONS)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious.txt").write_text("do not touch")
    for there in ("folder", "data"):
        before = sorted(tmp_path.rglob("*"))
        for overwrite in (False, True):
            with pytest.raises(StoreError, match="not a prepared store; nothing was touched"):
                PreparedStore(str(tmp_path / there), plan.layout, NO_OPTIONS).create(overwrite=overwrite)
        assert sorted(tmp_path.rglob("*")) == before


def test_the_input_is_not_replaced(client: Client, tmp_path: Path) -> None:
    to = str(tmp_path / "to")
    write(Place(str(tmp_path / "data"), NO_OPTIONS), cf())
    first = plan_prepare(cf_settings(str(tmp_path / "data")), NO_OPTIONS)
    prepare_here(first, to)
    data = first.layout.data(to).model_dump(mode="json", exclude={"url"})
    again = plan_prepare(settings_of(to, {"shard_days": 20, "overwrite": True}, **data), NO_OPTIONS)
    with pytest.raises(ConfigError, match="is the input itself"):
        start_prepare(client, again, to + "/", NO_OPTIONS)
    prepare_here(again, str(tmp_path / "again"))
    require_same(reopened(again, str(tmp_path / "again")), original(first.settings))


def test_receipts_alone_do_not_count(tmp_path: Path) -> None:
    write(Place(str(tmp_path / "data"), NO_OPTIONS), cf())
    plan = plan_prepare(cf_settings(str(tmp_path / "data")), NO_OPTIONS)
    store = prepare_here(plan, str(tmp_path / "to"))
    shutil.rmtree(tmp_path / "to")
    with pytest.raises(StoreError, match=r"no prepared store is beside(.|\n)*receipts alone(.|\n)*overwrite"):
        store.create(overwrite=False)
    store.create(overwrite=True)
    assert not store.done()


def test_cells_and_features_stay_what_they_are(tmp_path: Path) -> None:
    arrays = basins(Stored(np.arange(1.0, 8.0), ("cell",), {"units": "km2"}))
    arrays["attributes"].attrs["names"] = ["slope", "clay"]
    del arrays["attribute"]
    rng = np.random.default_rng(0)
    for name, units in (("net_radiation", "W m-2"), ("air_temperature", "degC")):
        arrays[name] = Stored(rng.random((7, 80)), ("cell", "time"), {"units": units})
    write(Place(str(tmp_path / "data"), NO_OPTIONS), arrays)
    data: dict[str, Any] = {"layout": "cf", "static": ["attributes"]}
    settings = settings_of(str(tmp_path / "data"), {"shard": [4], "chunk": [2]}, **data)
    plan = plan_prepare(settings, NO_OPTIONS)
    prepare_here(plan, str(tmp_path / "to"))
    ours = reopened(plan, str(tmp_path / "to"))
    require_same(ours, original(settings))
    assert ours.static == ("slope", "clay")
    with pytest.raises(ConfigError, match=r"prepare.shard(.|\n)*a number for each of the axes cell"):
        plan_prepare(settings_of(str(tmp_path / "data"), **data), NO_OPTIONS)


def test_a_static_array_must_not_be_called_like_another_one(tmp_path: Path) -> None:
    write(Place(str(tmp_path / "data"), NO_OPTIONS), {**cf(), "mask": Stored(field_of(4), ("lat", "lon"))})
    settings = settings_of(str(tmp_path / "data"), layout="cf", static=["elevation", "mask"])
    with pytest.raises(ConfigError, match="cannot have mask twice"):
        plan_prepare(settings, NO_OPTIONS)


def test_stored_as_promised(tmp_path: Path) -> None:
    write(Place(str(tmp_path / "data"), NO_OPTIONS), cf())
    prepare_here(plan_prepare(cf_settings(str(tmp_path / "data")), NO_OPTIONS), str(tmp_path / "to"))
    group = zarr.open_group(str(tmp_path / "to"), mode="r")
    assert group.metadata.consolidated_metadata is not None
    with xr.open_zarr(tmp_path / "to") as opened:
        assert opened["time"].values[0] == np.datetime64(FIRST)
        assert opened["precipitation"].dims == ("time", "lat", "lon")
    for name in FORCING:
        array = group[name]
        assert isinstance(array, zarr.Array)
        assert (array.shards, array.chunks, str(array.dtype)) == ((30, 2, 3), (10, 2, 3), "float32")
        assert [type(codec).__name__ for codec in array.compressors] == ["ZstdCodec", "Crc32cCodec"]
        assert {"units", "standard_name", "long_name", "cell_methods"} <= set(array.attrs)


@pytest.mark.parametrize("at_once", [2**20, 2**10], ids=["reading", "writing"])
def test_memory_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(daily_module, "READ_VALUES", at_once)
    lat, lon = np.linspace(80, -80, 60), np.linspace(0, 300, 80)
    rng = np.random.default_rng(0)
    arrays = {"lat": Stored(lat, ("lat",)), "lon": Stored(lon, ("lon",))}
    arrays |= {"time": hours_since(starts("2004-01-01", 24, 600))}
    arrays["elevation"] = Stored(rng.random((60, 80)), ("lat", "lon"))
    for name, units in zip(FORCING, ("W m-2", "mm h-1", "degC"), strict=True):
        values = rng.random((600, 60, 80))
        arrays[name] = Stored(values, ("time", "lat", "lon"), {"units": units}, (20, 60, 80))
    write(Place(str(tmp_path / "data"), NO_OPTIONS), arrays)
    cut = {"shard": [20, 20], "chunk": [10, 10], "shard_days": 600, "chunk_days": 300}
    settings = settings_of(str(tmp_path / "data"), cut, layout="cf", static=["elevation"])
    plan = plan_prepare(settings, NO_OPTIONS)
    store = PreparedStore(str(tmp_path / "to"), plan.layout, NO_OPTIONS)
    store.create(overwrite=False)
    tracemalloc.start()
    prepare_days(plan, store, plan.layout.blocks[0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.6 * plan.unit_bytes() < peak < plan.unit_bytes()


def test_days_that_do_not_fit_into_a_worker_are_refused(
    client: Client, world_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_prepare(settings_of(world_url), NO_OPTIONS)
    monkeypatch.setattr(PreparePlan, "unit_bytes", lambda _: 2**50)
    with pytest.raises(JobError, match=r"do not fit into a worker(.|\n)*30 days(.|\n)*prepare.shard_days"):
        start_prepare(client, plan, str(tmp_path / "to"), NO_OPTIONS)
    assert not any(tmp_path.iterdir())


def test_a_store_that_cannot_fit_on_the_disk_is_refused_before_anything_is_written(
    client: Client,
    world_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plan, to = plan_prepare(settings_of(world_url), NO_OPTIONS), str(tmp_path / "new" / "to.zarr")
    days, *shape = plan.layout.period.n_days, *plan.layout.grid.shape
    needed = plan.missing_bytes(())
    assert needed == 4 * len(FORCING) * days * shape[0] * shape[1]

    def leave(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))

    leave(needed // 11)
    with pytest.raises(StoreError, match=r"prepared store does not fit on the disk(.|\n)*data.period"):
        start_prepare(client, plan, to, NO_OPTIONS)
    assert not any(tmp_path.iterdir())
    leave(needed // 5)
    run(client, plan, to)
    assert "what is missing of the prepared store takes" in caplog.text
    leave(0)
    assert start_prepare(client, plan, to, NO_OPTIONS) is None, "nothing is missing"


def test_input_chunks_that_are_cut_are_told(
    client: Client, world_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for days in (365, 30):
        prepare_module._warn_of_split_chunks(
            plan_prepare(settings_of(world_url, {"shard_days": days, "chunk_days": 5}), NO_OPTIONS)
        )
    assert len(caplog.messages) == 3
    assert "365 days each, are cut by stretches of 30 days and read 13.0 times" in caplog.text


def test_other_data_on_a_worker_are_refused(world_url: str, tmp_path: Path) -> None:
    plan = plan_prepare(settings_of(world_url), NO_OPTIONS)
    content = {
        "run": "0" * 8,
        "to": str(tmp_path),
        "forcing": plan.layout.forcing,
        "fingerprint": "0" * 16,
        "period": str(plan.layout.period),
        "settings": plan.settings.model_dump(mode="json"),
        "storage_options": {},
    }
    with pytest.raises(JobError, match="a worker sees other data"):
        prepare_module._context(Message(content))
