"""What travels between client, scheduler and workers: jobs and their units, as plain dictionaries."""

import errno
import hashlib
import re
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple

from h2mv_dist.errors import H2mvError, StoreError

UnitState = Literal["waiting", "queued", "running", "done", "failed", "cancelled"]
TaskKind = Literal["fold", "summary", "tile", "finish", "prepare", "compact"]
FailureKind = Literal["refused", "machine", "full", "busy", "failed", "preempted", "peer", "cancelled"]
"""Why an attempt ended early, the most telling first; only ``refused`` and ``cancelled`` are final.

refused: our own checks said no, and would again. machine: a process, worker or device broke. full: a store or
disk has no room. busy: a store failed, or memory is taken, which may be different later. failed: any other
error. preempted: the worker was asked to leave. peer: a rank only noticed that another one was gone.
"""

FULL_PATIENCE_SECONDS: Final = 3600.0
"""How long a unit is tried again while a store or disk has no room, before that counts as its failure."""
FIRST_PAUSE_SECONDS: Final = 5.0
LONGEST_PAUSE_SECONDS: Final = 300.0
ID: Final = "^(train|infer|prepare|compact)-[0-9a-f]{8}$"
"""How a job's id looks."""
_PAUSED: Final = ("full", "busy")
"""What is no better if tried again at once."""
_OF_AN_ATTEMPT: Final = ("days", "of", "event", "reason")
"""What the next attempt does not take over of the latest report: days are computed anew, epochs are not."""


class Failure(NamedTuple):
    """Why a rank, and so its gang, ended early."""

    kind: FailureKind
    reason: str


class RankError(Exception):
    """An attempt of a rank ended early."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


def failure_of(error: BaseException) -> Failure:
    """What an exception says of another attempt: our own checks would refuse again, a store may recover."""
    if isinstance(error, RankError):
        return error.failure
    if isinstance(error, StoreError):
        return Failure("full" if error.full else "busy", str(error))
    if isinstance(error, H2mvError):
        return Failure("refused", str(error))
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return Failure("full" if full else "failed", "".join(traceback.format_exception(error)))


class Message(Mapping[str, Any]):
    """Arguments of a task; never shown, because Dask logs the arguments of failed tasks."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._content = dict(content)

    def __getitem__(self, key: str) -> Any:
        return self._content[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)

    def __repr__(self) -> str:
        return f"Message(job={self['job']!r}, unit={self['unit']!r})"


class Share(NamedTuple):
    """What a rank gets of its worker.

    Attributes:
        nthreads: used on a CPU unless ``training.threads`` says otherwise, or fewer are as fast.
        memory: bytes that the worker's limit leaves; None without a limit.
    """

    nthreads: int
    memory: int | None


class Place(NamedTuple):
    """Which rank of which gang a task is.

    Attributes:
        gang: unique name of the attempt.
        rank: 0 ... world - 1.
        world: number of ranks.
        attempt: 1 for the first.
        rendezvous: (host, port) where the ranks meet, if there are several and they do.
        history: why the attempt before this one ended, and which slots are not used any more.
    """

    gang: str
    rank: int
    world: int
    attempt: int
    rendezvous: tuple[str, int] | None
    history: Mapping[str, Any]


