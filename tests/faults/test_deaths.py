"""Ranks, workers, clients and schedulers that die or fall silent: a fold ends as if nothing had happened."""

import re
import signal
from pathlib import Path

import pytest

from h2mv_dist.io import stores
from h2mv_dist.jobs.records import FoldRecord, JobFolder
from h2mv_dist.jobs.training import submit_training
from tests.faults.conftest import NewSettings, settings_file, train
from tests.faults.folds import (
    END_SECONDS,
    FinalBytes,
    assert_recovered,
    final,
    pointer_held,
    rank_runs,
    seat_of,
    under_way,
    wait_for_the_end,
)
from tests.faults.processes import DaskProcesses, is_alive, send
from tests.jobs.conftest import NO_OPTIONS
from tests.jobs.processes import START_SECONDS, wait_until

pytestmark = [pytest.mark.slow]

STUCK_SECONDS = 15.0


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_is_killed(
    rank: int, steady: DaskProcesses, new_settings: NewSettings, reference: FinalBytes, folder: JobFolder
) -> None:
    fold = folder.fold(0)
    with steady.client() as client:
        job = submit_training(client, new_settings(), folder.url, NO_OPTIONS)
        under_way(fold)
        steady.workers[seat_of(fold, rank).name].rank.kill()
        job.wait()
    assert_recovered(fold, reference)
    assert "SIGKILL" in reasons(fold)[1, rank]


def test_a_rank_is_stopped(
    steady: DaskProcesses, new_settings: NewSettings, reference: FinalBytes, folder: JobFolder
) -> None:
    """It answers nobody, and the other one waits for it in a collective operation."""
    fold = folder.fold(0)
    with steady.client() as client:
        job = submit_training(client, new_settings(stuck_seconds=STUCK_SECONDS), folder.url, NO_OPTIONS)
        under_way(fold)
        stopped = steady.workers[seat_of(fold, 1).name].rank
        stopped.suspend()
        job.wait()
    assert_recovered(fold, reference)
    assert "no sign of life" in reasons(fold)[1, 1]
    assert not is_alive(stopped)
    assert "rank 1 gave no sign of life" in seat_of(fold, 0).before, "the wrong one is blamed"


def test_a_worker_is_killed_with_its_nanny(
    own: DaskProcesses, new_settings: NewSettings, reference: FinalBytes, folder: JobFolder
) -> None:
    """A spare one takes over; the rank is left to find out by itself."""
    fold = folder.fold(0)
    own.start_worker("spare")
    own.wait_for_workers(3)
    with own.client() as client:
        job = submit_training(client, new_settings(), folder.url, NO_OPTIONS)
        under_way(fold)
        seat = seat_of(fold, 0)
        nanny, worker, rank = family = own.workers[seat.name].family
        send(signal.SIGKILL, (nanny, worker))
        wait_until(lambda: not is_alive(rank), "the end of an orphan")
        job.wait()
    assert not any(map(is_alive, family))
    assert_recovered(fold, reference)
    assert seat.worker not in {run.worker for run in rank_runs(fold) if run.attempt > 1}


def test_a_worker_is_killed_and_its_nanny_brings_another(
    own: DaskProcesses, new_settings: NewSettings, reference: FinalBytes, folder: JobFolder
) -> None:
    """Both workers are needed, so the fold only goes on with the new one."""
    fold = folder.fold(0)
    with own.client() as client:
        job = submit_training(client, new_settings(), folder.url, NO_OPTIONS)
        under_way(fold)
        seat = seat_of(fold, 1)
        own.workers[seat.name].process.kill()
        job.wait()
    assert_recovered(fold, reference)
    successor = seat_of(fold, 1)
    assert successor.name == seat.name
    assert successor.worker != seat.worker


