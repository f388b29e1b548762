"""Cubes that grow: appended days, days computed anew, damage repaired; on real worker processes."""

import hashlib
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

from h2mv_dist import cli
from h2mv_dist.config import DataSettings, Settings, revise
from h2mv_dist.errors import ConfigError, DataError, JobError, NothingNewError, StoreError
from h2mv_dist.grid import Period, Tile
from h2mv_dist.io.cube import INPUT_VALUES, Progress
from h2mv_dist.io.cube_check import verify_cube
from h2mv_dist.io.cube_store import create_cube, publish, publish_further, read_cube
from h2mv_dist.io.ledger import Ledger, ledger_url
from h2mv_dist.io.sink import Sink, StoredValues
from h2mv_dist.io.snapshots import Snapshots, snapshots_url
from h2mv_dist.io.source import Source, open_source
from h2mv_dist.jobs import cube_plan, inference
from h2mv_dist.jobs.cube_plan import plan_inference
from h2mv_dist.jobs.handle import submit
from h2mv_dist.jobs.inference import forget_damage, recorded_job, submit_inference
from h2mv_dist.jobs.messages import Job, Unit, job_id
from h2mv_dist.jobs.run_record import RunRecord, run_url
from h2mv_dist.jobs.tiles import TileContext, compute_tile, finish_cube, open_context, stretches
from h2mv_dist.jobs.training import plan_training
from h2mv_dist.model.h2mv import SPEC
from tests.io.builders import whole
from tests.jobs.conftest import NO_OPTIONS, small_settings

FIRST = date(2001, 1, 1)
DAILY = {
    "tile": [9, 36],
    "shard": [9, 36],
    "chunk": [9, 18],
    "shard_days": 1,
    "chunk_days": 1,
    "spinup_days": 5,
    "outputs": [
        "runoff",
        "evapotranspiration",
        "actual_precipitation",
        "terrestrial_water_storage",
        "terrestrial_water_storage_anomaly",
        "soil_moisture_capacity",
        "baseflow_recession",
    ],
}
"""Two tiles, one-day shards."""


def until(day: int, url: str, cache: Path, **inference: Any) -> Settings:
    """Settings as if the forcing ended before this day of January."""
    chosen = {**DAILY, **inference}
    data = {"url": url, "period": f"{FIRST}..{FIRST.replace(day=day)}"}
    return small_settings(url, cache, data=data, inference=chosen)


def infer(
    client: Client,
    settings: Settings,
    job: str,
    cube: Path,
    *,
    append: bool = False,
    since: date | None = None,
) -> None:
    handle = submit_inference(client, settings, job, str(cube), NO_OPTIONS, append=append, since=since)
    assert handle is not None
    handle.wait()


def roll_back(settings: Settings, job: str, cube: Path, day: date) -> Progress:
    """What a run that computes anew does first; it ends right after."""
    planned = plan_inference(settings, job, NO_OPTIONS, cube=str(cube), since=day)
    inference.roll_back(planned, str(cube), NO_OPTIONS)
    return read_cube(str(cube), NO_OPTIONS).progress


def objects(folder: Path, *, metadata: bool = True) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and (metadata or p.name != "zarr.json")
    }


