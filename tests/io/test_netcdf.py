"""Selections of cubes as NetCDF files."""

from datetime import date
from pathlib import Path

import netCDF4
import numpy as np
import pytest
import xarray as xr

from h2mv_dist.config import StorageOptions
from h2mv_dist.errors import ConfigError, StoreError
from h2mv_dist.grid import Period
from h2mv_dist.io.cube import Progress
from h2mv_dist.io.cube_store import create_cube, publish
from h2mv_dist.io.netcdf import select, write_netcdf
from tests.io.cubes import LAYOUTS, PERIOD, CubePlace, basin_layout, fill, map_layout

DAYS = Period(date(2000, 2, 28), date(2000, 3, 2))
SPRING = Period(date(2000, 1, 15), date(2000, 4, 10))
NAMING = ("bounds", "cell_measures", "ancillary_variables", "coordinates")
"""CF attributes that name other variables."""


@pytest.fixture(scope="module")
def spring(tmp_path_factory: pytest.TempPathFactory) -> CubePlace:
    """Three months on disk, with monthly means; for reading only."""
    place = CubePlace(str(tmp_path_factory.mktemp("spring") / "cube.zarr"), StorageOptions())
    fill(place, map_layout(period=SPRING, monthly=("runoff",)))
    return place


def named_but_missing(path: Path) -> set[str]:
    """What the variables of a file name that is not there."""
    with netCDF4.Dataset(path) as file:
        texts = [getattr(array, name, "") for array in file.variables.values() for name in NAMING]
        return {w for text in texts for w in text.split() if not w.endswith(":")} - set(file.variables)


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
    assert set(part.data_vars) == {"runoff", "time_bnds", "lat_bnds", "lon_bnds", "cell_area"}
    np.testing.assert_array_equal(part["lat"], [88, 87, 86])
    np.testing.assert_array_equal(part["lon"], [2.5, 3.5, 4.5])
    write_netcdf(part, tmp_path / "box.nc")
    assert named_but_missing(tmp_path / "box.nc") == set()
    before = (tmp_path / "box.nc").read_bytes()
    with pytest.raises(StoreError, match="is there already"):
        write_netcdf(part, tmp_path / "box.nc")
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".nc"] == ["box.nc"]
    assert (tmp_path / "box.nc").read_bytes() == before


@pytest.mark.parametrize(
    ("variable", "sizes"),
    [
        ("runoff", {"time": 43, "lat": 3, "lon": 3, "bnds": 2}),
        ("runoff_monthly", {"month": 1, "lat": 3, "lon": 3, "bnds": 2}),
        ("soil_moisture_capacity", {"lat": 3, "lon": 3, "bnds": 2}),
        ("baseflow_recession", {}),
        ("", {"time": 43, "month": 1, "lat": 3, "lon": 3, "bnds": 2}),
    ],
)
def test_days_and_a_box_are_cut_whatever_the_variable(
    variable: str, sizes: dict[str, int], spring: CubePlace, tmp_path: Path
) -> None:
    part = select(
        spring.url,
        spring.options,
        variables=(variable,) if variable else (),
        period=Period(date(2000, 2, 1), date(2000, 3, 15)),
        box=(85.5, 88.5, 2, 5),
    )
    assert part.sizes == sizes
    write_netcdf(part, tmp_path / "part.nc")
    assert named_but_missing(tmp_path / "part.nc") == set()
    with xr.open_dataset(tmp_path / "part.nc") as file:
        xr.testing.assert_equal(file.load(), part.load())
        if "month" in sizes:
            bounds = np.array([["2000-02-01", "2000-03-01"]], "M8[ns]")
            np.testing.assert_array_equal(file["month"], bounds[:, 0])
            np.testing.assert_array_equal(file["month_bnds"], bounds)


def test_some_days_without_a_whole_month(spring: CubePlace) -> None:
    days = Period(date(2000, 2, 1), date(2000, 2, 29))
    assert "runoff_monthly" not in select(spring.url, spring.options, period=days)
    assert select(spring.url, spring.options, variables=("runoff",), period=days).sizes["time"] == 28
    with pytest.raises(ConfigError, match="a month counts as a whole"):
        select(spring.url, spring.options, variables=("runoff_monthly",), period=days)


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
        ({"variables": ("soil_moisture_capacity",), "box": (10.0, 20.0, 0.0, 9.0)}, "nothing of the cube"),
    ],
)
def test_what_is_not_there_is_said(on_disk: CubePlace, selection: dict[str, object], message: str) -> None:
    fill(on_disk, map_layout())
    with pytest.raises(ConfigError, match=message):
        select(on_disk.url, on_disk.options, **selection)  # type: ignore[arg-type]


def test_a_cube_that_was_never_finished_is_refused(on_disk: CubePlace) -> None:
    layout = map_layout()
    create_cube(on_disk.url, layout, on_disk.options, overwrite=False)
    with pytest.raises(StoreError, match=r"not finished(.|\n)*run h2mv-dist infer again"):
        select(on_disk.url, on_disk.options)


def test_days_of_a_cube_that_is_to_have_more_again_are_selected(on_disk: CubePlace) -> None:
    fill(on_disk, map_layout())
    shorter = Period(PERIOD.start, date(2000, 3, 2))
    begun = Progress(shorter, True, (shorter.stop,), until=PERIOD.stop)
    publish(on_disk.url, map_layout(), begun, on_disk.options)
    assert select(on_disk.url, on_disk.options).sizes["time"] == shorter.n_days
