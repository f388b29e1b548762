"""The made-up world: weather and land from io, targets from the hidden true model, and the loss floor."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Final

import numpy as np
import torch

from h2mv_dist.config import FoldSettings, ModelSettings, StorageOptions
from h2mv_dist.grid import Period
from h2mv_dist.io import stores, world
from h2mv_dist.io.cache import StagedCells
from h2mv_dist.io.folds import fit_scaler, make_folds
from h2mv_dist.jobs.batches import gather
from h2mv_dist.model.base import Batch
from h2mv_dist.model.checkpoint import Checkpoint, code_versions, model_tensors
from h2mv_dist.model.h2mv import H2MV
from h2mv_dist.model.registry import h2mv_loss
from h2mv_dist.model.rollout import spin_up
from h2mv_dist.model.truth import true_model
from h2mv_dist.spec import Float32Array, Scaler, moments

FIRST_YEAR: Final = 2001
CELLS_AT_ONCE: Final = 256


@dataclass(frozen=True, slots=True)
class WorldSummary:
    """What was made."""

    url: str
    truth_url: str
    n_land: int
    period: Period


def make_world(
    url: str, *, resolution: float, years: int, seed: int, options: StorageOptions
) -> WorldSummary:
    """Write a world in the published layout, and its hidden model beside it (``*.truth.safetensors``).

    Args:
        url: where; nothing may be there yet.
        resolution: edge of a cell, degrees.
        years: whole years from 2001 on.
        seed: of weather, gaps and noise.
        options: storage options.

    Raises:
        StoreError: something is there already, or the store cannot be reached.
        ConfigError: no grid of this resolution, or one with hardly any land.
    """
    land = world.load_land(resolution)
    for place in (url, truth_url(url)):
        world.require_free(place, options)
    period = Period(date(FIRST_YEAR, 1, 1), date(FIRST_YEAR + years, 1, 1))
    weather = world.make_weather(land, period, seed)
    model = true_model(weather_scaler(weather), weather.static_names)
    targets = world.observe(land, period, simulate_truth(model, weather), seed)
    world.write_world(url, land, period, weather, targets, options)
    stores.put_object(truth_url(url), _truth_checkpoint(model, weather).to_bytes(), options)
    return WorldSummary(url, truth_url(url), land.grid.n_land, period)


def truth_url(url: str) -> str:
    """Where the hidden model of a world lies.

    >>> truth_url("s3://bucket/world.zarr/")
    's3://bucket/world.truth.safetensors'
    """
    return url.rstrip("/").removesuffix(".zarr") + ".truth.safetensors"


def weather_scaler(weather: world.Weather) -> Scaler:
    """Statistics over all cells and days; the truth needs none for targets."""
    columns = weather.forcing.reshape(-1, weather.forcing.shape[2])
    mean, std = columns.mean(0, dtype=np.float64), columns.std(0, dtype=np.float64)
    forcing = moments(mean, std, world.FORCING)
    static = weather.static.astype(np.float64)
    return Scaler(forcing, moments(static.mean(0), static.std(0), weather.static_names), {})


@torch.no_grad()
def simulate_truth(model: H2MV, weather: world.Weather) -> Mapping[str, Float32Array]:
    """Daily outputs the observing systems look at, each [cell, time], after a spin-up over all days."""
    parts: dict[str, list[Float32Array]] = {n: [] for n in world.TRUTH}
    for first in range(0, len(weather.forcing), CELLS_AT_ONCE):
        cells = slice(first, first + CELLS_AT_ONCE)
        batch = Batch(torch.from_numpy(weather.forcing[cells]), torch.from_numpy(weather.static[cells]), {})
        daily = model(batch, spin_up(model, batch, None)).daily
        for name, found in parts.items():
            found.append(daily[name].numpy())
    return {name: np.concatenate(found) for name, found in parts.items()}


@torch.no_grad()
def loss_floor(
    url: str,
    staged: StagedCells,
    folds: FoldSettings,
    fold: int,
    spinup_days: int | None,
    options: StorageOptions,
) -> float:
    """Loss of the true model on a fold's noisy validation targets, with that fold's scaler and spin-up."""
    data = stores.get_object(truth_url(url), options)
    model = Checkpoint.from_bytes(data, truth_url(url)).build_model()
    chosen = make_folds(staged.grid, folds)[fold]
    loss = h2mv_loss(fit_scaler(staged, chosen))
    total = torch.zeros(len(loss.terms), 2)
    cells = chosen.cells("validation")
    for first in range(0, len(cells), CELLS_AT_ONCE):
        batch = gather(staged, chosen, "validation", cells[first : first + CELLS_AT_ONCE])
        total += loss.statistics(model(batch, spin_up(model, batch, spinup_days)), batch)
    return float(loss.value(total).total)


def _truth_checkpoint(model: H2MV, weather: world.Weather) -> Checkpoint:
    return Checkpoint(
        model=ModelSettings(),
        scaler=model.scaler,
        static_names=weather.static_names,
        fold=0,
        settings={},
        progress={},
        tensors=model_tensors(model),
        versions=code_versions(),
    )
