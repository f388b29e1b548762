"""Leaving a worker in an orderly way: ranks make a checkpoint before a worker that must go is gone.

Slurm, Kubernetes and cloud providers announce an eviction with SIGTERM. It reaches the worker itself, or its
nanny, which then closes the worker; in both cases the ranks of this process are told, and waited for.
"""

import asyncio
import contextlib
import signal
import threading
import time
from typing import Final

from distributed import Worker
from distributed.core import Status
from distributed.diagnostics.plugin import WorkerPlugin

LEAVE_SECONDS: Final = 25.0
"""How long ranks may take to reach the end of a step and make a checkpoint."""
leaving: Final = threading.Event()
"""Set when this worker must go."""
one_rank: Final = threading.Lock()
"""Held while a rank of this worker is alive, so that there are never two."""

_CLOSING: Final = (Status.closing, Status.closing_gracefully, Status.closed, Status.stopping)


class Preemption(WorkerPlugin):
    """Asks the ranks of a worker to stop before the worker does."""

    name = "h2mv-preemption"
    idempotent = True

    def setup(self, worker: Worker) -> None:
        """Called once, on the worker's event loop."""
        self.worker = worker
        if threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._on_signal)

    async def teardown(self, worker: Worker) -> None:
        """Called when the worker closes."""
        if worker.status in _CLOSING:
            await _ranks_have_left()

    def _on_signal(self) -> None:
        # a paused worker finishes what it does, and is given nothing more
        self.worker.status = Status.paused
        self.leaving = asyncio.ensure_future(self._leave())

    async def _leave(self) -> None:
        await _ranks_have_left()
        await self.worker.close_gracefully(reason="SIGTERM")


async def _ranks_have_left() -> None:
    leaving.set()
    deadline = time.monotonic() + LEAVE_SECONDS
    with contextlib.suppress(asyncio.CancelledError):
        while one_rank.locked() and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
