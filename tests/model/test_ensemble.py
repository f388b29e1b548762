"""Members that run together give what each gives alone."""

import pytest
import torch

from h2mv_dist.model.base import Result
from h2mv_dist.model.ensemble import Ensemble
from h2mv_dist.model.h2mv import H2MV
from h2mv_dist.spec import Moments, Scaler
from tests.model import builders


def members() -> list[H2MV]:
    """With other weights and other scalers."""
    models = []
    for seed in range(3):
        plain = builders.scaler()
        shifted = Moments(tuple(m + 3 * seed for m in plain.forcing.mean), plain.forcing.std)
        torch.manual_seed(seed)
        scaler = Scaler(shifted, plain.static, plain.targets)
        models.append(H2MV(scaler, hidden=9, encoder=12, condensed=4))
    return models


@pytest.mark.parametrize("together", [False, True])
def test_together_is_one_by_one(together: bool) -> None:
    ensemble = Ensemble(members(), torch.device("cpu"), together=together)
    batch = builders.batch(n_cells=5, n_days=40)
    state, found = ensemble.initial_state(5), dict[int, list[Result]]()
    for block in (batch.days(0, 25), batch.days(25, 40)):
        state = ensemble.run(block, state, lambda k, result: found.setdefault(k, []).append(result))
    for k, model in enumerate(members()):
        with torch.no_grad():
            alone = model(batch, model.initial_state(5))
        for name, expected in alone.daily.items():
            ours = torch.cat([part.daily[name] for part in found[k]], dim=1)
            assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max(), name
        for name, expected in (*alone.static.items(), *alone.constants.items()):
            ours = {**found[k][0].static, **found[k][0].constants}[name]
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)
        for ours, expected in zip(state, alone.state, strict=True):
            assert (ours[k] - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1e-6)


@pytest.mark.parametrize("together", [False, True])
def test_no_cell_at_all(together: bool) -> None:
    ensemble = Ensemble(members(), torch.device("cpu"), together=together)
    seen: list[Result] = []
    no_cells = builders.batch(n_cells=4, n_days=3).cells(0, 0)
    state = ensemble.run(no_cells, ensemble.initial_state(0), lambda _, result: seen.append(result))
    assert len(seen) == 3
    assert state[0].shape == (3, 0)
