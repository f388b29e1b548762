"""Small cubes written by the real sink, with the values that went into them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr

from h2mv_dist.config import StorageOptions
from h2mv_dist.grid import BoolArray, Grid, Period
from h2mv_dist.io.cube import FINGERPRINT, CubeLayout
from h2mv_dist.io.cube_store import create_cube
from h2mv_dist.io.sink import Sink
from h2mv_dist.spec import Float32Array

PERIOD = Period.parse("2001-01-01..2002-02-05")
WRITTEN = ("evapotranspiration", "runoff", "terrestrial_water_storage_anomaly")
DAILY = (*WRITTEN, "snowmelt")


@dataclass(frozen=True)
class Cube:
    """A cube and what is in it.

    Attributes:
        url: where it lies.
        land: mask, [*space].
        values: what was written, [member, time, cell].
    """

    url: str
    land: BoolArray
    values: Mapping[str, Float32Array]

    @property
    def opened(self) -> xr.Dataset:
        """The cube as a reader sees it."""
        opened: xr.Dataset = xr.open_zarr(self.url, chunks=None, consolidated=False)
        return opened


def map_grid(north_first: bool = True) -> Grid:
    """6 x 12 cells of 30 degrees, with sea."""
    lat = np.linspace(75.0, -75.0, 6)
    mask = np.random.default_rng(3).random((6, 12)) < 0.7
    order = slice(None, None, 1 if north_first else -1)
    return Grid.lat_lon(lat[order], np.arange(-165.0, 180.0, 30.0), mask[order])


def basin_grid() -> Grid:
    """Five basins, one of them not run."""
    mask = np.array([True, True, False, True, True])
    lat, lon = np.array([50.0, -33.0, 7.5, 60.0, 1.0]), np.array([8.0, 120.0, -60.0, 25.0, 3.0])
    return Grid(("cell",), lat, lon, mask, np.linspace(1e9, 5e9, 5))


def write_cube(folder: Path, grid: Grid, member_axis: bool) -> Cube:
    """A cube with two members in which snowmelt was never written."""
    layout = CubeLayout(
        grid=grid,
        period=PERIOD,
        daily=DAILY,
        static=("soil_moisture_capacity",),
        constants=("baseflow_recession",),
        members=(0, 1),
        members_as="all" if member_axis else "spread",
        chunk=(3,) * len(grid.dims),
        shard=(12,) * len(grid.dims),
        chunk_days=30,
        shard_days=420,
        tile=(12,) * len(grid.dims),
        attributes={FINGERPRINT: "f" * 64, "model": "h2mv <b>& more</b>"},
    )
    url, options = str(folder / "cube.zarr"), StorageOptions()
    create_cube(url, layout, options, overwrite=False)
    values = _values(grid)
    sink = Sink.open(url, layout, options)
    tile = grid.tiles(layout.tile)[0]
    sink.write(tile, PERIOD, values)
    capacity = np.linspace(100.0, 300.0, 2 * grid.n_land, dtype=np.float32).reshape(2, -1)
    sink.write_static(tile, {"soil_moisture_capacity": capacity})
    return Cube(url, grid.mask, values)


def _values(grid: Grid) -> dict[str, Float32Array]:
    rng = np.random.default_rng(1)
    shape = (2, PERIOD.n_days, grid.n_land)
    values = {name: rng.gamma(2.0, 1.0, shape).astype(np.float32) for name in WRITTEN}
    values["terrestrial_water_storage_anomaly"] -= np.float32(2.5)
    return {**values, "snowmelt": np.full(shape, np.nan, np.float32)}
