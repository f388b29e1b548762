"""Global inference on real worker processes: tiles, restart, refusals."""

import hashlib
import json
import math
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import psutil
import pytest
import torch
import xarray as xr
from distributed import Client

from h2mv_dist import cli
from h2mv_dist.config import DataSettings, Settings, load, to_json, validate
from h2mv_dist.errors import CheckpointError, ConfigError, JobError, StoreError
from h2mv_dist.io import source
from h2mv_dist.io.cube import root_attributes
from h2mv_dist.io.cube_check import verify_cube
from h2mv_dist.io.ledger import Ledger, ledger_url
from h2mv_dist.io.sink import Sink
from h2mv_dist.io.source import open_source
from h2mv_dist.jobs import tiles
from h2mv_dist.jobs.cube_plan import CubePlan, plan_from_message, plan_inference
from h2mv_dist.jobs.handle import JobHandle
from h2mv_dist.jobs.inference import (
    neighbourhood,
    start_inference,
    submit_inference,
    warn_of_split_chunks,
)
from h2mv_dist.jobs.messages import job_id
from h2mv_dist.jobs.records import JobFolder
from h2mv_dist.jobs.tasks import TOPIC
from h2mv_dist.model.base import Batch
from h2mv_dist.model.h2mv import SPEC
from h2mv_dist.model.rollout import spin_up
from h2mv_dist.variables import GROUPS
from tests.faults.conftest import settings_file
from tests.faults.processes import is_alive
from tests.jobs.conftest import NO_OPTIONS, one_process, small_settings
from tests.jobs.processes import START_SECONDS, process, wait_until


def infer(client: Client, settings: Settings, job: str, cube: Path) -> None:
    handle = submit_inference(client, settings, job, str(cube), NO_OPTIONS)
    assert handle is not None
    handle.wait()


