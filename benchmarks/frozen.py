"""The baseline: H2MV written plainly in PyTorch, as published, and left as it is.

Day by day: what the network reads is joined, ``nn.LSTMCell`` and a linear layer are called, physics works on
columns [cell, 1], and all outputs are appended to lists, whichever are asked for. It shares weights with the
package's model, and no code, so that what the package gains or loses shows.
"""

import torch
from torch import Tensor
from torch.nn import functional

from h2mv_dist.model.base import Batch
from h2mv_dist.model.h2mv import H2MV

State = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
OUTPUTS = ("snow_water_equivalent", "evapotranspiration", "runoff", "terrestrial_water_storage", "fapar")


def empty_state(model: H2MV, n_cells: int) -> State:
    """Four columns, hidden and cell state."""
    column, memory = torch.zeros(n_cells, 1), torch.zeros(n_cells, model.hidden)
    return column, column, column, column, memory, memory


def run(model: H2MV, batch: Batch, state: State) -> tuple[dict[str, Tensor], State]:
    """Outputs [cell, time], and the state after the last day."""
    static = (batch.static - model.static_mean) / model.static_std
    encoder = model.fc_static
    condensed = functional.leaky_relu(encoder.fc2(functional.leaky_relu(encoder.fc1(static))))
    capacity = functional.softplus(encoder.fc3(condensed) + 100.0) + 1.0
    scaled = (batch.forcing - model.forcing_mean) / model.forcing_std
    correction, recession = model.beta_snow.sigmoid(), model.beta_baseflow.sigmoid()
    swe, soil, ground, fapar, hidden, cell = state
    days: list[tuple[Tensor, ...]] = []
    for day in range(batch.n_days):
        stores = torch.cat([swe, soil, ground, fapar], dim=1) / model.state_scale
        known = torch.cat([scaled[:, day], condensed, stores], dim=1)
        hidden, cell = model.lstm_fc.lstm_cell(known, (hidden, cell))
        heads = model.lstm_fc.fc(hidden)
        melt_factor, interception_capacity = (
            functional.softplus(heads[:, 0:1]),
            functional.softplus(heads[:, 1:2]),
        )
        soil_factor, leaf_factor = heads[:, 2:3].sigmoid(), heads[:, 3:4].sigmoid()
        soil_recharge_factor, ground_recharge_factor = heads[:, 4:5].sigmoid(), heads[:, 5:6].sigmoid()
        fapar = heads[:, 6:7].sigmoid()

        radiation, precipitation, kelvin = (batch.forcing[:, day, i : i + 1] for i in range(3))
        celsius = kelvin - 273.15
        energy = (radiation * 0.0864 / 2.45).clamp(min=0.0)
        snow = torch.where(celsius <= 0.0, precipitation * correction, 0.0)
        rain = torch.where(celsius > 0.0, precipitation, 0.0)
        melt = torch.minimum(swe, celsius.clamp(min=0.0) * melt_factor)
        swe = (swe + snow - melt).clamp(min=0.0)

        interception = torch.minimum(torch.minimum(rain, fapar * interception_capacity), energy)
        energy = energy - interception
        soil_evaporation = (1.0 - fapar) * torch.minimum(energy, soil) * soil_factor
        energy, soil = energy - soil_evaporation, soil - soil_evaporation
        transpiration = fapar * torch.minimum(energy, soil) * leaf_factor
        soil = soil - transpiration

        water = rain + melt - interception
        fraction = ((capacity - soil) / water.clamp(min=1e-8)).clamp(max=1.0) * soil_recharge_factor
        recharge = (1.0 - fraction) * ground_recharge_factor * water
        surface = (1.0 - fraction) * (1.0 - ground_recharge_factor) * water
        soil = soil + fraction * water
        baseflow = ground * recession
        ground = ground + recharge - baseflow
        evaporation = interception + soil_evaporation + transpiration
        fraction_of_energy = torch.where(energy > 0.0, evaporation / energy.clamp(min=1e-8), 0.0)
        asked = (swe, evaporation, surface + baseflow, swe + soil + ground, fapar)
        others = (snow, rain, snow + rain, melt, interception, soil_evaporation, transpiration, water)
        soils = (fraction, fraction * water, recharge, surface, baseflow, soil, soil / capacity, ground)
        learned = (melt_factor, interception_capacity, soil_factor, leaf_factor, soil_recharge_factor)
        days.append((*asked, *others, *soils, *learned, ground_recharge_factor, fraction_of_energy))
    columns = [torch.cat(column, dim=1) for column in zip(*days, strict=True)]
    return dict(zip(OUTPUTS, columns, strict=False)), (swe, soil, ground, fapar, hidden, cell)
