"""H2MV: hybrid hydrological model with vegetation (water + fAPAR).

Source: H2MV v1.0, Geosci. Model Dev. 18, 2921 (2025), doi 10.5194/gmd-18-2921-2025. Inside the day loop every
quantity is a column [cell, 1]; what does not depend on yesterday is computed for all days before the loop,
what no later day needs is computed after it.
"""

from collections.abc import Iterator
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from h2mv_dist.model import water
from h2mv_dist.model.base import Batch, ProcessModel, Result, State
from h2mv_dist.model.networks import FeedbackLSTM, Memory, StaticEncoder
from h2mv_dist.spec import Budget, ModelSpec, Scaler

SPEC: Final = ModelSpec(
    name="h2mv",
    forcing=("net_radiation", "precipitation", "air_temperature"),
    targets=(
        "terrestrial_water_storage_anomaly",
        "evapotranspiration",
        "runoff",
        "snow_water_equivalent",
        "fapar",
    ),
    state=("snow_water_equivalent", "soil_moisture", "groundwater_storage", "fapar", "hidden", "cell"),
    daily=(
        "melt_factor",
        "interception_capacity",
        "soil_evaporation_factor",
        "transpiration_factor",
        "soil_recharge_factor",
        "groundwater_recharge_factor",
        "fapar",
        "snowfall",
        "rainfall",
        "actual_precipitation",
        "snowmelt",
        "snow_water_equivalent",
        "interception_evaporation",
        "soil_evaporation",
        "transpiration",
        "evapotranspiration",
        "evaporative_fraction",
        "water_input",
        "soil_recharge_fraction",
        "soil_recharge",
        "groundwater_recharge_fraction",
        "groundwater_recharge",
        "soil_moisture",
        "relative_soil_moisture",
        "surface_runoff_fraction",
        "surface_runoff",
        "baseflow",
        "runoff",
        "groundwater_storage",
        "terrestrial_water_storage",
    ),
    static=("soil_moisture_capacity",),
    constants=("snowfall_correction", "baseflow_recession"),
    anomalies={"terrestrial_water_storage_anomaly": "terrestrial_water_storage"},
    budget=Budget(
        store="terrestrial_water_storage",
        gains=("actual_precipitation",),
        losses=("evapotranspiration", "runoff"),
        states=("snow_water_equivalent", "soil_moisture", "groundwater_storage"),
    ),
)

STATE_SCALE: Final = (100.0, 200.0, 200.0, 1.0)
"""What SWE, SM, GW and fAPAR are divided by before the network reads them."""
GATE_DAYS: Final = 8
"""Days whose known gates are computed in one product."""
CAPACITY_OFFSET: Final = 100.0
SNOWFALL_START: Final = 3.0
BASEFLOW_START: Final = -6.0


class Learned(NamedTuple):
    """What the network sets each day, each [cell, 1]; units in ``variables.py``."""

    melt_factor: Tensor
    interception_capacity: Tensor
    soil_evaporation_factor: Tensor
    transpiration_factor: Tensor
    soil_recharge_factor: Tensor
    groundwater_recharge_factor: Tensor
    fapar: Tensor


class Stores(NamedTuple):
    """The physical states in the order the network reads them, each [cell, 1]."""

    snow_water_equivalent: Tensor
    soil_moisture: Tensor
    groundwater_storage: Tensor
    fapar: Tensor


class Fluxes(NamedTuple):
    """What one day moves, each [cell, 1]."""

    snowmelt: Tensor
    interception_evaporation: Tensor
    soil_evaporation: Tensor
    transpiration: Tensor
    water_input: Tensor
    soil_recharge_fraction: Tensor
    soil_recharge: Tensor
    groundwater_recharge_fraction: Tensor
    groundwater_recharge: Tensor
    surface_runoff_fraction: Tensor
    surface_runoff: Tensor
    baseflow: Tensor


class Weather(NamedTuple):
    """Forcing as physics needs it, [cell, time], or [cell, 1] for one day."""

    energy: Tensor
    snowfall: Tensor
    rainfall: Tensor
    thaw: Tensor


def physics_day(
    stores: Stores, weather: Weather, learned: Learned, capacity: Tensor, recession: Tensor
) -> tuple[Stores, Fluxes]:
    """Advance all stores by one day; ``d(SWE + SM + GW) == precipitation - ET - runoff``."""
    snow = water.snow_step(stores.snow_water_equivalent, weather.snowfall, weather.thaw, learned.melt_factor)
    evaporated = water.evaporation_step(
        stores.soil_moisture,
        weather.rainfall,
        weather.energy,
        learned.fapar,
        learned.interception_capacity,
        learned.soil_evaporation_factor,
        learned.transpiration_factor,
    )
    water_input = weather.rainfall + snow.melt - evaporated.interception
    soil = water.infiltration_step(
        evaporated.soil_moisture,
        capacity,
        water_input,
        learned.soil_recharge_factor,
        learned.groundwater_recharge_factor,
    )
    ground = water.groundwater_step(stores.groundwater_storage, soil.groundwater_recharge, recession)
    fluxes = Fluxes(
        snow.melt,
        evaporated.interception,
        evaporated.soil,
        evaporated.transpiration,
        water_input,
        soil.soil_fraction,
        soil.soil_recharge,
        soil.groundwater_fraction,
        soil.groundwater_recharge,
        soil.runoff_fraction,
        soil.surface_runoff,
        ground.baseflow,
    )
    return Stores(snow.swe, soil.soil_moisture, ground.storage, learned.fapar), fluxes


