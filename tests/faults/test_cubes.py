"""Global inference on an object store that fails, and with workers, clients and clusters that die."""

import hashlib
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import xarray as xr
from distributed import Client

from h2mv_dist.config import Settings, StorageOptions
from h2mv_dist.errors import JobError
from h2mv_dist.io.cube_check import verify_cube
from h2mv_dist.io.ledger import ledger_url
from h2mv_dist.io.snapshots import snapshots_url
from h2mv_dist.io.stores import get_object, join, list_objects
from h2mv_dist.jobs.handle import JobHandle
from h2mv_dist.jobs.inference import submit_inference
from h2mv_dist.jobs.training import submit_training
from tests.conftest import ProxiedS3, S3Server, free_port, storage_options
from tests.fault_proxy import FaultProxy
from tests.faults.processes import DaskProcesses, send
from tests.jobs.conftest import NO_OPTIONS, small_settings
from tests.jobs.processes import wait_until
from tests.seaweed import server_command, wait_for_server

pytestmark = [pytest.mark.slow]

SHARE = 0.2
DAYS = "2001-01-01..2001-03-02"
FINE = {
    "tile": [6, 6],
    "shard": [6, 6],
    "chunk": [6, 6],
    "shard_days": 10,
    "chunk_days": 10,
    "spinup_days": 10,
    "outputs": [
        "runoff",
        "terrestrial_water_storage_anomaly",
        "soil_moisture_capacity",
        "baseflow_recession",
    ],
}
"""More than ten tiles of six blocks."""


def settings_of(url: str, cache: Path, days: str = DAYS, **inference: Any) -> Settings:
    return small_settings(url, cache, data={"url": url, "period": days}, inference={**FINE, **inference})


@pytest.fixture(scope="session")
def trained(
    steady: DaskProcesses, world_url: str, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """A job folder with two folds."""
    folder = str(tmp_path_factory.mktemp("trained"))
    settings = small_settings(world_url, cache, training={"folds": [0, 1]})
    with steady.client() as client:
        submit_training(client, settings, folder, NO_OPTIONS).wait()
    return folder


def start(
    client: Client,
    settings: Settings,
    job: str,
    cube: str,
    options: StorageOptions = NO_OPTIONS,
    *,
    append: bool = False,
) -> JobHandle:
    handle = submit_inference(client, settings, job, cube, options, append=append)
    assert handle is not None
    return handle


@dataclass(frozen=True)
class Made:
    """What a finished cube consists of: the hash of every object."""

    objects: dict[str, str]

    @staticmethod
    def at(cube: str, options: StorageOptions = NO_OPTIONS) -> "Made":
        return Made({n: _sha(get_object(join(cube, n), options)) for n in list_objects(cube, options)})


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="session")
def undisturbed(
    steady: DaskProcesses, world_url: str, cache: Path, trained: str, tmp_path_factory: pytest.TempPathFactory
) -> Made:
    cube = str(tmp_path_factory.mktemp("undisturbed") / "cube.zarr")
    with steady.client() as client:
        start(client, settings_of(world_url, cache), trained, cube).wait()
    assert verify_cube(cube, NO_OPTIONS).complete
    return Made.at(cube)


@pytest.fixture(scope="session")
def undisturbed_on_s3(
    steady: DaskProcesses, s3_world: str, s3_server: S3Server, s3_bucket: str, cache: Path, trained: str
) -> Made:
    cube = f"{s3_bucket}/faults/{uuid.uuid4().hex}/cube.zarr"
    with steady.client() as client:
        start(client, settings_of(s3_world, cache), trained, cube, s3_server.options).wait()
    return Made.at(cube, s3_server.options)


def lose_replies(proxy: FaultProxy) -> None:
    for name in ("runoff", "cube.ledger", "cube.states", "zarr.json"):
        proxy.plan("lose", 2, "PUT", name)


def stall_reads(proxy: FaultProxy) -> None:
    proxy.plan("stall", 2, "GET", "prec")


