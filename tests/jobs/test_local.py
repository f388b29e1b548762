"""Some cells without a cluster give what a cube gives."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from distributed import Client

import h2mv_dist
from h2mv_dist.errors import CheckpointError, ConfigError
from h2mv_dist.grid import Grid, Tile
from h2mv_dist.jobs import local
from h2mv_dist.jobs.inference import submit_inference
from h2mv_dist.jobs.records import JobFolder
from tests.jobs.conftest import NO_OPTIONS, small_settings

DAYS = "2001-01-01..2001-03-02"


def checkpoints(job: str) -> list[str]:
    folder = JobFolder(job, NO_OPTIONS)
    states = [(fold, folder.fold(fold).state().best) for fold in (0, 1)]
    return [f"{job}/folds/{fold:02d}/checkpoints/{best}" for fold, best in states]


@pytest.fixture(scope="module")
def cube(
    client: Client, world_url: str, cache: Path, job: str, tmp_path_factory: pytest.TempPathFactory
) -> xr.Dataset:
    url = str(tmp_path_factory.mktemp("local") / "cube.zarr")
    chosen = {"members": "all", "period": DAYS, "spinup_days": 40}
    settings = small_settings(world_url, cache, inference=chosen)
    handle = submit_inference(client, settings, job, url, NO_OPTIONS)
    assert handle is not None
    handle.wait()
    with xr.open_zarr(url, chunks=None) as opened:
        loaded: xr.Dataset = opened.load()
        return loaded


def test_a_box_is_part_of_the_cube(cube: xr.Dataset, world_url: str, job: str) -> None:
    box = h2mv_dist.run(job, world_url, box=(-30, 40, 0, 60), period=DAYS, spinup_days=40)
    same = cube.sel(lat=box["lat"], lon=box["lon"])
    assert box.sizes == {"member": 2, "time": 60, "lat": 7, "lon": 6}
    np.testing.assert_array_equal(box["member"], cube["member"])
    for name in box.data_vars:
        ours, theirs = box[name].values, same[name].values
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs), err_msg=str(name))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.nanmax(np.abs(theirs)))
        assert box[name].attrs["units"] == cube[name].attrs["units"]
    np.testing.assert_array_equal(box["time"], cube["time"])


def test_some_cells_of_one_model(cube: xr.Dataset, world_url: str, job: str) -> None:
    land = np.argwhere(cube["land_mask"].values)[[3, 50, 100]]
    places = [(float(cube["lat"][i]) + 0.5, float(cube["lon"][j]) - 0.5) for i, j in land]
    found = h2mv_dist.run(
        checkpoints(job)[0],
        {"url": world_url},
        cells=places,
        period=DAYS,
        spinup_days=40,
        outputs=["runoff", "soil_moisture_capacity", "baseflow_recession"],
    )
    assert found["runoff"].dims == ("time", "cell")
    assert set(found.data_vars) == {"runoff", "soil_moisture_capacity", "baseflow_recession"}
    for k, (i, j) in enumerate(land):
        expected = cube["runoff"].values[0, :, i, j]
        np.testing.assert_allclose(found["runoff"].values[:, k], expected, rtol=1e-5, atol=1e-6)
        assert float(found["lat"][k]) == float(cube["lat"][i])


def test_box_or_cells_decide_the_axes_not_the_number_of_cells(
    cube: xr.Dataset, world_url: str, job: str
) -> None:
    i, j = np.argwhere(cube["land_mask"].values)[3]
    lat, lon = float(cube["lat"][i]), float(cube["lon"][j])
    chosen: dict[str, Any] = {
        "period": DAYS,
        "spinup_days": 40,
        "outputs": ["runoff", "soil_moisture_capacity"],
    }
    box = h2mv_dist.run(job, world_url, box=(lat - 1, lat + 1, lon - 1, lon + 1), **chosen)
    assert box["runoff"].dims == ("member", "time", "lat", "lon")
    assert box.sizes == {"member": 2, "time": 60, "lat": 1, "lon": 1}
    assert (float(box["lat"][0]), float(box["lon"][0])) == (lat, lon)
    cell = h2mv_dist.run(job, world_url, cells=[(lat, lon)], **chosen)
    assert cell["runoff"].dims == ("member", "time", "cell")
    assert cell["soil_moisture_capacity"].dims == ("member", "cell")
    np.testing.assert_array_equal(cell["runoff"].values, box["runoff"].values[..., 0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either box="),
        ({"box": (0, 1, 0, 1), "cells": [(0, 0)]}, "either box="),
        ({"box": (40, -30, 0, 60)}, r"no land cell lies in the box(.|\n)*order"),
        ({"cells": [(0.0, -140.0)]}, r"no land cell is there(.|\n)*degrees away"),
        ({"cells": [(10, 20)], "outputs": ["runof"]}, "did you mean 'runoff'"),
        ({"cells": [(10, 20)], "period": "1999-01-01..2001-02-01"}, "is not part of"),
        ({"cells": [(10, 20)], "spinup_days": 9999}, r"spinup_days: days are wanted that are not there"),
    ],
)
def test_wrong_places_are_explained(
    arguments: dict[str, Any], message: str, world_url: str, job: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        h2mv_dist.run(checkpoints(job)[0], world_url, **arguments)


def test_what_cannot_be_run_is_refused(world_url: str, job: str) -> None:
    with pytest.raises(CheckpointError, match="at least one"):
        h2mv_dist.run([], world_url, cells=[(10, 20)])
    with pytest.raises(AttributeError, match="walk"):
        h2mv_dist.walk  # noqa: B018


def without_areas(*centres: tuple[float, float]) -> Grid:
    lat, lon = np.array(centres).T
    return Grid(("cell",), lat, lon, np.ones(len(centres), np.bool_), np.ones(len(centres)))


@pytest.mark.parametrize(
    ("centres", "inside", "outside"),
    [
        ([(50.0, 8.0), (50.0, 8.5), (51.0, 179.9)], (50.2, 7.9), (50.4, 7.9)),
        ([(50.0, 8.0), (50.0, 8.0), (50.0, 8.5)], (50.2, 7.9), (50.4, 7.9)),
        ([(50.0, 8.0)], (50.9, 8.0), (51.1, 8.0)),
    ],
    ids=["neighbours", "one centre twice", "alone"],
)
def test_cells_without_areas_are_as_large_as_they_are_apart(
    centres: list[tuple[float, float]], inside: tuple[float, float], outside: tuple[float, float]
) -> None:
    grid = without_areas(*centres)
    assert local._land_cell(grid, *inside) == Tile((0,), (1,))
    with pytest.raises(ConfigError, match="no land cell is there"):
        local._land_cell(grid, *outside)
