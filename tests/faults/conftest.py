"""A small world, a cluster that tests must leave as they found it, and runs that nothing disturbed."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from h2mv_dist.config import Settings, StorageOptions, as_toml, to_json
from h2mv_dist.jobs.records import JobFolder
from h2mv_dist.jobs.training import submit_training
from h2mv_dist.jobs.worlds import make_world
from tests.conftest import S3Server
from tests.faults.folds import EPOCHS, FinalBytes, final
from tests.faults.processes import DaskProcesses
from tests.jobs.conftest import NO_OPTIONS, small_settings
from tests.jobs.processes import program

PERIOD = "2001-01-01..2001-02-10"
"""Forty days: little to step through, and whole shards of the cube that tests/slurm fill."""
REFERENCE_FOLDS = (0, 1)

NewSettings = Callable[..., Settings]


@pytest.fixture(scope="session")
def world_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """141 land cells, one year, of which jobs use the first forty days."""
    url = str(tmp_path_factory.mktemp("world") / "world.zarr")
    make_world(url, resolution=10.0, years=1, seed=3, options=NO_OPTIONS)
    return url


@pytest.fixture(scope="session")
def s3_world(s3_server: S3Server, s3_bucket: str) -> str:
    """The small world, in the object store."""
    url = f"{s3_bucket}/faults/world.zarr"
    make_world(url, resolution=10.0, years=1, seed=3, options=s3_server.options)
    return url


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def new_settings(world_url: str, cache: Path) -> NewSettings:
    """Settings of a small job of two ranks; keywords are settings of ``training``, or ``data``, ``model``."""

    def new(
        data: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **training: Any
    ) -> Settings:
        return small_settings(
            world_url,
            cache,
            data={"period": PERIOD, **(data or {})},
            model=model or {},
            training={"ranks": 2, "epochs": EPOCHS, "spinup_days": 10, **training},
        )

    return new


@pytest.fixture(scope="session")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaskProcesses]:
    """Four workers; a test that uses them leaves them as it found them."""
    with DaskProcesses(tmp_path_factory.mktemp("steady")) as dask:
        dask.start_scheduler()
        for number in range(4):
            dask.start_worker(f"w{number}")
        dask.wait_for_workers(4)
        yield dask


@pytest.fixture
def own(tmp_path: Path) -> Iterator[DaskProcesses]:
    """A scheduler and two workers that a test may ruin."""
    with DaskProcesses(tmp_path / "dask") as dask:
        dask.start_scheduler()
        for number in range(2):
            dask.start_worker(f"w{number}")
        dask.wait_for_workers(2)
        yield dask


@pytest.fixture(scope="session")
def references(
    steady: DaskProcesses, new_settings: NewSettings, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, FinalBytes]:
    """The final bytes of folds that nothing disturbed."""
    folder = JobFolder(str(tmp_path_factory.mktemp("reference") / "job"), NO_OPTIONS)
    with steady.client() as client:
        submit_training(client, new_settings(folds=REFERENCE_FOLDS), folder.url, NO_OPTIONS).wait()
    assert {folder.fold(f).state().attempt for f in REFERENCE_FOLDS} == {1}
    return {fold: final(folder.fold(fold)) for fold in REFERENCE_FOLDS}


@pytest.fixture(scope="session")
def reference(references: dict[int, FinalBytes]) -> FinalBytes:
    """The final bytes of fold 0."""
    return references[0]


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    """Where a job may be kept."""
    return JobFolder(str(tmp_path / "job"), NO_OPTIONS)


@contextmanager
def train(
    dask: DaskProcesses, log: Path, *arguments: str, wrapper: tuple[str, ...] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """``h2mv-dist train`` as a user starts it."""
    command = (sys.executable, "-m", "h2mv_dist.cli", "train", *arguments, "--address", dask.address)
    with program(log, (*wrapper, *command), {}) as client:
        yield client


def settings_file(tmp_path: Path, settings: Settings, options: StorageOptions = NO_OPTIONS) -> str:
    """The sections that matter here, and the options of stores, as TOML."""
    file = tmp_path / "settings.toml"
    sections = {name: to_json(settings)[name] for name in ("data", "folds", "model", "training", "inference")}
    sections |= {f"storage_options.{protocol}": chosen for protocol, chosen in options.items()}
    lines = []
    for section, values in sections.items():
        chosen = {k: v for k, v in values.items() if v is not None and not isinstance(v, dict)}
        lines += [f"[{section}]", *(f"{key} = {as_toml(value)}" for key, value in chosen.items())]
    file.write_text("\n".join(lines))
    return str(file)
