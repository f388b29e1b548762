"""Workers that are asked to leave: the ranks make a checkpoint first, and nobody's attempts are used up."""

import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from h2mv_dist.jobs.preemption import LEAVE_SECONDS
from h2mv_dist.jobs.records import JobFolder
from h2mv_dist.jobs.training import submit_training
from tests.faults.conftest import NewSettings, settings_file
from tests.faults.folds import (
    END_SECONDS,
    FinalBytes,
    assert_recovered,
    final,
    pointer_held,
    rank_runs,
    seat_of,
    under_way,
)
from tests.faults.processes import DaskProcesses, is_alive
from tests.jobs.conftest import NO_OPTIONS
from tests.jobs.processes import process, wait_until

pytestmark = [pytest.mark.slow]

DASK_WAITS_SECONDS = 8.0
"""For a worker whose nanny was asked to leave."""


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[DaskProcesses]:
    """Three workers with a memory limit, as batch systems give them; Dask then watches over their memory."""
    with DaskProcesses(tmp_path / "dask") as dask:
        dask.start_scheduler()
        for name in ("w0", "w1", "w2"):
            dask.start_worker(name, "--memory-limit", "3GiB")
        dask.wait_for_workers(3)
        yield dask


@pytest.mark.parametrize(
    ("asked", "slow_seconds"),
    [("worker", 0.0), ("nanny", 0.0), ("nanny", DASK_WAITS_SECONDS + 4.0)],
    ids=["worker", "nanny", "nanny-slow"],
)
def test_a_worker_is_asked_to_leave(
    asked: str,
    slow_seconds: float,
    limited: DaskProcesses,
    new_settings: NewSettings,
    reference: FinalBytes,
    folder: JobFolder,
) -> None:
    fold = folder.fold(0)
    with limited.client() as client:
        job = submit_training(client, new_settings(attempts=1), folder.url, NO_OPTIONS)
        under_way(fold)
        leaving = limited.workers[seat_of(fold, 1).name]
        with pointer_held(fold):
            (leaving.process if asked == "worker" else leaving.nanny).terminate()
            time.sleep(slow_seconds)
        wait_until(lambda: "part" in fold.state().last, "a checkpoint within the epoch")
        job.wait()
    assert_recovered(fold, reference)
    assert {run.kind for run in rank_runs(fold) if run.attempt == 1} == {"preempted"}
    assert leaving.name not in {run.name for run in rank_runs(fold) if run.attempt > 1}
    wait_until(lambda: not is_alive(leaving.nanny), "the end of the worker")
    assert "Resuming worker" not in limited.log(f"worker-{leaving.name}").read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_command_with_workers_of_its_own_is_asked_to_leave(
    number: signal.Signals,
    code: int,
    new_settings: NewSettings,
    reference: FinalBytes,
    folder: JobFolder,
    tmp_path: Path,
) -> None:
    """A batch job that reaches its time limit, or Ctrl-C: within the epoch, and resumed to the bit."""
    fold, log = folder.fold(0), tmp_path / "log"
    own = ("--set", "cluster.kind=local", "--set", "cluster.workers=2")
    first = ("train", settings_file(tmp_path, new_settings()), "--job", folder.url, *own)
    with process(log, "h2mv_dist.cli", *first) as trained:
        under_way(fold)
        with pointer_held(fold):
            trained.send_signal(number)
            wait_until(lambda: "the job stops with its cluster" in log.read_text(), "a word", log)
        assert trained.wait(LEAVE_SECONDS) == code, log.read_text()
    assert "part" in fold.state().last
    assert {run.kind for run in rank_runs(fold)} == {"preempted"}
    assert f"h2mv-dist train --resume {folder.url}" in log.read_text()
    # on a busy machine Dask complains of connections that the other side closed first
    assert "h2mv_dist/" not in log.read_text(), "a traceback of ours"
    if number == signal.SIGINT:
        return  # what is left is the same
    with process(log, "h2mv_dist.cli", "train", "--resume", folder.url, *own) as resumed:
        assert resumed.wait(END_SECONDS) == 0, log.read_text()
    assert final(fold) == reference


def test_a_rank_is_asked_to_leave_before_it_listens(
    own: DaskProcesses, new_settings: NewSettings, reference: FinalBytes, folder: JobFolder
) -> None:
    """Batch systems send SIGTERM to every process, whatever it is about to do."""
    fold = folder.fold(0)
    with own.client() as client:
        job = submit_training(client, new_settings(attempts=1), folder.url, NO_OPTIONS)
        newborn: list[psutil.Process] = []

        def born() -> bool:
            with suppress(ValueError):
                newborn.append(own.workers["w1"].rank)
            return bool(newborn)

        wait_until(born, "a rank")
        newborn[0].terminate()
        job.wait()
    assert final(fold) == reference
    kinds = {run.kind for run in rank_runs(fold) if run.attempt == 1}
    assert "preempted" in kinds
    assert any("before it had begun" in run.reason for run in rank_runs(fold)), kinds
