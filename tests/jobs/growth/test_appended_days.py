"""Days that are appended, however and whenever, make the cube that all days at once make."""

import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from distributed import Client

from h2mv_dist.config import DataSettings, Settings, revise
from h2mv_dist.errors import ConfigError, DataError, JobError, NothingNewError, StoreError
from h2mv_dist.grid import Period
from h2mv_dist.io.cube import INPUT_VALUES
from h2mv_dist.io.cube_check import verify_cube
from h2mv_dist.io.cube_store import create_cube, publish, read_cube
from h2mv_dist.io.ledger import Ledger
from h2mv_dist.io.snapshots import snapshots_url
from h2mv_dist.io.source import Source, open_source
from h2mv_dist.jobs.cube_plan import plan_inference
from h2mv_dist.jobs.inference import forget_damage, submit_inference
from h2mv_dist.jobs.tiles import compute_tile, finish_cube, open_context, stretches
from h2mv_dist.jobs.training import plan_training
from h2mv_dist.model.days import BLOCK_DAYS
from h2mv_dist.model.h2mv import SPEC
from tests.io.builders import whole
from tests.jobs.conftest import NO_OPTIONS, small_settings
from tests.jobs.growth.conftest import DAILY, FIRST, appended, infer, objects, until


@pytest.mark.slow
def test_days_at_once_equal_days_one_by_one(
    client: Client, world_url: str, cache: Path, job: str, cube: Path, ten_days: Path, tmp_path: Path
) -> None:
    before = objects(cube, metadata=False)
    infer(client, until(14, world_url, cache), job, cube, append=True)
    kept = objects(cube, metadata=False)
    assert {name: kept[name] for name in before} == before, "no append writes an object again"
    one_by_one = tmp_path / "single" / "cube.zarr"
    shutil.copytree(ten_days, one_by_one.parent)
    for day in (12, 13, 14):
        infer(client, until(day, world_url, cache), job, one_by_one, append=True)
        with xr.open_zarr(one_by_one, chunks=None) as opened:
            assert opened.attrs["time_coverage_end"] == f"2001-01-{day - 1}"
            assert opened.sizes["time"] == day - 1
    assert objects(one_by_one) == objects(cube)
    frozen = {"spinup_days": 5, "baseline": f"{FIRST}..2001-01-11"}
    infer(client, until(14, world_url, cache, **frozen), job, tmp_path / "whole.zarr")
    assert objects(tmp_path / "whole.zarr", metadata=False) == objects(cube, metadata=False)
    found = verify_cube(str(one_by_one), NO_OPTIONS)
    assert found.complete
    assert len(found.sound) == 2 * 4


@pytest.mark.slow
def test_compiled_days_at_once_equal_compiled_days_one_by_one(
    client: Client, world_url: str, cache: Path, job: str, tmp_path: Path
) -> None:
    """Days of a shard run as whole blocks and single days, whatever is computed with them."""
    days = BLOCK_DAYS + 1
    # all outputs, as other tests have them compiled
    compiled = {"code_path": "compiled", "shard_days": days, "chunk_days": days, "outputs": None}
    one, other = tmp_path / "one.zarr", tmp_path / "other.zarr"
    for cube in (one, other):
        infer(client, until(1 + days, world_url, cache, **compiled), job, cube)
    # a cube goes on as it began
    undecided = {**compiled, "code_path": "auto"}
    infer(client, until(1 + 3 * days, world_url, cache, **undecided), job, one, append=True)
    for shards in (2, 3):
        infer(client, until(1 + shards * days, world_url, cache, **undecided), job, other, append=True)
    assert objects(one, metadata=False) == objects(other, metadata=False)
    with xr.open_zarr(one, chunks=None) as opened:
        assert opened.attrs["code_path"] == "compiled"


