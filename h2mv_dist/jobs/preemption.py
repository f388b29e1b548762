"""Leaving a worker in an orderly way: ranks make a checkpoint before a worker that must go is gone.

Slurm, Kubernetes and cloud providers announce an eviction with SIGTERM. It reaches the worker itself, or its
nanny, which then closes the worker; in both cases the ranks of this process are told, and waited for.
"""

import asyncio
import contextlib
import os
import signal
import threading
import time
from typing import Final

import psutil
from distributed import Nanny, Worker
from distributed.core import Status
from distributed.diagnostics.plugin import NannyPlugin, WorkerPlugin

LEAVE_SECONDS: Final = 25.0
"""How long ranks may take to reach the end of a step and make a checkpoint."""
RANK_MODULE: Final = "h2mv_dist.jobs.rank"
"""What a rank's process is started with."""

_CLOSING: Final = (Status.closing, Status.closing_gracefully, Status.closed, Status.stopping)


class Preemption(WorkerPlugin):
    """Asks the ranks of a worker to stop before the worker does.

    Attributes:
        leaving: set when the worker must go.
        one_rank: held while a rank of the worker is alive, so that there are never two.
    """

    name = "h2mv-preemption"
    idempotent = True
    leaving: threading.Event
    one_rank: threading.Lock

    @staticmethod
    def of(worker: Worker) -> "Preemption":
        """That of a worker; a process may hold several of them."""
        plugin = worker.plugins[Preemption.name]
        assert isinstance(plugin, Preemption)
        return plugin

    def setup(self, worker: Worker) -> None:
        """Called once, on the worker's event loop."""
        self.worker = worker
        self.leaving, self.one_rank = threading.Event(), threading.Lock()
        if threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._on_signal)

    async def teardown(self, worker: Worker) -> None:
        """Called when the worker closes."""
        if worker.status in _CLOSING:
            await self._ranks_have_left()

    def _on_signal(self) -> None:
        # A paused worker finishes what it does, and is given nothing more. Dask pauses workers that are short
        # of memory, too, and would let this one run again at once.
        if (manager := self.worker.memory_manager) is not None:
            manager.memory_pause_fraction = False
        self.worker.status = Status.paused
        self.on_its_way = asyncio.ensure_future(self._leave())

    async def _leave(self) -> None:
        await self._ranks_have_left()
        if self.worker.status not in _CLOSING:
            await self.worker.close_gracefully(reason="SIGTERM")

    async def _ranks_have_left(self) -> None:
        self.leaving.set()
        deadline = time.monotonic() + LEAVE_SECONDS
        with contextlib.suppress(asyncio.CancelledError):
            while self.one_rank.locked() and time.monotonic() < deadline:
                await asyncio.sleep(0.05)


class NannyPreemption(NannyPlugin):
    """Lets a worker's ranks leave before its nanny ends it, for which Dask allows a few seconds only."""

    name = "h2mv-nanny-preemption"

    async def teardown(self, nanny: Nanny) -> None:
        """Called when the nanny closes, before it ends its worker."""
        if nanny.pid is None or not _has_ranks(nanny.pid):
            return
        os.kill(nanny.pid, signal.SIGTERM)
        deadline = time.monotonic() + LEAVE_SECONDS
        # the worker tells its nanny, which changes its status, once the ranks have left
        while nanny.is_alive() and nanny.status == Status.closing and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        nanny.status = Status.closing


def _has_ranks(worker: int) -> bool:
    """Whether the process of a worker has a rank below it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return any(RANK_MODULE in child.cmdline() for child in psutil.Process(worker).children())
    return False