@pytest.mark.parametrize(
    ("break_it", "kind", "at_least"),
    [
        (lambda proxy: proxy.share({"unavailable": SHARE}), "unavailable", 50),
        (lambda proxy: proxy.share({"truncate": SHARE}, methods=("GET",), match="/c"), "truncate", 5),
        (stall_reads, "stall", 2),
        (lose_replies, "lose", 8),
    ],
    ids=["busy", "truncated bodies", "stalled reads", "reply lost"],
)
def test_an_object_store_fails_now_and_then(
    break_it: Callable[[FaultProxy], None],
    kind: str,
    at_least: int,
    steady: DaskProcesses,
    cache: Path,
    trained: str,
    undisturbed_on_s3: Made,
    s3_server: S3Server,
    s3_bucket: str,
    s3_world: str,
    fault_proxy: ProxiedS3,
) -> None:
    cube = f"{s3_bucket}/faults/{uuid.uuid4().hex}/cube.zarr"
    break_it(fault_proxy.proxy)
    with steady.client() as client:
        status = start(client, settings_of(s3_world, cache), trained, cube, fault_proxy.options).wait()
    assert fault_proxy.proxy.faults[kind] >= at_least
    assert {unit["attempt"] for unit in status["units"]} == {1}
    assert Made.at(cube, s3_server.options) == undisturbed_on_s3


def test_a_full_store_is_waited_for(
    steady: DaskProcesses,
    cache: Path,
    trained: str,
    undisturbed_on_s3: Made,
    s3_server: S3Server,
    s3_bucket: str,
    s3_world: str,
    fault_proxy: ProxiedS3,
) -> None:
    cube = f"{s3_bucket}/faults/{uuid.uuid4().hex}/cube.zarr"
    with steady.client() as client:
        handle = start(client, settings_of(s3_world, cache), trained, cube, fault_proxy.options)
        some_receipts(cube, s3_server.options)
        fault_proxy.proxy.share({"full": 1.0}, methods=("PUT", "POST"))
        wait_until(lambda: fault_proxy.proxy.faults["full"] >= 4, "writes that are refused", seconds=60)
        fault_proxy.proxy.share({})
        handle.wait()
    assert Made.at(cube, s3_server.options) == undisturbed_on_s3


def some_receipts(cube: str, options: StorageOptions = NO_OPTIONS, more_than: int = 0) -> int:
    """Wait until some, but not all, of the tiles have their receipts."""
    ledger = ledger_url(cube)
    wait_until(lambda: len(list_objects(ledger, options)) > more_than, "a receipt", seconds=120)
    return len(list_objects(ledger, options))


def test_a_worker_is_killed_in_the_middle_of_a_tile(
    own: DaskProcesses, world_url: str, cache: Path, trained: str, undisturbed: Made, tmp_path: Path
) -> None:
    cube = str(tmp_path / "cube.zarr")
    with own.client() as client:
        handle = start(client, settings_of(world_url, cache), trained, cube)
        some_receipts(cube)
        done = len(list_objects(ledger_url(cube), NO_OPTIONS))
        os.kill(own.workers["w0"].process.pid, signal.SIGKILL)
        status = handle.wait()
    tiles = [unit for unit in status["units"] if unit["name"] != "finish"]
    assert 0 < done < len(tiles)
    assert max(unit["attempt"] for unit in tiles) >= 2, "a tile was being computed"
    assert Made.at(cube) == undisturbed


def test_a_straggler_and_its_successor_write_the_same(
    steady: DaskProcesses,
    own: DaskProcesses,
    world_url: str,
    cache: Path,
    trained: str,
    undisturbed: Made,
    tmp_path: Path,
) -> None:
    """Two clusters that know nothing of each other fill the same cube at the same time."""
    cube = str(tmp_path / "cube.zarr")
    with steady.client() as one, own.client() as other:
        handles = [start(client, settings_of(world_url, cache), trained, cube) for client in (one, other)]
        for handle in handles:
            handle.wait()
    assert verify_cube(cube, NO_OPTIONS).complete
    assert Made.at(cube) == undisturbed


def test_a_second_run_on_the_same_cluster_is_refused(
    steady: DaskProcesses, world_url: str, cache: Path, trained: str, tmp_path: Path
) -> None:
    cube = str(tmp_path / "cube.zarr")
    with steady.client() as client:
        handle = start(client, settings_of(world_url, cache), trained, cube)
        with pytest.raises(JobError, match="already running"):
            start(client, settings_of(world_url, cache), trained, cube)
        handle.wait()