def contents(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_the_cube_opens_with_plain_xarray_and_is_complete(
    client: Client, world_url: str, cache: Path, job: str, tmp_path: Path
) -> None:
    settings = small_settings(world_url, cache)
    infer(client, settings, job, tmp_path / "cube.zarr")
    id_ = job_id("infer", str(tmp_path / "cube.zarr"))
    events = [e for _, e in client.get_events(TOPIC) if e["job"] == id_ and e.get("event") == "days"]
    whole = dict.fromkeys(Ledger(str(tmp_path / "cube.zarr"), NO_OPTIONS).covered(), (365, 365))
    assert {e["unit"]: (e["days"], e["of"]) for e in events} == whole, "in the end"
    with xr.open_zarr(tmp_path / "cube.zarr") as cube:
        land = cube["land_mask"].values.astype(bool)
        for name in ("runoff", "runoff_spread", "terrestrial_water_storage_anomaly"):
            values = cube[name].values
            assert values.shape == (365, 18, 36)
            assert np.isfinite(values[:, land]).all()
            assert np.isnan(values[:, ~land]).all()
        assert np.isfinite(cube["soil_moisture_capacity"].values[land]).all()
        assert 0 < float(cube["snowfall_correction"]) < 1
        anomaly = cube["terrestrial_water_storage_anomaly"].values[:, land]
        assert np.abs(anomaly.mean(axis=0)).max() < 1e-2
        assert cube["time"].values[0] == np.datetime64("2001-01-01")
    assert submit_inference(client, settings, job, str(tmp_path / "cube.zarr"), NO_OPTIONS) is None
    found = verify_cube(str(tmp_path / "cube.zarr"), NO_OPTIONS, budget=SPEC.budget)
    ledger = Ledger(str(tmp_path / "cube.zarr"), NO_OPTIONS)
    assert found.complete
    assert len(found.sound) == sum(map(len, ledger.covered().values()))
    assert found.residual < 1e-3
    receipts = list(ledger.receipts(found.sound))
    assert all(r.missing == 0 and r.residual is not None and r.residual < 1e-3 for r in receipts)


def test_each_run_opens_anew_what_it_works_with(
    world_url: str, cache: Path, job: str, tmp_path: Path
) -> None:
    """Its credentials may be new, and the forcing another one."""
    days = {"period": "2001-01-01..2001-01-11"}
    settings = small_settings(
        world_url, cache, data=days, inference={"outputs": ["runoff"], "spinup_days": 5}
    )
    cube, opened = tmp_path / "cube.zarr", list[tiles.TileContext]()
    with one_process(1) as (client, _):
        for _ in range(2):
            infer(client, settings, job, cube)
            opened += tiles._contexts.values()
            ledger = Ledger(str(cube), NO_OPTIONS)
            ledger.forget(next(iter(ledger.covered().values())))
    first, second = opened
    assert first is not second
    assert first.plan.layout.fingerprint == second.plan.layout.fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("code_path", ["eager", "compiled"])
def test_tiled_and_blocked_equal_one_piece(
    client: Client, world_url: str, cache: Path, job: str, tmp_path: Path, code_path: str
) -> None:
    """The piece is computed as the model is written."""
    settings = small_settings(world_url, cache, inference={"members": "all", "code_path": code_path})
    infer(client, settings, job, tmp_path / "cube.zarr")
    written = small_settings(world_url, cache, inference={"members": "all", "code_path": "eager"})
    infer(client, written, job, tmp_path / "written.zarr")
    runoff = [contents(tmp_path / cube / "runoff" / "c") for cube in ("cube.zarr", "written.zarr")]
    assert (runoff[0] == runoff[1]) == (code_path == "eager"), "compiled code rounds otherwise"
    planned = plan_inference(settings, job, NO_OPTIONS)
    whole = planned.source.grid.tiles(planned.source.grid.shape)[0]
    land = planned.source.grid.mask
    forcing = planned.source.read_forcing(whole, planned.layout.period)[:, land].swapaxes(0, 1)
    batch = Batch(
        torch.from_numpy(forcing.copy()), torch.from_numpy(planned.source.read_static(whole)[land]), {}
    )
    with xr.open_zarr(tmp_path / "cube.zarr", chunks=None) as cube:
        cube.load()
        for member, checkpoint in enumerate(planned.checkpoints):
            model = checkpoint.build_model()
            with torch.no_grad():
                daily = model(batch, spin_up(model, batch, 60)).daily
            for name, expected in daily.items():
                ours = cube[name].values[member][:, land].T
                scale = max(float(expected.abs().max()), 1e-6)
                assert np.abs(ours - expected.numpy()).max() <= 1e-5 * scale + 1e-5, name


@pytest.mark.slow
def test_members_give_mean_and_spread(
    client: Client, world_url: str, cache: Path, job: str, tmp_path: Path
) -> None:
    for members in ("all", "spread"):
        chosen = {"members": members, "outputs": ["runoff", "soil_moisture_capacity"]}
        infer(client, small_settings(world_url, cache, inference=chosen), job, tmp_path / members)
    with xr.open_zarr(tmp_path / "all") as every, xr.open_zarr(tmp_path / "spread") as spread:
        assert every["member"].values.tolist() == [0, 1]
        for name in chosen["outputs"]:
            mean = every[name].mean("member", skipna=False)
            np.testing.assert_allclose(spread[name], mean, rtol=1e-5)
            std = every[name].std("member", skipna=False)
            np.testing.assert_allclose(spread[f"{name}_spread"], std, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_a_batch_system_ends_the_command_and_its_workers(
    world_url: str, cache: Path, job: str, tmp_path: Path
) -> None:
    fine = {"tile": [3, 6], "shard": [3, 6], "chunk": [3, 6], "outputs": ["runoff"]}
    cube, log = tmp_path / "cube.zarr", tmp_path / "log"
    file = settings_file(tmp_path, small_settings(world_url, cache, inference=fine))
    own = ("--set", "cluster.kind=local", "--set", "cluster.workers=2")
    command = ("infer", file, "--job", job, "--cube", str(cube), *own)
    with process(log, "h2mv_dist.cli", *command) as stopped:
        ledger = Path(ledger_url(str(cube)))
        wait_until(lambda: len(list(ledger.rglob("*.json"))) > 3, "some tiles", log, seconds=180)
        workers = psutil.Process(stopped.pid).children(recursive=True)
        stopped.send_signal(signal.SIGTERM)
        assert stopped.wait(START_SECONDS) == 143, log.read_text()
    wait_until(lambda: not any(map(is_alive, workers)), "the end of all workers", log)
    assert "the job stops with its cluster; go on with: the same command" in log.read_text()
    assert "h2mv_dist/" not in log.read_text(), "a traceback of ours"
    assert not verify_cube(str(cube), NO_OPTIONS).complete
    with process(log, "h2mv_dist.cli", *command) as again:
        assert again.wait(240) == 0, log.read_text()
    assert verify_cube(str(cube), NO_OPTIONS).complete


def test_another_checkpoint_or_geometry_is_refused_and_nothing_touched(
    client: Client, world_url: str, cache: Path, job: str, tmp_path: Path
) -> None:
    cube = tmp_path / "cube.zarr"
    small = {"outputs": ["runoff"], "folds": [0]}
    infer(client, small_settings(world_url, cache, inference=small), job, cube)
    before = contents(tmp_path)
    for change in ({"folds": [1]}, {"tile": [9, 12], "shard": [9, 12]}, {"outputs": ["fapar"]}):
        settings = small_settings(world_url, cache, inference={**small, **change})
        with pytest.raises(StoreError, match=r"inference.overwrite"):
            submit_inference(client, settings, job, str(cube), NO_OPTIONS)
    assert contents(tmp_path) == before
    settings = small_settings(world_url, cache, inference={**small, "folds": [1], "overwrite": True})
    infer(client, settings, job, cube)
    assert contents(tmp_path) != before
    # the workers of the replaced cube must not go on with its model
    infer(client, settings, job, tmp_path / "fresh.zarr")
    assert contents(cube) == contents(tmp_path / "fresh.zarr")


def test_a_worker_refuses_to_make_another_cube_than_the_planned_one(
    world_url: str, cache: Path, job: str
) -> None:
    settings = small_settings(world_url, cache)
    planned = plan_inference(settings, job, NO_OPTIONS)
    provenance = dict(planned.layout.attributes)
    message = {
        "settings": to_json(settings),
        "training_folder": job,
        "cube": "c",
        "period": str(planned.layout.period),
        "storage_options": {},
        "objects": planned.source.identity_by_objects(),
    }
    assert plan_from_message({**message, "provenance": provenance}).layout.attributes == provenance
    changed = {**provenance, "input_fingerprint": "other data"}
    with pytest.raises(JobError, match=r"c: input_fingerprint(.|\n)*other data(.|\n)*to do"):
        plan_from_message({**message, "provenance": changed})


def test_a_worker_reads_what_identifies_the_data_only_where_their_objects_are_others(
    world_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataSettings(url=world_url)
    first, same, copied = (
        open_source(data, forcing=SPEC.forcing, targets=(), options=NO_OPTIONS) for _ in range(3)
    )
    known = first.identity, first.identity_by_objects()
    with monkeypatch.context() as patched:
        patched.setattr(source, "fixed_values", lambda *_: pytest.fail("they are read"))
        same.take_over_identity(*known)
        assert same.identity == known[0]
    copied.take_over_identity("of others", "other objects")
    assert copied.identity == known[0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tile": [4, 12]}, ConfigError, r"tile(.|\n)*shard"),
        ({"folds": [7]}, CheckpointError, r"fold(.|\n)*7(.|\n)*\[0, 1\]"),
        ({"outputs": ["runof"]}, ConfigError, "inference.outputs(.|\n)*did you mean 'runoff'"),
        ({"outputs": ["stors"]}, ConfigError, "inference.outputs(.|\n)*did you mean 'stores'"),
        ({"rounding": {"runof": 9}}, ConfigError, "inference.rounding(.|\n)*did you mean 'runoff'"),
        ({"period": "2000-01-01..2001-06-01"}, ConfigError, "inference.period"),
        ({"spinup_days": 400}, ConfigError, r"inference.spinup_days(.|\n)*longer forcing"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    client: Client,
    world_url: str,
    cache: Path,
    job: str,
    tmp_path: Path,
    change: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    settings = small_settings(world_url, cache, inference=change)
    with pytest.raises(error, match=message):
        submit_inference(client, settings, job, str(tmp_path / "cube.zarr"), NO_OPTIONS)
    assert not any(tmp_path.iterdir())


def test_outputs_and_their_precision_go_by_name_or_group(
    world_url: str, cache: Path, job: str, tmp_path: Path
) -> None:
    def planned(**inference: Any) -> CubePlan:
        return plan_inference(small_settings(world_url, cache, inference=inference), job, NO_OPTIONS)

    chosen = {"outputs": ["soil_moisture", "fluxes"], "rounding": {"runoff": 16, "fluxes": 10, "stores": 23}}
    layout = planned(**chosen).layout
    fluxes = [name for name in GROUPS["fluxes"] if name in SPEC.daily]
    assert layout.daily == ("soil_moisture", *fluxes)
    assert layout.rounded == {name: 16 if name == "runoff" else 10 for name in fluxes}
    recorded = json.loads(layout.attributes["settings"])
    assert recorded["inference"]["outputs"] == list(layout.daily), "groups may grow, a cube's outputs do not"
    again = validate(recorded, where="the record")
    assert root_attributes(plan_inference(again, job, NO_OPTIONS).layout) == root_attributes(layout)
    word = planned(outputs=["fluxes", "fapar", "soil_moisture"], rounding="fluxes").layout
    assert word.rounded == dict.fromkeys((*fluxes, "fapar"), 12), "a word means what it always meant"
    both = planned(outputs=["stores", "soil_moisture"]).layout
    assert (both.daily.count("soil_moisture"), both.static) == (1, ("soil_moisture_capacity",))


def test_a_foreign_checkpoint_is_refused(world_url: str, cache: Path, job: str, tmp_path: Path) -> None:
    folder = shutil.copytree(job, tmp_path / "job")
    best = JobFolder(str(folder), NO_OPTIONS).fold(0).state().best
    (folder / "folds" / "00" / "checkpoints" / best).write_bytes(b"\x80\x05not a checkpoint")
    with pytest.raises(CheckpointError, match=best):
        plan_inference(small_settings(world_url, cache), str(folder), NO_OPTIONS)


def test_folds_that_are_not_finished_are_only_used_when_named(
    world_url: str, cache: Path, job: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(job, tmp_path / "job")
    (folder / "folds" / "01" / "done.json").unlink()
    with pytest.raises(
        CheckpointError,
        match=r"not finished: \[1\](.|\n)*--resume(.|\n)*inference.folds(.|\n)*best checkpoint",
    ):
        plan_inference(small_settings(world_url, cache), str(folder), NO_OPTIONS)
    for folds in ([0], [0, 1]):
        settings = small_settings(world_url, cache, inference={"folds": folds})
        assert plan_inference(settings, str(folder), NO_OPTIONS).layout.members == tuple(folds)


def test_a_cube_says_where_its_inputs_are(world_url: str, cache: Path, job: str) -> None:
    attributes = plan_inference(small_settings(world_url, cache), job, NO_OPTIONS).layout.attributes
    assert attributes["data_url"] == world_url
    assert attributes["training_job"] == job


def test_a_cube_that_cannot_fit_on_the_disk_is_refused_before_anything_is_written(
    client: Client,
    world_url: str,
    cache: Path,
    job: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = small_settings(world_url, cache, inference={"outputs": ["runoff"]})
    planned, cube = plan_inference(settings, job, NO_OPTIONS), str(tmp_path / "new" / "cube.zarr")
    needed = planned.missing_bytes({tile: [planned.layout.period] for tile in planned.layout.tiles})
    cells = sum(math.prod(tile.shape) for tile in planned.layout.tiles)
    assert needed == pytest.approx(2 * 4 * 365 * cells, rel=0.02)

    def leave(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))

    leave(needed // 11)
    with pytest.raises(StoreError, match=r"does not fit on the disk(.|\n)*before compression(.|\n)*free"):
        start_inference(client, planned, job, cube, NO_OPTIONS)
    assert not any(tmp_path.iterdir())
    caplog.set_level("INFO", "h2mv_dist")
    leave(needed // 5)
    handle = start_inference(client, planned, job, cube, NO_OPTIONS)
    assert handle is not None
    handle.wait()
    assert "what is missing of the cube takes" in caplog.text
    assert f"{cube}: {planned.summary()}" in caplog.messages
    leave(0)
    planned = plan_inference(settings, job, NO_OPTIONS, cube=cube)
    assert start_inference(client, planned, job, cube, NO_OPTIONS) is None, "nothing is missing"


def test_a_plan_refuses_what_cannot_fit(
    world_url: str,
    cache: Path,
    job: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings, file = small_settings(world_url, cache), tmp_path / "settings.toml"
    chosen, model = settings.inference, settings.model
    file.write_text(
        f'[data]\nurl = "{world_url}"\n[cluster]\nkind = "local"\n'
        f"[model]\nhidden = {model.hidden}\nencoder = {model.encoder}\ncondensed = {model.condensed}\n"
        f"[inference]\ntile = {list(chosen.tile)}\nshard = {list(chosen.shard)}\n"
        f"chunk = {list(chosen.chunk)}\nshard_days = 300\nchunk_days = 100\n"
    )

    def planned_with(*settings: str) -> tuple[int, str, str]:
        command = ["infer", str(file), "--job", job, "--cube", str(tmp_path / "cube.zarr"), "--plan"]
        monkeypatch.setattr("sys.argv", ["h2mv-dist", *command, *(w for s in settings for w in ("--set", s))])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    plan = plan_inference(load(file)[0], job, NO_OPTIONS)
    shorter = replace(plan, layout=replace(plan.layout, shard_days=200))
    code, said, refused = planned_with(f"cluster.memory_limit='{shorter.tile_bytes()}B'")
    assert (code, "memory:" in said) == (2, True)
    assert "does not fit into a worker" in refused
    assert "set inference.shard_days = 200, or start larger workers" in refused
    assert planned_with(f"cluster.memory_limit='{plan.tile_bytes()}B'")[0] == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    code, _, refused = planned_with()
    assert code == 2
    assert "the cube does not fit on the disk" in refused
    assert [*tmp_path.iterdir()] == [file]


def test_tiles_that_share_chunks_run_on_the_same_worker(
    client: Client, world_url: str, cache: Path, job: str, tmp_path: Path
) -> None:
    halves = {"tile": [3, 6], "shard": [3, 6], "chunk": [3, 6], "outputs": ["runoff"]}
    settings = small_settings(
        world_url, cache, inference={**halves, "period": "2001-01-01..2001-01-11", "spinup_days": 0}
    )
    planned = plan_inference(settings, job, NO_OPTIONS)
    assert planned.source.chunk_shape == (6, 6)
    handle = start_inference(client, planned, job, str(tmp_path / "cube.zarr"), NO_OPTIONS)
    assert handle is not None
    handle.wait()
    ran = {unit["name"]: unit["workers"] for unit in handle.status()["units"]}
    workers: dict[str, set[str]] = {}
    for tile in planned.layout.tiles:
        workers.setdefault(neighbourhood(planned, tile), set()).update(ran[tile.name])
    pairs = Counter(neighbourhood(planned, tile) for tile in planned.layout.tiles)
    split = [name for name, on in workers.items() if len(on) > 1]
    # only at the end, where nothing else is left
    assert len(split) <= 4 < sum(n == 2 for n in pairs.values()) // 2
    whole = plan_inference(small_settings(world_url, cache), job, NO_OPTIONS)
    assert {neighbourhood(whole, tile) for tile in whole.layout.tiles} == {""}


def test_tiles_that_cut_chunks_of_the_forcing_are_told(
    world_url: str, cache: Path, job: str, caplog: pytest.LogCaptureFixture
) -> None:
    for size in ([6, 12], [18, 36], [9, 12]):
        settings = small_settings(world_url, cache, inference={"tile": size, "shard": size, "chunk": size})
        warn_of_split_chunks(plan_inference(settings, job, NO_OPTIONS))
    (told,) = caplog.messages
    assert "tile = [9, 12] cuts chunks of the forcing, [6, 6] cells each" in told
    assert "tile = [18, 12] would not" in told


@pytest.mark.parametrize("cancelled", [False, True], ids=["to the end", "cancelled"])
def test_a_worker_begins_a_tile_while_it_ends_another(
    client: Client, world_url: str, cache: Path, job: str, tmp_path: Path, cancelled: bool
) -> None:
    small = {"tile": [6, 6], "shard": [6, 6], "chunk": [6, 6], "shard_days": 366, "chunk_days": 366}
    settings = small_settings(world_url, cache, inference={**small, "outputs": ["runoff"]})
    gate, cube = tmp_path / "gate", tmp_path / "cube.zarr"
    client.run(hold_writes, str(gate))
    try:
        handle = submit_inference(client, settings, job, str(cube), NO_OPTIONS)
        assert handle is not None
        wait_until(lambda: sorted(tiles_of_workers(handle).values()) == [2] * 4, "two tiles on each worker")
        if cancelled:
            handle.cancel()
            wait_until(lambda: not tiles_of_workers(handle), "the end of all tiles")
    finally:
        gate.touch()
        client.run(mock.patch.stopall)
    if cancelled:
        assert {unit["state"] for unit in handle.status()["units"]} == {"cancelled"}
        infer(client, settings, job, cube)
    else:
        handle.wait()
    assert verify_cube(str(cube), NO_OPTIONS).complete


def hold_writes(gate: str) -> None:
    """On a worker: no block of a cube is written before there is a file at ``gate``."""

    def held(sink: Sink, *values: Any) -> str:
        wait_until(Path(gate).exists, "the gate")
        return write(sink, *values)

    write = Sink.write
    mock.patch.object(Sink, "write", held).start()


def tiles_of_workers(handle: JobHandle) -> Counter[str]:
    """How many units run on each worker."""
    return Counter(w for u in handle.status()["units"] if u["state"] == "running" for w in u["workers"])
