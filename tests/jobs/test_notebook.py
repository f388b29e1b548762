"""Jobs from a notebook: submit, look, leave, come back, cancel; with real workers and from records alone."""

import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import dask
import numpy as np
import psutil
import pytest
from distributed import Client, LocalCluster

import h2mv_dist as hd
from h2mv_dist.config import to_json
from h2mv_dist.errors import ConfigError, JobError
from h2mv_dist.jobs.cluster import scheduler_address
from h2mv_dist.jobs.page import page_of
from h2mv_dist.jobs.progress import progress_of
from h2mv_dist.jobs.run_record import RunRecord
from h2mv_dist.notebook import Job
from tests.jobs.conftest import NO_OPTIONS, small_settings, training_settings
from tests.jobs.processes import wait_until


@pytest.fixture(autouse=True)
def connected(client: Client) -> Iterator[Client]:
    yield hd.connect(client)
    hd.disconnect()


@pytest.fixture(scope="module")
def trained(client: Client, world_url: str, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    hd.connect(client)
    settings = to_json(training_settings(world_url, cache, training={"folds": [0, 1], "ranks": 2}))
    return hd.train(settings, str(tmp_path_factory.mktemp("notebook") / "job")).wait(progress=False)


@pytest.fixture
def endless(client: Client, world_url: str, cache: Path, tmp_path: Path) -> Iterator[Job]:
    """A job that runs until it is cancelled."""
    settings = to_json(training_settings(world_url, cache))
    job = hd.train(settings, str(tmp_path / "endless"), ["training.epochs=10000", "training.patience=10000"])
    wait_until(lambda: progress_of(job.status()).done > 0, "an epoch")
    yield job
    hd.connect(client)
    job.cancel()


def test_an_address_comes_before_what_the_site_says(client: Client) -> None:
    address = scheduler_address(client)
    for other in ({"kind": "slurm"}, {"address": "tcp://127.0.0.1:1"}, {"scheduler_file": "/nowhere"}):
        with dask.config.set({"h2mv_dist.cluster": other}):
            assert scheduler_address(hd.connect(address)) == address
            assert scheduler_address(hd.connect(settings={"cluster": {"address": address}})) == address


def test_a_trained_job_tells_what_it_made(trained: Job) -> None:
    assert trained.state == "done"
    assert [unit["state"] for unit in trained.status()["units"]] == ["done"] * 3
    metrics = trained.metrics()
    assert list(metrics["fold"]) == [0, 0, 1, 1]
    assert metrics["valid_loss"].notna().all()
    made = trained.result()
    assert list(made.checkpoints) == ["fold-00", "fold-01"]
    assert all(Path(path).stat().st_size > 1000 for path in made.checkpoints.values())
    assert made.summary is not None
    assert list(made.summary["state"]) == ["done", "done"]
    assert len(trained.plot().axes[0].lines) >= 4, "two losses of two folds"


def test_logs_are_those_of_each_rank(trained: Job) -> None:
    logs = trained.logs()
    assert {(log.unit, log.rank) for log in logs} == {(f"fold-0{f}", r) for f in (0, 1) for r in (0, 1)}
    assert {log.outcome for log in logs} == {"done"}
    assert "fold-01, attempt 1, rank 1" in str(trained.logs("fold-01", rank=1))
    assert len(trained.logs("fold-01", rank=1)) == 1


@pytest.mark.slow
def test_any_cluster_of_dask_will_do(world_url: str, cache: Path, tmp_path: Path) -> None:
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster:
        assert scheduler_address(hd.connect(cluster)) == cluster.scheduler_address
        settings = to_json(training_settings(world_url, cache))
        assert hd.train(settings, str(tmp_path / "job")).wait(progress=False).state == "done"
        hd.disconnect()
        assert cluster.status.name == "running", "it is not ours to close"


def test_a_job_is_found_again_by_id_and_by_place(trained: Job) -> None:
    assert hd.job(trained.id).place == trained.place
    assert hd.job(trained.place).id == trained.id
    assert trained.id in {job.id for job in hd.jobs()}
    with pytest.raises(JobError, match=r"does not know the job(.|\n)*" + trained.id):
        hd.job("train-00000000")


def test_records_tell_the_same_without_a_cluster(trained: Job) -> None:
    live = trained.status()
    wait_until(lambda: (_run(trained)).state == "done", "the record of the end")
    hd.disconnect()
    alone = hd.job(trained.place)
    assert alone.state == "done"
    names = ("name", "state", "attempt")
    folds = [{name: unit[name] for name in names} for unit in live["units"] if unit["name"] != "summary"]
    assert [{name: unit[name] for name in names} for unit in alone.status()["units"]] == folds
    assert len(alone.logs()) == 4
    assert alone.wait(progress=False).result().checkpoints
    assert [job.id for job in hd.jobs(str(Path(trained.place).parent))] == [trained.id]
    with pytest.raises(JobError, match="there is no cluster"):
        hd.jobs()
    with pytest.raises(JobError, match="there is no job"):
        hd.job(str(Path(trained.place) / "folds"))


def _run(job: Job) -> RunRecord:
    found = RunRecord.read(job.id, job.place, NO_OPTIONS)
    assert found is not None
    return found


def test_it_is_shown_in_the_style_of_dask(trained: Job) -> None:
    html = trained._repr_html_()
    for part in (trained.id, "Training", "done", "fold-01", trained.place, "all jobs"):
        assert part in html
    assert repr(trained).startswith(f"<{trained.id} done: 4 of 4 epochs")
    assert trained.id in hd.jobs()._repr_html_()
    assert trained.id in repr(hd.jobs())


def test_the_dashboard_has_a_page_of_all_jobs(trained: Job, connected: Client) -> None:
    with urllib.request.urlopen(page_of(connected.dashboard_link)) as reply:
        page = reply.read().decode()
    assert trained.id in page
    assert "fold-01" in page


def test_cancel_frees_the_workers_and_is_remembered(endless: Job, client: Client) -> None:
    assert endless.state == "running"
    assert "epochs / " in repr(endless)
    assert endless.logs()[0].outcome == "running"
    children = [p for p in psutil.Process().children(recursive=True) if "h2mv_dist.jobs.rank" in p.cmdline()]
    assert children
    assert endless.cancel()
    psutil.wait_procs(children, timeout=5)
    assert not any(child.is_running() for child in children), "ranks outlived their job"
    wait_until(lambda: not any(client.processing().values()), "free workers")
    with pytest.raises(JobError, match=f"{endless.id} was cancelled"):
        endless.wait(progress=False)
    wait_until(lambda: _run(endless).state == "cancelled", "the record of the end")
    hd.disconnect()
    alone = hd.job(endless.place)
    assert alone.state == "cancelled"
    assert alone.metrics()["epoch"].max() >= 1
    with pytest.raises(JobError, match="was cancelled"):
        alone.wait(progress=False)


@pytest.mark.slow
def test_another_process_finds_a_job_whose_own_process_was_killed(
    client: Client, world_url: str, cache: Path, tmp_path: Path
) -> None:
    settings = to_json(training_settings(world_url, cache))
    folder = str(tmp_path / "left")
    script = (
        "import h2mv_dist as hd, sys, time\n"
        f"hd.connect({scheduler_address(client)!r})\n"
        f"job = hd.train({settings!r}, {folder!r}, ['training.epochs=8', 'training.patience=8'])\n"
        "print(job.id, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        name = other.stdout.readline().strip()
        other.kill()
    job = hd.job(name)
    assert job.state == "running", "the fault came too late"
    assert job.wait(progress=False).state == "done"
    assert job.metrics()["epoch"].max() == 8


def test_a_failed_fold_says_its_own_error_first_and_short(
    world_url: str, cache: Path, tmp_path: Path
) -> None:
    settings = to_json(training_settings(world_url, cache, training={"attempts": 1}))
    folder = tmp_path / "job"
    damaged = folder / "folds" / "00" / "decisions.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("{")
    job = hd.train(settings, str(folder))
    with pytest.raises(JobError, match=r"^fold-00 \(attempt 1\): a record is damaged") as failed:
        job.wait(progress=False)
    assert len(str(failed.value).splitlines()) <= 6
    assert "a record is damaged" in job.logs()[0].reason
    assert "a record is damaged" in job._repr_html_()
    wait_until(lambda: _run(job).state == "failed", "the record of the end")
    hd.disconnect()
    alone = hd.job(str(folder))
    assert alone.state == "failed"
    with pytest.raises(JobError, match=r"^fold-00"):
        alone.wait(progress=False)


def test_a_cube_is_filled_and_told_about(trained: Job, world_url: str, cache: Path, tmp_path: Path) -> None:
    settings, cube = to_json(small_settings(world_url, cache)), str(tmp_path / "cube.zarr")
    filled = hd.infer(settings, trained, cube).wait(progress=False)
    assert filled.state == "done"
    made = filled.result()
    assert made.cube is not None
    assert np.isfinite(made.cube["runoff"].isel(time=-1)).any()
    tiles = {unit["name"] for unit in filled.status()["units"]} - {"finish"}
    assert set(filled.metrics()["tile"]) == tiles
    again = hd.infer(settings, trained.place, cube)
    assert again.wait(progress=False).state == "done", "nothing was left to do"
    with pytest.raises(ConfigError, match="no training job"):
        filled.plot()
    hd.disconnect()
    alone = hd.job(cube)
    assert (alone.id, alone.state) == (filled.id, "done")
    assert {unit["name"] for unit in alone.status()["units"]} == tiles
