"""The coordinator: a scheduler plugin that leases gangs of workers, all at once or not at all.

It runs on the scheduler's event loop, so allocation is single-threaded and atomic: gangs cannot deadlock, and
a job outlives the client that submitted it. It does no I/O and runs no user code there; messages are plain
dictionaries. A job is a list of units (a fold, a tile); a unit needs ``ranks`` workers at once.
"""

import asyncio
import bisect
import contextlib
import itertools
import logging
import pickle
import secrets
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, get_args

from distributed import Client, Future, Scheduler
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.scheduler import WorkerState, heartbeat_interval
from tornado.ioloop import PeriodicCallback

from h2mv_dist.jobs import page, prometheus, tasks
from h2mv_dist.jobs.lease import Health, Seat, choose_seats, choose_unit
from h2mv_dist.jobs.messages import Failure, FailureKind, Job, Message, Place, Unit
from h2mv_dist.jobs.preemption import NannyPreemption, Preemption

PLUGIN_NAME: Final = "h2mv-coordinator"
PUMP_MILLISECONDS: Final = 500
"""How often waiting units are looked at, beside every event: a worker joins before it is ready."""
TELLING_SECONDS: Final = 1.0
"""How long the other ranks may take to tell why they ended."""
BLAMING_SECONDS: Final = 5.0
"""The same while all that is known is that one of them is to blame; a stopped rank is not quickly ended."""
SILENT_SECONDS: Final = 10.0
SILENT_HEARTBEATS: Final = 5
"""A worker that was not heard of for this long, and missed so many heartbeats, gets no rank."""
RECORDING_SECONDS: Final = 10.0
"""How long whoever waits for a job is kept waiting until its end is recorded, which takes a free worker."""
_log: Final = logging.getLogger(__name__)
_SEVERITY: Final[tuple[str, ...]] = get_args(FailureKind)


@dataclass(slots=True)
class _Gang:
    """One attempt of one unit.

    Attributes:
        job: its job's id.
        name: unique.
        seats: one a rank.
        ended: set when it must not go on.
        told: why the first of its ranks ended early, in its own words.
        makes_room: whether its worker may begin another unit beside it.
        blames: whether the loss of a worker counts against that worker's slot.
    """

    job: str
    name: str
    seats: tuple[Seat, ...]
    ended: asyncio.Future[Failure]
    told: asyncio.Future[Failure]
    makes_room: bool = False
    blames: bool = True

    def key(self, rank: int) -> str:
        """Of the Dask task of a rank."""
        return f"{self.name}/{rank}"

    def end(self, failure: Failure) -> None:
        """Make the attempt end early, for the first reason given."""
        if not self.ended.done():
            self.ended.set_result(failure)


@dataclass(frozen=True, slots=True, order=True)
class _Turn:
    """A unit in the queue; a unit that failed waits behind those that were queued before."""

    rank: int
    number: int
    job: Job = field(compare=False)
    unit: Unit = field(compare=False)


class _AttemptError(Exception):
    """Carries the failure of an attempt, and the slot that is to blame."""

    def __init__(self, failure: Failure, slot: str = "") -> None:
        super().__init__(failure.reason)
        self.failure, self.slot = failure, slot


