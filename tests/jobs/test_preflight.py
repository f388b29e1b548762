"""What the ranks of a gang tell each other before the first step."""

import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from h2mv_dist.errors import JobError, StoreError
from h2mv_dist.jobs import rank
from h2mv_dist.jobs.messages import Failure, Place, failure_of
from h2mv_dist.jobs.preflight import agree, code_fingerprint

GIB = 2**30


def facts(number: int, **changed: Any) -> dict[str, Any]:
    alike = dict.fromkeys(("code", "versions", "data"), "the same")
    room = {"free_memory": GIB, "worker_memory": None, "free_disk": GIB, "needed_memory": 1}
    return {**alike, **room, "host": "a", "device": f"cpu of process {number}", **changed}


def failures(store: dist.Store, problem: Exception | None, **changed: Any) -> list[Failure]:
    """How two ranks of which the second may have other facts end, if ``problem`` meets rank 0's decisions."""

    def decide(_: object) -> Mapping[str, Any]:
        if problem is not None:
            raise problem
        return {}

    def outcome(number: int, own: Mapping[str, Any]) -> Failure:
        with pytest.raises(Exception) as caught:  # noqa: PT011
            agree(store, Place("gang", number, 2, 1, None, {}), own, decide)
        return failure_of(caught.value)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(outcome, (0, 1), (facts(0), facts(1, **changed))))


@pytest.fixture
def store() -> dist.Store:
    made = dist.HashStore()
    made.set_timeout(timedelta(seconds=100))
    return made


@pytest.mark.parametrize(
    ("problem", "kind"),
    [
        (JobError("a newer attempt owns the fold"), "refused"),
        (StoreError("the store is full", full=True), "full"),
        (StoreError("the store kept failing: Connection reset by peer"), "busy"),
        (OSError(28, "No space left on device"), "full"),
        (KeyError("ranks"), "failed"),
    ],
)
def test_what_ended_rank_0_ends_the_others_for_the_same_reason(
    problem: Exception, kind: str, store: dist.Store
) -> None:
    first, second = failures(store, problem)
    assert first.kind == second.kind == kind
    assert str(problem.args[-1]) in second.reason


@pytest.mark.parametrize(
    ("changed", "kind", "word"),
    [
        ({"free_disk": 0}, "full", "training.cache"),
        ({"free_memory": 0}, "busy", "training.recompute"),
        ({"worker_memory": 0}, "refused", "cluster.memory_limit"),
        ({"device": "cpu of process 0"}, "refused", "share a device"),
    ],
)
def test_only_what_cannot_change_is_final(
    changed: dict[str, Any], kind: str, word: str, store: dist.Store
) -> None:
    for failure in failures(store, None, **changed):
        assert failure.kind == kind
        assert "rank 1 on a" in failure.reason
        assert word in failure.reason


def test_a_store_is_not_taken_for_a_peer() -> None:
    error = StoreError("the store kept failing: Connection reset by peer")
    assert rank._failure(error).kind == "busy"
    assert rank._failure(RuntimeError("Connection reset by peer")).kind == "peer"


def test_code_is_found_beside_a_clone_of_the_repository(tmp_path: Path) -> None:
    """Python takes its folder, which is in the current one, for a package without ``__file__``."""
    (tmp_path / "h2mv_dist").mkdir()
    command = "from h2mv_dist.jobs.preflight import code_fingerprint; print(code_fingerprint())"
    there = subprocess.run(
        (sys.executable, "-c", command), cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert there.stdout.strip() == code_fingerprint()
