"""Whether hosts see the same folder, and ranks reach each other: told soon, and by whom it is not so."""

import logging
import os
import re
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from distributed import Client

from h2mv_dist.errors import JobError
from h2mv_dist.jobs import reach, tasks, trainer, training
from h2mv_dist.jobs.cluster import LOOPBACK, workers_of
from h2mv_dist.jobs.messages import Place, RankError
from h2mv_dist.jobs.records import JobFolder
from h2mv_dist.jobs.training import submit_training
from tests.conftest import Place as StorePlace
from tests.conftest import free_port
from tests.jobs.conftest import NO_OPTIONS, training_settings
from tests.jobs.processes import wait_until


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    return JobFolder(str(tmp_path / "job"), NO_OPTIONS)


def test_a_token_is_compared_with_that_of_the_job(place: StorePlace) -> None:
    folder = JobFolder(place.url, place.options)
    with pytest.raises(JobError, match=r"does not see the job folder(.|\n)*no token there"):
        folder.require_token("0123")
    token = folder.write_token()
    folder.require_token(token)
    with pytest.raises(JobError, match=f"{socket.gethostname()}(.|\n)*0123(.|\n)*{token}"):
        folder.require_token("0123")


def test_ranks_look_for_the_token_also_in_a_sweep(
    client: Client, world_url: str, cache: Path, folder: JobFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if every worker had joined later, on a host where the same path is another folder."""
    monkeypatch.setattr(training, "require_shared", lambda *_: "of another folder")
    settings = training_settings(world_url, cache, sweep={"seeds": 2})
    with pytest.raises(JobError, match="2 of 3 units") as failed:
        submit_training(client, settings, folder.url, NO_OPTIONS).wait()
    for run in ("seed=0", "seed=1"):
        assert re.search(f"{run}/fold-00 .attempt 1.: this host does not see", str(failed.value))


@pytest.mark.slow
def test_one_worker_that_hangs_holds_up_nobody(
    client: Client, folder: JobFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stopped = min(workers_of(client))
    pid = client.run(os.getpid, workers=[stopped])[stopped]
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: reach._one_worker_a_host(client) != (stopped,), "word from another worker")
        assert reach.require_shared(client, folder) == folder.token()
        monkeypatch.setattr(reach, "ANSWER_SECONDS", 1.0)
        monkeypatch.setattr(reach, "_one_worker_a_host", lambda _: (stopped,))
        with pytest.raises(JobError, match=f"no worker answers(.|\n)*worker {stopped}"):
            reach.require_shared(client, folder)
        others = sorted(set(workers_of(client)) - {stopped})
        monkeypatch.setattr(reach, "_one_worker_a_host", lambda _: (stopped, others[0]))
        monkeypatch.setattr(reach, "ANSWER_SECONDS", 10.0)
        with caplog.at_level(logging.WARNING):
            assert reach.require_shared(client, folder) == folder.token()
        assert f"worker {stopped} does not answer" in caplog.text
    finally:
        os.kill(pid, signal.SIGCONT)


def test_ranks_meet_within_the_range_of_ports(client: Client) -> None:
    last = free_port()
    ports = f"{last - 1}:{last}"
    with socket.socket() as taken:
        taken.bind((LOOPBACK, last))
        taken.listen()
        meeting = client.submit(tasks.open_rendezvous, "gang", ports, pure=False)
        assert meeting.result() == (LOOPBACK, last - 1)
        with pytest.raises(JobError, match=r"no free port to meet on(.|\n)*cluster.port_range"):
            client.submit(tasks.open_rendezvous, "next gang", ports, pure=False).result()
    client.run(tasks.close_rendezvous, "gang")


def test_ranks_that_cannot_meet_say_where_they_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "REACH_TIMEOUT", timedelta(seconds=1))
    port = free_port()
    with pytest.raises(RankError, match="the ranks cannot reach each other") as failed:
        trainer.meet(Place("gang", 1, 2, 1, (LOOPBACK, port), {}))
    assert failed.value.failure.kind == "failed", "a network may come back"
    for part in (f"{LOOPBACK} port {port}", "rank 1 on", "cluster.interface", "cluster.port_range"):
        assert part in failed.value.failure.reason


def test_workers_are_counted_whatever_the_client_refreshes_meanwhile(client: Client) -> None:
    ended = threading.Event()

    def refresh() -> None:
        # what a client does every other second, and then knows of no worker
        while not ended.is_set():
            client.sync(client._update_scheduler_info, n_workers=0)

    with ThreadPoolExecutor(1) as threads:
        refreshing = threads.submit(refresh)
        counts = {len(workers_of(client)) for _ in range(200)}
        ended.set()
        refreshing.result()
    assert counts == {4}
