"""Selections of cubes as NetCDF files."""

from datetime import date
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from h2mv_dist.errors import ConfigError, StoreError
from h2mv_dist.grid import Period
from h2mv_dist.io.netcdf import select, write_netcdf
from tests.io.cubes import LAYOUTS, CubePlace, basin_layout, fill, map_layout

DAYS = Period(date(2000, 2, 28), date(2000, 3, 2))


@pytest.mark.parametrize("name", ["both", "basins"])
def test_a_file_holds_what_the_cube_holds(name: str, on_disk: CubePlace, tmp_path: Path) -> None:
    fill(on_disk, LAYOUTS[name])
    write_netcdf(select(on_disk.url, on_disk.options, period=DAYS), tmp_path / "part.nc")
    with xr.open_dataset(tmp_path / "part.nc") as file, on_disk.open() as cube:
        expected = cube.isel(time=slice(1, 4)).load()
        xr.testing.assert_equal(file.load(), expected)
        assert file["runoff"].attrs["units"] == "mm d-1"
        assert file.attrs["Conventions"] == "CF-1.11"


def test_a_box_and_variables_are_selected(on_disk: CubePlace, tmp_path: Path) -> None:
    fill(on_disk, map_layout())
    part = select(on_disk.url, on_disk.options, variables=("runoff",), box=(85.5, 88.5, 2, 5))
    assert list(part.data_vars) == ["runoff"]
    np.testing.assert_array_equal(part["lat"], [88, 87, 86])
    np.testing.assert_array_equal(part["lon"], [2.5, 3.5, 4.5])
    write_netcdf(part, tmp_path / "box.nc")
    before = (tmp_path / "box.nc").read_bytes()
    with pytest.raises(StoreError, match="is there already"):
        write_netcdf(part, tmp_path / "box.nc")
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".nc"] == ["box.nc"]
    assert (tmp_path / "box.nc").read_bytes() == before


def test_basins_lie_in_a_box(on_disk: CubePlace) -> None:
    fill(on_disk, basin_layout())
    part = select(on_disk.url, on_disk.options, box=(0, 60, 0, 30))
    np.testing.assert_array_equal(part["lat"], [50, 60, 1])


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"variables": ("runof",)}, "did you mean 'runoff'"),
        ({"box": (10.0, 20.0, 0.0, 9.0)}, "nothing of the cube"),
        ({"period": Period(date(1999, 1, 1), date(1999, 2, 1))}, "nothing of the cube"),
    ],
)
def test_what_is_not_there_is_said(on_disk: CubePlace, selection: dict[str, object], message: str) -> None:
    fill(on_disk, map_layout())
    with pytest.raises(ConfigError, match=message):
        select(on_disk.url, on_disk.options, **selection)  # type: ignore[arg-type]