class H2MV(ProcessModel):
    """The published model; the number of static features and the widths are sizes of the model."""

    spec = SPEC
    forcing_mean: Tensor
    forcing_std: Tensor
    static_mean: Tensor
    static_std: Tensor
    state_scale: Tensor

    def __init__(self, scaler: Scaler, *, hidden: int = 100, encoder: int = 150, condensed: int = 12) -> None:
        super().__init__()
        self.scaler = scaler
        n_static, n_forcing = len(scaler.static.mean), len(scaler.forcing.mean)
        self.fc_static = StaticEncoder(n_static, encoder, condensed, heads=1)
        self.lstm_fc = FeedbackLSTM(n_forcing + condensed, len(STATE_SCALE), hidden, len(Learned._fields))
        self.beta_snow = nn.Parameter(torch.tensor(SNOWFALL_START))
        self.beta_baseflow = nn.Parameter(torch.tensor(BASEFLOW_START))
        for name, moments in (("forcing", scaler.forcing), ("static", scaler.static)):
            mean, std = moments.arrays()
            self.register_buffer(f"{name}_mean", torch.from_numpy(mean), persistent=False)
            self.register_buffer(f"{name}_std", torch.from_numpy(std), persistent=False)
        self.register_buffer("state_scale", torch.tensor(STATE_SCALE), persistent=False)
        self.hidden = hidden

    def initial_state(self, n_cells: int) -> State:
        """Empty stores and memory: four [cell], two [cell, hidden]."""
        like = self.beta_snow.detach()
        stores = tuple(like.new_zeros(n_cells) for _ in Stores._fields)
        return (*stores, like.new_zeros(n_cells, self.hidden), like.new_zeros(n_cells, self.hidden))

    def forward(self, batch: Batch, state: State) -> Result:
        """Run every day of the batch, starting from ``state``."""
        encoding = self.fc_static((batch.static - self.static_mean) / self.static_std)
        capacity = functional.softplus(encoding.heads + CAPACITY_OFFSET) + 1.0
        weather = self._weather(batch.forcing)
        days, last = self._run_days(batch.forcing, encoding.condensed, weather, capacity, state)
        return Result(
            daily=_daily_outputs(days, weather, capacity),
            static={"soil_moisture_capacity": capacity.squeeze(1)},
            constants={
                "snowfall_correction": self.beta_snow.sigmoid(),
                "baseflow_recession": self.beta_baseflow.sigmoid(),
            },
            state=last,
        )

    def _weather(self, forcing: Tensor) -> Weather:
        net_radiation, precipitation, kelvin = forcing.unbind(dim=2)
        celsius = kelvin - water.ZERO_CELSIUS
        phase = water.precipitation_phase(precipitation, celsius, self.beta_snow.sigmoid())
        energy = water.available_energy(net_radiation)
        return Weather(energy, phase.snowfall, phase.rainfall, celsius.clamp(min=0.0))

    def _run_days(
        self, forcing: Tensor, condensed: Tensor, weather: Weather, capacity: Tensor, state: State
    ) -> tuple[dict[str, Tensor], State]:
        *columns, hidden, cell = state
        stores, memory = Stores(*(c.unsqueeze(1) for c in columns)), Memory(hidden, cell)
        weights = self.lstm_fc.day_weights(self.state_scale)
        recession = self.beta_baseflow.sigmoid()
        history: list[tuple[Tensor, ...]] = []
        gates = self._known_gates(forcing, condensed)
        for known, *today in zip(gates, *(w.split(1, dim=1) for w in weather), strict=True):
            memory = self.lstm_fc.step(known, stores, memory, weights)
            learned = _activate(self.lstm_fc.heads(memory.hidden, weights))
            stores, fluxes = physics_day(stores, Weather(*today), learned, capacity, recession)
            history.append((*learned[:-1], *stores, *fluxes))
        names = (*Learned._fields[:-1], *Stores._fields, *Fluxes._fields)
        days = {name: torch.cat(c, dim=1) for name, c in zip(names, zip(*history, strict=True), strict=True)}
        return days, (*(s.squeeze(1) for s in stores), *memory)

    def _known_gates(self, forcing: Tensor, condensed: Tensor) -> Iterator[Tensor]:
        """Gates of one day after the other; computed for a few days at a time, so that they stay in cache."""
        for block in forcing.split(GATE_DAYS, dim=1):
            scaled = (block - self.forcing_mean) / self.forcing_std
            yield from self.lstm_fc.known_gates(scaled, condensed).unbind(0)


def _activate(heads: Tensor) -> Learned:
    """Melt factor and interception capacity are positive, all others lie between 0 and 1."""
    positive = functional.softplus(heads[:, :2]).split(1, dim=1)
    fractions = heads[:, 2:].sigmoid().split(1, dim=1)
    return Learned(*positive, *fractions)


def _daily_outputs(days: dict[str, Tensor], weather: Weather, capacity: Tensor) -> dict[str, Tensor]:
    """Complete what the day loop kept by everything that follows from it, each [cell, time]."""
    evapotranspiration = days["interception_evaporation"] + days["soil_evaporation"] + days["transpiration"]
    storage = days["snow_water_equivalent"] + days["groundwater_storage"] + days["soil_moisture"]
    derived = {
        "snowfall": weather.snowfall,
        "rainfall": weather.rainfall,
        "actual_precipitation": weather.snowfall + weather.rainfall,
        "evapotranspiration": evapotranspiration,
        "evaporative_fraction": water.evaporative_fraction(evapotranspiration, weather.energy),
        "relative_soil_moisture": days["soil_moisture"] / capacity,
        "runoff": days["surface_runoff"] + days["baseflow"],
        "terrestrial_water_storage": storage,
    }
    complete = days | derived
    return {name: complete[name] for name in SPEC.daily}
