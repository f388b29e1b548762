"""A handle on a submitted job: status, wait, cancel."""

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from distributed import Client

from h2mv_dist.config import StorageOptions, shared_place
from h2mv_dist.errors import JobError, describe
from h2mv_dist.io.stores import displayed
from h2mv_dist.jobs.cluster import scheduler_address
from h2mv_dist.jobs.messages import Job, is_id, job_id
from h2mv_dist.jobs.progress import summary_of
from h2mv_dist.jobs.run_record import RunRecord

POLL_SECONDS: Final = 0.5
CANCELLED_PATIENCE_SECONDS: Final = 60.0
"""How long a job that was cancelled may take to end, before it counts as one that runs."""
_TOLD: Final = 3
"""Failed units whose own words an error holds."""
_GO_ON: Final = (
    "run the same command again, or h2mv-dist train --resume with the job's folder; "
    "what was finished is not lost"
)
_REFUSED: Final = "; wait for it, or cancel it first"

Watcher = Callable[[Mapping[str, Any]], None]
"""Called with the job's status (see ``Job.status``) again and again while it runs."""


@dataclass(frozen=True, slots=True)
class JobHandle:
    """A job on a scheduler; it goes on when the client leaves, as long as the scheduler lives."""

    id: str
    client: Client

    def status(self) -> dict[str, Any]:
        """State of every unit.

        Raises:
            JobError: the scheduler does not know the job.
        """
        status = status_of(self.client, self.id)
        if status is None:
            raise JobError(
                describe(
                    "the scheduler does not know the job",
                    where=f"job {self.id}",
                    expected="a job that was submitted to this scheduler",
                    actual="an unknown one; perhaps the scheduler was restarted",
                    fix=_GO_ON,
                )
            )
        return status

    def cancel(self) -> bool:
        """Stop the job's units and free their workers; False if there was nothing to stop any more."""
        return bool(_call(self.client, "h2mv_cancel", self.id))

    def wait(self, watch: Watcher | None = None) -> dict[str, Any]:
        """Wait until nothing more will happen; returns the last status.

        Raises:
            JobError: a unit failed, with the error of the rank itself; other units were still finished.
        """
        while True:
            status = self.status()
            if watch is not None:
                watch(status)
            if status["finished"]:
                break
            time.sleep(POLL_SECONDS)
        raise_failures(status)
        return status


def status_of(client: Client, job: str) -> dict[str, Any] | None:
    """State of every unit of a job, or None if the client's scheduler does not know it.

    Raises:
        JobError: the scheduler is gone.
    """
    status: dict[str, Any] | None = _call(client, "h2mv_status", job)
    return status


def running(client: Client, job: str) -> JobHandle | None:
    """A handle on a job that is still running on the client's scheduler, if it is.

    One that was cancelled, by whomever, is waited for: its gangs take some seconds to end.
    """
    deadline = time.monotonic() + CANCELLED_PATIENCE_SECONDS
    while _is_ending(status := status_of(client, job)) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return JobHandle(job, client) if status is not None and not status["finished"] else None


def _is_ending(status: Mapping[str, Any] | None) -> bool:
    return status is not None and status["cancelled"] and not status["finished"]


def require_idle(client: Client, job: str) -> None:
    """Refuse a job that is running on the client's scheduler, before anything is changed for a second one.

    Raises:
        JobError: it is.
    """
    if running(client, job) is not None:
        raise JobError(f"job {job} is already running on this scheduler{_REFUSED}")


def submit(client: Client, job: Job) -> JobHandle:
    """Hand a job to the coordinator, and leave a record of that beside what it fills.

    Raises:
        JobError: a job of this name is running.
        StoreError: the record cannot be written.
    """
    require_idle(client, job.id)
    if job.place:
        job.run = secrets.token_hex(4)
        begun = RunRecord(
            id=job.id,
            run=job.run,
            place=job.place,
            scheduler=scheduler_address(client),
            submitted=time.time(),
            units=tuple(unit.name for unit in job.units),
        )
        begun.write(StorageOptions(job.common["storage_options"]))
    refusal = _call(client, "h2mv_submit", job.message())
    if refusal is None:
        raise _no_coordinator(client)
    if refusal:
        raise JobError(f"{refusal}{_REFUSED}")
    return JobHandle(job.id, client)


def known_jobs(client: Client) -> list[dict[str, Any]]:
    """Status of every job the client's scheduler was given, oldest first."""
    found: list[dict[str, Any]] | None = _call(client, "h2mv_jobs")
    if found is None:
        raise _no_coordinator(client)
    return found


def _no_coordinator(client: Client) -> JobError:
    """Dask answers nothing to what a scheduler does not know."""
    return JobError(
        describe(
            "the scheduler does not run the coordinator",
            where=scheduler_address(client),
            expected="the scheduler that was connected to",
            actual="one that was started anew",
            fix="connect again",
        )
    )


def _call(client: Client, handler: str, job: Any = None) -> Any:
    """Ask the coordinator; its handlers take a job, its id, or nothing."""
    arguments = {} if job is None else {"job": job}
    try:
        return client.sync(getattr(client.scheduler, handler), **arguments)
    except OSError as error:
        raise JobError(
            describe(
                "the scheduler is gone",
                where=str(client.scheduler.address) if client.scheduler is not None else "closed client",
                expected="an answer",
                actual=f"{type(error).__name__}: {error}",
                fix=f"start it again, then {_GO_ON}",
            )
        ) from error


def raise_failures(status: Mapping[str, Any]) -> None:
    """Raise what the first failed units themselves said, short.

    Raises:
        JobError: a unit failed, or the job was cancelled.
    """
    failed = [unit for unit in status["units"] if unit["state"] == "failed"]
    if failed:
        first = failed[:_TOLD]
        said = [f"{u['name']} (attempt {u['attempt']}): {summary_of(u['error'])}" for u in first]
        said += [f"... and {len(failed) - _TOLD} more"] if len(failed) > _TOLD else []
        raise JobError(
            "\n".join(said) + f"\n{len(failed)} of {len(status['units'])} units of {status['id']} failed; "
            f"everything they said: h2mv-dist jobs show {status['place']}"
        )
    if status["cancelled"]:
        raise JobError(f"job {status['id']} was cancelled")


def cancel_jobs(client: Client, url: str) -> tuple[str, ...]:
    """Stop what runs for a job folder, or to fill a cube, a copy or a prepared store; returns their ids.

    Args:
        client: connected to the scheduler that runs it.
        url: the place, or the id of one job.

    Raises:
        JobError: nothing does.
    """
    kinds = ("train", "infer", "prepare", "compact")
    names = (url,) if is_id(url) else tuple(job_id(kind, shared_place(url)) for kind in kinds)
    cancelled = tuple(name for name in names if JobHandle(name, client).cancel())
    if not cancelled:
        raise JobError(
            describe(
                "no such job is running",
                where=scheduler_address(client),
                expected=f"a job with the folder, cube or prepared store {displayed(url)}",
                actual="none; it is finished, or was never submitted to this scheduler",
                fix="give the URL that was given to --job, --cube, --to or as TARGET, and the address of its "
                "scheduler",
            )
        )
    return cancelled
