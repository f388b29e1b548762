"""Units: what can be converted becomes ours; what cannot is named."""

import numpy as np
import pytest

from h2mv_dist.config import VariableSource
from h2mv_dist.errors import DataError
from tests.conftest import Place
from tests.io.builders import N_DAYS, Stored, cf, field_of, open_cf, read, whole


@pytest.mark.parametrize(
    ("name", "units", "scale", "offset"),
    [
        ("precipitation", "kg m-2 s-1", 86_400.0, 0.0),
        ("precipitation", "m s-1", 86_400_000.0, 0.0),
        ("precipitation", "mm/day", 1.0, 0.0),
        ("precipitation", "mm day-1", 1.0, 0.0),
        ("precipitation", "kg m-2 d-1", 1.0, 0.0),
        ("air_temperature", "degC", 1.0, 273.15),
        ("air_temperature", "celsius", 1.0, 273.15),
        ("net_radiation", "J m-2 d-1", 1 / 86_400, 0.0),
        ("net_radiation", "W/m^2", 1.0, 0.0),
    ],
)
def test_units_become_ours(folder: Place, name: str, units: str, scale: float, offset: float) -> None:
    arrays = cf()
    arrays[name].attrs["units"] = units
    expected = arrays[name].values.astype(np.float64) * scale + offset
    values = read(open_cf(folder, arrays, forcing=(name,)))[..., 0]
    np.testing.assert_allclose(values, expected, rtol=2e-7)


@pytest.mark.parametrize(
    ("name", "units", "scale"),
    [
        ("snow_water_equivalent", "kg m-2", 1.0),
        ("snow_water_equivalent", "m", 1000.0),
        ("terrestrial_water_storage_anomaly", "cm", 10.0),
        ("fapar", "percent", 0.01),
        ("fapar", "%", 0.01),
        ("fapar", "1", 1.0),
    ],
)
def test_units_of_targets_become_ours(folder: Place, name: str, units: str, scale: float) -> None:
    arrays = cf()
    arrays[name] = Stored(field_of(9, N_DAYS), ("time", "lat", "lon"), {"units": units})
    source = open_cf(folder, arrays, targets=(name,))
    expected = arrays[name].values.astype(np.float64) * scale
    np.testing.assert_allclose(source.read_targets(whole(source))[name], expected, rtol=2e-7)


def test_a_setting_gives_units_and_wins(folder: Place) -> None:
    arrays = cf()
    del arrays["air_temperature"].attrs["units"]
    arrays["precipitation"].attrs["units"] = "furlong"
    given_units = {
        "air_temperature": VariableSource(units="degC"),
        "precipitation": VariableSource(units="mm d-1"),
    }
    values = read(open_cf(folder, arrays, variables=given_units))
    np.testing.assert_allclose(values[..., 2], arrays["air_temperature"].values + 273.15, rtol=2e-7)


@pytest.mark.parametrize("units", ["K", "W m-2", "mm", "m of water equivalent", "-", "kg", "mm d-1)"])
def test_wrong_units_name_both(folder: Place, units: str) -> None:
    arrays = cf()
    arrays["precipitation"].attrs["units"] = units
    with pytest.raises(DataError, match=r"cannot be converted(.|\n)*mm d-1(.|\n)*actual:") as caught:
        open_cf(folder, arrays)
    assert repr(units) in str(caught.value)
