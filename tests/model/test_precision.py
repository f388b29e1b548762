"""Networks that multiply in bfloat16, physics that does not notice."""

import pytest
import torch
from torch import Tensor

from h2mv_dist.model.base import Batch, Result
from h2mv_dist.model.h2mv import H2MV, SPEC
from h2mv_dist.model.networks import multiply_in
from h2mv_dist.model.registry import h2mv_loss
from h2mv_dist.model.rollout import spin_up
from tests.model import builders


def run(precision: str, n_days: int = 700) -> tuple[H2MV, Result, Tensor]:
    model, batch = builders.model(), builders.batch(n_days=n_days)
    multiply_in(model, precision)
    result = model(batch, spin_up(model, batch, 50))
    loss = h2mv_loss(builders.scaler())
    total = loss.value(loss.statistics(result, batch)).total
    torch.autograd.backward(total)
    return model, result, total.detach()


def test_bfloat16_is_close_and_everything_outside_the_products_is_float32() -> None:
    (full, exact, loss), (low, rough, low_loss) = run("float32"), run("bfloat16")
    assert float(low_loss) == pytest.approx(float(loss), rel=0.02)
    tensors = [*rough.outputs(), *rough.state, *low.parameters(), low_loss]
    tensors += [p.grad for p in low.parameters() if p.grad is not None]
    assert {t.dtype for t in tensors} == {torch.float32}
    name = "terrestrial_water_storage"
    difference = (rough.daily[name] - exact.daily[name]).detach().abs().max()
    assert 0 < float(difference) < 0.05 * float(exact.daily[name].detach().max())
    for (name, found), expected in zip(gradients(low).items(), gradients(full).values(), strict=True):
        # summed over days in bfloat16, small summands would be lost
        assert float((found - expected).norm()) <= 0.02 * float(expected.norm()), name


def gradients(model: H2MV) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_the_budget_closes_whatever_the_networks_say() -> None:
    model = builders.model().double()
    multiply_in(model, "bfloat16")
    batch = builders.batch(n_days=400)
    batch = Batch(batch.forcing.double(), batch.static.double(), {})
    daily = model(batch, spin_up(model, batch, None)).daily
    gain = daily["actual_precipitation"] - daily["evapotranspiration"] - daily["runoff"]
    residual = daily["terrestrial_water_storage"].diff(dim=1) - gain[:, 1:]
    assert float(residual.detach().abs().max()) < 1e-9


def test_it_can_be_taken_back_to_the_bit() -> None:
    model, batch = builders.model(), builders.batch()
    with torch.no_grad():
        before = model(batch, model.initial_state(4))
        multiply_in(model, "bfloat16")
        between = model(batch, model.initial_state(4))
        multiply_in(model, "float32")
        after = model(batch, model.initial_state(4))
    assert all(torch.equal(before.daily[n], after.daily[n]) for n in SPEC.daily)
    assert not torch.equal(before.daily["fapar"], between.daily["fapar"])


def test_an_empty_batch_runs_in_bfloat16() -> None:
    model, batch = builders.model(), builders.batch(n_cells=1)
    multiply_in(model, "bfloat16")
    result = model(batch.cells(0, 0), model.initial_state(0))
    assert result.daily["runoff"].shape == (0, batch.n_days)