def test_nothing_new_is_said_and_nothing_touched(
    client: Client, world_url: str, cache: Path, job: str, cube: Path
) -> None:
    before = objects(cube.parent)
    with pytest.raises(NothingNewError, match=r"complete until 2001-01-11(.|\n)*forcing ends 2001-01-11"):
        infer(client, until(11, world_url, cache), job, cube, append=True)
    weekly = until(12, world_url, cache, shard_days=2)
    with pytest.raises(StoreError, match=r"layout\.shard_days"):
        infer(client, weekly, job, cube, append=False)
    with pytest.raises(ConfigError, match=r"the cube's days(.|\n)*longer forcing"):
        infer(client, until(8, world_url, cache), job, cube)
    with pytest.raises(ConfigError, match="--append"):
        infer(client, until(14, world_url, cache, period=f"{FIRST}..2001-01-13"), job, cube)
    with pytest.raises(StoreError, match=r"layout\.start"):
        infer(client, until(14, world_url, cache, period="2001-01-02..2001-01-10"), job, cube)
    handle = submit_inference(client, until(14, world_url, cache), job, str(cube), NO_OPTIONS)
    assert handle is None, "without --append a finished cube is finished, whatever the forcing"
    assert objects(cube.parent) == before


@pytest.fixture
def growing_world(world_url: str, tmp_path: Path) -> Path:
    """The same world, to be made shorter."""
    return Path(shutil.copytree(world_url, tmp_path / "growing.zarr"))


def show_days(world: Path, **days: int) -> None:
    """Show so many days of each variable; chunks hold all days of the year."""
    file = world / ".zmetadata"
    document = json.loads(file.read_text())
    for name, n_days in days.items():
        for array in ("data", "time"):
            document["metadata"][f"{name}/{array}/.zarray"]["shape"][0] = n_days
    file.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ("2001-01-01..2001-01-11", r"the settings leave out the days(.|\n)*goes on until 2001-01-14"),
        ("2001-01-12..2001-01-14", r"leave a gap, or overlap(.|\n)*a start on 2001-01-01"),
        ("2001-01-05..2001-01-14", r"leave a gap, or overlap(.|\n)*a start on 2001-01-01"),
    ],
)
def test_a_period_that_appends_nothing_or_leaves_a_gap_is_refused(
    world_url: str, cache: Path, job: str, cube: Path, chosen: str, said: str
) -> None:
    """Not as days that are yet to come: a timer would wait for them for ever."""
    settings = until(14, world_url, cache, period=chosen)
    with pytest.raises(ConfigError, match=said):
        plan_inference(settings, job, NO_OPTIONS, cube=str(cube), append=True)


def test_a_cube_that_is_not_finished_is_finished_before_it_is_extended(
    world_url: str, cache: Path, job: str, tmp_path: Path
) -> None:
    place = str(tmp_path / "begun.zarr")
    begun = plan_inference(until(11, world_url, cache), job, NO_OPTIONS, cube=place)
    create_cube(place, begun.layout, NO_OPTIONS, overwrite=False)
    longer = until(14, world_url, cache, period=f"{FIRST}..2001-01-13")
    with pytest.raises(ConfigError, match=r"ends 2001-01-11; leave inference\.period out(.|\n)*--append"):
        plan_inference(longer, job, NO_OPTIONS, cube=place)
    as_told = until(14, world_url, cache)
    assert plan_inference(as_told, job, NO_OPTIONS, cube=place).layout.period == begun.layout.period


def test_a_period_that_goes_on_is_appended(world_url: str, cache: Path, job: str, cube: Path) -> None:
    settings = until(14, world_url, cache, period=f"{FIRST}..2001-01-13")
    planned = plan_inference(settings, job, NO_OPTIONS, cube=str(cube), append=True)
    assert planned.layout.period == Period(FIRST, date(2001, 1, 13))


def test_appending_never_replaces_a_cube(
    client: Client, world_url: str, cache: Path, job: str, cube: Path
) -> None:
    before = objects(cube.parent)
    other = until(14, world_url, cache, members="all", overwrite=True)
    with pytest.raises(StoreError, match="nothing was touched"):
        infer(client, other, job, cube, append=True)
    assert objects(cube.parent) == before