@dataclass(slots=True)
class Unit:
    """One piece of a job that runs on a gang of workers: a fold, a tile, some days, or the end of a cube.

    Attributes:
        name: unique in its job.
        task: what the ranks do.
        spec: JSON-able arguments.
        ranks: gang size.
        attempts: how often it may fail without having got any further.
        neighbourhood: units of the same one are best run by the same worker; empty if that does not matter.
        steps: how many it takes at most: epochs of a fold, 1 of a tile or some days, none of what ends a job.
        attempt: number of the current or last attempt; a resumed unit goes on counting.
        failures: since the last progress.
        pause: seconds to wait before the next attempt.
    """

    name: str
    task: TaskKind
    spec: Mapping[str, Any]
    ranks: int = 1
    attempts: int = 3
    neighbourhood: str = ""
    steps: int = 1
    state: UnitState = "queued"
    attempt: int = 0
    failures: int = 0
    pause: float = 0.0
    workers: tuple[str, ...] = ()
    error: str = ""
    latest: Mapping[str, Any] = field(default_factory=dict)
    result: Any = None
    _reached: Any = None
    _pauses: int = 0
    _full_since: float | None = None

    @property
    def ranks_meet(self) -> bool:
        """Whether the ranks talk to each other and so need a place to meet."""
        return self.task == "fold"

    @property
    def overlaps(self) -> bool:
        """Whether a worker may begin it while another unit of the job is about to end there.

        One that failed before might take the other one with it.
        """
        return self.task == "tile" and not self.failures

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in ("done", "failed", "cancelled")

    def start(self, workers: tuple[str, ...]) -> None:
        """Begin a new attempt on these workers."""
        self.attempt += 1
        self.state, self.workers, self.pause = "running", workers, 0.0
        self.latest = {name: told for name, told in self.latest.items() if name not in _OF_AN_ATTEMPT}

    def end(self, failure: Failure, now: float) -> None:
        """Note a failed attempt: the unit waits for another one, unless that would be in vain.

        Args:
            failure: why it ended.
            now: seconds on any clock that never goes back.
        """
        self.error = failure.reason
        if failure.kind == "cancelled":
            self.state = "cancelled"
            return
        reached = self.latest.get("epoch")
        if reached != self._reached:
            self._reached, self.failures, self._pauses, self._full_since = reached, 0, 0, None
        full_for = self._full_for(failure, now)
        # leaving a machine that was asked for is nobody's failure, and a disk is full until somebody comes
        self.failures += failure.kind not in ("preempted", "full")
        hopeless = failure.kind == "refused" or self.failures >= self.attempts
        self.state = "failed" if hopeless or full_for > FULL_PATIENCE_SECONDS else "queued"
        self.pause = self._next_pause(failure)

    def _full_for(self, failure: Failure, now: float) -> float:
        """For how long there has been no room, seconds."""
        if failure.kind != "full":
            self._full_since = None
        elif self._full_since is None:
            self._full_since = now
        return now - self._full_since if self._full_since is not None else 0.0

    def _next_pause(self, failure: Failure) -> float:
        """Twice as long each time, and none after what a pause does not help against."""
        self._pauses = self._pauses + 1 if failure.kind in _PAUSED else 0
        doubled = float(FIRST_PAUSE_SECONDS * 2 ** (self._pauses - 1))
        return min(doubled, LONGEST_PAUSE_SECONDS) if self._pauses else 0.0

    def message(self) -> dict[str, Any]:
        """What a client sends."""
        return {
            "name": self.name,
            "task": self.task,
            "spec": dict(self.spec),
            "ranks": self.ranks,
            "attempts": self.attempts,
            "neighbourhood": self.neighbourhood,
            "steps": self.steps,
            "attempt": self.attempt,
        }

    def status(self) -> dict[str, Any]:
        """What a client is told."""
        return {
            "name": self.name,
            "state": self.state,
            "steps": self.steps,
            "attempt": self.attempt,
            "workers": list(self.workers),
            "error": self.error,
            "pause": self.pause,
            "latest": dict(self.latest),
        }


