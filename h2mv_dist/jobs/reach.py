"""Does every host of a cluster see the same folder? Asked before a job starts, by reading back a token."""

from typing import Any

from distributed import Client

from h2mv_dist.config import StorageOptions
from h2mv_dist.errors import H2mvError, JobError, describe
from h2mv_dist.io.stores import displayed
from h2mv_dist.jobs.records import JobFolder
from h2mv_dist.jobs.tasks import Message


def require_shared(client: Client, folder: JobFolder) -> None:
    """Write a token into a job's folder and let one worker of each host read it.

    Raises:
        JobError: a host sees another folder, or none; typically a local path on a remote cluster.
        StoreError: it cannot be written from here.
    """
    token = folder.write_token()
    message = Message({"job": folder.url, "unit": "token", "storage_options": folder.options.reveal()})
    seen = client.run(_read_token, message, workers=list(_one_worker_a_host(client)), on_error="return")
    wrong = {worker: found for worker, found in seen.items() if found != token}
    if wrong:
        raise JobError(
            describe(
                "not every host sees the job folder",
                where=f"{displayed(folder.url)} on {', '.join(sorted(wrong))}",
                expected="the token that was just written from here",
                actual="; ".join(sorted({_shown(found) for found in wrong.values()})),
                fix="use an object store, or a path on a file system that all hosts share",
            )
        )


def _one_worker_a_host(client: Client) -> dict[str, str]:
    """Worker address -> host."""
    workers = client.scheduler_info(n_workers=-1)["workers"]
    first = {info["host"]: address for address, info in sorted(workers.items(), reverse=True)}
    return {address: host for host, address in first.items()}


def _read_token(message: Message) -> str | None:
    try:
        return JobFolder(message["job"], StorageOptions(message["storage_options"])).token()
    except H2mvError as error:
        return f"{type(error).__name__}: {error}"


def _shown(found: Any) -> str:
    return "no token there" if found is None else str(found)
