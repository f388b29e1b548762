"""Cubes copied into ones with longer shards, also as they grow; on real worker processes."""

import shutil
import tracemalloc
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from distributed import Client

from h2mv_dist import cli
from h2mv_dist.errors import ConfigError, JobError, NothingNewError, StoreError
from h2mv_dist.grid import Period, Tile, as_date
from h2mv_dist.io.cube import COMPACTED, FINGERPRINT, CubeLayout, Progress
from h2mv_dist.io.cube_check import verify_cube
from h2mv_dist.io.cube_copy import CubeCopy
from h2mv_dist.io.cube_store import create_cube, publish, read_cube
from h2mv_dist.io.ledger import Ledger, Receipt, ended_months
from h2mv_dist.io.netcdf import select
from h2mv_dist.io.sink import DamagedError, Sink, StoredValues
from h2mv_dist.io.stores import put_object
from h2mv_dist.jobs import compact
from h2mv_dist.jobs.compact import CompactPlan, plan_compact, start_compact
from h2mv_dist.jobs.cube_plan import plan_inference
from h2mv_dist.jobs.inference import forget_damage
from h2mv_dist.model.registry import model_kind
from h2mv_dist.spec import Float32Array
from tests.conftest import S3Server
from tests.io.cubes import basin_grid, map_layout
from tests.jobs.conftest import NO_OPTIONS, small_settings
from tests.jobs.growth.conftest import infer, objects, until

START = date(2000, 1, 31)
CUT: Any = {"shard_days": 8, "chunk_days": 4, "chunk": (4, 2)}


def day(n: int) -> date:
    return as_date(Period(START, date(2000, 12, 31)).first + n)


def layout_of(n_days: int, **changes: Any) -> CubeLayout:
    """Four-day shards, monthly means, two tiles."""
    period = Period(START, day(n_days))
    return map_layout(**{"period": period, "tile": (4, 12), "monthly": ("runoff",), **changes})


def values_of(names: tuple[str, ...], shape: tuple[int, ...], *seed: int) -> dict[str, Float32Array]:
    generator = np.random.default_rng(seed)
    return {name: generator.normal(1e3, 50, shape).astype(np.float32) for name in names}


