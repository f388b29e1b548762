"""The assembled model: outputs, budgets over a run, state carry-over, masked losses."""

from dataclasses import replace

import pytest
import torch

from h2mv_dist.model.base import Batch, Result, Target, steps_between
from h2mv_dist.model.h2mv import SPEC
from h2mv_dist.model.registry import h2mv_loss
from h2mv_dist.model.rollout import spin_up
from h2mv_dist.variables import VARIABLES
from tests.model import builders


def test_every_output_is_in_the_table_and_has_its_shape() -> None:
    result = builders.model()(batch := builders.batch(), builders.model().initial_state(4))
    assert tuple(result.daily) == SPEC.daily
    assert all(v.shape == (batch.n_cells, batch.n_days) for v in result.daily.values())
    assert set(SPEC.outputs) <= set(VARIABLES)


def test_outputs_respect_the_bounds_of_the_table() -> None:
    model = builders.model().double()
    batch = builders.batch(n_days=400)
    batch = Batch(batch.forcing.double(), batch.static.double(), {})
    with torch.no_grad():
        result = model(batch, model.initial_state(4))
    for name, values in {**result.daily, **result.static}.items():
        bounds = VARIABLES[name]
        assert float(values.min()) >= bounds.lower - 1e-9, name
        assert float(values.max()) <= bounds.upper + 1e-9, name


def test_the_budget_closes_over_a_run() -> None:
    model = builders.model().double()
    batch = builders.batch(n_days=400)
    batch = Batch(batch.forcing.double(), batch.static.double(), {})
    daily = model(batch, spin_up(model, batch, None)).daily
    gain = daily["actual_precipitation"] - daily["evapotranspiration"] - daily["runoff"]
    residual = daily["terrestrial_water_storage"].diff(dim=1) - gain[:, 1:]
    assert float(residual.detach().abs().max()) < 1e-9


def test_blocks_of_days_equal_one_run() -> None:
    model, batch = builders.model(), builders.batch(n_days=100)
    state = spin_up(model, batch, 30)
    whole = model(batch, state)
    results: list[Result] = []
    for part in batch.forcing.split(33, dim=1):
        results.append(model(replace(batch, forcing=part, targets={}), state))
        state = results[-1].state
    for name in SPEC.daily:
        joined = torch.cat([r.daily[name] for r in results], dim=1)
        torch.testing.assert_close(joined, whole.daily[name], rtol=1e-4, atol=1e-4)


def test_an_empty_batch_runs_and_has_zero_gradients() -> None:
    model, batch = builders.model(), builders.batch(n_cells=2)
    empty = Batch(
        batch.forcing[:0],
        batch.static[:0],
        {k: Target(t.values[:0], t.steps) for k, t in batch.targets.items()},
    )
    loss = h2mv_loss(builders.scaler())
    result = model(empty, model.initial_state(0))
    value = loss.value(loss.statistics(result, empty))
    torch.autograd.backward(value.total)
    assert value.total.item() == 0.0
    assert all(p.grad is None or float(p.grad.abs().sum()) == 0.0 for p in model.parameters())


def test_a_cell_without_observations_changes_nothing() -> None:
    model, batch = builders.model(), builders.batch(n_cells=5)
    last = {
        k: Target(torch.cat([t.values[:4], torch.full_like(t.values[4:], torch.nan)]), t.steps)
        for k, t in batch.targets.items()
    }
    first = {k: Target(t.values[:4], t.steps) for k, t in last.items()}
    four = Batch(batch.forcing[:4], batch.static[:4], first)
    gradients = [gradient(model, b) for b in (replace(batch, targets=last), four)]
    for with_empty, without in zip(*gradients, strict=True):
        torch.testing.assert_close(with_empty, without, rtol=1e-5, atol=1e-6)


def test_a_gap_in_tws_only_removes_its_own_step() -> None:
    model, batch = builders.model(), builders.batch(gaps=0.0)
    name = "terrestrial_water_storage_anomaly"
    term = h2mv_loss(builders.scaler()).terms[0]
    result = model(batch, model.initial_state(4))
    target = batch.targets[name]
    gappy = replace(batch, targets={**batch.targets, name: Target(target.values.clone(), target.steps)})
    gappy.targets[name].values[0, 1] = torch.nan
    store = result.daily["terrestrial_water_storage"]
    predicted = target.steps.mean(store - store.mean(dim=1, keepdim=True))
    values = target.values[0, [0, 2]]
    by_hand = (((predicted[0, [0, 2]] - (values - values.mean())) / 2.0) ** 2).mean()
    rest = (((predicted - (target.values - target.values.mean(1, keepdim=True))) / 2.0) ** 2).mean(1)[1:]
    expected = torch.cat([by_hand[None], rest]).mean()
    torch.testing.assert_close(term.value(term.statistics(result, gappy)), expected)


def test_swe_beyond_saturation_is_met() -> None:
    model, batch = builders.model(), builders.batch(n_cells=1, n_days=2, gaps=0.0)
    term = h2mv_loss(builders.scaler()).terms[3]
    result = model(batch, model.initial_state(1))
    swe = torch.tensor([[150.0, 20.0]], requires_grad=True)
    target = batch.targets["snow_water_equivalent"]
    observed = Target(torch.tensor([[400.0, 24.0]]), target.steps)
    batch = replace(batch, targets={**batch.targets, "snow_water_equivalent": observed})
    result = replace(result, daily={**result.daily, "snow_water_equivalent": swe})
    value = term.value(term.statistics(result, batch))
    torch.autograd.backward(value)
    assert value.item() == pytest.approx(((24 - 20) / 2) ** 2 / 2)
    assert swe.grad is not None
    assert swe.grad[0, 0] == 0.0
    assert swe.grad[0, 1] != 0.0


def gradient(model: torch.nn.Module, batch: Batch) -> list[torch.Tensor]:
    loss = h2mv_loss(builders.scaler())
    result = model(batch, builders.model().initial_state(batch.n_cells))
    total = loss.value(loss.statistics(result, batch)).total
    return list(torch.autograd.grad(total, list(model.parameters())))


def test_unequal_steps_average_the_right_days() -> None:
    steps = steps_between(torch.tensor([0, 3]), torch.tensor([3, 5]))
    assert steps.mean(torch.arange(6.0)[None]).tolist() == [[1.0, 3.5]]


def test_anomalies_refer_to_all_observations_whatever_counts_in_a_role() -> None:
    batch, model = builders.batch(gaps=0.0), builders.model()
    with torch.no_grad():
        result = model(batch, model.initial_state(batch.n_cells))
    store = result.daily["terrestrial_water_storage"]
    name = "terrestrial_water_storage_anomaly"
    steps = batch.targets[name].steps
    perfect = steps.mean(store)
    role = torch.full_like(perfect, torch.nan)
    role[:, 0] = perfect[:, 0]
    term = next(t for t in h2mv_loss(builders.scaler()).terms if t.name == "tws")
    whole, part = Target(perfect, steps), Target(role, steps, known_mean=perfect.mean(dim=1))
    of_all = term.statistics(result, replace(batch, targets={name: whole}))
    assert float(term.value(of_all)) < 1e-4
    of_part = term.statistics(result, replace(batch, targets={name: part}))
    assert float(term.value(of_part)) < 1e-4
    misled = term.statistics(result, replace(batch, targets={name: Target(role, steps)}))
    assert float(term.value(misled)) > 10 * float(term.value(of_part))
