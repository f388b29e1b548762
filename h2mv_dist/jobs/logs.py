"""What the ranks of a training job printed: from the records, and from its worker if a rank still runs."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

from distributed import Client

from h2mv_dist.jobs.records import FoldRecord
from h2mv_dist.jobs.supervisor import printed_so_far

_READERS: Final = 8


class RankLog(NamedTuple):
    """What one rank of one attempt printed.

    Attributes:
        unit: name of the fold, or ``RUN/fold-NN`` in a sweep.
        attempt: from 1.
        rank: from 0.
        host: where it ran.
        outcome: how it ended, such as ``done`` or ``machine``; ``running`` as long as it has not.
        reason: what was said of it when it failed.
        text: the end of what it printed.
    """

    unit: str
    attempt: int
    rank: int
    host: str
    outcome: str
    reason: str
    text: str

    def __str__(self) -> str:
        told = [part for part in (self.text.rstrip(), self.reason.rstrip()) if part]
        title = f"--- {self.unit}, attempt {self.attempt}, rank {self.rank} on {self.host}: {self.outcome}"
        return "\n".join((title, *told))


def recorded_logs(unit: str, record: FoldRecord, attempt: int | None = None) -> list[RankLog]:
    """All ranks of an attempt at a fold that have ended, of the last one that began if None.

    Raises:
        StoreError: the records cannot be read.
    """
    ranks = record.attempts()
    wanted = attempt if attempt is not None else max((rank["attempt"] for rank in ranks), default=0)
    chosen = [rank for rank in ranks if rank["attempt"] == wanted]
    with ThreadPoolExecutor(_READERS, "h2mv-records") as pool:
        return list(pool.map(lambda rank: _recorded(unit, record, rank), chosen))


def _recorded(unit: str, record: FoldRecord, rank: Mapping[str, Any]) -> RankLog:
    outcome = rank.get("outcome", {"kind": "running", "reason": ""})
    text = record.attempt(rank["attempt"]).log(rank["rank"]).decode(errors="replace")
    who = (unit, rank["attempt"], rank["rank"], rank["host"])
    return RankLog(*who, outcome["kind"], outcome["reason"], text)


def with_what_runs(client: Client, status: Mapping[str, Any], logs: list[RankLog]) -> Iterator[RankLog]:
    """The same logs; of ranks that still run on the client's cluster, what they printed so far."""
    workers = [worker for unit in status["units"] if unit["state"] == "running" for worker in unit["workers"]]
    # only of these: one worker that does not answer would hold up all
    found = client.run(printed_so_far, status["id"], workers=workers, on_error="ignore") if workers else {}
    now = {key: text for of_worker in found.values() for key, text in of_worker.items()}
    for log in logs:
        live = now.get((log.unit, log.attempt, log.rank)) if log.outcome == "running" else None
        yield log if live is None else log._replace(text=live)
