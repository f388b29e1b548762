"""Workers whose libraries differ: real processes that see other packages' records first."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from distributed import Client

from h2mv_dist.config import ClusterSettings
from h2mv_dist.errors import JobError
from h2mv_dist.jobs.cluster import LOOPBACK, connect, install, scheduler_address
from h2mv_dist.jobs.training import submit_training
from h2mv_dist.jobs.versions import require_same_versions
from tests.jobs.conftest import NO_OPTIONS, training_settings
from tests.jobs.processes import START_SECONDS, process


@contextmanager
def another_worker(client: Client, folder: Path, **versions: str) -> Iterator[None]:
    """A worker that finds these versions of packages installed."""
    for name, version in versions.items():
        record = folder / f"{name}-{version}.dist-info" / "METADATA"
        record.parent.mkdir(parents=True)
        record.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    before = len(client.scheduler_info(n_workers=-1)["workers"])
    address = scheduler_address(client)
    command = ("distributed.cli.dask_worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard")
    # the folder it starts in may hold the record of an editable installation
    safe = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    with process(folder / "log", *command, "--host", LOOPBACK, **safe):
        client.wait_for_workers(before + 1, timeout=START_SECONDS)
        yield


@pytest.fixture(scope="module")
def own() -> Iterator[Client]:
    """A client that a user made, as in a notebook."""
    with (
        connect(ClusterSettings(kind="local", workers=1)) as started,
        Client(scheduler_address(started), set_as_default=False) as client,
    ):
        yield install(client)


def test_the_same_libraries_are_not_spoken_of(own: Client, caplog: pytest.LogCaptureFixture) -> None:
    require_same_versions(own)
    assert caplog.text == ""


def test_other_libraries_are_one_warning(
    own: Client, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with another_worker(own, tmp_path, zarr="3.0.1", numpy="2.0.0"):
        require_same_versions(own)
    (warning,) = [r for r in caplog.records if r.name.startswith("h2mv_dist")]
    assert warning.levelno == logging.WARNING
    header, client, worker = warning.getMessage().splitlines()[1:]
    assert header.split() == ["zarr", "numpy"]
    assert client.startswith("client")
    assert worker.split()[1:] == ["3.0.1", "2.0.0"]
    assert worker.startswith("tcp://127.0.0.1:")


def test_another_version_of_ours_is_refused_before_anything_is_written(
    own: Client, tmp_path: Path, world_url: str
) -> None:
    settings = training_settings(world_url, tmp_path / "cache")
    with another_worker(own, tmp_path / "other", h2mv_dist="99.1"), pytest.raises(JobError) as refused:
        submit_training(own, settings, str(tmp_path / "job"), NO_OPTIONS)
    for text in ("not everybody runs the same h2mv-dist", "99.1", "in the environment of the client"):
        assert text in str(refused.value)
    assert not (tmp_path / "job").exists()
