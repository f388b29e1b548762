"""Threads: what is tried, what is chosen, and that a fold keeps it."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from h2mv_dist.config import Settings, validate
from h2mv_dist.io.cache import stage
from h2mv_dist.io.folds import fit_scaler, make_folds
from h2mv_dist.io.source import open_source
from h2mv_dist.jobs import probe
from h2mv_dist.jobs.code_path import Way
from h2mv_dist.jobs.decisions import Begun, Work, decided
from h2mv_dist.jobs.probe import WORTH_TRYING, cell_days_a_second, fastest, measured, threads_to_try
from h2mv_dist.jobs.records import FoldRecord, JobFolder
from h2mv_dist.model.registry import h2mv_loss, model_kind
from tests.jobs.conftest import NO_OPTIONS, small_settings
from tests.model import builders

CELLS = 256
"""That are trained on."""
LARGE = Work(CELLS, 100, WORTH_TRYING["eager"])


def settings(**training: Any) -> Settings:
    chosen = {"code_path": "eager", **training}
    return validate({"data": {"url": "none"}, "training": chosen}, where="test")


def facts(**changed: Any) -> dict[str, Any]:
    usual = {"no_compiler": "", "host": "a", "device": "cpu of process 1", "cores": 8}
    memory = {"free_memory": 2**36, "worker_memory": None}
    return {**usual, **memory, **changed}


class Rates:
    """Stands for a measurement that gives these rates, and remembers what it was asked for."""

    def __init__(self, rates: dict[int, float]) -> None:
        self.rates, self.asked = rates, list[tuple[tuple[int, ...], Way]]()

    def __call__(self, threads: Sequence[int], way: Way) -> dict[int, float]:
        self.asked.append((tuple(threads), way))
        return {number: self.rates[number] for number in threads}


@pytest.fixture
def record(tmp_path: Path) -> FoldRecord:
    record = JobFolder(str(tmp_path), NO_OPTIONS).fold(0)
    record.claim(1, "gang")
    return record


@pytest.mark.parametrize(
    ("nthreads", "everyone", "expected"),
    [
        (1, [facts()], ()),
        (8, [facts(cores=1)], ()),
        (8, [facts()], (1, 2, 4, 8)),
        (3, [facts()], (1, 2, 3)),
        (8, [facts(), facts()], (1, 2, 4)),
        (8, [facts(), facts(host="b", cores=2)], (1, 2)),
        (8, [facts()] * 9, ()),
    ],
)
def test_no_more_threads_are_tried_than_every_rank_can_have(
    nthreads: int, everyone: list[dict[str, Any]], expected: tuple[int, ...]
) -> None:
    assert threads_to_try(nthreads, everyone) == expected


def test_a_thread_more_must_be_worth_it() -> None:
    assert fastest({1: 100.0, 2: 110.0}) == 1
    assert fastest({1: 100.0, 2: 111.0}) == 2
    assert fastest({1: 100.0, 2: 90.0, 4: 131.0}) == 4
    assert fastest({1: 100.0, 2: 180.0, 4: 200.0, 8: 250.0}) == 2


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy this machine is."""
    monkeypatch.setattr(probe, "LIMIT_SECONDS", dict.fromkeys(("eager", "compiled"), 300.0))


@pytest.mark.usefixtures("patient")
def test_every_number_of_threads_is_measured_and_the_old_one_comes_back() -> None:
    model, batch = builders.model(), builders.batch(3, 10)
    before = torch.get_num_threads()
    rates = measured(model, batch, h2mv_loss(model.scaler).reads, (1, 2))
    assert list(rates) == [1, 2]
    assert all(rate > 0 for rate in rates.values())
    assert torch.get_num_threads() == before


def test_a_measurement_that_takes_too_long_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "LIMIT_SECONDS", {"eager": 0.0})
    model, before = builders.model(), torch.get_num_threads()
    with pytest.raises(TimeoutError):
        measured(model, builders.batch(3, 10), h2mv_loss(model.scaler).reads, (1, 2))
    assert torch.get_num_threads() == before


def test_a_fold_keeps_the_threads_that_were_chosen_first(record: FoldRecord) -> None:
    begun, rates, others = Begun(record, 1, "cpu"), Rates({1: 10.0, 2: 19.0, 4: 20.0}), Rates({})
    first = decided(begun, settings(), LARGE, 4, [facts()], rates)
    assert (first["threads"], rates.asked) == (2, [((1, 2, 4), Way(compiled=False, recompute=False))])
    kept = record.decisions()
    assert kept is not None
    assert kept["cell_days_a_second"] == {"1": 10.0, "2": 19.0, "4": 20.0}
    assert decided(begun, settings(), LARGE, 4, [facts()], others) == first
    assert others.asked == []


def test_compiled_code_is_tried_where_there_is_much_to_do(record: FoldRecord) -> None:
    rates, work = Rates({1: 10.0, 2: 19.0, 4: 20.0}), Work(CELLS, 100, WORTH_TRYING["compiled"])
    found = decided(Begun(record, 1, "cpu"), settings(code_path="auto"), work, 4, [facts()], rates)
    assert (found["code_path"], found["threads"]) == ("compiled", 2)
    assert rates.asked == [((1, 2, 4), Way(compiled=True, recompute=False))]


@pytest.mark.parametrize(
    ("training", "device", "work", "threads"),
    [
        ({"threads": 3}, "cpu", LARGE, 3),
        ({"code_path": "compiled"}, "cpu", Work(CELLS, 100, WORTH_TRYING["compiled"] - 1), 4),
        ({}, "cuda", LARGE, 4),
        ({}, "cpu", Work(CELLS, 100, WORTH_TRYING["eager"] - 1), 4),
    ],
)
def test_nothing_is_tried_where_there_is_no_choice(
    training: dict[str, Any], device: str, work: Work, threads: int, record: FoldRecord
) -> None:
    rates = Rates({})
    found = decided(Begun(record, 1, device), settings(**training), work, 4, [facts()], rates)
    assert (found["threads"], rates.asked) == (threads, [])


def test_a_probe_that_fails_leaves_the_threads_of_the_worker(
    record: FoldRecord, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = decided(Begun(record, 1, "cpu"), settings(), LARGE, 4, [facts()], Rates({}))
    assert found["threads"] == 4
    assert "threads were not tried out" in caplog.text


@pytest.mark.usefixtures("patient")
def test_real_cells_are_measured(world_url: str, cache: Path) -> None:
    chosen = small_settings(world_url, cache, training={"batch_size": 8})
    spec = model_kind(chosen.model.name).spec
    source = open_source(chosen.data, forcing=spec.forcing, targets=spec.targets, options=NO_OPTIONS)
    staged = stage(source, cache)
    fold = make_folds(staged.grid, chosen.folds)[0]
    scaler = fit_scaler(staged, fold)
    for recompute in (False, True):
        way = Way(compiled=False, recompute=recompute)
        rates = cell_days_a_second(chosen, staged, fold, scaler, (1, 2), way)
        assert list(rates) == [1, 2]
