"""Pieces, truncation, ranks and steps that are skipped: what all ranks do equals one plain computation."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from h2mv_dist.config import Assignment, FoldSettings, StorageOptions, validate
from h2mv_dist.errors import JobError
from h2mv_dist.grid import Grid, Period
from h2mv_dist.io.cache import Series, StagedCells
from h2mv_dist.io.folds import Fold, make_folds
from h2mv_dist.io.times import StepAxis
from h2mv_dist.jobs.batches import CellBank, fits, gather
from h2mv_dist.jobs.code_path import Way
from h2mv_dist.jobs.gradient import GRADIENT_FAULT, LOSS_FAULT, Objective, averaging
from h2mv_dist.jobs.records import JobFolder
from h2mv_dist.jobs.trainer import FoldRun, Ranks, epoch_batches
from h2mv_dist.model import days
from h2mv_dist.model.base import Batch, ProcessModel, Result, Target, detach
from h2mv_dist.model.days import no_compiler_because
from h2mv_dist.model.h2mv import H2MV
from h2mv_dist.model.loss import LossSum, StepError
from h2mv_dist.model.registry import h2mv_loss
from h2mv_dist.model.rollout import spin_up, warm_up
from tests.jobs.ranks import CPU, joined, on_ranks
from tests.model import builders

SPINUP = 10
WIDTH = 4
"""Cells that compiled batches are filled up to."""
Arrays = dict[str, NDArray[Any]]
NEEDS_COMPILER = (
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(no_compiler_because()) and not os.environ.get("CI"), reason=no_compiler_because()
    ),
)


def compile_short_blocks(*reads: frozenset[str]) -> None:
    """In a process of its own, for losses that read these: two days take a sixth of the time to compile."""
    torch.set_num_threads(1)
    days.BLOCK_DAYS = 2  # type: ignore[misc]
    for names in reads:
        warm_up(new_model(compiled=True), names, gradient=True)


def new_model(*, compiled: bool) -> H2MV:
    model = builders.model()
    model.compiled, model.width = compiled, WIDTH
    return model


def enters_compiled_code(call: Callable[[], object]) -> bool:
    with torch.profiler.profile() as seen:
        call()
    return any(event.name.startswith("Torch-Compiled Region") for event in seen.events() or ())


def gradients(model: torch.nn.Module) -> Arrays:
    return {n: p.grad.numpy().copy() for n, p in model.named_parameters() if p.grad is not None}


# -------------------- pieces and blocks


@dataclass(frozen=True)
class Case:
    """How a batch is computed; ``terms`` of the loss, all if left out."""

    name: str
    n_cells: int = 7
    cells_at_once: int | None = None
    truncation_days: int | None = None
    terms: tuple[str, ...] = ()

    def objective(self, ranks: Ranks) -> Objective:
        return Objective(
            loss=self.loss,
            spinup_days=SPINUP,
            cells_at_once=self.cells_at_once,
            truncation_days=self.truncation_days,
            world=ranks.world,
            all_reduce=ranks.all_reduce,
        )

    @property
    def loss(self) -> LossSum:
        chosen = [t for t in h2mv_loss(builders.scaler()).terms if t.name in self.terms or not self.terms]
        return LossSum(tuple(chosen))

    def batch(self) -> Batch:
        """One cell is never observed, one rarely, and the others have gaps."""
        batch = builders.batch(n_cells=self.n_cells, n_days=40, gaps=0.5)
        for target in batch.targets.values():
            target.values[-1] = torch.nan
            target.values[0, 1:] = torch.nan
        return batch


CASES = (
    Case("whole"),
    Case("whole, fewer cells than ranks", n_cells=2),
    Case("single cells", cells_at_once=1),
    Case("pieces of two", cells_at_once=2),
    Case("pieces, fewer cells than ranks", n_cells=2, cells_at_once=2),
    Case("blocks", truncation_days=13),
    Case("pieces and blocks", cells_at_once=3, truncation_days=17),
    # the last block is one day, in which some parameters change nothing that the loss reads
    Case("short block", n_cells=2, cells_at_once=1, truncation_days=39, terms=("et",)),
)


def gradients_of_all_cases(rank: int, world: int, folder: Path, *, compiled: bool) -> None:
    if compiled:
        compile_short_blocks(*dict.fromkeys(case.loss.reads for case in CASES))
    with joined(rank, world, folder) as ranks, torch.compiler.set_stance("fail_on_recompile"):
        for case in CASES:
            cells = ranks.share(np.arange(case.n_cells))
            share = some_cells(case.batch(), cells)
            objective = case.objective(ranks)
            model = averaging(new_model(compiled=compiled))
            outcome = objective.gradient(model, share)
            assert outcome.fault == ""
            found = {"loss": outcome.value.total.detach().numpy(), **gradients(model.module)}
            if case is CASES[0]:
                # what one process computes as its second step, another one does as its first
                model.zero_grad(set_to_none=True)
                objective.gradient(model, share)
                assert all(np.array_equal(found[n], g) for n, g in gradients(model.module).items())
            found["validation"] = objective.evaluate(new_model(compiled=compiled), share).numpy()
            np.savez(folder / f"{world}-{rank}-{case.name}.npz", **found)  # type: ignore[arg-type]
        assert enters_compiled_code(partial(objective.gradient, model, case.batch())) == compiled


def some_cells(batch: Batch, cells: NDArray[np.int64]) -> Batch:
    rows = torch.from_numpy(cells)
    targets = {k: Target(t.values[rows], t.steps) for k, t in batch.targets.items()}
    return Batch(batch.forcing[rows], batch.static[rows], targets)


def plain(case: Case, model: ProcessModel) -> Arrays:
    """One process, one graph; the state is cut off where blocks of days begin."""
    batch, loss = case.batch(), case.loss
    state = spin_up(model, batch, SPINUP)
    results: list[Result] = []
    for forcing in batch.forcing.split(case.truncation_days or batch.n_days, dim=1):
        results.append(model(replace(batch, forcing=forcing, targets={}), detach(state)))
        state = results[-1].state
    daily = {k: torch.cat([r.daily[k] for r in results], dim=1) for k in results[0].daily}
    statistics = loss.statistics(replace(results[0], daily=daily), batch)
    total = loss.value(statistics).total
    torch.autograd.backward(total)
    found = {"loss": total.detach().numpy(), "validation": statistics.detach().numpy()}
    zeros = {n: np.zeros(p.shape, np.float32) for n, p in model.named_parameters()}
    return zeros | gradients(model) | found


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((1, False), id="1 rank"),
        pytest.param((2, False), id="2 ranks"),
        pytest.param((3, True), id="3 ranks, compiled", marks=NEEDS_COMPILER),
    ],
)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """How many ranks there are, and where they have left their gradients."""
    ranks, compiled = request.param
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(partial(gradients_of_all_cases, compiled=compiled), ranks, folder)
    return ranks, folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ranks_in_pieces_have_the_gradient_of_one_graph(case: Case, world: tuple[int, Path]) -> None:
    expected = plain(case, builders.model())
    ranks, folder = world
    found = [dict(np.load(folder / f"{ranks}-{r}-{case.name}.npz")) for r in range(ranks)]
    for rank in found:
        assert rank.keys() == expected.keys()
        for name, values in expected.items():
            # the loss is made of small differences of large stores, which are added up in another order
            bound = 3e-5 if name in ("loss", "validation") else 1e-5
            assert np.abs(rank[name] - values).max() <= bound * np.abs(values).max(), name
            np.testing.assert_array_equal(rank[name], found[0][name], err_msg=name)


def test_truncation_changes_the_gradient_but_not_the_loss() -> None:
    whole, blocks = (plain(Case("", truncation_days=days), builders.model()) for days in (None, 13))
    assert blocks["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    recurrent = "lstm_fc.lstm_cell.weight_hh"
    assert np.abs(blocks[recurrent] - whole[recurrent]).max() > 0.1 * np.abs(whole[recurrent]).max()


# -------------------- steps that are skipped


@dataclass(frozen=True)
class SteepError(StepError):
    """As its base, but without a finite slope for cells whose first static feature is above 100."""

    def statistics(self, result: Result, batch: Batch) -> Tensor:
        values = result.daily[self.variable]
        steep = (batch.static[:, 0] > 100).to(values.dtype)
        nothing = (steep[:, None] * (values - values.detach())).clamp(min=0).sqrt()
        flat = torch.stack([nothing.where(steep[:, None] > 0, 0.0).sum(), torch.zeros(())])
        return StepError.statistics(self, result, batch) + flat


def faults(rank: int, world: int, folder: Path) -> None:
    case, pieces = Case("whole"), Case("pieces", cells_at_once=1)
    steep = LossSum((SteepError("et", "evapotranspiration", 1.0),))
    with joined(rank, world, folder) as ranks:
        mine = ranks.share(np.arange(case.n_cells))
        clean, bad, sheer = case.batch(), case.batch(), case.batch()
        bad.forcing[6, 20, 1] = torch.nan
        bad.targets["evapotranspiration"].values[6] = 1.0
        bad.targets["fapar"].values[0, 0] = torch.inf
        sheer.static[6, 0] = 101.0
        for each in (case, pieces):
            objective = each.objective(ranks)
            model = averaging(builders.model())
            found = []
            for batch, loss in ((bad, objective.loss), (sheer, steep), (clean, objective.loss)):
                model.zero_grad(set_to_none=True)
                now = replace(objective, loss=loss)
                share = some_cells(batch, mine)
                found.append(now.gradient(model, share).fault)
                culprits = now.culprits(model.module, share, torch.from_numpy(mine), case.n_cells)
                found.append(str(culprits.nonzero().flatten().tolist()))
            assert found == [LOSS_FAULT, "[0, 6]", GRADIENT_FAULT, "[]", "", "[]"]
            expected = plain(each, builders.model())
            for name, values in gradients(model.module).items():
                assert np.abs(values - expected[name]).max() <= 1e-5 * np.abs(expected[name]).max(), name


def test_a_fault_on_one_rank_is_seen_by_all_and_its_cells_are_named(tmp_path: Path) -> None:
    on_ranks(faults, 2, tmp_path)


N_TRAIN, N_VALID, BATCH = 7, 3, 3
"""The last batch holds one cell, so the second of two ranks has none."""
POISONED = 4
EPOCHS = 2
TRAINING = {
    "batch_size": BATCH,
    "spinup_days": SPINUP,
    "epochs": EPOCHS,
    "learning_rate": 0.002,
}


def staged_cells(*, poison: bool) -> StagedCells:
    """Cells in memory; the poisoned one would not pass staging, but a model may also blow up by itself."""
    n_cells = N_TRAIN + N_VALID
    batch = builders.batch(n_cells=n_cells, n_days=90)
    period = Period(date(2001, 1, 1), date(2001, 4, 1))
    monthly = StepAxis(np.array([11323, 11354, 11382]), "monthly")
    forcing = batch.forcing.numpy()
    if poison:
        forcing[POISONED, 50, 2] = np.nan
    targets = {
        name: Series(
            StepAxis(period.days(), "daily") if t.values.shape[1] == 90 else monthly, t.values.numpy()
        )
        for name, t in batch.targets.items()
    }
    axis = np.arange(n_cells, dtype=np.float64)
    return StagedCells(
        path=Path(),
        grid=Grid(("cell",), axis, axis, np.ones(n_cells, bool), np.ones(n_cells)),
        period=period,
        forcing_names=("net_radiation", "precipitation", "air_temperature"),
        static_names=tuple("abcde"),
        forcing=forcing,
        static=batch.static.numpy(),
        targets=targets,
    )


def a_fold(staged: StagedCells) -> Fold:
    train = Assignment(role="train", cells=tuple(range(N_TRAIN)))
    validation = Assignment(role="validation", cells=tuple(range(N_TRAIN, N_TRAIN + N_VALID)))
    return make_folds(staged.grid, FoldSettings(explicit=((train, validation),)))[0]


def train_poisoned(rank: int, world: int, folder: Path, *, compiled: bool) -> None:
    if compiled:
        compile_short_blocks()
    model = {"hidden": 8, "encoder": 12, "condensed": 4}
    settings = validate({"data": {"url": "none"}, "model": model, "training": TRAINING}, where="test")
    staged = staged_cells(poison=True)
    record = JobFolder(str(folder / f"job-{world}"), StorageOptions()).fold(0)
    writer = record.claim(1, "gang") if rank == 0 else None
    with joined(rank, world, folder) as ranks:
        run = FoldRun(
            settings=settings,
            staged=staged,
            fold=a_fold(staged),
            scaler=builders.scaler(),
            way=Way(compiled=compiled, recompute=False),
            ranks=ranks,
            record=record,
            writer=writer,
            store=dist.FileStore(str(folder / f"written-{world}"), world),
            emit=lambda **_: None,
            leave=lambda: False,
        )
        torch.save(run.model.state_dict(), folder / f"first-{world}-{rank}.pt")
        run.train(0.0)
        torch.save(run.model.state_dict(), folder / f"last-{world}-{rank}.pt")
        torch.save(run.progress.record(), folder / f"progress-{world}-{rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=NEEDS_COMPILER)])
def test_a_nan_on_one_rank_is_skipped_by_all_as_by_one(tmp_path: Path, compiled: bool) -> None:
    for world in (1, 2):
        on_ranks(partial(train_poisoned, compiled=compiled), world, tmp_path)
    batches = {e: epoch_batches(np.arange(N_TRAIN), BATCH, (0, 0, e)) for e in range(1, EPOCHS + 1)}
    skipped = {e: [i for i, b in enumerate(found, 1) if POISONED in b] for e, found in batches.items()}
    alone, first, second = (weights(tmp_path, "last", *which) for which in ((1, 0), (2, 0), (2, 1)))
    expected = plainly_trained(weights(tmp_path, "first", 1, 0), batches)
    same = all(torch.equal(alone[name], values) for name, values in expected.items())
    assert same != compiled, "compiled code rounds otherwise"
    for name, values in expected.items():
        torch.testing.assert_close(alone[name], values, rtol=1e-4, atol=1e-5)
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], values, rtol=1e-4, atol=1e-5)
    for world in (1, 2):
        job = JobFolder(str(tmp_path / f"job-{world}"), StorageOptions())
        for metrics in job.fold(0).metrics():
            named = [(s["step"], s["cells"], s["reason"]) for s in metrics["skipped"]]
            assert named == [(step, [POISONED], LOSS_FAULT) for step in skipped[metrics["epoch"]]]
            assert metrics["train_loss"] > 0
    assert weights(tmp_path, "progress", 2, 0) == weights(tmp_path, "progress", 2, 1)


def weights(folder: Path, what: str, world: int, rank: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(folder / f"{what}-{world}-{rank}.pt", weights_only=True)
    return found


def plainly_trained(
    first: dict[str, Tensor], batches: dict[int, list[NDArray[np.int64]]]
) -> dict[str, Tensor]:
    """The same steps in one process without the batches of the poisoned cell."""
    staged, fold_loss = staged_cells(poison=False), h2mv_loss(builders.scaler())
    model = H2MV(builders.scaler(), hidden=8, encoder=12, condensed=4)
    model.load_state_dict(first)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.002, weight_decay=0.01)
    for cells in (b for found in batches.values() for b in found if POISONED not in b):
        batch = gather(staged, a_fold(staged), "train", cells)
        optimizer.zero_grad()
        result = model(batch, spin_up(model, batch, SPINUP))
        torch.autograd.backward(fold_loss.value(fold_loss.statistics(result, batch)).total)
        torch.nn.utils.clip_grad_value_(model.parameters(), 0.5)
        optimizer.step()
    return model.state_dict()


# -------------------- batches


@pytest.fixture
def split() -> tuple[StagedCells, Fold]:
    """Some cells train first and validate later, so they have both roles."""
    staged = staged_cells(poison=False)
    early, late = Period.parse("2001-01-01..2001-03-01"), Period.parse("2001-03-01..2001-04-01")
    assignments = (
        Assignment(role="train", cells=(1, 2, 3), periods=(early,)),
        Assignment(role="validation", cells=(2, 3, 7), periods=(late,)),
        Assignment(role="test", cells=(9,)),
    )
    return staged, make_folds(staged.grid, FoldSettings(explicit=(assignments,)))[0]


def same_batches(one: Batch, other: Batch) -> bool:
    pairs = [(one.forcing, other.forcing), (one.static, other.static)]
    for name, target in one.targets.items():
        pairs += [
            (target.values.nan_to_num(-1e9), other.targets[name].values.nan_to_num(-1e9)),
            (target.steps.days, other.targets[name].steps.days),
        ]
        assert (target.steps.weights is None) == (other.targets[name].steps.weights is None)
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in pairs)


@pytest.mark.parametrize(("role", "cells"), [("train", [3, 1]), ("validation", [7, 2, 3]), ("train", [])])
def test_batches_from_the_device_equal_those_from_the_host(
    split: tuple[StagedCells, Fold], role: str, cells: list[int]
) -> None:
    chosen = np.array(cells, np.int64)
    host, device = (CellBank(*split, CPU, resident=r).gather(role, chosen) for r in (False, True))
    assert same_batches(host, device)
    assert host.n_cells == len(cells)
    staged = split[0]
    np.testing.assert_array_equal(host.forcing.numpy(), staged.forcing[chosen])


def test_targets_without_the_role_do_not_count(split: tuple[StagedCells, Fold]) -> None:
    both = np.array([2, 3])
    for resident in (False, True):
        bank = CellBank(*split, CPU, resident=resident)
        for role, kept in (("train", slice(0, 59)), ("validation", slice(59, 90))):
            values = bank.gather(role, both).targets["snow_water_equivalent"].values.numpy()
            expected = np.full((2, 90), np.nan, np.float32)
            expected[:, kept] = split[0].targets["snow_water_equivalent"].values[both, kept]
            np.testing.assert_array_equal(values, expected)


def test_a_cell_that_is_not_on_the_device_is_refused(split: tuple[StagedCells, Fold]) -> None:
    with pytest.raises(JobError, match="not all that a batch needs"):
        CellBank(*split, CPU, resident=True).gather("train", np.array([1, 9]))


def test_cells_stay_on_the_device_only_if_they_leave_half_of_it_and_room_for_a_step(
    split: tuple[StagedCells, Fold],
) -> None:
    bank = CellBank(*split, CPU, resident=True)
    rows = [bank.forcing, bank.static, *(r for role in bank.targets.values() for r in role.values())]
    size = sum(r.table.nbytes for r in rows)  # type: ignore[attr-defined]
    assert fits(*split, free_bytes=2 * size, step_bytes=size)
    assert not fits(*split, free_bytes=2 * size - 2, step_bytes=0)
    assert not fits(*split, free_bytes=2 * size, step_bytes=size + 1), "the step would find no room"
    assert fits(*split, free_bytes=4 * size, step_bytes=3 * size)
    assert not CellBank.open(*split, CPU, step_bytes=0).resident


@pytest.mark.gpu
def test_a_gpu_keeps_the_cells(split: tuple[StagedCells, Fold]) -> None:
    gpu = torch.device("cuda:0")
    bank = CellBank.open(*split, gpu, step_bytes=0)
    assert bank.resident
    for cells in (np.array([3, 1]), np.array([], np.int64)):
        expected = CellBank(*split, CPU, resident=False).gather("train", cells)
        for found in (bank, CellBank(*split, gpu, resident=False)):
            batch = found.gather("train", cells)
            assert batch.forcing.is_cuda
            assert same_batches(expected, batch)
