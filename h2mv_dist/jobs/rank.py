"""The child process of one rank: ``python -m h2mv_dist.jobs.rank FD``.

Reads one JSON line (what to do) from standard input, which then stays open as its lifeline; writes JSON
lines (reports) to the given file descriptor.
"""

import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, Final

from h2mv_dist.errors import H2mvError, StoreError
from h2mv_dist.jobs.tasks import Place

ORPHANED: Final = 98
FAILED: Final = 1

Emit = Callable[..., None]


def main() -> None:
    """Run the rank; leaves without interpreter shutdown, which could wait for communication threads."""
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_exit_when_orphaned, daemon=True).start()
    emit = _emitter(int(sys.argv[1]))
    try:
        from h2mv_dist.jobs.trainer import train_rank

        emit(event="done", **train_rank(order["message"], Place(**order["place"]), emit))
    except BaseException as error:
        traceback.print_exc()
        # what our own checks refuse would be refused again; a store may recover
        retry = isinstance(error, StoreError) or not isinstance(error, H2mvError)
        emit(event="error", text=_explain(error), retry=retry)
        _leave(FAILED)
    _leave(0)


def _emitter(descriptor: int) -> Emit:
    stream = os.fdopen(descriptor, "w", buffering=1)

    def emit(**content: Any) -> None:
        stream.write(json.dumps(content) + "\n")

    return emit


def _explain(error: BaseException) -> str:
    return str(error) if isinstance(error, H2mvError) else traceback.format_exc()


def _exit_when_orphaned() -> None:
    """Standard input closes when the worker that supervises this rank is gone."""
    sys.stdin.read()
    os._exit(ORPHANED)


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
