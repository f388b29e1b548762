"""Does every host of a cluster see the same folder? Asked before a job starts, by reading back a token."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from distributed import Client

from h2mv_dist.config import StorageOptions
from h2mv_dist.errors import H2mvError, JobError, describe
from h2mv_dist.io.stores import displayed
from h2mv_dist.jobs.cluster import workers_of
from h2mv_dist.jobs.messages import Message
from h2mv_dist.jobs.records import JobFolder

ANSWER_SECONDS: Final = 60.0
"""How long a worker may take to read the token."""

_log = logging.getLogger(__name__)


def require_shared(client: Client, folder: JobFolder) -> str:
    """Write a token into a job's folder and let one worker of each host read it; returns the token.

    A worker that does not answer says nothing about its host: each rank looks for the token again.

    Raises:
        JobError: a host sees another folder, or none; typically a local path on a remote cluster. Or no
            worker answers at all.
        StoreError: it cannot be written from here.
    """
    token = folder.write_token()
    message = Message({"job": folder.url, "unit": "token", "storage_options": folder.options.reveal()})
    asked = _one_worker_a_host(client)
    answers = client.sync(_ask, client, message, asked)
    silent = sorted(set(asked) - {answer.worker for answer in answers})
    for worker in silent:
        _log.warning("worker %s does not answer, waited for %g s", worker, ANSWER_SECONDS)
    if not answers:
        raise JobError(_nobody_answers(silent))
    wrong = [answer for answer in answers if answer.token != token]
    if wrong:
        raise JobError(_not_shared(folder, wrong))
    return token


class _Answer(NamedTuple):
    worker: str
    token: str | None


def _one_worker_a_host(client: Client) -> tuple[str, ...]:
    """Of each host, the worker that was heard of last."""
    ordered = sorted(workers_of(client).items(), key=lambda item: float(item[1]["last_seen"]))
    return tuple({info["host"]: address for address, info in ordered}.values())


async def _ask(client: Client, message: Message, workers: Sequence[str]) -> list[_Answer]:
    """The answers of the workers that give one in time."""

    async def ask(worker: str) -> _Answer | None:
        asking = client._run(_read_token, message, workers=[worker], on_error="return")
        try:
            found = (await asyncio.wait_for(asking, ANSWER_SECONDS))[worker]
        except TimeoutError:
            return None
        # its connection may break, too
        return None if isinstance(found, OSError) else _Answer(worker, found)

    return [answer for answer in await asyncio.gather(*map(ask, workers)) if answer is not None]


async def _read_token(message: Message) -> str | None:
    """Runs on a worker; in a thread, so that a file system that hangs does not hold up the worker itself."""
    folder = JobFolder(message["job"], StorageOptions(message["storage_options"]))
    try:
        return await asyncio.to_thread(folder.token)
    except H2mvError as error:
        return f"{type(error).__name__}: {error}"


def _nobody_answers(silent: Sequence[str]) -> str:
    return describe(
        "no worker answers",
        where=", ".join(f"worker {worker}" for worker in silent),
        expected=f"a word from one worker of each host within {ANSWER_SECONDS:g} s",
        actual="these workers do not answer, though the scheduler has not lost them",
        fix="look at their logs, and start them again if they hang",
    )


def _not_shared(folder: JobFolder, wrong: Sequence[_Answer]) -> str:
    return describe(
        "not every host sees the job folder",
        where=f"{displayed(folder.url)} on {', '.join(sorted(answer.worker for answer in wrong))}",
        expected="the token that was just written from here",
        actual="; ".join(sorted({_shown(answer.token) for answer in wrong})),
        fix="use an object store, or a path on a file system that all hosts share",
    )


def _shown(found: Any) -> str:
    return "no token there" if found is None else str(found)
