"""Fold training on real worker processes."""

import json
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
from distributed import Client, Scheduler

from h2mv_dist.cli import app
from h2mv_dist.config import validate
from h2mv_dist.display import _line
from h2mv_dist.errors import ConfigError, DataError, JobError, StoreError
from h2mv_dist.jobs import messages, tasks
from h2mv_dist.jobs.cluster import scheduler_address
from h2mv_dist.jobs.handle import JobHandle, cancel_jobs, submit
from h2mv_dist.jobs.handle import running as running_job
from h2mv_dist.jobs.messages import Job, RankError, Unit, job_id
from h2mv_dist.jobs.progress import progress_of
from h2mv_dist.jobs.records import JobFolder
from h2mv_dist.jobs.tasks import TOPIC, cancellation_check
from h2mv_dist.jobs.training import submit_training
from tests.faults.conftest import settings_file
from tests.jobs.conftest import NO_OPTIONS, training_settings
from tests.jobs.processes import START_SECONDS, process, wait_until


def train(client: Client, world_url: str, cache: Path, folder: Path, **training: object) -> JobFolder:
    settings = training_settings(world_url, cache, training=training)
    submit_training(client, settings, str(folder), NO_OPTIONS).wait()
    return JobFolder(str(folder), NO_OPTIONS)


def test_folds_train_side_by_side_on_whole_gangs(
    client: Client, world_url: str, cache: Path, tmp_path: Path
) -> None:
    settings = training_settings(world_url, cache, training={"folds": [0, 1, 2], "ranks": 2, "epochs": 3})
    handle = submit_training(client, settings, str(tmp_path), NO_OPTIONS)
    leases: list[list[list[str]]] = []

    def watch(status: Mapping[str, Any]) -> None:
        leases.append([u["workers"] for u in status["units"] if u["state"] == "running"])

    status = handle.wait(watch)
    assert [u["state"] for u in status["units"]] == ["done"] * 4, "three folds and the summary"
    folds = [[gang for gang in running if len(gang) > 1] for running in leases]
    assert any(len(running) == 2 for running in folds), "two gangs fit on four workers at once"
    for running in folds:
        workers = [w for gang in running for w in gang]
        assert len(workers) == len(set(workers)), "a worker never holds two ranks"
        assert all(len(gang) == 2 for gang in running), "a gang is never partial"
    job = JobFolder(str(tmp_path), NO_OPTIONS)
    assert job.trained_folds() == (0, 1, 2)
    metrics = job.fold(1).metrics()
    assert [m["epoch"] for m in metrics] == [1, 2, 3]
    assert metrics[-1]["train_loss"] < metrics[0]["train_loss"]


@pytest.mark.slow
def test_steps_cost_no_messages_and_no_tasks(
    client: Client, world_url: str, cache: Path, tmp_path: Path
) -> None:
    counted = []
    for batch_size in (10, 100):
        reports, transitions = len(client.get_events(TOPIC)), client.run_on_scheduler(transitions_so_far)
        fold = train(client, world_url, cache, tmp_path / str(batch_size), batch_size=batch_size, ranks=2)
        assert len(fold.fold(0).metrics()) == 2
        now = len(client.get_events(TOPIC)), client.run_on_scheduler(transitions_so_far)
        counted.append((now[0] - reports, now[1] - transitions))
    assert counted[0] == counted[1]
    assert counted[0] > (0, 0)


def transitions_so_far(dask_scheduler: Scheduler) -> int:
    return int(dask_scheduler.transition_counter)


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(
    client: Client, world_url: str, cache: Path, tmp_path: Path
) -> None:
    """Compiled, on one rank; what tests/faults kills and resumes is not, and has two."""
    compiled = {"code_path": "compiled"}
    whole = train(client, world_url, cache, tmp_path / "whole", epochs=2, **compiled).fold(0)
    train(client, world_url, cache, tmp_path / "parts", epochs=1, **compiled)
    half = JobFolder(str(tmp_path / "parts"), NO_OPTIONS).fold(0)
    assert half.read_checkpoint("last").progress["epoch"] == 1
    written = train(client, world_url, cache, tmp_path / "written", epochs=1, code_path="eager")
    losses = [[m["valid_terms"] for m in fold.metrics()] for fold in (half, written.fold(0))]
    assert losses[0] != losses[1], "compiled code rounds otherwise"
    resumed = train(client, world_url, cache, tmp_path / "parts", epochs=2, **compiled).fold(0)
    assert resumed.read_checkpoint("last").progress["epoch"] == 2
    assert resumed.checkpoint_bytes("best") == whole.checkpoint_bytes("best")
    assert resumed.checkpoint_bytes("last") == whole.checkpoint_bytes("last")


