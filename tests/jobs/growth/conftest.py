"""Cubes of few days, in one-day shards, that grow."""

import hashlib
import shutil
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from distributed import Client

from h2mv_dist.config import Settings
from h2mv_dist.io.cube import Progress
from h2mv_dist.io.cube_store import read_cube
from h2mv_dist.jobs import inference
from h2mv_dist.jobs.cube_plan import plan_inference
from h2mv_dist.jobs.inference import submit_inference
from h2mv_dist.jobs.tiles import TileContext, compute_tile, open_context
from tests.jobs.conftest import NO_OPTIONS, small_settings

FIRST = date(2001, 1, 1)

DAILY = {
    "tile": [9, 36],
    "shard": [9, 36],
    "chunk": [9, 18],
    "shard_days": 1,
    "chunk_days": 1,
    "spinup_days": 5,
    "outputs": [
        "runoff",
        "evapotranspiration",
        "actual_precipitation",
        "terrestrial_water_storage",
        "terrestrial_water_storage_anomaly",
        "soil_moisture_capacity",
        "baseflow_recession",
    ],
}
"""Two tiles, one-day shards."""


def until(day: int, url: str, cache: Path, **inference: Any) -> Settings:
    """Settings as if the forcing ended before this day of the year."""
    chosen = {**DAILY, **inference}
    data = {"url": url, "period": f"{FIRST}..{FIRST + timedelta(days=day - 1)}"}
    return small_settings(url, cache, data=data, inference=chosen)


def infer(
    client: Client,
    settings: Settings,
    job: str,
    cube: Path,
    *,
    append: bool = False,
    since: date | None = None,
) -> None:
    handle = submit_inference(client, settings, job, str(cube), NO_OPTIONS, append=append, since=since)
    assert handle is not None
    handle.wait()


def roll_back(settings: Settings, job: str, cube: Path, day: date) -> Progress:
    """What a run that computes anew does first; it ends right after."""
    planned = plan_inference(settings, job, NO_OPTIONS, cube=str(cube), since=day)
    inference.roll_back(planned, str(cube), NO_OPTIONS)
    return read_cube(str(cube), NO_OPTIONS).progress


def objects(folder: Path, *, metadata: bool = True) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and (metadata or p.name != "zarr.json")
    }


def appended(day: int, url: str, cache: Path, job: str, cube: Path) -> TileContext:
    """A run that has computed all days before this one of January, and is yet to show them."""
    planned = plan_inference(until(day, url, cache), job, NO_OPTIONS, cube=str(cube), append=True)
    run = open_context(planned, str(cube), NO_OPTIONS)
    for tile in planned.layout.tiles:
        compute_tile(run, tile)
    return run


@pytest.fixture(scope="session")
def ten_days(
    client: Client, world_url: str, cache: Path, job: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished cube of ten days, to be copied."""
    folder = tmp_path_factory.mktemp("ten")
    infer(client, until(11, world_url, cache), job, folder / "cube.zarr")
    return folder


@pytest.fixture
def cube(ten_days: Path, tmp_path: Path) -> Path:
    shutil.copytree(ten_days, tmp_path / "copy")
    return tmp_path / "copy" / "cube.zarr"


@pytest.fixture
def other_weather(world_url: str, tmp_path: Path) -> str:
    """The same world with more rain from the 9th of January on."""
    url = shutil.copytree(world_url, tmp_path / "world.zarr")
    rain = zarr.open_array(str(url), path="prec/data", mode="r+")
    days = slice(8, 20)
    rain[days] = np.asarray(rain[days]) * 1.5
    return str(url)
