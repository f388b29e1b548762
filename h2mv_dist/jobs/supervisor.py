"""Run one rank as a child process of a Dask worker, and make sure that it ends with its task.

A rank lives in its own process because a thread cannot be cancelled and a distributed torch object that
outlives its process group can freeze the worker. The child's standard input is its lifeline: it exits
when that closes. Its reports come back as JSON lines on a pipe.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, Final

import psutil
from distributed import get_worker

from h2mv_dist.config import StorageOptions
from h2mv_dist.jobs.records import JobFolder
from h2mv_dist.jobs.tasks import Message, Place, RankError, close_rendezvous, report, worker_host

POLL_SECONDS: Final = 0.2
SILENCE_SECONDS: Final = 900.0
"""A rank that reports nothing for this long is considered stuck."""
GRACE_SECONDS: Final = 2.0


def supervise_rank(message: Message, place: Place) -> dict[str, Any]:
    """Run a rank to its end; returns its last report.

    Raises:
        RankError: with the rank's own traceback.
    """
    with tempfile.TemporaryFile() as log:
        try:
            with _child(message, place, log) as (process, events):
                return _watch(process, events, message, place)
        finally:
            close_rendezvous(place.gang)
            _keep_log(message, place, log)


@contextmanager
def _child(message: Message, place: Place, log: IO[bytes]) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    read_end, write_end = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "h2mv_dist.jobs.rank", str(write_end)],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        pass_fds=[write_end],
        env={**os.environ, **_interface_variables(worker_host())},
        start_new_session=True,
    )
    os.close(write_end)
    assert process.stdin is not None
    try:
        order = {"message": dict(message), "place": place._asdict()}
        process.stdin.write(json.dumps(order).encode() + b"\n")
        process.stdin.flush()
        yield process, read_end
    finally:
        process.stdin.close()
        _end(process)
        os.close(read_end)


def _watch(process: subprocess.Popen[bytes], events: int, message: Message, place: Place) -> dict[str, Any]:
    latest: dict[str, Any] = {}
    for event in _reports(events):
        if event is None or event["event"] == "beat":
            continue
        latest = event
        if event["event"] == "epoch":
            report(message, **event)
    code = process.wait()
    if code != 0:
        text = latest.get("text") or f"rank {place.rank} {_how_it_ended(code)} without a word"
        raise RankError(text, latest.get("retry", True))
    return latest


def _reports(events: int) -> Iterator[dict[str, Any] | None]:
    """The child's reports until it closes its end of the pipe; raises when it is stuck or unwanted."""
    buffer, heard = b"", time.monotonic()
    while True:
        if select.select([events], [], [], POLL_SECONDS)[0]:
            data = os.read(events, 65536)
            if not data:
                return
            heard = time.monotonic()
            *lines, buffer = (buffer + data).split(b"\n")
            yield from (json.loads(line) for line in lines)
        if _cancelled():
            raise RankError("cancelled", retry=True)
        if time.monotonic() - heard > SILENCE_SECONDS:
            raise RankError(f"no sign of life for {SILENCE_SECONDS:.0f} s", retry=True)


def _cancelled() -> bool:
    """Whether the scheduler does not want this task any more; a thread must find out by itself."""
    worker = get_worker()
    state = worker.state.tasks.get(worker.get_current_task())
    return state is None or state.state != "executing"


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(timeout=GRACE_SECONDS if process.poll() is None else 0)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _how_it_ended(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"


def _interface_variables(host: str) -> dict[str, str]:
    """Make gloo and nccl talk over the interface the worker itself uses."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == host and a.family in (socket.AF_INET, socket.AF_INET6) for a in addresses):
            return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
    return {}


def _keep_log(message: Message, place: Place, log: IO[bytes]) -> None:
    log.seek(0)
    text = log.read()
    if text:
        folder = JobFolder(message["folder"], StorageOptions(message["storage_options"]))
        folder.fold(message["fold"]).write_log(place.attempt, place.rank, text)
