"""What a rank keeps of its progress, and which batches it draws."""

import json

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from pydantic import ValidationError

from h2mv_dist.config import TrainingSettings
from h2mv_dist.jobs.trainer import Progress, epoch_batches


def test_batches_cover_every_cell_once_and_depend_on_the_epoch() -> None:
    cells = np.array([3, 5, 8, 13, 21, 34, 55])
    first, second = (epoch_batches(cells, 3, (0, 0, epoch)) for epoch in (1, 2))
    assert [len(b) for b in first] == [3, 3, 1]
    assert sorted(np.concatenate(first).tolist()) == cells.tolist()
    assert np.concatenate(first).tolist() != np.concatenate(second).tolist()
    again = epoch_batches(cells, 3, (0, 0, 1))
    assert [b.tolist() for b in again] == [b.tolist() for b in first]


def test_progress_keeps_the_best_epoch() -> None:
    progress = Progress()
    for loss in (3.0, float("nan"), 2.0, 2.5):
        progress = progress.after(loss)
    assert progress == Progress(4, 3, 2.0)
    assert Progress.from_record(progress.record()) == progress
    assert Progress.from_record(Progress().record()) == Progress()


LOSSES = st.lists(st.sampled_from([1.0, 2.0, 3.0, 4.0, float("nan")]), max_size=30)
PLATEAU = st.one_of(st.none(), st.integers(1, 6))


def cuts_by_hand(losses: list[float], plateau: int) -> int:
    """Epochs at which the best epoch so far, or the start, is a multiple of the plateau's length ago."""
    best, best_epoch, cuts = float("inf"), 0, 0
    for epoch, loss in enumerate(losses, start=1):
        if loss < best:
            best, best_epoch = loss, epoch
        elif (epoch - best_epoch) % plateau == 0:
            cuts += 1
    return cuts


@given(LOSSES, PLATEAU)
def test_the_learning_rate_falls_with_every_plateau(losses: list[float], plateau: int | None) -> None:
    progress = Progress()
    for loss in losses:
        before, progress = progress, progress.after(loss, plateau)
        assert before.rate_cuts <= progress.rate_cuts <= before.rate_cuts + 1
    cuts = 0 if plateau is None else cuts_by_hand(losses, plateau)
    assert progress.rate_cuts == cuts
    assert progress.learning_rate(0.01, 0.5) == 0.01 * 0.5**cuts


@given(LOSSES, LOSSES, PLATEAU)
def test_a_resume_from_the_record_changes_nothing(
    first: list[float], rest: list[float], plateau: int | None
) -> None:
    whole = resumed = Progress()
    for loss in first:
        whole = whole.after(loss, plateau)
        resumed = Progress.from_record(json.loads(json.dumps(resumed.after(loss, plateau).record())))
    for loss in rest:
        whole, resumed = whole.after(loss, plateau), resumed.after(loss, plateau)
    assert resumed == whole


def test_a_plateau_longer_than_the_patience_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"plateau_epochs \(30\) must be less than patience \(30\)"):
        TrainingSettings(plateau_epochs=30)


def test_settings_that_change_numbers_belong_to_the_job() -> None:
    changed = {
        "plateau_epochs": 5,
        "plateau_factor": 0.1,
        "precision": "bfloat16",
        "cells_at_once": 8,
        "truncation_days": 365,
    }
    before, after = TrainingSettings().identity(), TrainingSettings.model_validate(changed).identity()
    assert {key for key in after if after[key] != before[key]} == changed.keys()
