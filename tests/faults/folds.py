"""What tests of faults look at: how far a fold is, what its attempts left behind, and its final bytes."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

from h2mv_dist.io import stores
from h2mv_dist.jobs.records import FoldRecord, FoldState, JobFolder
from h2mv_dist.jobs.summary import FILE
from tests.jobs.processes import wait_until

EPOCHS = 10
END_SECONDS = 150.0


class RankRun(NamedTuple):
    """One rank of one attempt, as its supervisor recorded it."""

    attempt: int
    rank: int
    world: int
    worker: str
    name: str
    started: float
    ended: float
    """Infinite while it runs, or if nobody was left to record the end."""
    kind: str
    reason: str
    before: str
    """Why the attempt before this one ended."""
    first_step: float | None
    """Seconds since the job was submitted."""


_NOT_ENDED: Final = {"ended": float("inf"), "kind": "", "reason": "", "first_step": None}


def rank_runs(fold: FoldRecord) -> list[RankRun]:
    """Every rank of every attempt."""
    return [_rank_run(record) for record in fold.attempts()]


def _rank_run(record: Mapping[str, Any]) -> RankRun:
    outcome = {"before": record["history"]["before"], **record.get("outcome", {})}
    known = {name: record[name] for name in RankRun._fields if name in record}
    return RankRun(**{**_NOT_ENDED, **known, **outcome})


class FinalBytes(NamedTuple):
    """The bytes a finished fold leaves; a disturbed run must leave the same."""

    best: bytes
    last: bytes


def final(fold: FoldRecord) -> FinalBytes:
    return FinalBytes(fold.checkpoint_bytes("best"), fold.checkpoint_bytes("last"))


def under_way(fold: FoldRecord, epoch: int = 1, epochs: int = EPOCHS) -> FoldState:
    """Wait until a fold has completed ``epoch``; more are to come."""
    wait_until(lambda: fold.state().epoch >= epoch, f"epoch {epoch}", seconds=END_SECONDS)
    state = fold.state()
    assert 1 <= state.epoch < epochs, "too late for a fault"
    return state


@contextmanager
def pointer_held(fold: FoldRecord) -> Iterator[None]:
    """Nobody can move the fold's pointer meanwhile."""
    with stores._locked(Path(fold.path("state.json"))):
        yield


def seat_of(fold: FoldRecord, rank: int) -> RankRun:
    """Who runs a rank of the newest attempt."""
    return max((run for run in rank_runs(fold) if run.rank == rank), key=lambda run: run.attempt)


def wait_for_the_end(folder: JobFolder) -> None:
    """Wait for a job that nobody else waits for."""
    summary = stores.join(folder.url, FILE)
    wait_until(lambda: stores.exists(summary, folder.options), "the job", seconds=END_SECONDS)


def assert_recovered(fold: FoldRecord, reference: FinalBytes, attempts: int = 2) -> None:
    """The fold was begun again, and ended with the very bytes of a run that was left alone."""
    assert fold.state().attempt >= attempts, "the fault did not end an attempt"
    assert {run.attempt for run in rank_runs(fold)} == set(range(1, fold.state().attempt + 1))
    assert final(fold) == reference


def assert_workers_held_one_rank_at_a_time(runs: Iterable[RankRun]) -> None:
    by_worker = defaultdict(list)
    for run in runs:
        by_worker[run.worker].append(run)
    for held in by_worker.values():
        for earlier, later in pairwise(sorted(held, key=lambda run: run.started)):
            assert earlier.ended <= later.started, f"two ranks at a time: {earlier}, {later}"


def assert_gangs_were_whole(runs: Iterable[RankRun]) -> None:
    gangs = defaultdict(set)
    for run in runs:
        gangs[run.attempt].add((run.rank, run.world))
    for attempt, members in gangs.items():
        assert members == {(r, w) for _, w in members for r in range(w)}, f"attempt {attempt}: {members}"


def overlap(some: Iterable[RankRun], others: Iterable[RankRun]) -> bool:
    """Whether any two of them ran at the same time."""
    others = tuple(others)
    return any(a.started < b.ended and b.started < a.ended for a in some for b in others)
