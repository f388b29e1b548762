"""The child process of one rank: ``python -m h2mv_dist.jobs.rank FD``.

Reads one JSON line (what to do) from standard input, which then stays open as its lifeline; writes JSON
lines (reports) to the given file descriptor. SIGTERM asks it to make a checkpoint and leave.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, Final

from h2mv_dist.errors import H2mvError, JobError, describe
from h2mv_dist.jobs.memory import RANK_BYTES, keep_freed_memory, loading
from h2mv_dist.jobs.messages import Failure, Place, RankError, Share, failure_of

ORPHANED: Final = 98
FAILED: Final = 1
PULSE_SECONDS: Final = 1.0
"""How often a rank says that it is alive, whatever it is waiting for."""
PEER_WORDS: Final = ("gloo/", "Connection closed by peer", "Connection reset by peer", "NCCL")

Emit = Callable[..., None]


def main() -> None:
    """Run the rank; leaves without interpreter shutdown, which could wait for communication threads."""
    leave = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: leave.set())
    keep_freed_memory(RANK_BYTES)
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_exit_when_orphaned, daemon=True).start()
    emit = _emitter(int(sys.argv[1]))
    threading.Thread(target=_pulse, args=[emit], daemon=True).start()
    try:
        with loading():
            # optimizers and DDP do, too
            import torch._dynamo  # noqa: F401

            from h2mv_dist.jobs.trainer import train_rank

        summary = train_rank(
            order["message"], Place(**order["place"]), Share(**order["share"]), emit, leave.is_set
        )
        if summary is None:
            emit(event="preempted", kind="preempted", reason="the worker had to leave; a checkpoint was made")
        else:
            emit(event="done", **summary)
    except BaseException as error:
        traceback.print_exc()
        failure = _failure(error)
        emit(event="error", kind=failure.kind, reason=failure.reason)
        _leave(FAILED)
    _leave(0)


def _emitter(descriptor: int) -> Emit:
    stream, lock = os.fdopen(descriptor, "w", buffering=1), threading.Lock()

    def emit(**content: Any) -> None:
        with lock:
            stream.write(json.dumps(content) + "\n")

    return emit


def _pulse(emit: Emit) -> None:
    while True:
        emit(event="pulse")
        time.sleep(PULSE_SECONDS)


def _failure(error: BaseException) -> Failure:
    """Sort out what the process group and the device say of themselves from errors of this rank."""
    import torch
    from torch.distributed import DistError

    if isinstance(error, torch.OutOfMemoryError):
        return failure_of(_no_device_memory(error))
    found = failure_of(error)
    if isinstance(error, H2mvError | RankError):
        # it has said what it is, whatever words of a network are in its message
        return found
    if isinstance(error, DistError) or any(word in str(error) for word in PEER_WORDS):
        return Failure("peer", found.reason)
    return Failure("machine", found.reason) if isinstance(error, torch.AcceleratorError) else found


def _no_device_memory(error: BaseException) -> JobError:
    return JobError(
        describe(
            "the GPU's memory is not enough for a step",
            where="training.batch_size",
            expected="a step that fits",
            actual=str(error),
            fix="set training.cells_at_once below a rank's share of the batch, or raise training.ranks",
        )
    )


def _exit_when_orphaned() -> None:
    """Standard input closes when the worker that supervises this rank is gone; what it started goes, too."""
    sys.stdin.read()
    if os.getpgid(0) == os.getpid():
        # compilers, which would go on for minutes
        os.killpg(0, signal.SIGKILL)
    os._exit(ORPHANED)


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
