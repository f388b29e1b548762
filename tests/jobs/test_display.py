"""What people see of a job under way, in a terminal and as HTML."""

import io
from typing import Any

import pytest
from rich.console import Console

from h2mv_dist.display import _Lines, table_of
from h2mv_dist.jobs.html import jobs_html
from h2mv_dist.jobs.progress import progress_of


def unit(name: str, state: str, **more: Any) -> dict[str, Any]:
    known = {"attempt": 0, "workers": [], "latest": {}, "error": "", "pause": 0.0, "steps": 1}
    return {"name": name, "state": state, **known, **more}


@pytest.fixture
def status() -> dict[str, Any]:
    """Of four tiles, one is done, one is at its first fifth, and one has failed once."""
    begun = {"attempt": 1, "workers": ["tcp://[fd00::1]:1"], "latest": {"days": 73, "of": 365}}
    units = [
        unit("0-4_0-6", "done", attempt=1),
        unit("0-4_6-12", "running", **begun),
        unit("4-8_0-6", "queued", attempt=1, pause=2.0, error="the store kept failing [/b]"),
        unit("4-8_6-12", "queued"),
    ]
    job = {"id": "infer-cube", "place": "s3://b/cube.zarr", "units": units, "finished": False}
    return {**job, "cancelled": False, "submitted": 100.0, "now": 220.0}


def test_time_left_counts_what_a_tile_has_done(status: dict[str, Any]) -> None:
    found = progress_of(status)
    assert (found.done, found.total) == (1, 4)
    assert found.rate == pytest.approx(1.2 / 120)
    assert found.seconds_left == pytest.approx(2.8 * 100)


def test_tiles_under_way_are_named(status: dict[str, Any]) -> None:
    out = io.StringIO()
    Console(file=out, width=120).print(table_of(status))
    for said in (out.getvalue(), jobs_html([status])):
        for part in (
            "0-4_6-12",
            "tcp://[fd00::1]:1",
            "73 of 365",
            "4-8_0-6",
            "waits: the store kept failing [/b]",
        ):
            assert part in said
        assert "4-8_6-12" not in said, "it has not begun"
        assert "1 of 4" in said


def test_a_fold_whose_loss_was_never_finite_has_no_best_one(status: dict[str, Any]) -> None:
    """As its record tells, which leaves out what there is not."""
    latest = {"epoch": 2, "train_loss": None, "valid_loss": None, "seconds": 1.5}
    job = {**status, "id": "train-job", "units": [unit("fold-00", "unfinished", latest=latest, steps=9)]}
    lines, table = io.StringIO(), io.StringIO()
    _Lines(Console(file=lines, width=120))(job)
    Console(file=table, width=120).print(table_of(job))
    assert lines.getvalue() == "fold-00: unfinished, epoch 2, train -, validation -, best -\n"
    for said in (table.getvalue(), jobs_html([job])):
        assert "fold-00" in said
        assert "1.5000" in said
