"""The coordinator: a scheduler plugin that leases gangs of workers, all at once or not at all.

It runs on the scheduler's event loop, so allocation is single-threaded and atomic: gangs cannot deadlock, and
a job outlives the client that submitted it. It does no I/O and runs no user code there; messages are plain
dictionaries. A job is a list of units (a fold, a tile); a unit needs ``ranks`` workers at once.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from distributed import Client, Future, Scheduler
from distributed.diagnostics.plugin import SchedulerPlugin
from tornado.ioloop import PeriodicCallback

from h2mv_dist.jobs import tasks
from h2mv_dist.jobs.messages import Job, Unit

PLUGIN_NAME: Final = "h2mv-coordinator"
PUMP_MILLISECONDS: Final = 500
"""How often waiting units are looked at, beside every event: a worker joins before it is ready."""


def choose_workers(free: Iterable[tuple[str, str]], n: int) -> tuple[str, ...] | None:
    """Addresses of ``n`` workers, packed on few hosts; None if there are not enough.

    Args:
        free: (host, address) of each idle worker.
        n: gang size.

    >>> choose_workers([("b", "b:1"), ("a", "a:2"), ("a", "a:1")], 2)
    ('a:1', 'a:2')
    >>> choose_workers([("a", "a:1")], 2) is None
    True
    """
    ordered = sorted(free)
    return tuple(address for _, address in ordered[:n]) if len(ordered) >= n else None


@dataclass(slots=True)
class _Gang:
    """The workers of one attempt of one unit."""

    job: str
    name: str
    workers: tuple[str, ...]
    lost: asyncio.Event = field(default_factory=asyncio.Event)


class GangError(Exception):
    """An attempt ended early; says whether another one could help."""

    def __init__(self, reason: str, *, retry: bool) -> None:
        super().__init__(reason)
        self.retry = retry


class Coordinator(SchedulerPlugin):
    """Runs the units of all jobs on gangs of workers, first come first served."""

    name = PLUGIN_NAME
    idempotent = True

    async def start(self, scheduler: Scheduler) -> None:
        """Called once, on the scheduler."""
        self.scheduler = scheduler
        self.jobs: dict[str, Job] = {}
        self.queue: deque[tuple[Job, Unit]] = deque()
        self.leases: dict[str, _Gang] = {}
        self.running: set[asyncio.Task[None]] = set()
        self.client = await Client(
            scheduler.address,
            asynchronous=True,
            set_as_default=False,
            name=PLUGIN_NAME,
            security=scheduler.security,
        )
        scheduler.handlers.update(h2mv_submit=self.submit, h2mv_status=self.status, h2mv_cancel=self.cancel)
        self.pump_timer = PeriodicCallback(self.pump, PUMP_MILLISECONDS)
        self.pump_timer.start()

    async def close(self) -> None:
        """Called when the scheduler stops."""
        self.pump_timer.stop()
        for task in self.running:
            task.cancel()
        await self.client.close()

    async def submit(self, job: dict[str, Any]) -> str:
        """Queue a job; answers "" or why it was refused."""
        new = Job.from_message(job)
        known = self.jobs.get(new.id)
        if known is not None and not known.finished:
            return f"job {new.id} is already running on this scheduler"
        self.jobs[new.id] = new
        self.queue.extend((new, unit) for unit in new.units)
        self.pump()
        return ""

    async def status(self, job: str) -> dict[str, Any] | None:
        """State of every unit of a job, without its settings."""
        return self.jobs[job].status() if job in self.jobs else None

    async def cancel(self, job: str) -> None:
        """Stop a job's units; workers are free within a second."""
        cancelled = self.jobs[job]
        cancelled.cancelled = True
        self.queue = deque((j, u) for j, u in self.queue if j is not cancelled)
        for unit in cancelled.all_units():
            if unit.state in ("queued", "waiting"):
                unit.state = "cancelled"
        for gang in self.leases.values():
            if gang.job == job:
                gang.lost.set()

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """A worker joined: it may complete a gang."""
        scheduler.loop.call_later(0, self.pump)

    def remove_worker(self, scheduler: Scheduler, worker: str, **_: Any) -> None:
        """A worker is gone: its gang cannot go on (a pinned task would wait for it for ever)."""
        if worker in self.leases:
            self.leases[worker].lost.set()

    def log_event(self, topic: str, msg: Any) -> None:
        """Keep the latest report of each unit, for whoever asks."""
        if topic == tasks.TOPIC and isinstance(msg, Mapping) and msg.get("job") in self.jobs:
            self.jobs[msg["job"]].report(msg)

    def pump(self) -> None:
        """Start as many waiting units as there are free gangs, in order."""
        while self.queue:
            job, unit = self.queue[0]
            workers = choose_workers(self._free_workers(), unit.ranks)
            if workers is None:
                return
            self.queue.popleft()
            self._launch(job, unit, workers)

    def _free_workers(self) -> list[tuple[str, str]]:
        return [
            (state.host, address)
            for address, state in self.scheduler.workers.items()
            if address not in self.leases and state.status.name == "running" and not state.processing
        ]

    def _launch(self, job: Job, unit: Unit, workers: tuple[str, ...]) -> None:
        unit.start(workers)
        gang = _Gang(job.id, f"{job.id}/{unit.name}/{unit.attempt}", workers)
        self.leases.update(dict.fromkeys(workers, gang))
        task = asyncio.ensure_future(self._run(job, unit, gang))
        self.running.add(task)
        task.add_done_callback(self.running.discard)

    async def _run(self, job: Job, unit: Unit, gang: _Gang) -> None:
        try:
            unit.result = await self._attempt(job, unit, gang)
            unit.state = "done"
        except GangError as failure:
            self._fail(job, unit, failure)
        finally:
            for worker in gang.workers:
                if self.leases.get(worker) is gang:
                    del self.leases[worker]
        self._finish(job)
        self.pump()

    def _fail(self, job: Job, unit: Unit, failure: GangError) -> None:
        unit.error = str(failure)
        if job.cancelled:
            unit.state = "cancelled"
        elif failure.retry and unit.attempt < unit.attempts:
            unit.state = "queued"
            self.queue.appendleft((job, unit))
        else:
            unit.state = "failed"

    def _finish(self, job: Job) -> None:
        """Queue the job's last unit once all others are done."""
        if job.final is not None and job.final.state == "waiting":
            if all(unit.state == "done" for unit in job.units):
                job.final.state = "queued"
                self.queue.append((job, job.final))
            elif all(unit.ended for unit in job.units):
                job.final.state = "cancelled"

    async def _attempt(self, job: Job, unit: Unit, gang: _Gang) -> Any:
        """Run all ranks of a gang; one failure or loss ends them all."""
        futures: list[Future[Any]] = []
        work = asyncio.ensure_future(self._ranks(job, unit, gang, futures))
        lost = asyncio.ensure_future(gang.lost.wait())
        try:
            await asyncio.wait({work, lost}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise GangError("cancelled" if job.cancelled else "a worker was lost", retry=True)
            return work.result()
        except tasks.RankError as error:
            raise GangError(str(error), retry=error.retry) from error
        except Exception as error:
            if isinstance(error, GangError):
                raise
            raise GangError(f"{type(error).__name__}: {error}", retry=True) from error
        finally:
            lost.cancel()
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await work
            await self.client.cancel(futures, force=True)

    async def _ranks(self, job: Job, unit: Unit, gang: _Gang, futures: list[Future[Any]]) -> Any:
        rendezvous = await self._rendezvous(unit, gang) if unit.ranks_meet else None
        for rank, worker in enumerate(gang.workers):
            place = tasks.Place(gang.name, rank, len(gang.workers), unit.attempt, rendezvous)
            futures.append(
                self.client.submit(
                    tasks.run_unit,
                    tasks.Message(job.task_message(unit)),
                    place,
                    key=f"{gang.name}/{rank}",
                    **_pinned(worker),
                )
            )
        results = await _all_or_first_error(f for f in futures)
        return results[0]

    async def _rendezvous(self, unit: Unit, gang: _Gang) -> tuple[str, int]:
        address: tuple[str, int] = await self.client.submit(
            tasks.open_rendezvous, gang.name, key=f"{gang.name}/rendezvous", **_pinned(gang.workers[0])
        )
        return address


def _pinned(worker: str) -> dict[str, Any]:
    """Run on this worker or not at all: ranks must never double up."""
    return {"workers": [worker], "allow_other_workers": False, "pure": False, "retries": 0}


async def _all_or_first_error(futures: Iterable[Awaitable[Any]]) -> list[Any]:
    """Results in order, or the first exception as soon as it is there."""

    async def result(future: Awaitable[Any]) -> Any:
        return await future

    waiting = [asyncio.ensure_future(result(future)) for future in futures]
    try:
        return list(await asyncio.gather(*waiting))
    finally:
        for task in waiting:
            task.cancel()