class Coordinator(SchedulerPlugin):
    """Runs the units of all jobs on gangs of workers: by priority, then first come first served."""

    name = PLUGIN_NAME
    idempotent = True

    async def start(self, scheduler: Scheduler) -> None:
        """Called once, on the scheduler."""
        self.scheduler = scheduler
        self.jobs: dict[str, Job] = {}
        self.queue: list[_Turn] = []
        self.submitted = itertools.count()
        self.leases: dict[str, list[_Gang]] = {}
        self.neighbourhoods: dict[str, str] = {}
        self.health = Health()
        self.running: set[asyncio.Task[None]] = set()
        self.ending: set[str] = set()
        self.client = await Client(
            scheduler.address,
            asynchronous=True,
            set_as_default=False,
            name=PLUGIN_NAME,
            security=scheduler.security,
        )
        # every worker, also one that joins later, learns to leave in an orderly way
        await scheduler.register_worker_plugin(
            comm=None, plugin=pickle.dumps(Preemption()), name=Preemption.name, idempotent=True
        )
        await scheduler.register_nanny_plugin(
            comm=None, plugin=pickle.dumps(NannyPreemption()), name=NannyPreemption.name, idempotent=True
        )
        scheduler.handlers.update(
            h2mv_submit=self.submit,
            h2mv_status=self.status,
            h2mv_cancel=self.cancel,
            h2mv_jobs=self.list_jobs,
        )
        self.unregister = prometheus.register(self.jobs, self.health)
        page.serve(scheduler, self.jobs)
        self.pump_timer = PeriodicCallback(self.pump, PUMP_MILLISECONDS)
        self.pump_timer.start()

    async def close(self) -> None:
        """Called when the scheduler stops."""
        self.pump_timer.stop()
        self.unregister()
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
        for unit in new.units:
            self._queue(new, unit)
        # at once where no other unit is left, as after an interruption just before the end
        final = new.finish()
        if final is not None:
            self._queue(new, final)
        self.pump()
        return ""

    async def status(self, job: str) -> dict[str, Any] | None:
        """State of every unit of a job, without its settings."""
        if job not in self.jobs:
            return None
        return {**self._told(self.jobs[job]), "quarantined": dict(self.health.quarantined)}

    def _told(self, job: Job) -> dict[str, Any]:
        """A job counts as finished once that is recorded: whoever waits for it may close the cluster then."""
        status = job.status()
        return {**status, "finished": status["finished"] and job.id not in self.ending}

    async def list_jobs(self) -> list[dict[str, Any]]:
        """State of all jobs since this scheduler started, in the order they were submitted."""
        return [self._told(job) for job in sorted(self.jobs.values(), key=lambda job: job.submitted)]

    async def cancel(self, job: str) -> bool:
        """Stop a job's units; workers are free within a second. False if there was nothing to stop."""
        cancelled = self.jobs.get(job)
        if cancelled is None or cancelled.finished:
            return False
        cancelled.cancelled = True
        self.queue = [turn for turn in self.queue if turn.job is not cancelled]
        for unit in cancelled.all_units():
            if unit.state in ("queued", "waiting"):
                unit.state = "cancelled"
        for gang in itertools.chain.from_iterable(self.leases.values()):
            if gang.job == job:
                gang.end(Failure("cancelled", "cancelled"))
        self._record_end(cancelled)
        return True

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """A worker joined: it may complete a gang."""
        scheduler.loop.call_later(0, self.pump)

    def remove_worker(self, scheduler: Scheduler, worker: str, **_: Any) -> None:
        """A worker is gone: its gangs cannot go on (a pinned task would wait for it for ever)."""
        self.neighbourhoods.pop(worker, None)
        for number, gang in enumerate(self.leases.get(worker, ())):
            gang.blames = number == 0
            gang.end(Failure("machine", f"worker {worker} was lost"))

    def log_event(self, topic: str, msg: Any) -> None:
        """Keep the latest report of each unit, for whoever asks; use the room that a unit makes."""
        if topic == tasks.TOPIC and isinstance(msg, Mapping) and msg.get("job") in self.jobs:
            self.jobs[msg["job"]].report(msg)
        if topic == tasks.ROOM and isinstance(msg, Mapping):
            for gang in self.leases.get(str(msg.get("worker")), ()):
                gang.makes_room |= gang.name == msg.get("gang")
            self.pump()

    def pump(self) -> None:
        """Start the gangs whose turn it is, until one has to wait.

        A gang larger than the whole cluster does not hold up the others; any other one does, or small gangs
        would keep a large one waiting for ever.
        """
        waiting, everyone = [], self._seats()
        while self.queue:
            turn = self.queue.pop(0)
            seats = self.health.usable(everyone, turn.unit.ranks)
            chosen = choose_seats((s for s in seats if self._is_free(s)), turn.unit.ranks)
            # the last units are left to the workers that are free first
            if chosen is None and turn.unit.overlaps and len(self.queue) >= len(seats):
                chosen = choose_seats((s for s in seats if self._has_room(s, turn.job)), turn.unit.ranks)
            if chosen is not None:
                if turn.unit.neighbourhood:
                    turn = self._near(turn, chosen[0])
                self._launch(turn.job, turn.unit, chosen)
                continue
            waiting.append(turn)
            if len(seats) >= turn.unit.ranks:
                break
        self.queue = waiting + self.queue

    def _near(self, first: _Turn, seat: Seat) -> _Turn:
        """The turn of ``first``, or of another unit of its job that is nearer to what a worker did last."""
        same = (t for t in self.queue if t.job is first.job and t.unit.ranks == first.unit.ranks)
        alike = (t for t in same if t.unit.overlaps == first.unit.overlaps)
        turns = [first, *(turn for turn in alike if turn.unit.neighbourhood)]
        last = self.neighbourhoods.pop(seat.address, "")
        named = [turn.unit.neighbourhood for turn in turns]
        near = turns[choose_unit(named, last, self.neighbourhoods.values())]
        if near is not first:
            self.queue.remove(near)
            self.queue.insert(0, first)
        self.neighbourhoods[seat.address] = near.unit.neighbourhood
        return near

    def _queue(self, job: Job, unit: Unit) -> None:
        bisect.insort(self.queue, _Turn(-job.priority, next(self.submitted), job, unit))

    def _seats(self) -> list[Seat]:
        return [
            Seat(state.host, str(state.name), address)
            for address, state in self.scheduler.workers.items()
            if state.status.name == "running" and not self._is_silent(state)
        ]

    def _is_silent(self, worker: WorkerState) -> bool:
        """Whether it may be gone, though its connection is not: it was stopped, or its network is down."""
        expected = heartbeat_interval(len(self.scheduler.workers))
        return bool(time.time() - worker.last_seen > max(SILENT_SECONDS, SILENT_HEARTBEATS * expected))

    def _is_free(self, seat: Seat) -> bool:
        return seat.address not in self.leases and not self.scheduler.workers[seat.address].processing

    def _has_room(self, seat: Seat, job: Job) -> bool:
        """Whether a worker does nothing but end a unit that makes room for another one of its job."""
        gangs = self.leases.get(seat.address, [])
        if len(gangs) != 1 or not gangs[0].makes_room or gangs[0].job != job.id:
            return False
        known = {gangs[0].key(rank) for rank in range(len(gangs[0].seats))}
        return known.issuperset(task.key for task in self.scheduler.workers[seat.address].processing)

    def _launch(self, job: Job, unit: Unit, seats: tuple[Seat, ...]) -> None:
        unit.start(tuple(seat.address for seat in seats))
        # the random part keeps attempts apart that two schedulers number alike
        name = f"{job.id}/{unit.name}/{unit.attempt}-{secrets.token_hex(4)}"
        new_future = asyncio.get_running_loop().create_future
        gang = _Gang(job.id, name, seats, ended=new_future(), told=new_future())
        for seat in seats:
            self.leases.setdefault(seat.address, []).append(gang)
        self._keep(self._run(job, unit, gang))

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something beside everything else; the event loop itself would forget it."""
        task = asyncio.ensure_future(work)
        self.running.add(task)
        task.add_done_callback(self.running.discard)

    async def _run(self, job: Job, unit: Unit, gang: _Gang) -> None:
        try:
            unit.result = await self._attempt(job, unit, gang)
            unit.state, unit.error = "done", ""
            self.health.clear(seat.slot for seat in gang.seats)
        except _AttemptError as failed:
            self._note(job, unit, failed)
        finally:
            for seat in gang.seats:
                self.leases[seat.address].remove(gang)
                if not self.leases[seat.address]:
                    del self.leases[seat.address]
        final = job.finish()
        if final is not None:
            self._queue(job, final)
        self._record_end(job)
        self.pump()

    def _record_end(self, job: Job) -> None:
        """Have some worker write down how a job ended, once it has."""
        if job.finished and job.place:
            self.ending.add(job.id)
            self._keep(self._write_end(job))

    async def _write_end(self, job: Job) -> None:
        """Try to; whoever waits for the job is not kept waiting for long where no worker is free for that."""
        writing = asyncio.ensure_future(self._written_end(job))
        try:
            await asyncio.wait({writing}, timeout=RECORDING_SECONDS)
            self.ending.discard(job.id)
            if not writing.done():
                _log.warning("the end of %s is recorded as soon as a worker is free", job.id)
            if problem := await writing:
                _log.warning("the end of %s was not recorded: %s", job.id, problem)
        finally:
            writing.cancel()

    async def _written_end(self, job: Job) -> str:
        """Why it could not be written down; empty if it was."""
        record = {"scheduler": self.scheduler.address, **job.ending()}
        content = {"job": job.id, "unit": "record", "record": record}
        message = Message({**content, "storage_options": job.common["storage_options"]})
        try:
            problem: str = await self.client.submit(tasks.record_end, message, pure=False, retries=0)
        except Exception as error:
            return str(error) or type(error).__name__
        return problem

    def _note(self, job: Job, unit: Unit, failed: _AttemptError) -> None:
        if failed.failure.kind == "machine" and failed.slot:
            self.health.blame(failed.slot, failed.failure.reason)
        unit.end(Failure("cancelled", "cancelled") if job.cancelled else failed.failure, time.monotonic())
        if unit.pause:
            asyncio.get_running_loop().call_later(unit.pause, self._queue_again, job, unit)
        else:
            self._queue_again(job, unit)

    def _queue_again(self, job: Job, unit: Unit) -> None:
        """Queue a unit that failed, unless it is over by now."""
        if unit.state == "queued":
            self._queue(job, unit)
            self.pump()

    async def _attempt(self, job: Job, unit: Unit, gang: _Gang) -> Any:
        """Run all ranks of a gang; one failure or loss ends them all."""
        futures: list[Future[Any]] = []
        work = asyncio.ensure_future(self._ranks(job, unit, gang, futures))
        try:
            await asyncio.wait({work, gang.ended}, return_when=asyncio.FIRST_COMPLETED)
            if gang.ended.done():
                raise await self._early_end(gang)
            return work.result()
        except _AttemptError:
            raise
        except Exception as error:
            raise _AttemptError(Failure("failed", f"{type(error).__name__}: {error}")) from error
        finally:
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await work
            await self.client.cancel(futures, force=True)

    async def _early_end(self, gang: _Gang) -> _AttemptError:
        """A worker that is gone is nobody's failure if it was asked to leave, which the ranks know."""
        failure = gang.ended.result()
        if failure.kind == "machine":
            await asyncio.wait({gang.told}, timeout=TELLING_SECONDS)
            if gang.told.done() and gang.told.result().kind == "preempted":
                return _AttemptError(gang.told.result())
        return _AttemptError(failure, self._lost_slot(gang))

    def _lost_slot(self, gang: _Gang) -> str:
        """The slot of the gang's worker that is gone, if one is."""
        lost = [seat.slot for seat in gang.seats if seat.address not in self.scheduler.workers]
        return lost[0] if lost and gang.blames else ""

    async def _ranks(self, job: Job, unit: Unit, gang: _Gang, futures: list[Future[Any]]) -> Any:
        """Result of the first rank, once all are done."""
        meets = unit.ranks_meet and len(gang.seats) > 1
        rendezvous = await self._rendezvous(unit, gang) if meets else None
        history = {"before": unit.error, "quarantined": dict(self.health.quarantined)}
        for rank, seat in enumerate(gang.seats):
            place = Place(gang.name, rank, len(gang.seats), unit.attempt, rendezvous, history)
            message = Message(job.task_message(unit))
            key = gang.key(rank)
            futures.append(self.client.submit(tasks.run_unit, message, place, key=key, **_pinned(seat)))
        outcomes = await _outcomes(futures, gang.told)
        failures = [(f, seat.slot) for f, seat in zip(outcomes, gang.seats, strict=True) if f is not None]
        if failures:
            raise _AttemptError(*min(failures, key=lambda f: _SEVERITY.index(f[0].kind)))
        return (await futures[0])["result"]

    async def _rendezvous(self, unit: Unit, gang: _Gang) -> tuple[str, int]:
        key, ports = f"{gang.name}/rendezvous", unit.spec["settings"]["cluster"]["port_range"]
        future = self.client.submit(
            tasks.open_rendezvous, gang.name, ports, key=key, **_pinned(gang.seats[0])
        )
        address: tuple[str, int] = await future
        return address


def _pinned(seat: Seat) -> dict[str, Any]:
    """Run on this worker or not at all: ranks must never double up."""
    return {"workers": [seat.address], "allow_other_workers": False, "pure": False, "retries": 0}


async def _outcomes(futures: Sequence[Future[Any]], told: asyncio.Future[Failure]) -> list[Failure | None]:
    """How each rank ended; after a first failure, the others get a moment to tell their side of it."""
    waiting = [asyncio.ensure_future(_outcome(future)) for future in futures]
    try:
        for next_one in asyncio.as_completed(waiting):
            failure = await next_one
            if failure is not None:
                told.set_result(failure)
                patience = BLAMING_SECONDS if failure.kind == "peer" else TELLING_SECONDS
                await asyncio.wait(waiting, timeout=patience)
                break
        return [task.result() if task.done() else None for task in waiting]
    finally:
        for task in waiting:
            task.cancel()


async def _outcome(future: Future[Any]) -> Failure | None:
    try:
        failure = (await future)["failure"]
    except asyncio.CancelledError:
        if not future.cancelled():
            raise
        return Failure("machine", "its task was cancelled by Dask")
    return None if failure is None else Failure(*failure)