def test_a_crash_in_an_append_leaves_the_old_days_readable(
    steady: DaskProcesses, world_url: str, cache: Path, trained: str, tmp_path: Path
) -> None:
    longer, cube = "2001-01-01..2001-04-21", str(tmp_path / "cube.zarr")
    with steady.client() as client:
        start(client, settings_of(world_url, cache), trained, cube).wait()
        shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-whole")
        whole = str(tmp_path.parent / f"{tmp_path.name}-whole" / "cube.zarr")
        start(client, settings_of(world_url, cache, longer), trained, whole, append=True).wait()
    with xr.open_zarr(cube, chunks=None) as opened:
        old = opened["runoff"].load()
    n_receipts = len(list_objects(ledger_url(cube), NO_OPTIONS))
    with DaskProcesses(tmp_path.parent / f"{tmp_path.name}-dask") as doomed:
        doomed.start_scheduler()
        doomed.start_worker("w0")
        doomed.wait_for_workers(1)
        with doomed.client() as client:
            start(client, settings_of(world_url, cache, longer), trained, cube, append=True)
            some_receipts(cube, more_than=n_receipts)
            assert doomed.scheduler is not None
            families = [doomed.scheduler, doomed.workers["w0"].nanny, doomed.workers["w0"].process]
            send(signal.SIGKILL, families)
    new = len(list_objects(ledger_url(cube), NO_OPTIONS)) - n_receipts
    assert 0 < new < n_receipts, "some tiles were appended to, and some not"
    with xr.open_zarr(cube, chunks=None) as opened:
        assert opened.sizes["time"] == 60
        xr.testing.assert_identical(opened["runoff"].load(), old)
    with steady.client() as client:
        start(client, settings_of(world_url, cache, longer), trained, cube, append=True).wait()
    assert Made.at(cube) == Made.at(whole)
    assert Made.at(snapshots_url(cube)) == Made.at(snapshots_url(whole))


def test_the_object_store_is_killed_and_comes_back(
    steady: DaskProcesses, world_url: str, cache: Path, trained: str, tmp_path: Path
) -> None:
    with Server(tmp_path / "weed") as server:
        bucket = server.s3.new_bucket()
        whole, cube = f"{bucket}/whole/cube.zarr", f"{bucket}/disturbed/cube.zarr"
        settings = settings_of(world_url, cache)
        with steady.client() as client:
            start(client, settings, trained, whole, server.s3.options).wait()
            handle = start(client, settings, trained, cube, server.s3.options)
            done = some_receipts(cube, server.s3.options)
            server.kill()
            time.sleep(10)
            server.start()
            status = handle.wait()
        assert 0 < done < len(status["units"]) - 1
        assert Made.at(cube, server.s3.options) == Made.at(whole, server.s3.options)


class Server:
    """A SeaweedFS of its own that can be killed and started again, with the same files and ports."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        port = free_port()
        self.folder, self.command = folder, server_command(folder, port)
        endpoint = f"http://127.0.0.1:{port}"
        self.s3 = S3Server(endpoint, storage_options(endpoint))
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        environment = {**os.environ, "GOMEMLIMIT": "256MiB", "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"}
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, env=environment)
        wait_for_server(self.s3.endpoint, self.process, self.folder / "log")

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()


def test_credentials_that_expire_stop_the_run_and_new_ones_go_on(
    steady: DaskProcesses,
    cache: Path,
    trained: str,
    undisturbed_on_s3: Made,
    s3_server: S3Server,
    s3_bucket: str,
    s3_world: str,
    fault_proxy: ProxiedS3,
) -> None:
    cube = f"{s3_bucket}/faults/{uuid.uuid4().hex}/cube.zarr"
    with steady.client() as client:
        handle = start(client, settings_of(s3_world, cache), trained, cube, fault_proxy.options)
        done = some_receipts(cube, s3_server.options)
        fault_proxy.proxy.share({"expired": 1.0})
        with pytest.raises(JobError, match="access to the store was refused"):
            handle.wait()
        fault_proxy.proxy.share({})
        ledger = ledger_url(cube)
        kept = Made.at(ledger, s3_server.options).objects
        assert len(kept) >= done
        start(client, settings_of(s3_world, cache), trained, cube, s3_server.options).wait()
    after = Made.at(ledger, s3_server.options).objects
    assert {name: after[name] for name in kept} == kept, "finished tiles were not redone"
    assert Made.at(cube, s3_server.options) == undisturbed_on_s3
