"""Small models and batches for tests."""

import torch

from h2mv_dist.model.base import Batch, Target, steps_between
from h2mv_dist.model.h2mv import H2MV, SPEC
from h2mv_dist.spec import Moments, Scaler

N_STATIC = 5
MONTH = 30


def scaler(n_static: int = N_STATIC) -> Scaler:
    return Scaler(
        forcing=Moments((50.0, 3.0, 280.0), (50.0, 5.0, 15.0)),
        static=Moments((0.0,) * n_static, (1.0,) * n_static),
        targets={name: Moments((1.0,), (2.0,)) for name in SPEC.targets},
    )


def model(seed: int = 0, hidden: int = 16) -> H2MV:
    torch.manual_seed(seed)
    return H2MV(scaler(), hidden=hidden, encoder=12, condensed=4)


def batch(n_cells: int = 4, n_days: int = 90, seed: int = 0, gaps: float = 0.3) -> Batch:
    """Random weather with snow and targets of which the share ``gaps`` is unobserved."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    season = torch.sin(torch.arange(n_days) / 58.0)
    forcing = torch.stack(
        [
            60 + 60 * season + 20 * normal(n_cells, n_days),
            (6 * normal(n_cells, n_days)).clamp(min=0),
            276 + 12 * season + 4 * normal(n_cells, n_days),
        ],
        dim=2,
    )
    months = torch.arange(0, n_days, MONTH)
    monthly = steps_between(months, (months + MONTH).clamp(max=n_days))
    daily = steps_between(torch.arange(n_days), torch.arange(n_days) + 1)
    targets = {}
    for name in SPEC.targets:
        steps, length = (daily, n_days) if name == "snow_water_equivalent" else (monthly, len(months))
        values = normal(n_cells, length).abs() * 3
        hidden = torch.rand(values.shape, generator=generator) < gaps
        targets[name] = Target(torch.where(hidden, torch.nan, values), steps)
    return Batch(forcing, normal(n_cells, N_STATIC), targets)
