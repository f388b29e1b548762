"""Run one rank as a child process of a Dask worker, and make sure that it ends with its task.

A rank lives in its own process because a thread cannot be cancelled and a distributed torch object that
outlives its process group can freeze the worker. The child's standard input is its lifeline: it exits
when that closes. Its reports come back as JSON lines on a pipe. It is stopped when the task is cancelled,
when it says nothing for too long, when it grows too large, and, after a checkpoint, when the worker must go.
"""

import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, Final

import psutil
from dask.utils import format_bytes
from distributed import get_worker

from h2mv_dist.config import StorageOptions
from h2mv_dist.errors import StoreError, describe
from h2mv_dist.jobs.memory import own_bytes
from h2mv_dist.jobs.messages import Failure, Message, Place, RankError, Share, failure_of
from h2mv_dist.jobs.preemption import RANK_MODULE, Preemption
from h2mv_dist.jobs.records import AttemptRecord, JobFolder
from h2mv_dist.jobs.tasks import cancellation_check, close_rendezvous, report, worker_host

POLL_SECONDS: Final = 0.2
GRACE_SECONDS: Final = 2.0
LEAVE_SECONDS: Final = 20.0
"""How long a rank that was asked to leave may take."""
LOG_BYTES: Final = 4 * 2**20
"""What is kept of a rank's log; its end says why the rank ended."""

_log = logging.getLogger(__name__)

_logs: dict[tuple[str, str, int, int], IO[bytes]] = {}
"""What the ranks of this worker print to, by job, unit, attempt and rank."""


def printed_so_far(job: str) -> dict[tuple[str, int, int], str]:
    """On a worker: the end of what its ranks of a job printed, by unit, attempt and rank."""
    own = {key[1:]: log for key, log in tuple(_logs.items()) if key[0] == job}
    return {key: _end_of(log).decode(errors="replace") for key, log in own.items()}


def supervise_rank(message: Message, place: Place) -> dict[str, Any]:
    """Run a rank to its end; returns its last report.

    Raises:
        RankError: with the rank's own traceback.
        StoreError: it cannot be recorded who runs the rank.
    """
    fold = JobFolder(message["folder"], StorageOptions(message["storage_options"])).fold(message["fold"])
    record = fold.attempt(place.attempt)
    own = Preemption.of(get_worker())
    with own.one_rank, tempfile.TemporaryFile() as log:
        started = _who(place)
        failure: Failure | None = None
        key = (message["job"], message["unit"], place.attempt, place.rank)
        _logs[key] = log
        try:
            _require_time(own.leaving)
            record.write_rank(place.rank, started)
            with _child(message, place, log) as child:
                return _Watch(child, message, place, started, own.leaving).until_the_end()
        except Exception as error:
            failure = failure_of(error)
            raise
        finally:
            del _logs[key]
            close_rendezvous(place.gang)
            _keep(record, place.rank, started, failure, log)


def _require_time(leaving: threading.Event) -> None:
    """Take no rank on a worker that is about to go.

    Raises:
        RankError: it is.
    """
    if leaving.is_set():
        raise RankError(Failure("preempted", "the worker was leaving already"))


def _who(place: Place) -> dict[str, Any]:
    worker = get_worker()
    return {
        **{key: value for key, value in place._asdict().items() if key != "rendezvous"},
        "worker": worker.address,
        "name": str(worker.name),
        "host": socket.gethostname(),
        "started": time.time(),
    }


def _keep(
    record: AttemptRecord, rank: int, started: dict[str, Any], failure: Failure | None, log: IO[bytes]
) -> None:
    """Write how it ended and what it printed; a store that fails now must not hide the failure itself."""
    ended = {"kind": "done", "reason": ""} if failure is None else failure._asdict()
    try:
        record.write_rank(rank, {**started, "ended": time.time(), "outcome": ended})
        record.write_log(rank, _end_of(log))
    except StoreError as error:
        _log.warning("the log of rank %d could not be kept: %s", rank, error)


def _end_of(log: IO[bytes]) -> bytes:
    """What is kept of a log; a child may be writing to it, so its place there is left alone."""
    size = os.fstat(log.fileno()).st_size
    return os.pread(log.fileno(), LOG_BYTES, max(0, size - LOG_BYTES))


class _Child:
    """The process and the reading end of its reports."""

    def __init__(self, process: subprocess.Popen[bytes], events: int) -> None:
        self.process, self.events = process, events

    def end(self) -> None:
        """Wait for a process that is ending, or end it; what it started, such as compilers, ends with it."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=GRACE_SECONDS if self.process.poll() is None else 0)
        # nobody may be left
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def _child(message: Message, place: Place, log: IO[bytes]) -> Iterator[_Child]:
    read_end, write_end = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", RANK_MODULE, str(write_end)],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        pass_fds=[write_end],
        env={**os.environ, **_interface_variables(worker_host())},
        start_new_session=True,
    )
    os.close(write_end)
    assert process.stdin is not None
    child = _Child(process, read_end)
    try:
        share = Share(get_worker().state.nthreads, _memory_left())
        order = {"message": dict(message), "place": place._asdict(), "share": share._asdict()}
        process.stdin.write(json.dumps(order).encode() + b"\n")
        process.stdin.flush()
        yield child
    finally:
        process.stdin.close()
        child.end()
        os.close(read_end)


def _memory_left() -> int | None:
    """Bytes that the worker's limit leaves to its rank; None without a limit."""
    limit = get_worker().memory_manager.memory_limit
    return max(0, limit - psutil.Process().memory_info().rss) if limit else None