def test_a_late_variable_is_waited_for(
    client: Client,
    growing_world: Path,
    cache: Path,
    job: str,
    cube: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    show_days(growing_world, rn=13, prec=13, tair=10)
    chosen = small_settings(str(growing_world), cache, inference=DAILY)
    before, values = objects(cube.parent), objects(cube, metadata=False)
    late = r"forcing ends 2001-01-11 \(air_temperature ends 2001-01-11, others 2001-01-14\)"
    with pytest.raises(NothingNewError, match=rf"complete until 2001-01-11(.|\n)*{late}"):
        infer(client, chosen, job, cube, append=True)
    assert submit_inference(client, chosen, job, str(cube), NO_OPTIONS) is None
    assert objects(cube.parent) == before
    next(p for p in (cube / "runoff" / "c" / "3").rglob("*") if p.is_file()).unlink()
    forget_damage(str(cube), verify_cube(str(cube), NO_OPTIONS), NO_OPTIONS)
    infer(client, chosen, job, cube)
    assert objects(cube, metadata=False) == values
    show_days(growing_world, tair=12)
    caplog.clear()
    infer(client, chosen, job, cube, append=True)
    assert read_cube(str(cube), NO_OPTIONS).progress.period.stop == date(2001, 1, 13)
    told = [message for message in caplog.messages if "every forcing variable has" in message]
    assert told == [
        "days that every forcing variable has are used, 2001-01-01..2001-01-13: "
        "air_temperature ends 2001-01-13, others 2001-01-14"
    ]


def in_this_process(settings: Settings, job: str, cube: Path, *, append: bool = True) -> None:
    planned = plan_inference(settings, job, NO_OPTIONS, cube=str(cube), append=append)
    create_cube(str(cube), planned.layout, NO_OPTIONS, overwrite=False)
    context = open_context(planned, str(cube), NO_OPTIONS)
    for tile in planned.layout.tiles:
        compute_tile(context, tile)
    finish_cube(context)


@pytest.fixture
def weather(world_url: str) -> xr.Dataset:
    """The world's first days and features as a CF data set."""
    source = open_source(DataSettings(url=world_url), forcing=SPEC.forcing, targets=(), options=NO_OPTIONS)
    days = Period(FIRST, FIRST.replace(day=15))
    forcing, space = source.read_forcing(whole(source), days), ("lat", "lon")
    units = {"net_radiation": "W m-2", "precipitation": "mm d-1", "air_temperature": "K"}
    drivers = {
        name: (("time", *space), forcing[..., column], {"units": units[name]})
        for column, name in enumerate(SPEC.forcing)
    }
    features = ((*space, "feature"), source.read_static(whole(source)), {"names": list(source.static)})
    axes = {"time": days.days().astype("datetime64[D]").astype("datetime64[ns]")}
    axes |= {"lat": source.grid.lat, "lon": source.grid.lon}
    mask = (space, source.grid.mask.astype(np.int8))
    return xr.Dataset({**drivers, "features": features, "mask": mask}, axes)


def add_days(weather: xr.Dataset, url: Path, first: int, stop: int) -> None:
    """Write some days the way xarray's users do; coordinates are written again."""
    part = weather.isel(time=slice(first - 1, stop - 1))
    growing = part.drop_vars(["features", "mask"])
    with warnings.catch_warnings():
        # not in the specification yet
        warnings.filterwarnings("ignore", "Consolidated metadata is currently not")
        if first == 1:
            part.to_zarr(url, encoding={"time": {"units": f"days since {FIRST}"}})
        else:
            growing.to_zarr(url, append_dim="time")


def weather_settings(url: Path, cache: Path) -> Settings:
    data = {"url": str(url), "layout": "cf", "static": ["features"], "mask": {"name": "mask"}}
    return small_settings("", cache, data=data, inference=DAILY)


def test_a_cube_goes_on_though_its_data_were_written_again_or_copied(
    weather: xr.Dataset, cache: Path, job: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url, copy, cube = tmp_path / "weather.zarr", tmp_path / "copy.zarr", tmp_path / "cube.zarr"
    settings = weather_settings(url, cache)
    add_days(weather, url, 1, 8)
    in_this_process(settings, job, cube, append=False)
    add_days(weather, url, 8, 10)
    in_this_process(settings, job, cube)
    assert not [message for message in caplog.messages if "same product" in message]
    shutil.copytree(url, copy, copy_function=shutil.copyfile)
    add_days(weather, copy, 10, 11)
    in_this_process(weather_settings(copy, cache), job, cube)
    assert read_cube(str(cube), NO_OPTIONS).layout.period.n_days == 10
    (told,) = [message for message in caplog.messages if "same product" in message]
    assert f"from {url} so far, and is read from {copy} now" in told
    add_days(weather, copy, 11, 12)
    zarr.open_array(str(copy), path="features", mode="r+")[:, :, 0] = 0.5
    with pytest.raises(StoreError, match="input_fingerprint"):
        in_this_process(weather_settings(copy, cache), job, cube)
    assert verify_cube(str(cube), NO_OPTIONS).complete


def test_a_cube_that_knows_its_data_by_files_learns_their_values(
    weather: xr.Dataset, cache: Path, job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, copy, cube = tmp_path / "weather.zarr", tmp_path / "copy.zarr", tmp_path / "cube.zarr"
    settings, copied = weather_settings(url, cache), weather_settings(copy, cache)
    add_days(weather, url, 1, 15)
    early = revise(settings, [f"inference.period={FIRST}..2001-01-08"])
    with monkeypatch.context() as patched:
        patched.setattr(Source, "identity", property(Source.identity_by_objects))
        in_this_process(early, job, cube, append=False)
    layout, progress = read_cube(str(cube), NO_OPTIONS)
    known = {name: text for name, text in layout.attributes.items() if name != INPUT_VALUES}
    publish(str(cube), replace(layout, attributes=known), progress, NO_OPTIONS)
    shutil.copytree(url, copy, copy_function=shutil.copyfile)
    with pytest.raises(StoreError, match="input_fingerprint"):
        in_this_process(copied, job, cube)
    in_this_process(revise(settings, [f"inference.period={FIRST}..2001-01-09"]), job, cube)
    in_this_process(copied, job, cube)
    after = read_cube(str(cube), NO_OPTIONS).layout
    assert after.period.n_days == 14
    assert after.attributes["input_fingerprint"] == known["input_fingerprint"]
    zarr.open_array(str(copy), path="features", mode="r+")[:, :, 0] = 0.5
    with pytest.raises(StoreError, match="input_fingerprint"):
        in_this_process(copied, job, cube, append=False)


def test_folds_do_not_take_the_days_that_late_forcing_leaves(
    growing_world: Path, cache: Path, tmp_path: Path
) -> None:
    show_days(growing_world, prec=360)
    settings = small_settings(str(growing_world), cache)
    with pytest.raises(DataError, match=r"precipitation ends 2001-12-27(.|\n)*set data.period"):
        plan_training(settings, str(tmp_path / "job"), NO_OPTIONS)


@pytest.mark.slow
def test_whole_shards_only(client: Client, world_url: str, cache: Path, job: str, tmp_path: Path) -> None:
    weekly = {"shard_days": 4, "chunk_days": 2}
    infer(client, until(9, world_url, cache, **weekly), job, tmp_path / "cube.zarr")
    with pytest.raises(NothingNewError, match="4 at a time"):
        infer(client, until(12, world_url, cache, **weekly), job, tmp_path / "cube.zarr", append=True)
    infer(client, until(15, world_url, cache, **weekly), job, tmp_path / "cube.zarr", append=True)
    assert read_cube(str(tmp_path / "cube.zarr"), NO_OPTIONS).layout.period.n_days == 12
    infer(client, until(11, world_url, cache, **weekly), job, tmp_path / "ragged.zarr")
    with pytest.raises(JobError, match=r"ends within a shard(.|\n)*--from DATE"):
        infer(client, until(15, world_url, cache, **weekly), job, tmp_path / "ragged.zarr", append=True)
    longer = until(15, world_url, cache, **weekly)
    infer(client, longer, job, tmp_path / "ragged.zarr", since=date(2001, 1, 11))
    assert verify_cube(str(tmp_path / "ragged.zarr"), NO_OPTIONS).complete
    ours, theirs = (objects(tmp_path / name, metadata=False) for name in ("ragged.zarr", "cube.zarr"))
    daily = [name for name in ours if name.startswith(("runoff/", "evapotranspiration/"))]
    assert daily
    assert [ours[name] for name in daily] == [theirs[name] for name in daily]


def test_an_interrupted_append_is_not_seen_and_goes_on(
    world_url: str, cache: Path, job: str, cube: Path, tmp_path: Path
) -> None:
    """In this process: one of two tiles is done when it ends."""
    settings = until(13, world_url, cache)
    planned = plan_inference(settings, job, NO_OPTIONS, cube=str(cube), append=True)
    context = open_context(planned, str(cube), NO_OPTIONS)
    first, second = planned.layout.tiles
    compute_tile(context, first)
    with pytest.raises(JobError, match="have no receipt"):
        finish_cube(context)
    found = verify_cube(str(cube), NO_OPTIONS, budget=SPEC.budget)
    assert found.complete, "at its old length"
    assert (len(found.sound), found.unseen) == (2, 1)
    with xr.open_zarr(cube, chunks=None) as opened:
        assert opened.sizes["time"] == 10
        assert np.isfinite(opened["runoff"].values[:, opened["land_mask"].values == 1]).all()
    compute_tile(context, second)
    finish_cube(context)
    assert verify_cube(str(cube), NO_OPTIONS).complete
    with xr.open_zarr(cube, chunks=None) as opened:
        assert opened.sizes["time"] == 12


def test_a_receipt_of_days_that_are_seen_and_of_others_is_checked_as_far_as_they_are(
    world_url: str, cache: Path, job: str, cube: Path
) -> None:
    """As a repair that was interrupted leaves them, if the next command appends."""
    ledger = Ledger(str(cube), NO_OPTIONS)
    (tile, receipts), _ = sorted(ledger.covered().items())
    ledger.forget(receipts)
    appended(13, world_url, cache, job, cube)
    found = verify_cube(str(cube), NO_OPTIONS, budget=SPEC.budget)
    assert found.complete
    assert (len(found.sound), found.unseen) == (2, 1)
    next(p for p in (cube / "runoff" / "c" / "3" / "0").rglob("*") if p.is_file()).unlink()
    assert [one.tile for one in verify_cube(str(cube), NO_OPTIONS).damaged] == [tile]


def test_a_lost_snapshot_costs_time_and_nothing_else(
    world_url: str, cache: Path, job: str, cube: Path, tmp_path: Path
) -> None:
    results = []
    for lost in (False, True):
        copy = tmp_path / f"{lost}" / "cube.zarr"
        shutil.copytree(cube.parent, copy.parent)
        if lost:
            shutil.rmtree(snapshots_url(str(copy)))
        settings = until(12, world_url, cache, baseline=f"{FIRST}..2001-01-11")
        planned = plan_inference(settings, job, NO_OPTIONS, cube=str(copy), append=True)
        context = open_context(planned, str(copy), NO_OPTIONS)
        for tile in planned.layout.tiles:
            compute_tile(context, tile)
        finish_cube(context)
        results.append(objects(copy))
    assert results[0] == results[1]


def test_a_damaged_snapshot_or_one_of_another_model_is_refused(
    world_url: str, cache: Path, job: str, cube: Path
) -> None:
    planned = plan_inference(until(12, world_url, cache), job, NO_OPTIONS, cube=str(cube), append=True)
    context = open_context(planned, str(cube), NO_OPTIONS)
    (tile, _) = planned.layout.tiles
    other = replace(context, snapshots=replace(context.snapshots, fingerprint="another"))
    with pytest.raises(StoreError, match="belongs to another model"):
        compute_tile(other, tile)
    (state,) = (Path(snapshots_url(str(cube))) / tile.name).iterdir()
    data = bytearray(state.read_bytes())
    data[-5] ^= 1
    state.write_bytes(bytes(data))
    with pytest.raises(StoreError, match=r"damaged(.|\n)*delete this object"):
        compute_tile(context, tile)


@pytest.mark.slow
def test_monthly_means_are_those_of_whole_months(
    client: Client, world_url: str, cache: Path, job: str, tmp_path: Path
) -> None:
    def ending(stop: str) -> Settings:
        data = {"url": world_url, "period": f"2001-01-20..2001-{stop}"}
        chosen = {**DAILY, "monthly": True, "baseline": "2001-01-20..2001-02-10"}
        return small_settings(world_url, cache, data=data, inference=chosen)

    cubes = {name: tmp_path / name / "cube.zarr" for name in ("at once", "one by one")}
    for name, ends in (("at once", ["02-26", "04-02"]), ("one by one", ["02-26", "03-01", "03-02", "04-02"])):
        for k, stop in enumerate(ends):
            infer(client, ending(stop), job, cubes[name], append=k > 0)
        assert verify_cube(str(cubes[name]), NO_OPTIONS).complete
    assert objects(cubes["at once"]) == objects(cubes["one by one"])
    with xr.open_zarr(cubes["at once"], chunks=None) as opened:
        cube = opened.load()
    assert [str(month)[:10] for month in cube["month"].values] == ["2001-02-01", "2001-03-01"]
    whole = cube["runoff"].sel(time=slice("2001-02-01", "2001-03-31"))
    expected = whole.resample(time="MS").mean(skipna=False).values
    np.testing.assert_allclose(cube["runoff_monthly"].values, expected, rtol=1e-5, atol=1e-7)
    assert cube["runoff_monthly"].attrs["cell_methods"] == "month: mean realization: mean"
    assert "runoff_spread_monthly" in cube
    next(p for p in (cubes["at once"] / "runoff_monthly" / "c" / "1").rglob("*") if p.is_file()).unlink()
    (problem,) = verify_cube(str(cubes["at once"]), NO_OPTIONS).damaged.values()
    assert problem == "means of 2001-03-01..2001-04-01 are not those that were written"


@pytest.mark.parametrize(
    ("gap", "every", "expected"),
    [
        ((0, 10), None, [(0, 10)]),
        ((0, 11), None, [(0, 10), (10, 11)]),
        ((0, 11), 4, [(0, 4), (4, 8), (8, 10), (10, 11)]),
        ((6, 8), 4, [(6, 8)]),
        ((6, 10), 4, [(6, 8), (8, 10)]),
        ((10, 11), 4, [(10, 11)]),
    ],
)
def test_stretches_end_where_states_are_kept(
    world_url: str,
    cache: Path,
    job: str,
    gap: tuple[int, int],
    every: int | None,
    expected: list[tuple[int, int]],
) -> None:
    shards: Mapping[str, Any] = {"shard_days": 2, "chunk_days": 2, "state_days": every}
    planned = plan_inference(until(20, world_url, cache, **shards), job, NO_OPTIONS)

    def days(first: int, stop: int) -> Period:
        return Period(FIRST.replace(day=first + 1), FIRST.replace(day=stop + 1))

    assert list(stretches(planned, days(*gap))) == [days(*part) for part in expected]
