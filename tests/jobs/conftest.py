"""A tiny world and real Dask workers for the job tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import trustme
from distributed import Client, LocalCluster, Worker

from h2mv_dist.config import ClusterSettings, Settings, StorageOptions, TlsSettings, validate
from h2mv_dist.errors import JobError
from h2mv_dist.jobs.cluster import LOOPBACK, connect, install
from h2mv_dist.jobs.handle import submit
from h2mv_dist.jobs.messages import Job, Unit
from h2mv_dist.jobs.training import submit_training
from h2mv_dist.jobs.worlds import make_world
from tests.jobs.processes import START_SECONDS

NO_OPTIONS = StorageOptions()
TRAINED_DAYS = "2001-01-01..2001-03-01"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The workers need the other cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """141 land cells, one year."""
    url = str(tmp_path_factory.mktemp("world") / "world.zarr")
    make_world(url, resolution=10.0, years=1, seed=3, options=NO_OPTIONS)
    return url


@pytest.fixture(scope="session")
def client() -> Iterator[Client]:
    """Four worker processes."""
    with connect(ClusterSettings(kind="local", workers=4)) as connected:
        yield connected


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> TlsSettings:
    """An authority's certificate, and one of ours with its key."""
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    certificate = authority.issue_cert(LOOPBACK)
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    certificate.private_key_pem.write_to_path(str(folder / "key.pem"))
    certificate.cert_chain_pems[0].write_to_path(str(folder / "cert.pem"))
    return TlsSettings(
        **{
            n: str(folder / f"{f}.pem")
            for n, f in zip(("ca_file", "cert", "key"), ("ca", "cert", "key"), strict=True)
        }
    )


@pytest.fixture(scope="session")
def job(client: Client, world_url: str, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two trained folds."""
    folder = str(tmp_path_factory.mktemp("job"))
    settings = training_settings(world_url, cache, training={"folds": [0, 1]})
    submit_training(client, settings, folder, NO_OPTIONS).wait()
    return folder


@contextmanager
def one_process(n_workers: int) -> Iterator[tuple[Client, list[Worker]]]:
    """A scheduler and workers in this process, as notebooks may start them."""
    with (
        LocalCluster(
            n_workers=n_workers, threads_per_worker=1, processes=False, dashboard_address=None
        ) as own,
        Client(own) as client,
    ):
        install(client)
        yield client, list(own.workers.values())


def assert_runs_jobs(client: Client) -> None:
    """The coordinator leases a worker, and says that what ran there failed: the unit is empty."""
    client.wait_for_workers(1, timeout=START_SECONDS)
    job = Job("empty", "", {}, (Unit("nothing", "tile", {}, attempts=1),))
    with pytest.raises(JobError, match="1 of 1 units of empty failed"):
        submit(client, job).wait()


def training_settings(world_url: str, cache: Path, **sections: dict[str, Any]) -> Settings:
    """As :func:`small_settings`, of two months: jobs take most of their time to step."""
    return small_settings(world_url, cache, **{"data": {"period": TRAINED_DAYS}, **sections})


def small_settings(world_url: str, cache: Path, **sections: dict[str, Any]) -> Settings:
    """A small model and few epochs; ``sections`` override."""
    tree: dict[str, dict[str, Any]] = {
        "data": {"url": world_url},
        "folds": {"block": 2},
        "model": {"hidden": 8, "encoder": 12, "condensed": 4},
        "training": {
            "folds": [0],
            "epochs": 2,
            "batch_size": 50,
            "spinup_days": 30,
            # a long job would take two minutes to compile
            "code_path": "eager",
            "cache": str(cache),
        },
        "inference": {
            "tile": [6, 12],
            "shard": [6, 12],
            "chunk": [3, 6],
            "shard_days": 120,
            "chunk_days": 40,
            "spinup_days": 60,
            "code_path": "eager",
        },
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return validate(tree, where="test")
