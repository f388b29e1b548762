"""The laws: budgets close, bounds hold, gradients are finite, whatever the weather."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from h2mv_dist.model import water
from h2mv_dist.model.h2mv import Learned, Stores, Weather, physics_day

TOLERANCE = 1e-9


def number(low: float, high: float) -> st.SearchStrategy[Tensor]:
    plain = st.floats(low, high, allow_nan=False, allow_subnormal=False)
    return plain.map(lambda x: torch.tensor([[x]], dtype=torch.float64))


@st.composite
def days(draw: st.DrawFn) -> tuple[Stores, Weather, Learned, Tensor, Tensor]:
    capacity = draw(number(1.0, 1000.0))
    temperature = draw(number(-60.0, 50.0))
    phase = water.precipitation_phase(draw(number(0.0, 300.0)), temperature, draw(number(0.0, 1.0)))
    stores = Stores(
        draw(number(0.0, 5000.0)),
        draw(number(0.0, 1.0)) * capacity,
        draw(number(0.0, 5000.0)),
        draw(number(0.0, 1.0)),
    )
    energy = water.available_energy(draw(number(-200.0, 500.0)))
    weather = Weather(energy, *phase, temperature.clamp(min=0.0))
    positive = (draw(number(0.0, 50.0)), draw(number(0.0, 50.0)))
    fractions = (draw(number(0.0, 1.0)) for _ in range(5))
    return stores, weather, Learned(*positive, *fractions), capacity, draw(number(0.0, 1.0))


def total(stores: Stores) -> Tensor:
    return stores.snow_water_equivalent + stores.soil_moisture + stores.groundwater_storage


@given(days())
def test_the_budget_closes_every_day(day: tuple[Stores, Weather, Learned, Tensor, Tensor]) -> None:
    stores, weather, learned, capacity, recession = day
    after, fluxes = physics_day(stores, weather, learned, capacity, recession)
    evaporated = fluxes.interception_evaporation + fluxes.soil_evaporation + fluxes.transpiration
    gain = weather.snowfall + weather.rainfall - evaporated - fluxes.surface_runoff - fluxes.baseflow
    assert (total(after) - total(stores) - gain).abs().item() < TOLERANCE


@given(days())
def test_stores_and_fluxes_stay_within_bounds(day: tuple[Stores, Weather, Learned, Tensor, Tensor]) -> None:
    stores, weather, learned, capacity, recession = day
    after, fluxes = physics_day(stores, weather, learned, capacity, recession)
    assert all(float(store) >= 0.0 for store in after)
    assert float(after.soil_moisture - capacity) <= TOLERANCE
    assert all(float(flux) >= -TOLERANCE for flux in fluxes)
    evaporated = fluxes.interception_evaporation + fluxes.soil_evaporation + fluxes.transpiration
    assert float(evaporated - weather.energy) <= TOLERANCE
    shares = (
        fluxes.soil_recharge_fraction + fluxes.groundwater_recharge_fraction + fluxes.surface_runoff_fraction
    )
    assert abs(float(shares) - 1.0) < TOLERANCE


@given(days())
def test_gradients_are_finite(day: tuple[Stores, Weather, Learned, Tensor, Tensor]) -> None:
    stores, weather, learned, capacity, recession = day
    leaves = [t.clone().requires_grad_() for t in learned]
    after, fluxes = physics_day(stores, weather, Learned(*leaves), capacity, recession)
    sum(t.sum() for t in (*after, *fluxes)).backward()  # type: ignore[union-attr]
    assert all(leaf.grad is not None and bool(leaf.grad.isfinite().all()) for leaf in leaves)


def test_phase_splits_at_freezing() -> None:
    celsius = torch.tensor([-1.0, 0.0, 0.1])
    phase = water.precipitation_phase(torch.full((3,), 10.0), celsius, torch.tensor(0.9))
    assert phase.snowfall.tolist() == [9.0, 9.0, 0.0]
    assert phase.rainfall.tolist() == [0.0, 0.0, 10.0]


def test_a_full_soil_sends_everything_on() -> None:
    one = torch.ones(1, dtype=torch.float64)
    out = water.infiltration_step(100 * one, 100 * one, 20 * one, one, 0.25 * one)
    assert out.soil_recharge.item() == 0.0
    assert out.groundwater_recharge.item() == 5.0
    assert out.surface_runoff.item() == 15.0


def test_groundwater_recedes_exponentially() -> None:
    storage = torch.tensor(100.0, dtype=torch.float64)
    for _ in range(10):
        storage = water.groundwater_step(storage, torch.zeros_like(storage), torch.tensor(0.1)).storage
    assert abs(storage.item() - 100 * 0.9**10) < 1e-4
