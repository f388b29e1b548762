"""The hidden "true" H2MV of the made-up world: its weights are set by hand, so that its maps make sense.

A few LSTM units are leaky integrators of one driver or static feature (constant gates, ``c`` follows the
driver with a time scale of some days); the heads are sums of those. A trained model can represent it
exactly, so the loss of the truth on noisy targets is a floor that training can approach.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from h2mv_dist.model.h2mv import H2MV, Learned
from h2mv_dist.spec import Scaler

LIFT: Final = 20.0
"""Added before leaky ReLUs and taken off after them: all of them stay in their linear part."""
OPEN_GATE: Final = 6.0

CONDENSED: Final = (
    "root_depth_m",
    "forest",
    "greenness",
    "bare",
    "permafrost",
    "clay",
    "relief_m",
    "wetland",
)
"""Static features the truth depends on, one condensed column each."""


@dataclass(frozen=True, slots=True)
class Integrator:
    """An LSTM unit that follows ``gain * driver + offset`` (through tanh) with a time scale in days."""

    driver: str
    gain: float
    days: float
    offset: float = 0.0


DRIVERS: Final = ("net_radiation", "precipitation", "air_temperature")
STATES: Final = ("snow_water_equivalent", "soil_moisture", "groundwater_storage", "fapar")

UNITS: Final[Mapping[str, Integrator]] = {
    "season": Integrator("air_temperature", 0.7, 25.0),
    "warmth": Integrator("air_temperature", 0.7, 3.0),
    "light": Integrator("net_radiation", 0.6, 10.0),
    "wetness": Integrator("precipitation", 0.5, 8.0),
    "moisture": Integrator("soil_moisture", 2.0, 15.0, offset=-0.6),
    **{name: Integrator(name, 0.5, 3.0) for name in CONDENSED[1:]},
}

HEADS: Final[Mapping[str, Mapping[str, float]]] = {
    "melt_factor": {"bias": 2.8, "warmth": 1.0, "forest": -0.9},
    "interception_capacity": {"bias": 0.8, "forest": 1.0},
    "soil_evaporation_factor": {"bias": -0.8, "moisture": 1.2, "wetness": 1.0, "clay": -0.4},
    "transpiration_factor": {"bias": 0.2, "moisture": 1.6, "light": 0.6, "season": 0.5},
    "soil_recharge_factor": {"bias": 1.4, "permafrost": -1.4, "clay": -0.7, "relief_m": -0.9},
    "groundwater_recharge_factor": {"bias": 0.8, "clay": -0.9, "wetland": -0.5, "relief_m": -0.5},
    "fapar": {"bias": -0.6, "greenness": 2.2, "season": 1.6, "moisture": 1.2, "bare": -1.0},
}
"""Weights of the heads before their softplus or sigmoid."""

CAPACITY: Final = {"root_depth_m": 45.0}
"""Deviation of SM_max from about 101 mm for one standard deviation of a feature, mm."""
SNOWFALL: Final = 2.4
BASEFLOW: Final = -5.5


@torch.no_grad()
def true_model(scaler: Scaler, static_names: tuple[str, ...]) -> H2MV:
    """The hidden model for static features of these names (a world's own)."""
    model = H2MV(scaler)
    for parameter in model.parameters():
        parameter.zero_()
    _set_encoder(model, static_names)
    for unit, integrator in enumerate(UNITS.values()):
        _set_unit(model, unit, integrator)
    _set_heads(model)
    model.beta_snow.fill_(SNOWFALL)
    model.beta_baseflow.fill_(BASEFLOW)
    return model.eval()


def _set_encoder(model: H2MV, static_names: tuple[str, ...]) -> None:
    encoder = model.fc_static
    for column, name in enumerate(CONDENSED):
        encoder.fc1.weight[column, static_names.index(name)] = 1.0
        encoder.fc1.bias[column] = LIFT
        encoder.fc2.weight[column, column] = 1.0
        encoder.fc3.weight[0, column] = CAPACITY.get(name, 0.0)
    encoder.fc3.bias[0] = -LIFT * sum(CAPACITY.values())


def _set_unit(model: H2MV, unit: int, integrator: Integrator) -> None:
    cell, hidden = model.lstm_fc.lstm_cell, model.hidden
    write, keep, candidate, read = (unit + hidden * gate for gate in range(4))
    share = torch.tensor(1.0 / integrator.days)
    cell.bias_ih[write] = share.logit()
    cell.bias_ih[keep] = (1.0 - share).logit()
    cell.bias_ih[read] = OPEN_GATE
    offset = integrator.offset
    if integrator.driver in CONDENSED:
        column = len(DRIVERS) + CONDENSED.index(integrator.driver)
        offset -= integrator.gain * LIFT
    elif integrator.driver in DRIVERS:
        column = DRIVERS.index(integrator.driver)
    else:
        column = model.lstm_fc.known + STATES.index(integrator.driver)
    cell.weight_ih[candidate, column] = integrator.gain
    cell.bias_ih[candidate] = offset


def _set_heads(model: H2MV) -> None:
    units = tuple(UNITS)
    for row, name in enumerate(Learned._fields):
        for unit, weight in HEADS[name].items():
            if unit == "bias":
                model.lstm_fc.fc.bias[row] = weight
            else:
                model.lstm_fc.fc.weight[row, units.index(unit)] = weight
