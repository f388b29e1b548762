"""Days computed anew from a day on, and what other runs may do to the cube meanwhile."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import xarray as xr
from distributed import Client

from h2mv_dist.config import Settings
from h2mv_dist.errors import ConfigError, JobError, StoreError
from h2mv_dist.grid import Period, Tile
from h2mv_dist.io.cube import Progress
from h2mv_dist.io.cube_check import verify_cube
from h2mv_dist.io.cube_store import create_cube, publish_further, read_cube
from h2mv_dist.io.ledger import Ledger, ledger_url
from h2mv_dist.io.sink import Sink
from h2mv_dist.io.snapshots import Snapshots, snapshots_url
from h2mv_dist.jobs.cube_plan import plan_inference
from h2mv_dist.jobs.run_record import RunRecord, run_url
from h2mv_dist.jobs.tiles import compute_tile, finish_cube, open_context
from tests.jobs.conftest import NO_OPTIONS
from tests.jobs.growth.conftest import FIRST, appended, infer, objects, roll_back, until


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


def test_days_appended_instead_begin_where_the_last_shard_does(
    client: Client, world_url: str, cache: Path, job: str, ragged: Path
) -> None:
    """Computing anew was interrupted after a tile, and the forcing has grown since."""
    settings = until(11, world_url, cache, **RAGGED)
    roll_back(settings, job, ragged, date(2001, 1, 10))
    planned = plan_inference(settings, job, NO_OPTIONS, cube=str(ragged), append=True)
    compute_tile(open_context(planned, str(ragged), NO_OPTIONS), planned.layout.tiles[0])
    infer(client, until(14, world_url, cache, **RAGGED), job, ragged, append=True)
    assert read_cube(str(ragged), NO_OPTIONS).progress.period.stop == date(2001, 1, 13)
    assert verify_cube(str(ragged), NO_OPTIONS).complete
    with xr.open_zarr(ragged, chunks=None) as opened:
        assert bool(opened["runoff"].notnull().any(("lat", "lon")).all())


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
