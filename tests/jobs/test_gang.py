"""The coordinator's rules: queue, priorities, attempts, quarantine."""

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from h2mv_dist.jobs.gang import _SEVERITY
from h2mv_dist.jobs.lease import QUARANTINE_AFTER, Health, Seat, choose_seats, choose_unit
from h2mv_dist.jobs.messages import (
    FIRST_PAUSE_SECONDS,
    FULL_PATIENCE_SECONDS,
    LONGEST_PAUSE_SECONDS,
    Failure,
    FailureKind,
    Job,
    Unit,
)
from h2mv_dist.jobs.progress import waits_for

SEATS = st.lists(
    st.builds(lambda h, n: Seat(f"host{h}", str(n), f"host{h}:{n}"), st.integers(0, 3), st.integers(0, 9)),
    unique_by=lambda s: s.address,
)


@given(SEATS, st.integers(1, 8))
def test_a_gang_is_whole_and_sorted_or_not_at_all(free: list[Seat], n: int) -> None:
    chosen = choose_seats(free, n)
    if len(free) < n:
        assert chosen is None
        return
    assert chosen is not None
    assert len(set(chosen)) == n
    assert set(chosen) <= set(free)
    assert list(chosen) == sorted(chosen, key=lambda s: s.position)
    on_one_host = any(sum(s.host == h.host for s in free) >= n for h in free)
    assert (len({s.host for s in chosen}) == 1) == on_one_host


@given(st.integers(1, 4), st.data())
def test_workers_stay_in_a_neighbourhood_while_others_are_left(n_workers: int, data: st.DataObject) -> None:
    queue = [name for name in "abcdef" for _ in range(3)] * 2
    order = data.draw(st.permutations([*range(n_workers)] * len(queue)))
    last, took = dict.fromkeys(range(n_workers), ""), list[str]()
    while queue:
        worker = order.pop()
        elsewhere = [name for other, name in last.items() if other != worker]
        name = queue.pop(choose_unit(queue, last[worker], elsewhere))
        if last[worker] in queue:
            assert name == last[worker]
        elif set(queue) - set(elsewhere):
            assert name not in elsewhere
        last[worker] = name
        took.append(name)
    assert sorted(took) == sorted("abcdef" * 6)


def unit(**fields: Any) -> Unit:
    return Unit("fold-00", "fold", {}, **fields)


def fail(unit: Unit, kind: FailureKind, epoch: int | None = None, now: float = 0.0) -> str:
    unit.start(("w",))
    if epoch is not None:
        unit.latest = {"epoch": epoch}
    unit.end(Failure(kind, f"{kind} happened"), now)
    return unit.state


def test_failures_without_progress_are_bounded() -> None:
    fold = unit(attempts=2)
    assert fail(fold, "machine") == "queued"
    assert fail(fold, "failed") == "failed"
    assert (fold.attempt, fold.error) == (2, "failed happened")


def test_progress_between_failures_gives_new_chances() -> None:
    fold = unit(attempts=2)
    assert [fail(fold, "machine", epoch) for epoch in (1, 2, 3, 3)] == ["queued"] * 3 + ["failed"]


def test_being_asked_to_leave_is_no_failure_and_a_refusal_is_final() -> None:
    fold = unit(attempts=1)
    assert [fail(fold, "preempted") for _ in range(5)] == ["queued"] * 5
    assert fail(fold, "refused") == "failed"


def test_a_rank_that_had_to_leave_tells_more_than_those_it_left() -> None:
    """They see a closed connection, which would count as a failure."""
    kinds = sorted(("cancelled", "peer", "preempted", "machine"), key=_SEVERITY.index)
    assert kinds == ["machine", "preempted", "peer", "cancelled"]
    fold = unit(attempts=1)
    assert fail(fold, "preempted") == "queued"
    assert fail(fold, "peer") == "failed"


