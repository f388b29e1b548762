"""Stores that fail, lose replies or are full, and hosts that see other files."""

import signal
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from h2mv_dist.errors import JobError
from h2mv_dist.jobs.handle import running
from h2mv_dist.jobs.messages import FIRST_PAUSE_SECONDS, job_id
from h2mv_dist.jobs.records import JobFolder
from h2mv_dist.jobs.training import submit_training
from tests.conftest import ProxiedS3, S3Server
from tests.fault_proxy import FaultProxy
from tests.faults.conftest import NewSettings, settings_file, train
from tests.faults.disks import over, small_disk
from tests.faults.folds import END_SECONDS, FinalBytes, final, seat_of, under_way
from tests.faults.processes import DaskProcesses, send
from tests.jobs.conftest import NO_OPTIONS
from tests.jobs.processes import wait_until

pytestmark = [pytest.mark.slow]

SHARE = 0.2
LOST = {"state.json": 3, "checkpoints": 3, "metrics": 3, "decisions.json": 1, "done.json": 1}
"""Objects -> how many writes of them are carried out without an answer."""


def lose_replies(proxy: FaultProxy) -> None:
    """The store has done what it was asked to, but nobody is told."""
    for name, times in LOST.items():
        proxy.plan("lose", times, "PUT", name)


@pytest.mark.parametrize(
    ("break_it", "kind", "at_least"),
    [
        (lambda proxy: proxy.share({"unavailable": SHARE}), "unavailable", 20),
        (lambda proxy: proxy.share({"reset": SHARE}), "reset", 20),
        (lose_replies, "lose", sum(LOST.values())),
    ],
    ids=["busy", "reset", "reply lost"],
)
def test_an_object_store_fails_now_and_then(
    break_it: Callable[[FaultProxy], None],
    kind: str,
    at_least: int,
    steady: DaskProcesses,
    new_settings: NewSettings,
    reference: FinalBytes,
    s3_server: S3Server,
    s3_bucket: str,
    s3_world: str,
    fault_proxy: ProxiedS3,
    tmp_path: Path,
) -> None:
    """Data and job folder behind it: nothing has to begin again."""
    url = f"{s3_bucket}/faults/{uuid.uuid4().hex}"
    settings = new_settings(data={"url": s3_world}, cache=str(tmp_path))
    break_it(fault_proxy.proxy)
    with steady.client() as client:
        submit_training(client, settings, url, fault_proxy.options).wait()
    assert fault_proxy.proxy.faults[kind] >= at_least
    assert fault_proxy.proxy.requests["PUT"] > at_least
    fold = JobFolder(url, s3_server.options).fold(0)
    assert fold.state().attempt == 1
    assert final(fold) == reference
    assert fold.done() is not None


def test_a_full_disk_is_waited_for(new_settings: NewSettings, reference: FinalBytes, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk, DaskProcesses(tmp_path / "dask") as dask:
        url = str(disk.inside / "job")
        fold = JobFolder(str(disk.outside / "job"), NO_OPTIONS).fold(0)
        settings = settings_file(tmp_path, new_settings())
        dask.start_scheduler()
        for name in ("w0", "w1"):
            dask.start_worker(name, wrapper=disk.wrapper)
        dask.wait_for_workers(2)
        log = tmp_path / "client.log"
        with (
            train(dask, log, settings, "--job", url, wrapper=disk.wrapper) as trained,
            dask.client() as client,
        ):
            under_way(fold)
            filler = disk.fill()
            job = running(client, job_id("train", url))
            assert job is not None

            def waits() -> bool:
                latest = job.status()["units"][0]["latest"]
                return bool(latest.get("event") == "waiting")

            wait_until(waits, "a report of the rank that waits")
            before = fold.state()
            wait_until(lambda: "the store is full" in log.read_text(), "a word to the user")
            assert fold.state() == before
            filler.unlink()
            assert trained.wait(END_SECONDS) == 0, log.read_text()
        assert fold.state().attempt == 1, "the rank just waited"
        assert final(fold) == reference


def test_a_fold_that_starts_again_waits_for_room(
    new_settings: NewSettings, reference: FinalBytes, tmp_path: Path
) -> None:
    """The disk is full when a rank dies: its fold waits for room and goes on."""
    with small_disk(tmp_path / "disk") as disk, DaskProcesses(tmp_path / "dask") as dask:
        url = str(disk.inside / "job")
        fold = JobFolder(str(disk.outside / "job"), NO_OPTIONS).fold(0)
        settings = settings_file(tmp_path, new_settings(attempts=2))
        dask.start_scheduler()
        for name in ("w0", "w1"):
            dask.start_worker(name, wrapper=disk.wrapper)
        dask.wait_for_workers(2)
        log = tmp_path / "client.log"
        with (
            train(dask, log, settings, "--job", url, wrapper=disk.wrapper) as trained,
            dask.client() as client,
        ):
            under_way(fold)
            filler = disk.fill()
            job = running(client, job_id("train", url))
            assert job is not None
            dask.workers[seat_of(fold, 1).name].rank.kill()
            wait_until(lambda: job.status()["units"][0]["pause"] > FIRST_PAUSE_SECONDS, "two pauses")
            wait_until(lambda: "fold-00: waits, the store is full" in log.read_text(), "a word to the user")
            filler.unlink()
            assert trained.wait(END_SECONDS) == 0, log.read_text()
        assert fold.state().attempt >= 2
        assert final(fold) == reference


def test_a_host_that_sees_other_files_is_refused(
    own: DaskProcesses, new_settings: NewSettings, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    own.start_worker("elsewhere", "--host", "127.0.0.2", wrapper=over(shared))
    own.wait_for_workers(3)
    with own.client() as client, pytest.raises(JobError, match="not every host sees the job folder") as no:
        submit_training(client, new_settings(), str(shared / "job"), NO_OPTIONS)
    assert "127.0.0.2" in str(no.value)
    assert "no token there" in str(no.value)
    assert not (shared / "job" / "job.json").exists()


def test_a_host_that_joins_later_is_refused_by_its_rank(
    own: DaskProcesses, new_settings: NewSettings, tmp_path: Path
) -> None:
    """It takes the place of a lost one, and was not there to be asked when the job was submitted."""
    shared = tmp_path / "shared"
    shared.mkdir()
    elsewhere = over(shared)
    fold = JobFolder(str(shared / "job"), NO_OPTIONS).fold(0)
    with own.client() as client:
        job = submit_training(client, new_settings(), str(shared / "job"), NO_OPTIONS)
        under_way(fold)
        lost = own.workers[seat_of(fold, 1).name]
        send(signal.SIGKILL, (lost.nanny, lost.process))
        own.start_worker("elsewhere", "--host", "127.0.0.2", wrapper=elsewhere)
        with pytest.raises(JobError, match=r"this host does not see the job folder(.|\n)*no token there"):
            job.wait()
    assert fold.state().attempt == 1, "it claimed a fold of its own"
