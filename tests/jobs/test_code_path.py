"""Compiled or as written: what is chosen, kept, and refused."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from h2mv_dist.config import CodePath, Settings, validate
from h2mv_dist.errors import ConfigError, JobError
from h2mv_dist.jobs import code_path
from h2mv_dist.jobs.code_path import WORTH_CELL_DAYS, Way, chosen_path, compiles_here
from h2mv_dist.jobs.decisions import Begun, Work, decided
from h2mv_dist.jobs.messages import RankError
from h2mv_dist.jobs.preflight import least_step_bytes, must_recompute, step_bytes
from h2mv_dist.jobs.records import JobFolder
from h2mv_dist.model.checkpoint import new_model
from h2mv_dist.model.days import BLOCK_DAYS
from tests.jobs.conftest import NO_OPTIONS
from tests.model import builders

GIB = 2**30
NOTHING = "no C++ compiler: g++ is not in PATH"


CELLS = 256
"""That are trained on."""


def settings(**training: Any) -> Settings:
    return validate({"data": {"url": "none"}, "training": training}, where="test")


def facts(**changed: Any) -> dict[str, Any]:
    return {
        "no_compiler": "",
        "free_memory": 64 * GIB,
        "worker_memory": None,
        "host": "a",
        "device": "cpu of process 1",
        "cores": 8,
        **changed,
    }


@pytest.mark.parametrize(
    ("wanted", "device", "cell_days", "obstacle", "expected"),
    [
        ("auto", "cpu", WORTH_CELL_DAYS, "", "compiled"),
        ("auto", "cpu", WORTH_CELL_DAYS - 1, "", "eager"),
        ("auto", "cuda", 1e12, "", "eager"),
        ("auto", "cpu", 1e12, NOTHING, "eager"),
        ("compiled", "cpu", 1.0, "", "compiled"),
        ("eager", "cpu", 1e12, "", "eager"),
        ("eager", "cpu", 1e12, NOTHING, "eager"),
    ],
)
def test_a_path_is_chosen(
    wanted: CodePath, device: str, cell_days: float, obstacle: str, expected: str
) -> None:
    assert chosen_path(wanted, device, cell_days, obstacle, "training.code_path") == expected


def test_what_cannot_be_compiled_is_refused_if_it_was_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"training.code_path = compiled(.|\n)*g\+\+ is not in PATH"):
        chosen_path("compiled", "cpu", 1.0, NOTHING, "training.code_path")


def test_a_worker_without_compiler_says_so_once_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    code_path._warn.cache_clear()
    monkeypatch.setattr(code_path, "no_compiler_because", lambda: NOTHING)
    with caplog.at_level(logging.WARNING):
        assert [compiles_here("compiled"), compiles_here("compiled"), compiles_here("eager")] == [False] * 3
    assert len(caplog.records) == 1
    assert NOTHING in caplog.text


def never(threads: Sequence[int], way: Way) -> dict[int, float]:
    raise AssertionError(f"nothing to choose, but {threads} were tried")


def test_what_was_decided_stays(tmp_path: Path) -> None:
    record = JobFolder(str(tmp_path), NO_OPTIONS).fold(0)
    record.claim(1, "gang")
    begun, large, small = Begun(record, 1, "cpu"), Work(CELLS, 100, 1e9), Work(CELLS, 100, 1.0)
    first = decided(begun, settings(), large, 3, [facts()], never)
    assert first == {"ranks": 1, "device": "cpu", "code_path": "compiled", "threads": 3, "recompute": False}
    assert decided(begun, settings(), small, 1, [facts()], never) == first
    with pytest.raises(JobError, match=r"begun in another way(.|\n)*g\+\+ is not in PATH"):
        decided(begun, settings(), large, 3, [facts(no_compiler=NOTHING)], never)
    smaller = facts(worker_memory=step_bytes(settings(), CELLS, 100, "compiled", False) - 1)
    assert decided(begun, settings(), small, 1, [smaller], never) == {**first, "recompute": True}
    again = decided(begun, settings(recompute=True), small, 1, [facts()], never)
    assert again == {**first, "recompute": True}
    with pytest.raises(RankError, match=r"does not fit into memory(.|\n)*training.recompute"):
        decided(begun, settings(recompute=False), large, 1, [facts(free_memory=1000)], never)
    with pytest.raises(JobError, match=r"begun in another way"):
        decided(Begun(record, 2, "cpu"), settings(), large, 3, [facts(), facts()], never)


def test_a_fold_that_was_refused_for_memory_may_be_begun_elsewhere(tmp_path: Path) -> None:
    record = JobFolder(str(tmp_path), NO_OPTIONS).fold(0)
    record.claim(1, "gang")
    begun, work = Begun(record, 1, "cpu"), Work(CELLS, 100, 1e12)
    with pytest.raises(RankError, match="does not fit into memory"):
        decided(begun, settings(), work, 4, [facts(worker_memory=1000)], never)
    assert record.decisions() is None
    assert not decided(begun, settings(), work, 4, [facts()], never)["recompute"]


def test_a_step_takes_no_more_than_the_cells_there_are() -> None:
    batch = settings().training.batch_size
    whole, half = (step_bytes(settings(), n_cells, 100, "eager", False) for n_cells in (batch, batch // 2))
    assert half * 2 == whole == step_bytes(settings(), 10 * batch, 100, "eager", False)


def test_folds_begun_before_there_was_a_choice_go_on(tmp_path: Path) -> None:
    record = JobFolder(str(tmp_path), NO_OPTIONS).fold(0)
    record.claim(1, "gang")
    record.settle({"ranks": 1, "device": "cpu", "code_path": "eager", "threads": 2, "facts": []})
    found = decided(Begun(record, 1, "cpu"), settings(), Work(CELLS, 100, 1e12), 1, [facts()], never)
    assert found == {"ranks": 1, "device": "cpu", "code_path": "eager", "threads": 2, "recompute": False}


def test_a_graph_that_does_not_fit_is_computed_once_more() -> None:
    needed = step_bytes(settings(), CELLS, 7000, "compiled", False)
    assert not must_recompute(settings(), CELLS, 7000, "compiled", [facts(free_memory=needed)])
    assert must_recompute(settings(), CELLS, 7000, "compiled", [facts(free_memory=needed - 1)])
    assert must_recompute(settings(), CELLS, 7000, "compiled", [facts(free_memory=needed)] * 2), (
        "one host, two ranks"
    )
    hosts = [facts(free_memory=needed, host=name) for name in "ab"]
    assert not must_recompute(settings(), CELLS, 7000, "compiled", hosts)
    assert must_recompute(settings(), CELLS, 7000, "compiled", [facts(worker_memory=needed - 1)])
    assert not must_recompute(settings(), CELLS, 7000, "compiled", [facts(worker_memory=needed)] * 2), (
        "each its own"
    )
    assert not must_recompute(settings(recompute=False), CELLS, 7000, "compiled", [facts(free_memory=1)])
    assert must_recompute(settings(recompute=True), CELLS, 1, "compiled", [facts()])


def test_the_bound_of_a_step_is_that_of_the_cheapest_way_left() -> None:
    free, eager = settings(), settings(code_path="eager", recompute=False)
    assert least_step_bytes(free, CELLS, 7000) == step_bytes(free, CELLS, 7000, "compiled", True) < GIB
    assert least_step_bytes(eager, CELLS, 7000) == step_bytes(eager, CELLS, 7000, "eager", False) > 10 * GIB
    once, again = (step_bytes(free, CELLS, BLOCK_DAYS, "compiled", way) for way in (False, True))
    assert again > once == least_step_bytes(free, CELLS, BLOCK_DAYS), "a block is there as a whole"


@pytest.mark.parametrize(
    ("path", "least"),
    # beside what it keeps, eager code loses memory between arrays of many sizes
    [("eager", 0.25), pytest.param("compiled", 0.9, marks=pytest.mark.slow)],
)
def test_a_graph_keeps_no_more_than_is_projected(path: str, least: float) -> None:
    """At the default sizes, and in proportion to days."""
    n_cells, kept = 64, dict[int, int]()
    model = new_model(settings().model, builders.scaler())
    model.compiled, model.width = path == "compiled", n_cells
    for n_days in (32, 64):
        storages: dict[int, int] = {}

        def keep(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = model(builders.batch(n_cells, n_days), model.initial_state(n_cells))
            # what is kept is freed with the loss, and its place used again
            loss = sum(values.sum() for values in result.daily.values())
        kept[n_days] = sum(storages.values())
        projected = step_bytes(settings(batch_size=n_cells, ranks=1), n_cells, n_days, path, False)
        assert least * projected < kept[n_days] <= projected
        del loss
    assert 1.8 < kept[64] / kept[32] <= 2.0
