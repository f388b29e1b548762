"""Real data as CF Zarr stores: three Caravan catchments [time, cell], and the NLDAS-2 grid [time, lat, lon].

Both carry the same static features, the climate of their own precipitation: the two collections share no
attribute for every cell (NLDAS-2 lacks the soil of one land cell). Two catchments scale the features, so
these are such as place the third among them: it is at most 1.6 standard deviations from their mean, but 3 to
4 in warmth or aridity, and 80 in seasonality. Units are those of the origin; the Source converts them.
"""

from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import xarray as xr

from h2mv_dist.config import StorageOptions
from tests.conftest import Place

CATCHMENTS: Final = ("camelsch_4001", "camelses_1414", "camelslx_054")
PERIOD: Final = slice("2000-01-02", "2020-09-30")
STATIC: Final = ("precipitation_mean", "wet_days", "heavy_precipitation")
CATCHMENT_VARIABLES: Final[dict[str, dict[str, str]]] = {"runoff": {"name": "streamflow"}}
NLDAS_VARIABLES: Final[dict[str, dict[str, str]]] = {
    "net_radiation": {"name": "rnet_est"},
    "precipitation": {"name": "precip"},
    "air_temperature": {"name": "tair"},
}

_WET: Final = 1.0
"""Precipitation above which a day is wet, mm d-1."""
_HEAVY: Final = 0.99
"""Share of days with less than heavy precipitation."""


def write_catchments(data: Path, url: str) -> None:
    """Daily forcing and snow, monthly streamflow (NaN unless every day was observed) of three catchments."""
    daily = _read_catchments(data / "caravan")
    monthly = daily.pop("streamflow").resample({"time": "MS"}).mean(skipna=False).rename(time="month")
    attributes = pd.read_csv(data / "caravan" / "attributes.csv", index_col="gauge_id").loc[list(CATCHMENTS)]
    climate = _climate(daily["precipitation"], "cell")
    store = xr.Dataset({**daily, **climate, "streamflow": monthly.assign_attrs(units="mm d-1")})
    store = store.assign_coords(
        lat=("cell", attributes["gauge_lat"].to_numpy(), {"standard_name": "latitude"}),
        lon=("cell", attributes["gauge_lon"].to_numpy(), {"standard_name": "longitude"}),
        area=("cell", attributes["area"].to_numpy(), {"standard_name": "cell_area", "units": "km2"}),
    )
    _write(store, Place(url, StorageOptions()))


def observed_streamflow(url: str) -> xr.DataArray:
    """Monthly streamflow as stored, [month, cell], mm d-1."""
    with xr.open_zarr(url, consolidated=False) as store:
        streamflow: xr.DataArray = store["streamflow"].load()
    return streamflow


def write_nldas(data: Path, place: Place) -> None:
    """The grid as it is: latitudes descending at irregular distances, NaN over the sea, a mask."""
    with xr.open_dataset(data / "nldas2_conus_412cells_daily_20150401_20180331.nc") as file:
        daily = file[[v["name"] for v in NLDAS_VARIABLES.values()]].load()
    daily = daily.transpose("time", "lat", "lon")
    climate = _climate(daily["precip"], "lat", "lon")
    land = daily["precip"].notnull().any("time").astype(np.int8)
    _write(xr.Dataset({**daily.data_vars, **climate, "land": land}), place)


def _read_catchments(folder: Path) -> dict[str, xr.DataArray]:
    tables = [_read_catchment(folder / f"{name}.csv.gz") for name in CATCHMENTS]
    days = pd.date_range(PERIOD.start, PERIOD.stop)
    units = {
        "net_radiation": "W m-2",
        "precipitation": "mm d-1",
        "air_temperature": "degC",
        "snow_water_equivalent": "mm",
        "streamflow": "mm d-1",
    }
    return {
        name: xr.DataArray(
            np.stack([table[name].reindex(days).to_numpy() for table in tables], axis=1),
            dims=("time", "cell"),
            coords={"time": days},
            attrs={"units": unit},
        )
        for name, unit in units.items()
    }


def _read_catchment(path: Path) -> Any:
    table = pd.read_csv(path, parse_dates=["date"], index_col="date")
    table["net_radiation"] = (
        table["surface_net_solar_radiation_mean"] + table["surface_net_thermal_radiation_mean"]
    )
    names = {
        "total_precipitation_sum": "precipitation",
        "temperature_2m_mean": "air_temperature",
        "snow_depth_water_equivalent_mean": "snow_water_equivalent",
    }
    return table.rename(columns=names)


def _climate(precipitation: xr.DataArray, *dims: str) -> dict[str, xr.DataArray]:
    """Static features from forcing alone, [*dims]; no target has a part in them."""
    known = precipitation.notnull().all("time")
    features = (
        precipitation.mean("time"),
        (precipitation > _WET).mean("time").where(known),
        precipitation.quantile(_HEAVY, "time", skipna=False).drop_vars("quantile"),
    )
    return {name: f.transpose(*dims) for name, f in zip(STATIC, features, strict=True)}


def _write(store: xr.Dataset, place: Place) -> None:
    plain = store.drop_encoding().astype(np.float32, keep_attrs=True)
    options: Any = place.options.get("s3")
    plain.to_zarr(place.url, mode="w", zarr_format=3, consolidated=False, storage_options=options)
