"""Workers that share the process of their scheduler and client, as notebooks may start them."""

import threading
from pathlib import Path
from typing import Final

import pytest
from distributed import get_worker

from h2mv_dist.jobs import gang
from h2mv_dist.jobs.handle import submit
from h2mv_dist.jobs.messages import Job, Unit
from h2mv_dist.jobs.preemption import Preemption
from h2mv_dist.jobs.run_record import RunRecord
from tests.jobs.conftest import NO_OPTIONS, one_process
from tests.jobs.processes import wait_until

free: Final = threading.Event()
"""Set once a worker has nothing more to do."""


def until_free() -> None:
    """What keeps a worker busy."""
    free.wait()


def is_leaving() -> bool:
    """Of the worker that is asked."""
    return Preemption.of(get_worker()).leaving.is_set()


def test_each_leaves_and_holds_ranks_for_itself() -> None:
    with one_process(2) as (_, workers):
        gone = list(map(Preemption.of, workers))
    assert all(plugin.leaving.is_set() for plugin in gone)
    with one_process(2) as (client, workers):
        held = [Preemption.of(worker).one_rank for worker in workers]
        assert held[0] is not held[1]
        asked = client.submit(is_leaving)
        assert not asked.result(), "others have left, these have not"


def test_an_end_is_recorded_once_a_worker_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gang, "RECORDING_SECONDS", 0.2)
    place = str(tmp_path / "job")
    common = {"storage_options": {}, "folder": place}

    def state() -> str:
        record = RunRecord.read("train-01234567", place, NO_OPTIONS)
        return "" if record is None else record.state

    with one_process(1) as (client, _):
        busy = client.submit(until_free, pure=False)
        wait_until(lambda: bool(client.processing()[next(iter(client.nthreads()))]), "the worker to be busy")
        handle = submit(client, Job("train-01234567", place, common, (Unit("fold-00", "summary", {}),)))
        handle.cancel()
        wait_until(lambda: handle.status()["finished"], "the end of a job that nobody is kept waiting for")
        assert state() == "running"
        free.set()
        busy.result()
        wait_until(lambda: state() == "cancelled", "the record")
