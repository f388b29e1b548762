"""The laws of water, one day at a time; pure elementwise functions.

Every argument is a tensor of one shape (or broadcasts to it): stores mm, fluxes mm d-1, temperature degC.
Each law returns the new store with its fluxes, so that the budget closes by construction. Source: H2MV v1.0,
Geosci. Model Dev. 18, 2921 (2025); published symbols are given in the docstrings.
"""

from typing import Final, NamedTuple

import torch
from torch import Tensor

ZERO_CELSIUS: Final = 273.15
LATENT_HEAT: Final = 2.45
"""Latent heat of vaporisation, MJ kg-1."""
WATT_DAY: Final = 0.0864
"""MJ m-2 d-1 in one W m-2."""
SMALLEST_INPUT: Final = 1e-8
"""Water input below which it counts as this much when divided by, mm d-1."""


class Phase(NamedTuple):
    """Precipitation by phase, mm d-1."""

    snowfall: Tensor
    rainfall: Tensor


def available_energy(net_radiation: Tensor) -> Tensor:
    """Net radiation (W m-2) as the evaporation it can drive, ``Rn``, mm d-1, >= 0.

    >>> available_energy(torch.tensor([-5.0, 100.0]))
    tensor([0.0000, 3.5265])
    """
    return (net_radiation * (WATT_DAY / LATENT_HEAT)).clamp(min=0.0)


def precipitation_phase(precipitation: Tensor, temperature: Tensor, snowfall_correction: Tensor) -> Phase:
    """Snow at or below freezing, corrected for gauge undercatch (``b_snow``); rain above it."""
    snowfall = torch.where(temperature <= 0.0, precipitation * snowfall_correction, 0.0)
    return Phase(snowfall, torch.where(temperature > 0.0, precipitation, 0.0))


class Snow(NamedTuple):
    """Snow store and melt."""

    swe: Tensor
    melt: Tensor


def snow_step(swe: Tensor, snowfall: Tensor, thaw: Tensor, melt_factor: Tensor) -> Snow:
    """Melt by the degree-day factor ``a_melt``; ``new - old == snowfall - melt``.

    Args:
        swe: snow water equivalent, mm, >= 0.
        snowfall: mm d-1.
        thaw: temperature above freezing, degC, >= 0.
        melt_factor: mm degC-1 d-1, >= 0.
    """
    melt = torch.minimum(swe, thaw * melt_factor)
    return Snow((swe + snowfall - melt).clamp(min=0.0), melt)


class Evaporation(NamedTuple):
    """Soil moisture after evaporation, and the three fluxes."""

    soil_moisture: Tensor
    interception: Tensor
    soil: Tensor
    transpiration: Tensor


def evaporation_step(
    soil_moisture: Tensor,
    rainfall: Tensor,
    energy: Tensor,
    fapar: Tensor,
    interception_capacity: Tensor,
    soil_factor: Tensor,
    transpiration_factor: Tensor,
) -> Evaporation:
    """Interception, soil evaporation and transpiration share the energy, in this order.

    ``new - old == -(soil + transpiration)``. The factors ``a_Es`` and ``a_T`` lie in [0, 1],
    ``a_Ei`` is >= 0; ``energy`` is ``Rn``.
    """
    interception = torch.minimum(torch.minimum(rainfall, fapar * interception_capacity), energy)
    energy = energy - interception
    soil = (1.0 - fapar) * torch.minimum(energy, soil_moisture) * soil_factor
    energy, soil_moisture = energy - soil, soil_moisture - soil
    transpiration = fapar * torch.minimum(energy, soil_moisture) * transpiration_factor
    return Evaporation(soil_moisture - transpiration, interception, soil, transpiration)


class Infiltration(NamedTuple):
    """Soil moisture after recharge, and how the water input was divided."""

    soil_moisture: Tensor
    soil_fraction: Tensor
    soil_recharge: Tensor
    groundwater_fraction: Tensor
    groundwater_recharge: Tensor
    runoff_fraction: Tensor
    surface_runoff: Tensor


def infiltration_step(
    soil_moisture: Tensor,
    capacity: Tensor,
    water_input: Tensor,
    soil_factor: Tensor,
    groundwater_factor: Tensor,
) -> Infiltration:
    """Divide the water input between soil, groundwater and surface runoff; nothing is lost.

    The three fractions sum to 1 and the soil never exceeds ``capacity`` (``SM_max``, mm). The factors
    ``a_rsoil`` and ``a_rgw`` lie in [0, 1].
    """
    room = (capacity - soil_moisture) / water_input.clamp(min=SMALLEST_INPUT)
    soil_fraction = room.clamp(max=1.0) * soil_factor
    excess = 1.0 - soil_fraction
    groundwater_fraction = excess * groundwater_factor
    runoff_fraction = excess * (1.0 - groundwater_factor)
    soil_recharge = soil_fraction * water_input
    return Infiltration(
        soil_moisture + soil_recharge,
        soil_fraction,
        soil_recharge,
        groundwater_fraction,
        groundwater_fraction * water_input,
        runoff_fraction,
        runoff_fraction * water_input,
    )


class Groundwater(NamedTuple):
    """Groundwater store and its outflow."""

    storage: Tensor
    baseflow: Tensor


def groundwater_step(storage: Tensor, recharge: Tensor, recession: Tensor) -> Groundwater:
    """Linear reservoir that drains the share ``b_baseflow`` a day; ``new - old == recharge - baseflow``."""
    baseflow = storage * recession
    return Groundwater(storage + recharge - baseflow, baseflow)


def evaporative_fraction(evapotranspiration: Tensor, energy: Tensor) -> Tensor:
    """Evaporation as a share of the energy, ``EF``; 0 where there is no energy.

    >>> evaporative_fraction(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 4.0]))
    tensor([0.0000, 0.2500])
    """
    has_energy = energy > 0.0
    return torch.where(has_energy, evapotranspiration / torch.where(has_energy, energy, 1.0), 0.0)