def test_a_failing_store_is_given_more_time_with_every_failure() -> None:
    fold = unit(attempts=3)
    assert [fail(fold, "busy") for _ in range(2)] == ["queued"] * 2
    assert fold.pause == 2 * FIRST_PAUSE_SECONDS
    fold.start(("w",))
    assert fold.pause == 0.0, "it runs"
    assert fail(fold, "busy") == "failed"


def test_a_full_disk_is_waited_for_but_not_for_ever() -> None:
    fold, now, states = unit(attempts=1), 0.0, []
    while now <= FULL_PATIENCE_SECONDS:
        states.append(fail(fold, "full", now=now))
        assert 0 < fold.pause <= LONGEST_PAUSE_SECONDS
        now += fold.pause
    assert set(states) == {"queued"}
    assert len(states) < 30
    assert fail(fold, "full", now=now) == "failed"


def test_room_that_was_there_meanwhile_starts_the_wait_anew() -> None:
    fold = unit(attempts=1)
    fail(fold, "full", epoch=1)
    assert fail(fold, "full", epoch=2, now=2 * FULL_PATIENCE_SECONDS) == "queued"
    assert fold.pause == FIRST_PAUSE_SECONDS


def test_what_an_attempt_waited_for_is_forgotten_with_it() -> None:
    fold = unit()
    job = Job("j", "", {}, (fold,))
    fold.start(("w",))
    job.report({"unit": fold.name, "event": "epoch", "epoch": 4})
    job.report({"unit": fold.name, "event": "waiting", "reason": "the disk is full"})
    assert waits_for(fold.status()) == "the disk is full"
    fold.end(Failure("machine", "was ended by SIGKILL"), 0.0)
    fold.start(("w",))
    assert waits_for(fold.status()) == ""
    assert fold.latest["epoch"] == 4


def test_a_resumed_unit_goes_on_counting_attempts() -> None:
    fold = Unit(**unit(attempt=4).message())
    fold.start(("w",))
    assert fold.attempt == 5


@pytest.mark.parametrize(("always", "expected"), [(True, "queued"), (False, "cancelled")])
def test_the_final_unit_after_a_failure(always: bool, expected: str) -> None:
    end = Unit("end", "summary", {}, state="waiting")
    job = Job("j", "", {}, (unit(), unit()), final=end, always_final=always)
    assert job.finish() is None
    job.units[0].state = "done"
    assert job.finish() is None
    job.units[1].state = "failed"
    final = job.finish()
    assert (final is job.final) == always
    assert job.final is not None
    assert job.final.state == expected


def test_a_slot_that_keeps_failing_is_quarantined_until_it_works() -> None:
    health = Health()
    for _ in range(QUARANTINE_AFTER - 1):
        health.blame("a/0", "was ended by SIGSEGV")
    health.clear(["a/0"])
    health.blame("a/0", "first of a new row")
    assert not health.quarantined
    for _ in range(QUARANTINE_AFTER):
        health.blame("a/0", "fell off the bus")
    assert health.quarantined == {"a/0": "fell off the bus"}


def test_a_host_whose_slots_all_fail_is_quarantined_as_a_whole() -> None:
    health = Health()
    for device in range(2 * QUARANTINE_AFTER):
        health.blame(f"bad/{device}", "the fabric is down")
    assert health.quarantined == {"bad": "the fabric is down"}
    seats = [Seat("bad", "9", "bad:9"), Seat("good", "0", "good:0")]
    assert [s.host for s in health.usable(seats, 1)] == ["good"]


def test_messages_survive_the_way() -> None:
    end = Unit("end", "summary", {})
    job = Job("j", "s3://b/j", {"a": 1}, (unit(ranks=2),), final=end, always_final=True, priority=3)
    back = Job.from_message(job.message())
    assert back.message() == job.message()
    status: Mapping[str, Any] = back.status()
    assert [u["state"] for u in status["units"]] == ["queued", "waiting"]
