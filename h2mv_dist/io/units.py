"""Units: how stored values become values in the units of :mod:`h2mv_dist.variables`."""

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from h2mv_dist.errors import DataError, describe
from h2mv_dist.io.library import Found
from h2mv_dist.spec import Float32Array
from h2mv_dist.variables import variable

_WATER_DENSITY: Final = (1000.0, "kg m-3")
"""Turns a mass of water on an area into a depth."""


class Conversion(NamedTuple):
    """``ours = theirs * scale + offset``."""

    scale: float = 1.0
    offset: float = 0.0

    def apply(self, values: NDArray[np.generic]) -> Float32Array:
        """Values in our units; computed in float64, so that an offset costs no digits."""
        if self == Conversion():
            return values.astype(np.float32, copy=False)
        return (values.astype(np.float64) * self.scale + self.offset).astype(np.float32)


def conversion_of(found: Found) -> Conversion:
    """From the stored units of an array to ours; a static array stays as it is.

    Raises:
        DataError: its units cannot be converted.
    """
    if found.units is None:
        return Conversion()
    ours = variable(found.name).units
    return conversion_between(
        found.units, ours, found.where, f"set data.variables.{found.name}.units or convert the data"
    )


def conversion_between(units: str, ours: str, where: str, fix: str) -> Conversion:
    """How to convert ``units`` to ``ours``; a mass of water on an area counts as its depth.

    Args:
        units: as they are stored.
        ours: as we want them.
        where: the array, for messages.
        fix: what to do where they cannot be converted.

    Raises:
        DataError: they cannot be converted.
    """
    if units == ours:
        return Conversion()
    try:
        zero, one = (_magnitude(value, units, ours) for value in (0.0, 1.0))
    except Exception as error:  # pint raises its own, AttributeError, AssertionError and TokenError
        raise DataError(
            describe(
                "units cannot be converted",
                where=where,
                expected=f"units that can be converted to {ours}",
                actual=f"{units!r} ({error})" if str(error) else repr(units),
                fix=fix,
            )
        ) from error
    return Conversion(one - zero, zero)


def _magnitude(value: float, units: str, ours: str) -> float:
    # takes as long to import as all else that reads a store, and most stores have our units
    from cf_xarray.units import units as cf_units

    quantity, density = cf_units.Quantity(value, cf_units.Unit(units)), cf_units.Quantity(*_WATER_DENSITY)
    target = cf_units.Unit(ours)
    if (quantity.units / target).dimensionality == density.dimensionality:
        quantity = quantity / density
    return float(quantity.to(target).magnitude)