@dataclass(slots=True)
class Job:
    """Units that belong together.

    Attributes:
        id: unique on a scheduler.
        place: URL of the folder or store it fills.
        common: JSON-able arguments that all units share; may hold credentials, so it is never shown.
        units: what can run in any order.
        final: runs once all units are done.
        always_final: run the final unit even if some units failed.
        priority: jobs with a higher one come first.
        run: a word that no other run of the job has.
        submitted: by the scheduler's clock, seconds since 1970.
    """

    id: str
    place: str
    common: Mapping[str, Any] = field(repr=False)
    units: tuple[Unit, ...]
    final: Unit | None = None
    always_final: bool = False
    priority: int = 0
    run: str = ""
    submitted: float = 0.0
    cancelled: bool = False
    _by_name: Mapping[str, Unit] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._by_name = {unit.name: unit for unit in self.all_units()}

    def all_units(self) -> Iterator[Unit]:
        """The units, then the final one."""
        yield from self.units
        if self.final is not None:
            yield self.final

    @property
    def finished(self) -> bool:
        """Whether nothing more will happen."""
        return all(unit.ended for unit in self.all_units())

    def finish(self) -> Unit | None:
        """The final unit, when its turn has just come."""
        if self.final is None or self.final.state != "waiting":
            return None
        if not all(unit.ended for unit in self.units):
            return None
        if self.cancelled or not (self.always_final or all(unit.state == "done" for unit in self.units)):
            self.final.state = "cancelled"
            return None
        self.final.state = "queued"
        return self.final

    def report(self, message: Mapping[str, Any]) -> None:
        """Keep the latest report of a unit."""
        if (unit := self._by_name.get(message.get("unit", ""))) is not None:
            unit.latest = {**unit.latest, **message}

    def task_message(self, unit: Unit) -> dict[str, Any]:
        """What a rank of the unit is given."""
        own = {"job": self.id, "run": self.run, "unit": unit.name, "task": unit.task}
        return {**own, **self.common, **unit.spec}

    def message(self) -> dict[str, Any]:
        """What a client sends to the scheduler."""
        return {
            "id": self.id,
            "place": self.place,
            "common": dict(self.common),
            "units": [unit.message() for unit in self.units],
            "final": self.final.message() if self.final is not None else None,
            "always_final": self.always_final,
            "priority": self.priority,
            "run": self.run,
        }

    def status(self) -> dict[str, Any]:
        """What a client is told."""
        return {
            "id": self.id,
            "place": self.place,
            "submitted": self.submitted,
            "now": time.time(),
            "finished": self.finished,
            "cancelled": self.cancelled,
            "units": [unit.status() for unit in self.all_units()],
        }

    def ending(self) -> dict[str, Any]:
        """How it ended, for its record: see :class:`h2mv_dist.jobs.run_record.RunRecord`."""
        failed = {unit.name: unit.error for unit in self.all_units() if unit.state == "failed"}
        return {
            "id": self.id,
            "run": self.run,
            "place": self.place,
            "submitted": self.submitted,
            "units": [unit.name for unit in self.units],
            "state": "cancelled" if self.cancelled else "failed" if failed else "done",
            "ended": time.time(),
            "failed": failed,
        }

    @staticmethod
    def from_message(message: Mapping[str, Any]) -> "Job":
        """Inverse of :meth:`message`."""
        final = message["final"]
        return Job(
            id=message["id"],
            place=message["place"],
            common=message["common"],
            units=tuple(Unit(**unit) for unit in message["units"]),
            final=Unit(**final, state="waiting") if final is not None else None,
            always_final=message["always_final"],
            priority=message["priority"],
            run=message["run"],
            submitted=time.time(),
        )


def is_id(text: str) -> bool:
    """Whether a text is a job's id, and no place.

    >>> is_id("train-0123abcd"), is_id("train-later"), is_id("s3://bucket/train-0123abcd")
    (True, False, False)
    """
    return re.match(ID, text) is not None


def job_id(kind: str, url: str) -> str:
    """One place, one job: the same folder or cube always gives the same id.

    >>> job_id("train", "s3://bucket/job")
    'train-32564751'
    """
    return f"{kind}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"


def kind_of(job: str) -> str:
    """What a job does, from its id.

    >>> kind_of("infer-3f2a")
    'infer'
    """
    return job.partition("-")[0]
