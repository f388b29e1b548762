"""deploy/slurm on a real Slurm: from submission to a trained fold and a cube, and what Slurm does to jobs."""

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import xarray as xr

from h2mv_dist.config import ClusterSettings, Settings, SlurmSettings
from h2mv_dist.jobs import slurm as slurm_jobs
from h2mv_dist.jobs.cluster import connect
from h2mv_dist.jobs.training import submit_training
from tests.faults.folds import (
    FinalBytes,
    assert_recovered,
    final,
    pointer_held,
    rank_runs,
    under_way,
    wait_for_the_end,
)
from tests.jobs.conftest import NO_OPTIONS
from tests.jobs.processes import START_SECONDS, process, wait_until
from tests.slurm.conftest import SIZE, Site
from tests.slurm.single_node import SingleNode

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

INFER = ("settings.toml", "--job", "job", "--cube", "cube.zarr")


def assert_nothing_is_left(site: Site) -> None:
    """The allocation is empty, and nobody finds a scheduler that is no more."""
    wait_until(lambda: not site.slurm.jobs(), "the end of all jobs")
    wait_until(lambda: not site.slurm.processes_of_jobs(), "the end of their processes")
    assert list(site.folder.glob("scheduler*.json")) == []


def test_from_submission_to_a_cube_that_grows(site: Site, reference: FinalBytes) -> None:
    assert_nothing_is_left(site)
    assert reference.best
    filled = site.submit(*SIZE, "infer.sbatch", *INFER)
    assert site.wait(filled) == "COMPLETED 0:0", site.output()
    with xr.open_zarr(site.folder / "cube.zarr") as cube:
        assert cube.sizes["time"] == 40
        assert float(cube["evapotranspiration"].mean()) > 0
    daily = site.submit(*SIZE, str(as_batch_script(site.folder / "daily.scron", site)))
    assert site.wait(daily) == "COMPLETED 0:0", f"nothing new is no failure\n{site.output()}"
    assert_nothing_is_left(site)


def as_batch_script(scron: Path, site: Site) -> Path:
    """The job that scrontab, which Debian leaves out of its packages, makes of its file."""
    text = scron.read_text()
    command = re.sub(r"^\d.*?\* \* \* ", "", text, flags=re.MULTILINE)
    script = site.folder / "daily.sbatch"
    script.write_text("#!/bin/sh\n" + command.replace("#SCRON", "#SBATCH").replace(HOME, str(site.folder)))
    return script


HOME = "/home/me/h2mv-slurm"


def test_a_requeued_job_goes_on(site: Site, reference: FinalBytes) -> None:
    fold = site.job("requeued").fold(0)
    job = site.submit(*SIZE, "train.sbatch", "settings.toml", "--job", "requeued")
    under_way(fold)
    with pointer_held(fold):
        site.slurm.run("scontrol", "requeue", job)
        wait_until(lambda: site.slurm.state(job) != "RUNNING", "the end of the first run")
    wait_until(lambda: "part" in fold.state().last, "a checkpoint within the epoch")
    assert site.wait(job) == "COMPLETED 0:0", site.output()
    assert site.slurm.detail(job, "Restarts") == "1"
    assert_recovered(fold, reference)
    assert_nothing_is_left(site)


def test_a_job_near_its_time_limit_leaves_in_time(site: Site, reference: FinalBytes) -> None:
    """Slurm warns the batch script alone; the same command submitted again goes on."""
    command = (*SIZE, "train.sbatch", "settings.toml", "--job", "limited")
    fold = site.job("limited").fold(0)
    job = site.submit(*command)
    under_way(fold)
    with pointer_held(fold):
        site.slurm.run("scancel", "--batch", "--signal=TERM", job)
        wait_until(lambda: asked_to_leave(site, job), "the script to pass it on")
    assert site.wait(job) == "FAILED 143:0", site.output()
    assert "part" in fold.state().last
    assert {run.kind for run in rank_runs(fold)} == {"preempted"}
    assert_nothing_is_left(site)
    assert site.wait(site.submit(*command)) == "COMPLETED 0:0", site.output()
    assert_recovered(fold, reference)


def asked_to_leave(site: Site, job: str) -> bool:
    return "Received signal SIGTERM" in (site.folder / f"h2mv-train-{job}.dask.log").read_text()


def test_training_on_a_scheduler_that_is_a_job(site: Site, reference: FinalBytes) -> None:
    """Its workers are jobs of dask-jobqueue, and nobody is logged in."""
    fold, file = site.job("unattended").fold(0), site.folder / "scheduler.json"
    (site.folder / "cluster.toml").write_text(CLUSTER)
    job = site.submit("--mem=1G", "scheduler.sbatch", "cluster.toml", str(file))
    wait_until(file.exists, "the scheduler")
    with connect(ClusterSettings(scheduler_file=str(file))) as client:
        client.wait_for_workers(2, timeout=START_SECONDS)
    command = ("train", str(site.folder / "settings.toml"), "--job", site.job("unattended").url, "--set")
    log = site.folder / "client.log"
    with process(log, "h2mv_dist.cli", *command, f"cluster.scheduler_file={file}") as watching:
        under_way(fold)
        watching.send_signal(signal.SIGKILL)
    wait_for_the_end(site.job("unattended"))
    assert final(fold) == reference
    assert fold.state().attempt == 1
    site.slurm.run("scancel", job)
    assert_nothing_is_left(site)


CLUSTER = """\
[cluster]
kind = "slurm"
workers = 2

[cluster.slurm]
memory = "2GiB"
"""


def test_a_lost_job_of_workers_is_replaced_when_its_node_is_back(
    site: Site, settings: Settings, reference: FinalBytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_jobs, "WATCH_SECONDS", 1.0)
    monkeypatch.setenv("SLURM_CONF", site.slurm.environment["SLURM_CONF"])
    folder, fold = site.job("drained"), site.job("drained").fold(0)
    with connect(workers_as_jobs(site)) as client:
        job = submit_training(client, settings, folder.url, NO_OPTIONS)
        under_way(fold)
        lost, kept = site.slurm.jobs()
        with drained(site.slurm):
            with pointer_held(fold):
                site.slurm.run("scancel", lost)
                wait_until(lambda: lost not in site.slurm.jobs("RUNNING"), "the end of a job")
            wait_until(lambda: site.slurm.jobs("PENDING"), "a new job")
            assert fold.done() is None, "one worker did what takes two"
        job.wait()
        assert kept in site.slurm.jobs("RUNNING")
    assert_recovered(fold, reference)
    assert len({run.name for run in rank_runs(fold)}) == 3
    assert_nothing_is_left(site)


def workers_as_jobs(site: Site) -> ClusterSettings:
    jobs = SlurmSettings(memory="2GiB", log_directory=str(site.folder / "logs"))
    return ClusterSettings(kind="slurm", workers=2, interface="lo", slurm=jobs)


@contextmanager
def drained(slurm: SingleNode) -> Iterator[None]:
    """No job starts on the node; what runs there goes on."""
    update = ("scontrol", "update", f"NodeName={slurm.node}")
    slurm.run(*update, "State=DRAIN", "Reason=test")
    yield
    slurm.run(*update, "State=RESUME")
