"""A fold's records: what counts, who may say so, and what a stale attempt cannot do."""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from h2mv_dist.config import StorageOptions
from h2mv_dist.errors import JobError, StoreError
from h2mv_dist.io import stores
from h2mv_dist.jobs.records import UNFINISHED_SECONDS, FoldRecord, FoldWriter, JobFolder
from h2mv_dist.model.checkpoint import Checkpoint
from tests.conftest import Place
from tests.model.test_checkpoint import checkpoint


def record(place: Place) -> FoldRecord:
    return JobFolder(place.url, place.options).fold(3)


def at(epoch: int) -> Checkpoint:
    return replace(checkpoint(epoch), progress={"epoch": epoch, "best_epoch": epoch, "best_loss": 0.5})


def write(writer: FoldWriter, epoch: int, *, best: bool = True, keep: bool = False) -> None:
    writer.write_epoch(
        epoch, {"epoch": epoch, "valid_loss": 1.0}, at(epoch), at(epoch) if best else None, keep
    )


def contents(fold: FoldRecord) -> tuple[object, ...]:
    return fold.state(), fold.checkpoint_bytes("best"), fold.checkpoint_bytes("last"), fold.metrics()


def checkpoints(fold: FoldRecord) -> list[str]:
    return list(stores.list_objects(fold.path("checkpoints"), fold.options))


def test_an_epoch_counts_as_a_whole_and_only_what_counts_is_kept(place: Place) -> None:
    fold = record(place)
    assert not fold.has_checkpoint("last")
    with pytest.raises(StoreError, match="there is no best checkpoint yet"):
        fold.read_checkpoint("best")
    writer = fold.claim(1, "gang-1")
    write(writer, 1)
    write(writer, 2, best=False, keep=True)
    write(writer, 3, best=False)
    assert fold.read_checkpoint("best").progress["epoch"] == 1
    assert fold.read_checkpoint("last").progress["epoch"] == 3
    assert [m["epoch"] for m in fold.metrics()] == [1, 2, 3]
    assert checkpoints(fold) == [
        "00001-001-best.safetensors",
        "00002-001-last.safetensors",
        "00003-001-last.safetensors",
    ]


def test_a_stale_attempt_changes_nothing(place: Place) -> None:
    fold = record(place)
    stale = fold.claim(1, "gang-1")
    write(stale, 1)
    current = fold.claim(2, "gang-2")
    write(current, 2)
    before = contents(fold)
    for late in (2, 3):
        with pytest.raises(JobError, match=r"another attempt owns the fold(.|\n)*attempt 2 \(gang-2\)"):
            write(stale, late)
    with pytest.raises(JobError, match="another attempt owns the fold"):
        stale.write_within_epoch(1, at(1))
    with pytest.raises(JobError, match="another attempt owns the fold"):
        fold.claim(2, "another scheduler's gang")
    assert (
        fold.state(),
        fold.checkpoint_bytes("best"),
        fold.checkpoint_bytes("last"),
        fold.metrics(),
    ) == before
    write(current, 3)
    assert fold.claim(3, "gang-3").state.epoch == 3
    assert set(checkpoints(fold)) == fold.state().names, "what the stale attempt left is cleared away"


def test_a_stale_attempt_deletes_nothing_of_a_newer_one(place: Place) -> None:
    """Stopped between its claim and clearing up, or after a checkpoint, it goes on much later."""
    fold = record(place)
    write(fold.claim(1, "gang-1"), 1)
    stale = fold.claim(2, "gang-2")
    current = fold.claim(3, "gang-3")
    write(current, 2)
    before = contents(fold)
    stale.delete_unused()
    assert contents(fold) == before


def test_what_a_newer_attempt_inherited_stays(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pointer is moved but the answer is lost, and another attempt goes on from there meanwhile."""
    fold = record(place)
    unlucky = fold.claim(1, "gang-1")
    swap = stores.swap_object

    def lose_answer(*arguments: Any) -> None:
        swap(*arguments)
        monkeypatch.undo()
        fold.claim(2, "gang-2")

    monkeypatch.setattr(stores, "swap_object", lose_answer)
    with pytest.raises(JobError, match="another attempt owns the fold"):
        write(unlucky, 1)
    assert (fold.state().attempt, fold.state().epoch) == (2, 1)
    assert fold.read_checkpoint("best").progress["epoch"] == 1
    assert fold.read_checkpoint("last").progress["epoch"] == 1


def test_the_end_clears_away_what_stale_attempts_left(place: Place) -> None:
    fold = record(place)
    stale = fold.claim(1, "gang-1")
    current = fold.claim(2, "gang-2")
    with pytest.raises(JobError, match="another attempt owns the fold"):
        write(stale, 1)
    write(current, 1)
    current.mark_done({"epoch": 1})
    assert set(checkpoints(fold)) == fold.state().names


def test_what_killed_processes_were_writing_is_deleted_a_day_later(tmp_path: Path) -> None:
    fold = JobFolder(str(tmp_path), StorageOptions()).fold(0)
    left, written = (Path(fold.path(f"checkpoints/.h2mv-part-{n}")) for n in ("left", "written"))
    left.parent.mkdir(parents=True)
    for path in (left, written):
        path.write_bytes(b"half a check")
    os.utime(left, (0, time.time() - 1.1 * UNFINISHED_SECONDS))
    fold.claim(1, "gang-1")
    assert (left.exists(), written.exists()) == (False, True)


def test_a_checkpoint_within_an_epoch_is_where_a_resume_starts(place: Place) -> None:
    fold = record(place)
    writer = fold.claim(1, "gang-1")
    write(writer, 1)
    writer.write_within_epoch(1, at(7))
    resumed = fold.claim(2, "gang-2")
    assert (resumed.state.epoch, fold.read_checkpoint("last").progress["epoch"]) == (1, 7)
    assert [m["epoch"] for m in fold.metrics()] == [1]


def test_a_token_stays(place: Place) -> None:
    folder = JobFolder(place.url, place.options)
    assert folder.token() is None
    assert folder.write_token() == folder.write_token() == folder.token()