@pytest.fixture(scope="module")
def ten_days(
    client: Client, world_url: str, cache: Path, job: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished cube of ten days, to be copied."""
    folder = tmp_path_factory.mktemp("ten")
    infer(client, until(11, world_url, cache), job, folder / "cube.zarr")
    return folder


@pytest.fixture
def cube(ten_days: Path, tmp_path: Path) -> Path:
    shutil.copytree(ten_days, tmp_path / "copy")
    return tmp_path / "copy" / "cube.zarr"


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
    # all outputs, as other tests have them compiled
    compiled = {"code_path": "compiled", "shard_days": 9, "chunk_days": 9, "outputs": None}
    one, other = tmp_path / "one.zarr", tmp_path / "other.zarr"
    for cube in (one, other):
        infer(client, until(10, world_url, cache, **compiled), job, cube)
    # a cube goes on as it began
    undecided = {**compiled, "code_path": "auto"}
    infer(client, until(28, world_url, cache, **undecided), job, one, append=True)
    for day in (19, 28):
        infer(client, until(day, world_url, cache, **undecided), job, other, append=True)
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


@pytest.fixture
def other_weather(world_url: str, tmp_path: Path) -> str:
    """The same world with more rain from the 9th of January on."""
    url = shutil.copytree(world_url, tmp_path / "world.zarr")
    rain = zarr.open_array(str(url), path="prec/data", mode="r+")
    days = slice(8, 20)
    rain[days] = np.asarray(rain[days]) * 1.5
    return str(url)


@pytest.mark.slow
def test_replaced_forcing_is_computed_anew_from_a_day_on(
    client: Client, world_url: str, other_weather: str, cache: Path, job: str, cube: Path, tmp_path: Path
) -> None:
    infer(client, until(13, world_url, cache), job, cube, append=True)
    frozen = {"baseline": f"{FIRST}..2001-01-11"}
    with xr.open_zarr(cube, chunks=None) as opened:
        preliminary = opened.load()
    longer = until(15, other_weather, cache)
    with pytest.raises(JobError, match=r"no tile can go on(.|\n)*2001-01-11, 2001-01-13(.|\n)*state_days"):
        roll_back(longer, job, cube, date(2001, 1, 10))
    progress = roll_back(longer, job, cube, date(2001, 1, 12))
    assert progress.period.stop == date(2001, 1, 11)
    with xr.open_zarr(cube, chunks=None) as opened:
        assert opened.sizes["time"] == 10, "readers see the shorter cube at once"
    infer(client, longer, job, cube, append=True)
    assert verify_cube(str(cube), NO_OPTIONS).complete
    with xr.open_zarr(cube, chunks=None) as opened:
        final = opened.load()
    xr.testing.assert_identical(final["runoff"][:10], preliminary["runoff"][:10])
    assert float(abs(final["runoff"][10:12] - preliminary["runoff"][10:12]).max()) > 1e-3
    ledger = Ledger(str(cube), NO_OPTIONS, progress.rollbacks)
    assert {one.edition for parts in ledger.covered().values() for one in parts} == {0, 1}
    assert frozen["baseline"] == final.attrs["baseline_period"]


@pytest.mark.slow
def test_states_on_the_way_can_be_gone_back_to(
    client: Client, world_url: str, other_weather: str, cache: Path, job: str, tmp_path: Path
) -> None:
    cube = tmp_path / "cube.zarr"
    often = {"state_days": 4, "keep_states": 1}
    infer(client, until(14, world_url, cache, **often), job, cube)
    snapshots = Snapshots(str(cube), NO_OPTIONS, "")
    (tile, *_) = [p.name for p in Path(snapshots_url(str(cube))).iterdir()]
    assert snapshots.days(tile) == tuple(date(2001, 1, d) for d in (5, 9, 13, 14))
    again = until(14, other_weather, cache, **often)
    assert roll_back(again, job, cube, date(2001, 1, 11)).period.stop == date(2001, 1, 9)
    infer(client, again, job, cube, append=True)
    infer(client, until(9, other_weather, cache, **often), job, tmp_path / "fresh.zarr")
    assert verify_cube(str(cube), NO_OPTIONS).complete
    with (
        xr.open_zarr(cube, chunks=None) as ours,
        xr.open_zarr(tmp_path / "fresh.zarr", chunks=None) as theirs,
    ):
        xr.testing.assert_equal(ours["runoff"][:8].load(), theirs["runoff"].load())
        assert ours.attrs["baseline_period"] == f"{FIRST}..2001-01-14"


RAGGED: Mapping[str, Any] = {"shard_days": 4, "chunk_days": 2}
"""A cube of ten days ends within its third shard."""


@pytest.fixture(scope="module")
def made_ragged(
    client: Client, world_url: str, cache: Path, job: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("ragged")
    infer(client, until(11, world_url, cache, **RAGGED), job, folder / "cube.zarr")
    return folder


@pytest.fixture
def ragged(made_ragged: Path, tmp_path: Path) -> Path:
    shutil.copytree(made_ragged, tmp_path / "ragged")
    return tmp_path / "ragged" / "cube.zarr"


def test_days_computed_anew_reach_as_far_as_before(
    client: Client, other_weather: str, cache: Path, job: str, ragged: Path
) -> None:
    with xr.open_zarr(ragged, chunks=None) as opened:
        preliminary = opened["runoff"].load()
    infer(client, until(11, other_weather, cache, **RAGGED), job, ragged, since=date(2001, 1, 10))
    with xr.open_zarr(ragged, chunks=None) as opened:
        final = opened["runoff"].load()
    assert final.sizes["time"] == 10
    xr.testing.assert_identical(final[:8], preliminary[:8])
    assert float(abs(final[8:] - preliminary[8:]).max()) > 1e-3
    progress = read_cube(str(ragged), NO_OPTIONS).progress
    assert progress == Progress(progress.period, True, (date(2001, 1, 9),), progress.constants)
    assert verify_cube(str(ragged), NO_OPTIONS).complete


def test_interrupted_days_anew_go_on_to_the_same_end(
    client: Client, world_url: str, cache: Path, job: str, ragged: Path
) -> None:
    settings = until(11, world_url, cache, **RAGGED)
    shorter = roll_back(settings, job, ragged, date(2001, 1, 10))
    assert (shorter.period.stop, shorter.until) == (date(2001, 1, 9), date(2001, 1, 11))
    ways: tuple[Mapping[str, Any], ...] = ({}, {"append": True}, {"since": date(2001, 1, 10)})
    for way in ways:
        planned = plan_inference(settings, job, NO_OPTIONS, cube=str(ragged), **way)
        assert planned.layout.period.stop == date(2001, 1, 11)
    longer = plan_inference(
        until(14, world_url, cache, **RAGGED), job, NO_OPTIONS, cube=str(ragged), append=True
    )
    assert longer.layout.period.stop == date(2001, 1, 13)
    infer(client, settings, job, ragged)
    done = read_cube(str(ragged), NO_OPTIONS).progress
    assert (done.period.stop, done.until) == (date(2001, 1, 11), None)


def test_what_cannot_be_computed_anew_is_not_rolled_back(
    client: Client, world_url: str, cache: Path, job: str, ragged: Path
) -> None:
    before = objects(ragged.parent)
    refused: tuple[tuple[Settings, type[Exception], str], ...] = (
        (until(10, world_url, cache, **RAGGED), ConfigError, "the cube's days"),
        (until(11, world_url, cache, **{**RAGGED, "members": "all"}), StoreError, "nothing was touched"),
        (until(11, world_url, cache, shard_days=2, overwrite=True), StoreError, "nothing was touched"),
    )
    for settings, error, said in refused:
        with pytest.raises(error, match=said):
            infer(client, settings, job, ragged, since=date(2001, 1, 10))
    assert objects(ragged.parent) == before


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


def appended(day: int, url: str, cache: Path, job: str, cube: Path) -> TileContext:
    """A run that has computed all days before this one of January, and is yet to show them."""
    planned = plan_inference(until(day, url, cache), job, NO_OPTIONS, cube=str(cube), append=True)
    run = open_context(planned, str(cube), NO_OPTIONS)
    for tile in planned.layout.tiles:
        compute_tile(run, tile)
    return run


def test_a_run_does_not_undo_a_rollback_of_another(world_url: str, cache: Path, job: str, cube: Path) -> None:
    run = appended(13, world_url, cache, job, cube)
    shown = roll_back(until(13, world_url, cache), job, cube, date(2001, 1, 11))
    with pytest.raises(JobError, match="rolled back while it was worked on"):
        finish_cube(run)
    assert read_cube(str(cube), NO_OPTIONS).progress == shown


@pytest.mark.parametrize("end", [12, 13], ids=["before the receipt", "before the next shards"])
def test_a_run_stops_where_another_has_rolled_the_cube_back(
    world_url: str, cache: Path, job: str, cube: Path, monkeypatch: pytest.MonkeyPatch, end: int
) -> None:
    """As two commands do that each have a cluster of their own: one is in the middle of a tile."""
    settings = until(end, world_url, cache)
    planned = plan_inference(settings, job, NO_OPTIONS, cube=str(cube), append=True)
    run = open_context(planned, str(cube), NO_OPTIONS)
    first, second = planned.layout.tiles
    receipts, write, written = objects(Path(ledger_url(str(cube)))), Sink.write, list[date]()

    def overtaken(sink: Sink, tile: Tile, period: Period, values: Mapping[str, Any]) -> str:
        roll_back(settings, job, cube, date(2001, 1, 11))
        written.append(period.start)
        return write(sink, tile, period, values)

    monkeypatch.setattr(Sink, "write", overtaken)
    with pytest.raises(JobError, match="rolled back while it was worked on"):
        compute_tile(run, first)
    assert written == [date(2001, 1, 11)]
    with pytest.raises(JobError, match="rolled back while it was worked on"):
        compute_tile(run, second)
    assert written == [date(2001, 1, 11)]
    assert objects(Path(ledger_url(str(cube)))) == receipts


@pytest.mark.parametrize(
    "replacement",
    [{"threads": 2}, {"chunk_days": 1, "outputs": ["runoff"]}],
    ids=["other numbers", "other variables"],
)
def test_a_run_stops_where_another_has_replaced_the_cube(
    world_url: str, cache: Path, job: str, cube: Path, replacement: dict[str, Any]
) -> None:
    """Its receipts would count as those of the new cube."""
    run = appended(13, world_url, cache, job, cube)
    settings = until(11, world_url, cache, **replacement, overwrite=True)
    other = plan_inference(settings, job, NO_OPTIONS, cube=str(cube))
    create_cube(str(cube), other.layout, NO_OPTIONS, overwrite=True)
    before = objects(cube.parent)
    with pytest.raises(JobError, match="replaced while it was worked on"):
        compute_tile(run, run.plan.layout.tiles[0])
    with pytest.raises(JobError, match="replaced while it was worked on"):
        publish_further(str(cube), run.plan.layout, Progress(run.plan.layout.period, True), NO_OPTIONS)
    assert objects(cube.parent) == before


def test_a_cube_is_not_rolled_back_under_a_run_of_another_scheduler(
    client: Client, world_url: str, cache: Path, job: str, cube: Path
) -> None:
    done = RunRecord.read("infer", str(cube), NO_OPTIONS)
    assert done is not None
    assert done.state == "done"
    lost = replace(done, state="running", scheduler="tcp://elsewhere:1", place=str(cube))
    lost.write(NO_OPTIONS)
    before, settings = objects(cube.parent), until(13, world_url, cache)
    with pytest.raises(
        JobError, match=r"another run may be(.|\n)*tcp://elsewhere:1(.|\n)*delete .*run\.json"
    ):
        infer(client, settings, job, cube, since=date(2001, 1, 11))
    assert objects(cube.parent) == before
    Path(run_url("infer-1", str(cube))).unlink()
    infer(client, settings, job, cube, since=date(2001, 1, 11))
    assert verify_cube(str(cube), NO_OPTIONS).complete


def test_a_run_does_not_shorten_what_another_has_appended(
    world_url: str, cache: Path, job: str, cube: Path
) -> None:
    shorter, longer = (appended(day, world_url, cache, job, cube) for day in (12, 13))
    finish_cube(longer)
    finish_cube(shorter)
    assert read_cube(str(cube), NO_OPTIONS).progress.period.stop == date(2001, 1, 13)
    assert verify_cube(str(cube), NO_OPTIONS).complete


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


def test_damage_is_found_and_repaired(
    client: Client, world_url: str, cache: Path, job: str, cube: Path
) -> None:
    infer(client, until(13, world_url, cache), job, cube, append=True)
    before = objects(cube)
    damaged = next(p for p in (cube / "runoff" / "c" / "3").rglob("*") if p.is_file())
    damaged.write_bytes(damaged.read_bytes()[:-3])
    next(p for p in (cube / "runoff" / "c" / "10").rglob("*") if p.is_file()).unlink()
    values = zarr.open_array(str(cube), path="baseflow_recession", mode="r+")
    values[...] = 0.5
    found = verify_cube(str(cube), NO_OPTIONS)
    assert len(found.damaged) == 2
    assert found.constants
    forget_damage(str(cube), found, NO_OPTIONS)
    infer(client, until(13, world_url, cache), job, cube)
    assert verify_cube(str(cube), NO_OPTIONS).complete
    assert objects(cube) == before


def test_an_edited_cube_is_refused(world_url: str, cache: Path, job: str, cube: Path) -> None:
    layout, progress = read_cube(str(cube), NO_OPTIONS)
    edited = replace(layout, attributes={**layout.attributes, "checkpoints": '{"0":"other"}'})
    publish(str(cube), edited, progress, NO_OPTIONS)
    planned = plan_inference(until(12, world_url, cache), job, NO_OPTIONS, cube=str(cube), append=True)
    with pytest.raises(StoreError, match="checkpoints"):
        open_context(planned, str(cube), NO_OPTIONS)


def test_another_release_goes_on_with_a_cube_unless_its_numbers_are_others(
    world_url: str, cache: Path, job: str, cube: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wordings and versions are another release's; the numbers, once we say so."""
    root = zarr.open_group(cube, use_consolidated=False)
    root.attrs.update({"title": "worded otherwise", "Conventions": "CF-1.12", "versions": '{"torch":"3.0"}'})
    longer = until(12, world_url, cache)
    planned = plan_inference(longer, job, NO_OPTIONS, cube=str(cube), append=True)
    open_context(planned, str(cube), NO_OPTIONS)
    monkeypatch.setattr(cube_plan, "NUMBERS", cube_plan.NUMBERS + 1)
    others = plan_inference(longer, job, NO_OPTIONS, cube=str(cube), append=True)
    with pytest.raises(StoreError, match="numbers"):
        open_context(others, str(cube), NO_OPTIONS)


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


def test_a_budget_that_does_not_close_fails(
    client: Client, cube: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A hundred mm of runoff that nobody computed, with a receipt that says they were."""
    layout, _ = read_cube(str(cube), NO_OPTIONS)
    (tile, *_), (day, *_) = layout.tiles, list(layout.period.blocks(1))[3:]
    boxes = list(StoredValues.open(str(cube), layout, NO_OPTIONS).read(tile=tile, period=day))
    boxes[layout.daily.index("runoff")] += 100
    written = Sink.open(str(cube), layout, NO_OPTIONS).write_stored(boxes, tile=tile, period=day)
    ledger = Ledger(str(cube), NO_OPTIONS)
    (one,) = ledger.covered()[tile.name]
    (receipt,) = ledger.receipts([one])
    blocks = (*receipt.blocks[:3], written, *receipt.blocks[4:])
    ledger.record(tile.name, one.period, replace(receipt, blocks=blocks))
    address = client.scheduler_info()["address"]
    monkeypatch.setattr("sys.argv", ["h2mv-dist", "verify-cube", str(cube), "--address", address])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    said = capsys.readouterr().out
    assert "2 receipts agree" in said
    assert f"{tile.name} {one.period}: the water budget does not close" in said


def test_the_command_line_for_a_timer(
    client: Client,
    world_url: str,
    cache: Path,
    job: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Plan, make, append, check, break and repair a cube, each by its command and exit code."""
    file, cube = tmp_path / "settings.toml", tmp_path / "cube.zarr"
    model = "hidden = 8\nencoder = 12\ncondensed = 4\n"
    lists = "".join(f"{name} = {DAILY[name]}\n" for name in ("tile", "shard", "chunk"))
    file.write_text(
        f'[data]\nurl = "{world_url}"\n[model]\n{model}[inference]\n{lists}shard_days = 1\nchunk_days = 1\n'
        'spinup_days = 2\noutputs = ["runoff", "baseflow_recession"]\nkeep_states = 60\n'
    )
    address = client.scheduler_info()["address"]

    def run(*words: str, days: int = 3) -> tuple[int, str]:
        ends = f"data.period={FIRST}..{FIRST.replace(day=days + 1)}"
        command = [*words, "--set", ends, "--address", address]
        monkeypatch.setattr("sys.argv", ["h2mv-dist", *command])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        code = ended.value.code
        return int(code or 0), said.out + said.err

    infer = ("infer", str(file), "--job", job, "--cube", str(cube))
    code, said = run(*infer, "--plan")
    assert (code, cube.exists()) == (0, False)
    # a chunk holds 365 days, of which three are read, and some sea
    for part in ("tiles: 2 of 2", "each byte 162.22 times", "in 12 objects", "memory:", "cell-days"):
        assert part in said
    assert run(*infer)[0] == 0
    code, said = run(*infer)
    assert code == 0
    assert "nothing to do" in said
    code, said = run(*infer, "--append")
    assert code == 75
    assert "complete until 2001-01-04" in said
    code, said = run(*infer, "--append", days=4)
    assert code == 0, said
    code, said = run(*infer, "--from", "2001-01-04", days=5)
    assert code == 0
    assert "computing anew from 2001-01-04" in said
    assert run(*infer, "--from", "2001-01-05", "--plan", days=5)[0] == 0
    code, said = run("verify-cube", str(cube))
    assert code == 0
    assert "4 receipts agree" in said
    next(p for p in (cube / "runoff" / "c" / "4").rglob("*") if p.is_file()).unlink()
    code, said = run("verify-cube", str(cube))
    assert code == 1
    assert "are not those that were written" in said
    receipts, states = objects(Path(ledger_url(str(cube)))), objects(Path(snapshots_url(str(cube))))
    busy = submit(client, Job(job_id("infer", str(cube)), "", {}, (Unit("waits", "tile", {}, ranks=99),)))
    code, said = run("verify-cube", str(cube), "--repair", days=5)
    assert code == 2
    assert "is already running on this scheduler" in said
    assert objects(Path(ledger_url(str(cube)))) == receipts
    busy.cancel()
    code, said = run("verify-cube", str(cube), "--repair", "--json", days=5)
    assert code == 0, said
    assert json.loads(said[said.index("{") : said.rindex("}") + 1])["sound"] == 4
    assert objects(Path(snapshots_url(str(cube)))) == states
    assert recorded_job(str(cube), NO_OPTIONS)[0]["inference"]["keep_states"] == 60, "a repair drops no more"