@pytest.mark.slow
def test_the_number_of_ranks_changes_nothing_but_rounding(
    client: Client, world_url: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meeting, losses = tasks.open_rendezvous, []
    for ranks, meet in ((1, _nobody_meets), (2, meeting)):
        # of the scheduler, which runs here
        monkeypatch.setattr(tasks, "open_rendezvous", meet)
        fold = train(client, world_url, cache, tmp_path / str(ranks), epochs=2, ranks=ranks).fold(0)
        losses.append([m["valid_loss"] for m in fold.metrics()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def _nobody_meets(*_: object) -> None:
    raise AssertionError("a rank alone has nobody to meet")


def test_more_ranks_than_workers_are_refused(
    client: Client, world_url: str, cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(JobError, match=r"not enough workers(.|\n)*5 for training.ranks"):
        train(client, world_url, cache, tmp_path / "job", ranks=5)
    assert not (tmp_path / "job").exists()


def test_a_job_folder_keeps_its_numbers(client: Client, world_url: str, cache: Path, tmp_path: Path) -> None:
    train(client, world_url, cache, tmp_path, epochs=1)
    before = JobFolder(str(tmp_path), NO_OPTIONS).fold(0).checkpoint_bytes("best")
    with pytest.raises(JobError, match=r"other settings(.|\n)*learning_rate"):
        train(client, world_url, cache, tmp_path, epochs=1, learning_rate=0.5)
    assert JobFolder(str(tmp_path), NO_OPTIONS).fold(0).checkpoint_bytes("best") == before


def test_an_unknown_model_or_fold_is_refused(
    client: Client, world_url: str, cache: Path, tmp_path: Path
) -> None:
    settings = training_settings(world_url, cache, model={"name": "h2mw"})
    with pytest.raises(ConfigError, match=r"unknown model 'h2mw'(.|\n)*h2mv"):
        submit_training(client, settings, str(tmp_path / "job"), NO_OPTIONS)
    with pytest.raises(ConfigError, match="from 0 to 9"):
        train(client, world_url, cache, tmp_path / "job", folds=[10])
    assert not (tmp_path / "job").exists()


def test_missing_data_are_refused_before_anything_is_written(
    client: Client, cache: Path, tmp_path: Path
) -> None:
    with pytest.raises((DataError, StoreError), match="nowhere"):
        train(client, str(tmp_path / "nowhere.zarr"), cache, tmp_path / "job")
    assert not (tmp_path / "job").exists()


def test_a_damaged_checkpoint_fails_the_fold_with_its_own_message(
    client: Client, world_url: str, cache: Path, tmp_path: Path
) -> None:
    train(client, world_url, cache, tmp_path, epochs=1)
    (last,) = (tmp_path / "folds" / "00" / "checkpoints").glob("*-last.safetensors")
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(JobError, match=r"fold-00 \(attempt 2\)(.|\n)*truncated(.|\n)*last.safetensors"):
        train(client, world_url, cache, tmp_path, epochs=2)
    assert last.read_bytes()[:1000] == last.read_bytes(), "nothing was overwritten"


@pytest.mark.slow
def test_cancel_frees_the_workers(client: Client, world_url: str, cache: Path, tmp_path: Path) -> None:
    settings = training_settings(
        world_url, cache, training={"ranks": 4, "epochs": 10_000, "patience": 10_000}
    )
    handle = submit_training(client, settings, str(tmp_path / "long"), NO_OPTIONS)
    _wait_for_an_epoch(handle)
    handle.cancel()
    with pytest.raises(JobError, match="cancelled"):
        handle.wait()
    # all four workers are needed, so this only ends if every one of them is free again
    train(client, world_url, cache, tmp_path / "next", ranks=4, epochs=1)


@pytest.mark.slow
def test_a_store_that_fails_is_tried_again_after_a_pause(
    client: Client, world_url: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler is in this process."""
    monkeypatch.setattr(messages, "FIRST_PAUSE_SECONDS", 2.0)
    in_the_way = tmp_path / "folds" / "00" / "attempts"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("not a folder")
    settings = training_settings(world_url, cache, training={"epochs": 1, "ranks": 2, "attempts": 2})
    handle = submit_training(client, settings, str(tmp_path), NO_OPTIONS)
    paused: list[Mapping[str, Any]] = []

    def watch(status: Mapping[str, Any]) -> None:
        paused.extend(unit for unit in status["units"] if unit["pause"])
        if paused and in_the_way.is_file():
            in_the_way.unlink()

    status = handle.wait(watch)
    assert {unit["state"] for unit in status["units"]} == {"done"}
    assert paused[0]["state"] == "queued"
    assert str(tmp_path) in _line(paused[0])
    assert "fold-00: waits" in _line(paused[0])
    assert status["units"][0]["attempt"] == 2
    assert not handle.cancel(), "there is nothing left to cancel"
    assert not handle.status()["cancelled"]


@pytest.mark.slow
def test_the_same_command_watches_a_running_job_and_another_one_cancels_it(
    client: Client, world_url: str, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = training_settings(world_url, cache, training={"epochs": 10_000, "patience": 10_000})
    url, log = str(tmp_path / "job"), tmp_path / "log"
    address = ("--address", scheduler_address(client))
    handle = submit_training(client, settings, url, NO_OPTIONS)
    _wait_for_an_epoch(handle)
    command = ("train", settings_file(tmp_path, settings), "--job", url, *address)
    with process(log, "h2mv_dist.cli", *command) as watching:
        wait_until(lambda: "fold-00: running, epoch" in log.read_text(), "a watcher", log)
        assert "the job is running already" in log.read_text()
        capsys.readouterr()
        app(["jobs", "cancel", url, *address, "--json"], standalone_mode=False)
        assert json.loads(capsys.readouterr().out) == {"cancelled": [job_id("train", url)]}
        assert watching.wait(START_SECONDS) == 2
    assert "was cancelled" in log.read_text()
    assert handle.status()["cancelled"]
    capsys.readouterr()
    with pytest.raises(JobError, match="was cancelled"):
        app(["jobs", "watch", url, *address, "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["state"] == "cancelled"
    for known in (url, "/never/submitted"):
        with pytest.raises(JobError, match=f"no such job is running(.|\n)*{known}"):
            cancel_jobs(client, known)


def work_until_not_wanted(began: Path, ended: Path) -> None:
    """A task that has a thread of its own ask, as tiles do."""
    require_wanted = cancellation_check()
    with ThreadPoolExecutor(1) as writer:
        began.touch()
        try:
            while True:
                writer.submit(require_wanted).result()
                time.sleep(0.05)
        except RankError as error:
            ended.write_text(error.failure.kind)


def test_threads_notice_that_their_task_is_cancelled(client: Client, tmp_path: Path) -> None:
    began, ended = tmp_path / "began", tmp_path / "ended"
    task = client.submit(work_until_not_wanted, began, ended)
    wait_until(began.exists, "the task")
    assert not ended.exists()
    task.cancel(force=True)
    wait_until(ended.exists, "its end")
    wait_until(lambda: ended.read_text() == "cancelled", "what it says")


def test_an_inference_is_cancelled_by_its_cube(client: Client) -> None:
    name = job_id("infer", "/cube")
    handle = submit(client, Job(name, "", {}, (Unit("too large for the cluster", "tile", {}, ranks=99),)))
    assert cancel_jobs(client, "/cube") == (name,)
    assert handle.status()["cancelled"]
    assert handle.status()["finished"]


def _wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.02)


def test_a_job_that_was_cancelled_is_waited_for_before_it_goes_on(client: Client, tmp_path: Path) -> None:
    place, free = str(tmp_path / "cube"), tmp_path / "free"
    units = (Unit("too large for the cluster", "tile", {}, ranks=99),)
    handle = submit(client, Job(job_id("infer", place), place, {"storage_options": {}}, units))
    assert running_job(client, handle.id) == handle
    seats = [worker for worker, threads in client.nthreads().items() for _ in range(threads)]
    busy = [client.submit(_wait_for, free, workers=[seat], pure=False) for seat in seats]
    wait_until(lambda: sum(map(len, client.processing().values())) == len(seats), "busy workers")
    handle.cancel()
    assert not handle.status()["finished"], "nobody has written it down"
    later = Timer(0.5, free.touch)
    later.start()
    assert running_job(client, handle.id) is None
    assert handle.status()["finished"]
    later.join()
    client.gather(busy)


def _wait_for_an_epoch(handle: JobHandle) -> None:
    deadline = time.monotonic() + 60
    while "epoch" not in handle.status()["units"][0]["latest"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_records_hold_settings_that_read_back_and_no_storage_options(
    client: Client, world_url: str, cache: Path, tmp_path: Path
) -> None:
    job = train(client, world_url, cache, tmp_path, epochs=1)
    record = json.loads((tmp_path / "job.json").read_text())
    assert validate(record["settings"], where="test") == job.settings()
    assert "storage_options" not in record
    done = job.fold(0).done()
    assert done is not None
    assert done["epoch"] == 1
    again = progress_of(submit_training(client, job.settings(), str(tmp_path), NO_OPTIONS).wait())
    assert (again.done, again.total) == (1, 1), "it is as far as it was"


@pytest.mark.slow
def test_checkpoints_of_another_fold_are_refused(
    client: Client, world_url: str, cache: Path, tmp_path: Path
) -> None:
    train(client, world_url, cache, tmp_path, epochs=1)
    shutil.copytree(tmp_path / "folds" / "00", tmp_path / "folds" / "01")
    with pytest.raises(JobError, match=r"fold-01(.|\n)*of another fold(.|\n)*expected: 1(.|\n)*actual:   0"):
        train(client, world_url, cache, tmp_path, epochs=2, folds=[1])
