"""H2MV: hybrid hydrological model with vegetation (water + fAPAR).

Source: H2MV v1.0, Geosci. Model Dev. 18, 2921 (2025), doi 10.5194/gmd-18-2921-2025. In a block of days every
quantity of a day is a vector [cell]; what does not depend on yesterday is computed for all days of the block
before the loop, what no later day needs is computed after it.
"""

from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from h2mv_dist.model import water
from h2mv_dist.model.base import ProcessModel, State
from h2mv_dist.model.days import Prepared
from h2mv_dist.model.networks import DayWeights, FeedbackLSTM, Memory, StaticEncoder
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
CAPACITY_OFFSET: Final = 100.0
SNOWFALL_START: Final = 3.0
BASEFLOW_START: Final = -6.0


class Learned(NamedTuple):
    """What the network sets each day, each [cell]; units in ``variables.py``."""

    melt_factor: Tensor
    interception_capacity: Tensor
    soil_evaporation_factor: Tensor
    transpiration_factor: Tensor
    soil_recharge_factor: Tensor
    groundwater_recharge_factor: Tensor
    fapar: Tensor


class Stores(NamedTuple):
    """The physical states in the order the network reads them, each [cell]."""

    snow_water_equivalent: Tensor
    soil_moisture: Tensor
    groundwater_storage: Tensor
    fapar: Tensor


class Fluxes(NamedTuple):
    """What one day moves, each [cell]."""

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
    """Forcing as physics needs it, [day, cell], or [cell] for one day."""

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


class Shared(NamedTuple):
    """What days and cells share: weights, statistics of the forcing [var, 1] in its units, two shares."""

    network: DayWeights
    forcing_mean: Tensor
    forcing_std: Tensor
    snowfall_correction: Tensor
    baseflow_recession: Tensor


class CellShared(NamedTuple):
    """What the days of a cell share: gates [4 hidden, cell], all else [cell].

    Shares that are the same in all cells are here, too: their gradients are then added up cell by cell over
    the days, and lose less to rounding.
    """

    constant_gates: Tensor
    capacity: Tensor
    snowfall_correction: Tensor
    baseflow_recession: Tensor


class H2MV(ProcessModel):
    """The published model; the number of static features and the widths are sizes of the model.

    Attributes:
        physics: advances all stores by a day; a model with other laws is a subclass with another one.
    """

    spec = SPEC
    physics = staticmethod(physics_day)
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

    def prepare(self, static: Tensor) -> Prepared:
        """Everything that is the same every day, from static features [feature, cell]."""
        scaled = (static - self.static_mean.unsqueeze(1)) / self.static_std.unsqueeze(1)
        encoding = self.fc_static(scaled)
        capacity = functional.softplus(encoding.heads.squeeze(0) + CAPACITY_OFFSET) + 1.0
        n_forcing = len(self.spec.forcing)
        shared = Shared(
            self.lstm_fc.day_weights(n_forcing, self.state_scale, compiled=self.compiled),
            self.forcing_mean.unsqueeze(1),
            self.forcing_std.unsqueeze(1),
            self.beta_snow.sigmoid(),
            self.beta_baseflow.sigmoid(),
        )
        constant = self.lstm_fc.constant_gates(n_forcing, encoding.condensed)
        shares = (
            share.repeat(static.shape[1]) for share in (shared.snowfall_correction, shared.baseflow_recession)
        )
        return Prepared(shared, CellShared(constant, capacity, *shares))

    @staticmethod
    def outputs_without_days(prepared: Prepared) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Static outputs [cell], and constants."""
        shared, cells = _typed(prepared)
        constants = {
            "snowfall_correction": shared.snowfall_correction,
            "baseflow_recession": shared.baseflow_recession,
        }
        return {"soil_moisture_capacity": cells.capacity}, constants

    @classmethod
    def day_block(
        cls, prepared: Prepared, forcing: Tensor, state: State, names: tuple[str, ...]
    ) -> tuple[tuple[Tensor, ...], State]:
        """Run some days; see :data:`h2mv_dist.model.days.DayBlock`."""
        shared, cells = _typed(prepared)
        weather = _weather(forcing, cells.snowfall_correction)
        *columns, hidden, cell = state
        stores, memory = Stores(*columns), Memory(hidden, cell)
        history: list[tuple[Tensor, ...]] = []
        scaled = (forcing - shared.forcing_mean) / shared.forcing_std
        for today, *skies in zip(scaled, *weather, strict=True):
            heads, memory = FeedbackLSTM.step(cells.constant_gates, today, stores, memory, shared.network)
            learned = _activate(heads)
            stores, fluxes = cls.physics(
                stores, Weather(*skies), learned, cells.capacity, cells.baseflow_recession
            )
            history.append((*learned[:-1], *stores, *fluxes))
        return _outputs(history, weather, cells.capacity, names), (*stores, *memory)


def _typed(prepared: Prepared) -> tuple[Shared, CellShared]:
    return Shared(*prepared.weights), CellShared(*prepared.cells)


def _weather(forcing: Tensor, snowfall_correction: Tensor) -> Weather:
    net_radiation, precipitation, kelvin = forcing.unbind(1)
    celsius = kelvin - water.ZERO_CELSIUS
    phase = water.precipitation_phase(precipitation, celsius, snowfall_correction)
    energy = water.available_energy(net_radiation)
    return Weather(energy, phase.snowfall, phase.rainfall, celsius.clamp(min=0.0))


def _activate(heads: Tensor) -> Learned:
    """Melt factor and interception capacity are positive, all others lie between 0 and 1."""
    return Learned(*functional.softplus(heads[:2]), *heads[2:].sigmoid())


def _outputs(
    history: list[tuple[Tensor, ...]], weather: Weather, capacity: Tensor, names: tuple[str, ...]
) -> tuple[Tensor, ...]:
    """The outputs of these names, each [day, cell], from what the loop kept and what follows from it."""
    if not names:
        return ()
    kept = (*Learned._fields[:-1], *Stores._fields, *Fluxes._fields)
    days = {name: torch.stack(c) for name, c in zip(kept, zip(*history, strict=True), strict=True)}
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
    return tuple(complete[name] for name in names)
