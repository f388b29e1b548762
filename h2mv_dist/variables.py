"""Every variable once: name, units, CF standard name, long name, valid range.

Stores are in mm, water fluxes in mm d-1. A CF standard name is given only where its canonical units
can be converted to ours (``lwe_*``: liquid water equivalent); bounds are physical, both ends included.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from h2mv_dist.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """One physical quantity.

    Attributes:
        name: identifier in settings, cubes and Python.
        units: UDUNITS string.
        long_name: a few words for plots and attributes.
        standard_name: CF standard name, or None where CF has none in these units.
        lower: smallest possible value.
        upper: largest possible value.
    """

    name: str
    units: str
    long_name: str
    standard_name: str | None = None
    lower: float = -math.inf
    upper: float = math.inf

    def cf_attributes(self) -> dict[str, str]:
        """Attributes a CF reader expects on an array of this variable."""
        attributes = {"units": self.units, "long_name": self.long_name}
        if self.standard_name is not None:
            attributes["standard_name"] = self.standard_name
        return attributes


def _flux(name: str, long_name: str, standard_name: str | None = None) -> Variable:
    return Variable(name=name, units="mm d-1", long_name=long_name, standard_name=standard_name, lower=0.0)


def _store(name: str, long_name: str, standard_name: str | None = None) -> Variable:
    return Variable(name=name, units="mm", long_name=long_name, standard_name=standard_name, lower=0.0)


def _fraction(name: str, long_name: str, standard_name: str | None = None) -> Variable:
    return Variable(
        name=name,
        units="1",
        long_name=long_name,
        standard_name=standard_name,
        lower=0.0,
        upper=1.0,
    )


_FORCING = (
    Variable(
        name="net_radiation",
        units="W m-2",
        long_name="net radiation at the surface",
        standard_name="surface_net_downward_radiative_flux",
        lower=-500.0,
        upper=1000.0,
    ),
    _flux("precipitation", "precipitation", "lwe_precipitation_rate"),
    Variable(
        name="air_temperature",
        units="K",
        long_name="air temperature near the surface",
        standard_name="air_temperature",
        lower=150.0,
        upper=350.0,
    ),
)

_FLUXES = (
    _flux("snowfall", "snowfall after gauge correction", "lwe_snowfall_rate"),
    _flux("rainfall", "rainfall", "rainfall_rate"),
    _flux("actual_precipitation", "snowfall plus rainfall", "lwe_precipitation_rate"),
    _flux("snowmelt", "snow melt"),
    _flux("interception_evaporation", "evaporation of intercepted rain"),
    _flux("soil_evaporation", "evaporation from bare soil"),
    _flux("transpiration", "transpiration"),
    _flux("evapotranspiration", "evapotranspiration", "lwe_water_evaporation_rate"),
    _flux("water_input", "rain and melt water reaching the soil"),
    _flux("soil_recharge", "recharge of the soil moisture store"),
    _flux("groundwater_recharge", "recharge of the groundwater store"),
    _flux("surface_runoff", "surface runoff"),
    _flux("baseflow", "outflow of the groundwater store"),
    _flux("runoff", "total runoff"),
)

_STORES = (
    _store("snow_water_equivalent", "snow water equivalent", "lwe_thickness_of_surface_snow_amount"),
    _store(
        "soil_moisture",
        "water in the root zone above the wilting point",
        "lwe_thickness_of_moisture_content_of_soil_layer",
    ),
    _store("groundwater_storage", "groundwater storage"),
    _store("terrestrial_water_storage", "terrestrial water storage"),
    Variable(
        name="terrestrial_water_storage_anomaly",
        units="mm",
        long_name="terrestrial water storage minus its mean over the baseline period",
    ),
    _store("soil_moisture_capacity", "largest possible soil moisture"),
)

_FRACTIONS = (
    _fraction("evaporative_fraction", "evapotranspiration as a share of net radiation"),
    _fraction("soil_recharge_fraction", "share of water input that recharges the soil"),
    _fraction("groundwater_recharge_fraction", "share of water input that recharges groundwater"),
    _fraction("surface_runoff_fraction", "share of water input that runs off at once"),
    _fraction("relative_soil_moisture", "soil moisture as a share of its capacity"),
    _fraction(
        "fapar",
        "fraction of absorbed photosynthetically active radiation",
        "fraction_of_surface_downwelling_photosynthetic_radiative_flux_absorbed_by_vegetation",
    ),
)

_LEARNED = (
    Variable(name="melt_factor", units="mm degC-1 d-1", long_name="learned degree-day factor", lower=0.0),
    _flux("interception_capacity", "learned interception capacity of a full canopy"),
    _fraction("soil_evaporation_factor", "learned reduction of soil evaporation"),
    _fraction("transpiration_factor", "learned reduction of transpiration"),
    _fraction("soil_recharge_factor", "learned reduction of soil recharge"),
    _fraction("groundwater_recharge_factor", "learned share of excess water to groundwater"),
    _fraction("snowfall_correction", "learned global correction of snowfall"),
    Variable(
        name="baseflow_recession",
        units="d-1",
        long_name="learned global share of groundwater that drains a day",
        lower=0.0,
        upper=1.0,
    ),
)

VARIABLES: Final[Mapping[str, Variable]] = MappingProxyType(
    {v.name: v for v in (*_FORCING, *_FLUXES, *_STORES, *_FRACTIONS, *_LEARNED)}
)

GROUPS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        group: tuple(v.name for v in variables)
        for group, variables in {
            "fluxes": _FLUXES,
            "stores": _STORES,
            "fractions": _FRACTIONS,
            "learned": _LEARNED,
        }.items()
    }
)
"""What a model may give, by the kind of quantity; a group's name stands for all of its variables."""


def variable(name: str) -> Variable:
    """The variable called ``name``.

    Raises:
        ConfigError: no such variable; the message names the nearest one.

    >>> variable("runoff").units
    'mm d-1'
    """
    if name not in VARIABLES:
        raise ConfigError(f"unknown variable {name!r}; {nearest(name, VARIABLES)}")
    return VARIABLES[name]


def by_name_or_group(wanted: Collection[str], valid: tuple[str, ...], where: str) -> tuple[str, ...]:
    """Variables that are wanted by name or by group, each once.

    Args:
        wanted: names of variables and of groups.
        valid: the variables there are; groups stand for those of theirs that are among them.
        where: what asks for them, for messages.

    Raises:
        ConfigError: a name is neither; the message names the nearest one.

    >>> by_name_or_group(["fapar", "stores"], ("soil_moisture", "runoff", "fapar"), "outputs")
    ('fapar', 'soil_moisture')
    """
    found = {group: tuple(name for name in names if name in valid) for group, names in GROUPS.items()}
    known = {name: (name,) for name in valid} | {group: names for group, names in found.items() if names}
    for name in wanted:
        if name not in known:
            raise ConfigError(f"{where}: there is no {name!r}; {nearest(name, known)}")
    return tuple(dict.fromkeys(name for each in wanted for name in known[each]))


def nearest(name: str, valid: Mapping[str, object] | tuple[str, ...]) -> str:
    """A hint that names the valid spelling closest to ``name``.

    >>> nearest("runof", ("runoff", "fapar"))
    "did you mean 'runoff'?"
    >>> nearest("x", ("runoff", "fapar"))
    'valid: fapar, runoff'
    """
    import difflib

    matches = difflib.get_close_matches(name, list(valid), n=1)
    return f"did you mean {matches[0]!r}?" if matches else f"valid: {', '.join(sorted(valid))}"