class _Watch:
    """Reads a child's reports and decides whether it may go on.

    A pulse only says that the process is alive. It gets on if it says anything else: a rank that waits for
    one that was stopped has a pulse but no beat.
    """

    def __init__(
        self, child: _Child, message: Message, place: Place, record: dict[str, Any], leaving: threading.Event
    ) -> None:
        self.child, self.message, self.place, self.record = child, message, place, record
        self.leaving = leaving
        self.stuck_seconds = float(message["settings"]["training"]["stuck_seconds"])
        self.alive = self.got_on = time.monotonic()
        self.begun = False
        self.asked_to_leave: float | None = None
        self.require_wanted = cancellation_check()

    def until_the_end(self) -> dict[str, Any]:
        """The last report.

        Raises:
            RankError: it failed, or had to be stopped.
        """
        latest: dict[str, Any] = {}
        for event in self._events():
            if event["event"] != "beat":
                latest = event
            if event["event"] == "first step":
                self.record["first_step"] = event["seconds_since_submit"]
            # a fold that was done before tells its epochs at its end only
            if event["event"] in ("epoch", "waiting", "done") and self.place.rank == 0:
                report(self.message, **event)
        code = self.child.process.wait()
        if latest.get("event") in ("error", "preempted"):
            raise RankError(Failure(latest["kind"], latest["reason"]))
        if code == -signal.SIGTERM:
            # it came before the rank could listen; from its first line on it would have made a checkpoint
            reason = f"rank {self.place.rank} was asked to leave before it had begun"
            raise RankError(Failure("preempted", reason))
        if code != 0:
            reason = f"rank {self.place.rank} {_how_it_ended(code)} without a word"
            raise RankError(Failure("machine", reason))
        return latest

    def _events(self) -> Iterator[dict[str, Any]]:
        """The child's reports, but for pulses, until it closes its end of the pipe."""
        buffer = b""
        while True:
            if select.select([self.child.events], [], [], POLL_SECONDS)[0]:
                data = os.read(self.child.events, 65536)
                if not data:
                    return
                self.alive = time.monotonic()
                *lines, buffer = (buffer + data).split(b"\n")
                for event in map(json.loads, lines):
                    pulse = event["event"] == "pulse"
                    self.begun |= not pulse
                    # until the rank's own code is imported there is nothing else to hear
                    if not pulse or not self.begun:
                        self.got_on = self.alive
                    if not pulse:
                        yield event
            self._check()

    def _check(self) -> None:
        self.require_wanted()
        self._check_leaving()
        self._check_memory()
        if time.monotonic() - self.got_on > self.stuck_seconds:
            raise RankError(self._stuck())

    def _stuck(self) -> Failure:
        limit = f"for {self.stuck_seconds:g} s (training.stuck_seconds)"
        if time.monotonic() - self.alive > self.stuck_seconds / 2:
            return Failure("machine", f"rank {self.place.rank} gave no sign of life {limit}")
        return Failure("peer", f"rank {self.place.rank} took no step {limit}; perhaps it waited for another")

    def _check_leaving(self) -> None:
        if not self.leaving.is_set():
            return
        if self.asked_to_leave is None:
            self.asked_to_leave = time.monotonic()
            self.child.process.send_signal(signal.SIGTERM)
        elif time.monotonic() - self.asked_to_leave > LEAVE_SECONDS:
            raise RankError(Failure("preempted", "the worker had to leave, without a checkpoint"))

    def _check_memory(self) -> None:
        limit = get_worker().memory_manager.memory_limit
        if not limit:
            return
        used = own_bytes(self.child.process.pid) + psutil.Process().memory_info().rss
        if used > limit:
            raise RankError(
                Failure(
                    "refused",
                    describe(
                        "a rank needs more memory than its worker may use",
                        where=f"rank {self.place.rank} on {get_worker().address}",
                        expected=f"at most {format_bytes(limit)} for worker and rank together",
                        actual=format_bytes(used),
                        fix="set training.recompute, lower training.batch_size or training.cells_at_once, "
                        "raise training.ranks, or start workers with more memory (cluster.memory_limit)",
                    ),
                )
            )


def _how_it_ended(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"


def _interface_variables(host: str) -> dict[str, str]:
    """Make gloo and nccl talk over the interface the worker itself uses."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == host and a.family in (socket.AF_INET, socket.AF_INET6) for a in addresses):
            return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
    return {}