def fill(url: Path, layout: CubeLayout, *, first: int = 0, weather: int = 0) -> None:
    """Make a cube, or days of it from the ``first`` on, as inference does."""
    create_cube(str(url), layout, NO_OPTIONS, overwrite=False)
    rollbacks = read_cube(str(url), NO_OPTIONS).progress.rollbacks
    sink, ledger = Sink.open(str(url), layout, NO_OPTIONS), Ledger(str(url), NO_OPTIONS, rollbacks)
    for tile in layout.tiles:
        for block in list(layout.period.blocks(layout.shard_days))[first // layout.shard_days :]:
            ledger.record(tile.name, block, fill_block(sink, tile, block, weather))
    constants = sink.write_constants(values_of(layout.constants, (len(layout.members),), 1))
    publish(str(url), layout, Progress(layout.period, True, rollbacks, constants), NO_OPTIONS)


def fill_block(sink: Sink, tile: Tile, block: Period, weather: int) -> Receipt:
    layout = sink.layout
    members, n_land = len(layout.members), int(layout.grid.mask[tile.slices].sum())
    seed = (weather, block.first, *tile.start)
    static = values_of(layout.static, (members, n_land), *tile.start)
    daily = values_of(layout.daily, (members, block.n_days, n_land), *seed)
    means = values_of(layout.monthly, (members, n_land), *seed)
    months = ended_months(layout.period, block) if layout.monthly else ()
    return Receipt(
        fingerprint=layout.fingerprint,
        static=sink.write_static(tile, static) if block.start == START else "",
        blocks=(sink.write(tile, block, daily),),
        months=tuple(sink.write_month(tile, month, means) for month in months),
        forcing="f",
        missing=0,
        residual=None,
        seconds=0.0,
    )


def run(client: Client, cube: Path, target: Path, **cut: Any) -> CompactPlan:
    plan = plan_compact(str(cube), str(target), NO_OPTIONS, **cut)
    start_compact(client, plan, NO_OPTIONS).wait()
    return plan


def roll_back(cube: Path, to: int) -> None:
    layout, progress = read_cube(str(cube), NO_OPTIONS)
    shorter = Progress(Period(START, day(to)), True, (*progress.rollbacks, day(to)), progress.constants)
    publish(str(cube), layout, shorter, NO_OPTIONS)


def require_copy(cube: Path, target: Path, n_days: int) -> None:
    """The copy is sound, and holds in every array what the cube does."""
    found = verify_cube(str(target), NO_OPTIONS)
    assert found.complete
    assert len(found.sound) == len(read_cube(str(target), NO_OPTIONS).layout.tiles) * n_days // 8
    with xr.open_zarr(cube, chunks=None) as theirs, xr.open_zarr(target, chunks=None) as ours:
        assert ours.sizes["time"] == n_days
        expected = theirs.isel(time=slice(n_days), month=slice(ours.sizes["month"]))
        assert set(ours.variables) == set(expected.variables)
        for name, array in expected.variables.items():
            assert ours[name].values.tobytes() == array.values.tobytes(), name
            assert ours[name].attrs == array.attrs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cube of 36 days, February among them."""
    folder = tmp_path_factory.mktemp("made")
    fill(folder / "cube.zarr", layout_of(36))
    return folder


@pytest.fixture
def cube(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "in")
    return tmp_path / "in" / "cube.zarr"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "long.zarr"


def test_a_copy_holds_the_same_and_grows_with_the_cube(client: Client, cube: Path, target: Path) -> None:
    roll_back(cube, 20)
    run(client, cube, target, **CUT)
    require_copy(cube, target, 16)
    attributes = zarr.open_group(str(target), mode="r").attrs.asdict()
    theirs = zarr.open_group(str(cube), mode="r").attrs.asdict()
    assert attributes[COMPACTED] == theirs[FINGERPRINT] != attributes[FINGERPRINT]
    runoff = zarr.open_array(str(target), path="runoff", mode="r")
    assert (runoff.shards, runoff.chunks) == ((8, 4, 4), (4, 4, 2))
    before = objects(target.parent)
    with pytest.raises(NothingNewError, match=r"complete until 2000-02-16(.|\n)*8 at a time"):
        run(client, cube, target)
    assert objects(target.parent) == before
    shown = objects(target, metadata=False)
    fill(cube, layout_of(36), first=20, weather=1)
    assert run(client, cube, target).layout.shard_days == 8, "as it is cut already"
    require_copy(cube, target, 32)
    after = objects(target, metadata=False)
    assert {name: after[name] for name in shown} == shown, "nothing a reader can see is written again"
    at_once = target.with_name("at_once.zarr")
    run(client, cube, at_once, **CUT)
    assert objects(at_once) == objects(target), "at once as bit by bit"


@pytest.mark.parametrize(
    "changes",
    [
        {"members_as": "both", "rounded": {"runoff": 12}},
        {"members": (5,), "static": (), "constants": ()},
        {"grid": basin_grid(), "chunk": (1,), "shard": (2,), "tile": (4,), "members_as": "all"},
    ],
    ids=["both", "one member", "basins"],
)
def test_whatever_a_cube_holds(tmp_path: Path, client: Client, changes: dict[str, Any]) -> None:
    fill(tmp_path / "cube.zarr", layout_of(10, **changes))
    run(client, tmp_path / "cube.zarr", tmp_path / "long.zarr", shard_days=8)
    require_copy(tmp_path / "cube.zarr", tmp_path / "long.zarr", 8)


@pytest.mark.slow
def test_from_and_to_an_object_store(client: Client, made: Path, s3_server: S3Server, s3_bucket: str) -> None:
    folder, options = f"{s3_bucket}/compact", s3_server.options
    for file in (path for path in made.rglob("*") if path.is_file()):
        put_object(f"{folder}/{file.relative_to(made)}", file.read_bytes(), options)
    plan = plan_compact(f"{folder}/cube.zarr", f"{folder}/long.zarr", options, **CUT)
    start_compact(client, plan, options).wait()
    found = verify_cube(f"{folder}/long.zarr", options)
    assert found.complete
    assert len(found.sound) == 2 * 4


def test_an_interrupted_copy_goes_on(client: Client, cube: Path, target: Path, tmp_path: Path) -> None:
    """In this process: some units are done when it ends; then all but the last one; then the rest."""
    run(client, cube, tmp_path / "undisturbed.zarr", **CUT)
    plan = plan_compact(str(cube), str(target), NO_OPTIONS, **CUT)
    copy = opened(plan)
    first, *_ = plan.layout.tiles
    for block in plan.missing[first][:2]:
        copy.copy(first, block)
    context = compact.CompactContext(copy, ())
    with pytest.raises(JobError, match=r"have no receipt(.|\n)*2000-02-16"):
        compact.finish_copy(context)
    assert not read_cube(str(target), NO_OPTIONS).progress.complete
    again = plan_compact(str(cube), str(target), NO_OPTIONS)
    assert [len(blocks) for blocks in again.missing.values()] == [2, *[4] * (len(plan.layout.tiles) - 1)]
    for tile, blocks in again.missing.items():
        assert list(compact._left(copy.ledger, tile, [str(b) for b in plan.missing[tile]])) == list(blocks)
        for block in blocks:
            copy.copy(tile, block)
    assert not run(client, cube, target).missing, "the last unit alone is left"
    assert objects(target) == objects(tmp_path / "undisturbed.zarr")


def opened(plan: CompactPlan) -> CubeCopy:
    create_cube(plan.target, plan.layout, NO_OPTIONS, overwrite=False)
    return CubeCopy(
        StoredValues.open(plan.cube, plan.source.layout, NO_OPTIONS),
        Ledger(plan.cube, NO_OPTIONS, plan.source.progress.rollbacks),
        Sink.open(plan.target, plan.layout, NO_OPTIONS),
        Ledger(plan.target, NO_OPTIONS, plan.rollbacks),
    )


def copy_first_shards(copy: CubeCopy, plan: CompactPlan) -> None:
    for tile, blocks in plan.missing.items():
        copy.copy(tile, blocks[0])


def test_a_copy_follows_a_rollback(client: Client, cube: Path, target: Path) -> None:
    run(client, cube, target, **CUT)
    roll_back(cube, 20)
    run(client, cube, target)
    require_copy(cube, target, 16)
    with pytest.raises(NothingNewError):
        run(client, cube, target)
    fill(cube, layout_of(36), first=20, weather=2)
    stale = opened(plan_compact(str(cube), str(target), NO_OPTIONS))
    run(client, cube, target)
    require_copy(cube, target, 32)
    editions = {one.edition for parts in stale.ledger.covered().values() for one in parts}
    assert editions == {0, 1}
    roll_back(cube, 28)
    with pytest.raises(JobError, match=r"changed while it was copied(.|\n)*rolled back"):
        compact.finish_copy(compact.CompactContext(stale, (day(20),)))
    run(client, cube, target)
    require_copy(cube, target, 24)
    roll_back(cube, 4)
    before = objects(target.parent)
    with pytest.raises(StoreError, match=r"cannot follow(.|\n)*first shard(.|\n)*delete the copy"):
        run(client, cube, target)
    assert objects(target.parent) == before


def test_a_copy_that_was_rolled_back_is_not_written_by_an_older_run(
    client: Client, cube: Path, target: Path
) -> None:
    """The older run has read the cube as it was, and is about to write."""
    run(client, cube, target, **CUT)
    roll_back(cube, 20)
    run(client, cube, target)
    fill(cube, layout_of(36), first=20, weather=1)
    plan = plan_compact(str(cube), str(target), NO_OPTIONS)
    stale = opened(plan)
    roll_back(cube, 20)
    run(client, cube, target)
    before = objects(target.parent)
    with pytest.raises(JobError, match="rolled back while it was worked on"):
        copy_first_shards(stale, plan)
    assert objects(target.parent) == before


def test_time_of_a_copy_goes_on_beyond_what_was_stored_at_first(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("h2mv_dist.io.cube.HORIZON_DAYS", 8)
    cube = tmp_path / "grows.zarr"
    for first, stop in ((0, 20), (20, 36)):
        fill(cube, layout_of(stop), first=first)
        plan = plan_compact(str(cube), str(target), NO_OPTIONS, **CUT)
        copy = opened(plan)
        for tile, blocks in plan.missing.items():
            for block in blocks:
                copy.copy(tile, block)
        compact.finish_copy(compact.CompactContext(copy, ()))
        require_copy(cube, target, plan.layout.period.n_days)


def test_a_rollback_before_the_first_days_are_shown(client: Client, cube: Path, target: Path) -> None:
    plan = plan_compact(str(cube), str(target), NO_OPTIONS, **CUT)
    copy_first_shards(opened(plan), plan)
    roll_back(cube, 4)
    with pytest.raises(NothingNewError, match="4 days by now"):
        run(client, cube, target)
    fill(cube, layout_of(20), first=4, weather=3)
    run(client, cube, target)
    require_copy(cube, target, 16)


@pytest.mark.parametrize("lost", [True, False])
def test_damage_is_not_copied(cube: Path, target: Path, lost: bool) -> None:
    plan = plan_compact(str(cube), str(target), NO_OPTIONS, **CUT)
    damaged = next(p for p in (cube / "runoff" / "c" / "1").rglob("*") if p.is_file())
    damaged.unlink() if lost else damaged.write_bytes(damaged.read_bytes()[:-3] + b"abc")
    copy, said = opened(plan), "values of 2000-02-04(.|\n)*not those" if lost else "stored values are damaged"
    with pytest.raises(DamagedError, match=said):
        copy_first_shards(copy, plan)
    assert len(copy.ledger.covered()) < len(plan.layout.tiles)


def test_damage_of_the_copy_is_repaired(client: Client, cube: Path, target: Path) -> None:
    run(client, cube, target, **CUT)
    before = objects(target)
    next(p for p in (target / "runoff" / "c" / "1").rglob("*") if p.is_file()).unlink()
    zarr.open_array(str(target), path="baseflow_recession", mode="r+")[...] = 0.5
    found = verify_cube(str(target), NO_OPTIONS)
    assert len(found.damaged) == 1
    assert found.constants
    forget_damage(str(target), found, NO_OPTIONS)
    run(client, cube, target)
    assert objects(target) == before


def test_bad_input_is_refused_before_anything_is_written(
    client: Client, cube: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(client, cube, target, **CUT)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious.txt").write_text("do not touch")
    (tmp_path / "link.zarr").symlink_to(cube)
    fill(tmp_path / "other.zarr", layout_of(8, attributes={FINGERPRINT: "other"}))
    create_cube(str(tmp_path / "new.zarr"), layout_of(8), NO_OPTIONS, overwrite=False)
    before = objects(tmp_path)
    new = str(tmp_path / "somewhere.zarr")
    refused: list[tuple[type[Exception], str, str, str, dict[str, Any]]] = [
        (ConfigError, "into itself", str(cube), str(cube) + "/", {}),
        (ConfigError, "into itself", str(cube), str(tmp_path / "link.zarr"), {}),
        (ConfigError, "nor share its receipts", str(cube), str(cube).removesuffix(".zarr"), {}),
        (ConfigError, "into itself", str(cube), str(cube / "copy"), {}),
        (StoreError, "no complete cube", str(tmp_path / "nowhere"), new, {}),
        (StoreError, "not a cube", str(tmp_path / "folder"), new, {}),
        (StoreError, "not a cube", str(cube), str(tmp_path / "folder"), {}),
        (JobError, "not finished", str(tmp_path / "new.zarr"), new, {}),
        (StoreError, r"another cube(.|\n)*of its own", str(cube), str(tmp_path / "other.zarr"), {}),
        (StoreError, r"another cube(.|\n)*fingerprint", str(tmp_path / "other.zarr"), str(target), {}),
        (StoreError, r"layout.shard_days \(8 there, 16", str(cube), str(target), {"shard_days": 16}),
        (StoreError, r"layout.chunk ", str(cube), str(target), {"chunk": (1, 1)}),
        (ConfigError, "the cube's shard_days", str(cube), new, {"shard_days": 5}),
        (ConfigError, "--chunk-days", str(cube), new, {"shard_days": 8, "chunk_days": 5}),
        (ConfigError, "change --chunk", str(cube), new, {**CUT, "chunk": (3, 3)}),
        (ConfigError, "change --chunk", str(cube), new, {**CUT, "chunk": (2,)}),
        (NothingNewError, "36 days by now", str(cube), new, {}),
    ]
    for error, message, one, other, cut in refused:
        with pytest.raises(error, match=message):
            plan_compact(one, other, NO_OPTIONS, **cut)
    plan = plan_compact(str(cube), new, NO_OPTIONS, **CUT)
    monkeypatch.setattr(CompactPlan, "unit_bytes", lambda _: 2**50)
    with pytest.raises(JobError, match=r"does not fit into a worker(.|\n)*8 days(.|\n)*--shard-days"):
        start_compact(client, plan, NO_OPTIONS)
    assert objects(tmp_path) == before


def test_many_shards_share_units(cube: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_compact(str(cube), str(target), NO_OPTIONS, **CUT)
    n_tiles = len(plan.layout.tiles)
    assert len(list(compact._units(plan))) == 4 * n_tiles
    monkeypatch.setattr(compact, "_UNITS", 2 * n_tiles)
    units = list(compact._units(plan))
    assert [unit.name.split("/")[1] for unit in units[:2]] == [
        "2000-01-31..2000-02-16",
        "2000-02-16..2000-03-03",
    ]
    blocks = [(u.name.split("/")[0], block) for u in units for block in u.spec["blocks"]]
    assert blocks == [(t.name, str(block)) for t, parts in plan.missing.items() for block in parts]


def test_memory_is_known_before(tmp_path: Path, target: Path) -> None:
    shape = {"chunk": (4, 8), "shard": (4, 8), "tile": (4, 8)}
    fill(tmp_path / "cube.zarr", layout_of(6000, shard_days=1000, chunk_days=500, monthly=(), **shape))
    plan = plan_compact(str(tmp_path / "cube.zarr"), str(target), NO_OPTIONS, shard_days=6000)
    copy = opened(plan)
    tile = max(plan.layout.tiles, key=lambda tile: np.prod(tile.shape))
    tracemalloc.start()
    copy.copy(tile, plan.layout.period)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.2 * plan.unit_bytes() < peak < plan.unit_bytes()


def test_the_command_line(
    client: Client,
    cube: Path,
    target: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    address = client.scheduler_info()["address"]

    def command(*words: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["h2mv-dist", "compact", *words, "--address", address])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out + said.err

    places = (str(cube), str(target))
    code, said = command(*places, "--shard-days", "8", "--chunk", "4,x")
    assert code == 2
    assert "--chunk 4,x: expected whole numbers" in said
    code, said = command(*places, "--shard-days", "8", "--chunk", "4,2")
    assert code == 0, said
    assert "2000-01-31..2000-03-03 of 2000-01-31..2000-03-07 in shards of 8 days: 8 to copy" in said
    require_copy(cube, target, 32)
    assert command(*places)[0] == 75


def test_inference_does_not_fill_a_copy(client: Client, cube: Path, target: Path, tmp_path: Path) -> None:
    run(client, cube, target, **CUT)
    before = objects(tmp_path)
    for append, overwrite in ((True, False), (False, False), (True, True)):
        settings = small_settings("nowhere", tmp_path, inference={"overwrite": overwrite})
        with pytest.raises(StoreError, match=r"does not fill(.|\n)*from .*cube.zarr(.|\n)*infer into"):
            plan_inference(settings, "nowhere", NO_OPTIONS, cube=str(target), append=append)
    assert objects(tmp_path) == before


@pytest.mark.slow
def test_real_days(
    client: Client,
    world_url: str,
    cache: Path,
    job: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cube, target = tmp_path / "cube.zarr", tmp_path / "long.zarr"
    infer(client, until(6, world_url, cache), job, cube)
    run(client, cube, target, shard_days=2, chunk=(9, 9))
    infer(client, until(8, world_url, cache), job, cube, append=True)
    run(client, cube, target)
    found = verify_cube(str(target), NO_OPTIONS, budget=model_kind("h2mv").spec.budget)
    assert found.complete
    assert found.residual < 1e-2
    part = select(str(target), NO_OPTIONS, variables=("runoff",))
    with xr.open_zarr(cube, chunks=None) as theirs:
        np.testing.assert_array_equal(part["runoff"].values, theirs["runoff"].values[:6])
    next(p for p in (target / "runoff" / "c" / "1").rglob("*") if p.is_file()).unlink()
    address = client.scheduler_info()["address"]
    monkeypatch.setattr(
        "sys.argv", ["h2mv-dist", "verify-cube", str(target), "--repair", "--address", address]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "h2mv-dist compact then extends this one, and writes anew" in capsys.readouterr().err
    run(client, cube, target)
    assert verify_cube(str(target), NO_OPTIONS).complete
