"""Do client, scheduler and workers run the same libraries? Asked of all of them before a job starts."""

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, Final

from distributed import Client
from distributed.versions import get_package_info

from h2mv_dist.errors import JobError, describe
from h2mv_dist.jobs.cluster import scheduler_address

MUST_AGREE: Final = ("python", "h2mv_dist")
"""What tasks cannot do without; of Python the first two numbers."""
SHOULD_AGREE: Final = ("torch", "zarr", "xarray", "numpy", "distributed")
ANSWER_SECONDS: Final = 20.0
"""How long a worker may take to answer; a silent one is nobody's fault here, and gets no rank later."""

Versions = Mapping[str, str | None]

_log = logging.getLogger(__name__)


def require_same_versions(client: Client) -> None:
    """Compare the libraries of everybody with the client's; other than ours may differ, with a warning.

    Raises:
        JobError: this package, or Python, is not the same somewhere.
    """
    own = _ours(get_package_info(SHOULD_AGREE + MUST_AGREE[1:]))
    others = client.sync(_ask, client)
    differing = {
        who: wrong
        for who, found in others.items()
        if (wrong := [name for name in own if found[name] != own[name]])
    }
    if not differing:
        return
    table = _table(own, others, differing)
    if any(name in MUST_AGREE for wrong in differing.values() for name in wrong):
        raise JobError(
            describe(
                "not everybody runs the same h2mv-dist and Python",
                where=scheduler_address(client),
                expected=", ".join(f"{name} {own[name]}" for name in MUST_AGREE),
                actual=f"\n{table}",
                fix="start scheduler and workers in the environment of the client, or the other way round",
            )
        )
    _log.warning("libraries differ, which may change numbers or fail later:\n%s", table)


async def _ask(client: Client) -> dict[str, Versions]:
    """Versions by ``scheduler`` and by worker address, of all that answer in time."""
    packages = [*SHOULD_AGREE, *MUST_AGREE[1:]]
    assert client.scheduler is not None, "an open client"
    scheduler = client.scheduler
    identity = await scheduler.identity(n_workers=-1)

    async def ask(worker: str) -> tuple[str, Any]:
        message = {"op": "versions", "packages": packages}
        asking = scheduler.broadcast(msg=message, workers=[worker], on_error="ignore")
        try:
            return worker, (await asyncio.wait_for(asking, ANSWER_SECONDS)).get(worker)
        except TimeoutError:
            return worker, None

    answers = [("scheduler", await scheduler.versions(packages=packages))]
    answers += await asyncio.gather(*map(ask, identity["workers"]))
    return {who: _ours(answer["packages"]) for who, answer in answers if answer is not None}


def _ours(packages: Mapping[str, str | None]) -> Versions:
    python = ".".join(str(packages["python"]).split(".")[:2])
    return {"python": python, **{name: packages[name] for name in (*MUST_AGREE[1:], *SHOULD_AGREE)}}


def _table(own: Versions, others: Mapping[str, Versions], differing: Mapping[str, list[str]]) -> str:
    """A line for the client and for each who differs, a column for each library that does."""
    columns = [name for name in own if any(name in wrong for wrong in differing.values())]
    rows = [["", *columns], ["client", *(own[name] or "missing" for name in columns)]]
    rows += [[who, *(others[who][name] or "missing" for name in columns)] for who in sorted(differing)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
