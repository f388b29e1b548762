"""A handle on a submitted job: status, wait, cancel."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from distributed import Client

from h2mv_dist.errors import JobError, describe
from h2mv_dist.jobs.messages import Job

POLL_SECONDS: Final = 0.5
_GO_ON: Final = (
    "run the same command again, or h2mv-dist train --resume with the job's folder; "
    "what was finished is not lost"
)

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
        status: dict[str, Any] | None = _call(self.client, "h2mv_status", self.id)
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
        _raise_failures(status)
        return status


def running(client: Client, job: str) -> JobHandle | None:
    """A handle on a job that is still running on the client's scheduler, if it is."""
    status = _call(client, "h2mv_status", job)
    return JobHandle(job, client) if status is not None and not status["finished"] else None


def submit(client: Client, job: Job) -> JobHandle:
    """Hand a job to the coordinator.

    Raises:
        JobError: a job of this name is running.
    """
    refusal = _call(client, "h2mv_submit", job.message())
    if refusal:
        raise JobError(f"{refusal}; wait for it, or cancel it first")
    return JobHandle(job.id, client)


def _call(client: Client, handler: str, job: Any) -> Any:
    """Ask the coordinator; its handlers take a job or its id."""
    try:
        return client.sync(getattr(client.scheduler, handler), job=job)
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


def _raise_failures(status: Mapping[str, Any]) -> None:
    failed = [unit for unit in status["units"] if unit["state"] == "failed"]
    if failed:
        errors = "\n".join(f"{u['name']} (attempt {u['attempt']}): {u['error']}" for u in failed)
        raise JobError(f"{len(failed)} of {len(status['units'])} units of {status['id']} failed\n{errors}")
    if status["cancelled"]:
        raise JobError(f"job {status['id']} was cancelled")
