"""A Dask cluster of plain processes that tests can kill, stop and start again one by one."""

import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil
from distributed import Client

from h2mv_dist.config import ClusterSettings
from h2mv_dist.jobs.cluster import LOOPBACK, PRELOAD, connect
from h2mv_dist.jobs.preemption import RANK_MODULE
from tests.conftest import free_port
from tests.jobs.processes import START_SECONDS, launch


@dataclass(frozen=True)
class DaskWorker:
    """A nanny, the worker it started, and the rank the worker may have started."""

    name: str
    nanny: psutil.Process

    @property
    def process(self) -> psutil.Process:
        """The worker itself."""
        (found,) = _children(self.nanny, "spawn_main")
        return found

    @property
    def rank(self) -> psutil.Process:
        """The rank it runs now."""
        (found,) = _children(self.process, RANK_MODULE)
        return found

    @property
    def family(self) -> list[psutil.Process]:
        """Nanny, worker and rank, the eldest first."""
        return [self.nanny, self.process, self.rank]


def send(number: signal.Signals, processes: Iterable[psutil.Process]) -> None:
    """Send a signal to each process that is still there."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs; one that ended but was not waited for does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class DaskProcesses:
    """A scheduler with the coordinator, and workers, on 127.0.0.1; whatever is left is killed at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = f"tcp://{LOOPBACK}:{free_port()}"
        self.scheduler: psutil.Process | None = None
        self.workers: dict[str, DaskWorker] = {}
        self._started: list[subprocess.Popen[bytes]] = []
        self._families: set[psutil.Process] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for started in self._started:
            with suppress(psutil.NoSuchProcess):
                self.remember(psutil.Process(started.pid).children(recursive=True))
            started.kill()
        send(signal.SIGKILL, self._families)
        for started in self._started:
            started.wait()

    @property
    def settings(self) -> ClusterSettings:
        """How a client finds the scheduler."""
        return ClusterSettings(address=self.address)

    def start_scheduler(self, **environment: str) -> None:
        """Start the scheduler, always at the same address."""
        self.scheduler = self._start(
            "scheduler",
            ("distributed.cli.dask_scheduler", "--host", self.address, "--preload", PRELOAD),
            environment,
        )

    def start_worker(
        self, name: str, *options: str, wrapper: tuple[str, ...] = (), **environment: str
    ) -> DaskWorker:
        """Start a worker of one thread and its nanny."""
        folder = self.folder / "scratch"
        command = ("distributed.cli.dask_worker", self.address, "--name", name, "--nthreads", "1")
        place = ("--host", LOOPBACK, "--local-directory", str(folder), "--memory-limit", "0")
        nanny = self._start(f"worker-{name}", (*command, *place, *options), environment, wrapper)
        self.workers[name] = DaskWorker(name, nanny)
        return self.workers[name]

    def wait_for_workers(self, count: int) -> None:
        """Wait until the scheduler has so many workers."""
        with self.client() as client:
            client.wait_for_workers(count, timeout=START_SECONDS)

    @contextmanager
    def client(self) -> Iterator[Client]:
        """A connection of this process."""
        with connect(self.settings) as connected:
            yield connected

    def remember(self, processes: Iterable[psutil.Process]) -> None:
        """Kill these, too, at the end: processes whose parent may be gone by then."""
        self._families |= set(processes)

    def log(self, name: str) -> Path:
        """What ``scheduler`` or ``worker-NAME`` printed."""
        return self.folder / f"{name}.log"

    def _start(
        self,
        name: str,
        command: tuple[str, ...],
        environment: dict[str, str],
        wrapper: tuple[str, ...] = (),
    ) -> psutil.Process:
        self.folder.mkdir(parents=True, exist_ok=True)
        local = ("--dashboard-address", f"{LOOPBACK}:0")
        started = launch(
            self.log(name),
            (*wrapper, sys.executable, "-m", *command, *local),
            {"OMP_NUM_THREADS": "1", **environment},
        )
        self._started.append(started)
        return psutil.Process(started.pid)


def _children(parent: psutil.Process, word: str) -> list[psutil.Process]:
    found = []
    for child in parent.children():
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if any(word in part for part in child.cmdline()):
                found.append(child)
    return found