def test_the_client_is_killed(
    steady: DaskProcesses,
    new_settings: NewSettings,
    reference: FinalBytes,
    folder: JobFolder,
    tmp_path: Path,
) -> None:
    fold, settings = folder.fold(0), settings_file(tmp_path, new_settings())
    with train(steady, tmp_path / "client.log", settings, "--job", folder.url) as client:
        under_way(fold)
        client.kill()
        assert client.wait(START_SECONDS) == -signal.SIGKILL
    assert fold.done() is None
    wait_for_the_end(folder)
    assert fold.state().attempt == 1, "a client is not needed"
    assert final(fold) == reference


def test_the_scheduler_is_killed(
    own: DaskProcesses,
    new_settings: NewSettings,
    reference: FinalBytes,
    folder: JobFolder,
    tmp_path: Path,
) -> None:
    fold, settings, log = folder.fold(0), settings_file(tmp_path, new_settings()), tmp_path / "client.log"
    with train(own, log, settings, "--job", folder.url) as client:
        under_way(fold)
        assert own.scheduler is not None
        own.scheduler.kill()
        nannies = [worker.nanny for worker in own.workers.values()]
        wait_until(lambda: not any(map(is_alive, nannies)), "the end of the workers")
        assert fold.done() is None
        own.start_scheduler()
        for name in tuple(own.workers):
            own.start_worker(name)
        own.wait_for_workers(2)
        assert client.wait(START_SECONDS) == 2
    # whichever it meets first: nobody who answers, or a new one
    assert re.search("the scheduler (does not know the job|is gone)", log.read_text())
    assert "--resume" in log.read_text()
    with train(own, tmp_path / "resumed.log", "--resume", folder.url) as resumed:
        assert resumed.wait(END_SECONDS) == 0, (tmp_path / "resumed.log").read_text()
    assert_recovered(fold, reference)


def test_a_stale_rank_wakes_up_and_changes_nothing(
    own: DaskProcesses, new_settings: NewSettings, reference: FinalBytes, folder: JobFolder
) -> None:
    """Stopped between writing an epoch and moving the pointer, with all who could have ended it."""
    fold = folder.fold(0)
    own.start_worker("spare")
    own.wait_for_workers(3)
    with own.client() as client:
        job = submit_training(client, new_settings(stuck_seconds=STUCK_SECONDS), folder.url, NO_OPTIONS)
        under_way(fold)
        stale = own.workers[seat_of(fold, 0).name]
        family, rank = stale.family, stale.rank
        own.remember(family)
        with pointer_held(fold):
            unmoved = fold.state()
            wait_until(lambda: written(fold, unmoved.epoch + 1), "the next epoch's checkpoint")
            send(signal.SIGSTOP, family)
        assert fold.state() == unmoved
        wait_until(lambda: fold.state().epoch > unmoved.epoch + 1, "another attempt", seconds=END_SECONDS)
        assert fold.state().attempt >= 2
        assert stale.name not in {run.name for run in rank_runs(fold) if run.attempt >= 2}
        rank.resume()
        wait_until(lambda: not is_alive(rank), "the end of the stale rank")
        assert fold.state().attempt >= 2
        send(signal.SIGCONT, family)
        wait_until(lambda: (1, 0) in reasons(fold), "the stale rank's record")
        job.wait()
    assert_recovered(fold, reference)
    log = stores.get_object(fold.path("attempts/001/rank-0.log"), NO_OPTIONS).decode()
    assert "another attempt owns the fold" in log
    assert {name.split("-")[1] for name in checkpoints(fold)} <= {
        name.split("-")[1] for name in fold.state().names
    }


def reasons(fold: FoldRecord) -> dict[tuple[int, int], str]:
    """(attempt, rank) -> why it ended, for those that have."""
    return {(run.attempt, run.rank): run.reason for run in rank_runs(fold) if run.kind}


def checkpoints(fold: FoldRecord) -> tuple[str, ...]:
    return stores.list_objects(fold.path("checkpoints"), fold.options)


def written(fold: FoldRecord, epoch: int) -> bool:
    return any(name.startswith(f"{epoch:05d}-") and "last" in name for name in checkpoints(fold))
