"""Global inference on an object store that fails, and with workers, clients and clusters that die."""

import hashlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import s3fs
import xarray as xr
from distributed import Client

from h2mv_dist.config import Settings, StorageOptions
from h2mv_dist.errors import JobError, StoreError
from h2mv_dist.io.cube_check import verify_cube
from h2mv_dist.io.ledger import ledger_url
from h2mv_dist.io.snapshots import snapshots_url
from h2mv_dist.io.stores import get_object, join, list_objects
from h2mv_dist.jobs.handle import JobHandle, running
from h2mv_dist.jobs.inference import submit_inference
from h2mv_dist.jobs.messages import job_id
from h2mv_dist.jobs.training import submit_training
from tests.conftest import ProxiedS3, S3Server, free_port, storage_options
from tests.fault_proxy import FaultProxy
from tests.faults.conftest import settings_file
from tests.faults.processes import DaskProcesses, is_alive, send
from tests.jobs.conftest import NO_OPTIONS, small_settings, training_settings
from tests.jobs.processes import program, wait_until
from tests.seaweed import READERS_KEY, server_command, wait_for_server

pytestmark = [pytest.mark.slow]

SHARE = 0.2
DAYS = "2001-01-01..2001-03-02"
LONGER = "2001-01-01..2001-04-21"
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


def settings_of(url: str, cache: Path, days: str = DAYS) -> Settings:
    return small_settings(url, cache, data={"url": url, "period": days}, inference=FINE)


@pytest.fixture(scope="session")
def trained(
    steady: DaskProcesses, world_url: str, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """A job folder with two folds."""
    folder = str(tmp_path_factory.mktemp("trained"))
    settings = training_settings(world_url, cache, training={"folds": [0, 1]})
    with steady.client() as client:
        submit_training(client, settings, folder, NO_OPTIONS).wait()
    return folder


def start(
    client: Client,
    settings: Settings,
    job: str,
    cube: str,
    options: StorageOptions,
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
    def at(cube: str, options: StorageOptions) -> "Made":
        return Made({n: _sha(get_object(join(cube, n), options)) for n in list_objects(cube, options)})


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def cube(s3_bucket: str) -> str:
    """URL where nothing is yet."""
    return new_url(s3_bucket)


def new_url(bucket: str) -> str:
    return f"{bucket}/faults/{uuid.uuid4().hex}/cube.zarr"


@pytest.fixture(scope="session")
def settings(s3_world: str, cache: Path) -> Settings:
    return settings_of(s3_world, cache)


@pytest.fixture(scope="session")
def longer(s3_world: str, cache: Path) -> Settings:
    return settings_of(s3_world, cache, LONGER)


@pytest.fixture(scope="session")
def whole(
    steady: DaskProcesses, s3_server: S3Server, s3_bucket: str, settings: Settings, trained: str
) -> str:
    """URL of a cube that nothing disturbed; nobody writes to it any more."""
    cube = new_url(s3_bucket)
    with steady.client() as client:
        start(client, settings, trained, cube, s3_server.options).wait()
    assert verify_cube(cube, s3_server.options).complete
    return cube


@pytest.fixture(scope="session")
def undisturbed(whole: str, s3_server: S3Server) -> Made:
    return Made.at(whole, s3_server.options)


def copied(cube: str, options: StorageOptions) -> str:
    """A cube with its receipts and snapshots, once more beside it."""
    copy, name = new_url(cube.partition("/faults/")[0]), "cube.zarr"
    filesystem = s3fs.S3FileSystem(**options["s3"])
    filesystem.copy(cube.removesuffix(name), copy.removesuffix(name), recursive=True)
    return copy


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
    settings: Settings,
    trained: str,
    undisturbed: Made,
    cube: str,
    s3_server: S3Server,
    fault_proxy: ProxiedS3,
) -> None:
    break_it(fault_proxy.proxy)
    with steady.client() as client:
        status = start(client, settings, trained, cube, fault_proxy.options).wait()
    assert fault_proxy.proxy.faults[kind] >= at_least
    assert {unit["attempt"] for unit in status["units"]} == {1}
    assert Made.at(cube, s3_server.options) == undisturbed


def test_a_full_store_is_waited_for(
    steady: DaskProcesses,
    settings: Settings,
    trained: str,
    undisturbed: Made,
    cube: str,
    s3_server: S3Server,
    fault_proxy: ProxiedS3,
) -> None:
    with steady.client() as client:
        handle = start(client, settings, trained, cube, fault_proxy.options)
        some_receipts(cube, s3_server.options)
        fault_proxy.proxy.share({"full": 1.0}, methods=("PUT", "POST"))
        wait_until(lambda: fault_proxy.proxy.faults["full"] >= 4, "writes that are refused")
        fault_proxy.proxy.share({})
        handle.wait()
    assert Made.at(cube, s3_server.options) == undisturbed


def some_receipts(cube: str, options: StorageOptions, more_than: int = 0) -> int:
    """Wait until some, but not all, of the tiles have their receipts; how many have."""
    ledger = ledger_url(cube)
    wait_until(lambda: len(list_objects(ledger, options)) > more_than, "a receipt", seconds=300)
    return len(list_objects(ledger, options))


def test_a_worker_is_killed_in_the_middle_of_a_tile(
    own: DaskProcesses,
    settings: Settings,
    trained: str,
    undisturbed: Made,
    cube: str,
    s3_server: S3Server,
    fault_proxy: ProxiedS3,
) -> None:
    with own.client() as client:
        handle = start(client, settings, trained, cube, fault_proxy.options)
        done = some_receipts(cube, s3_server.options)
        os.kill(own.workers["w0"].process.pid, signal.SIGKILL)
        status = handle.wait()
    tiles = [unit for unit in status["units"] if unit["name"] != "finish"]
    assert 0 < done < len(tiles)
    assert max(unit["attempt"] for unit in tiles) >= 2, "a tile was being computed"
    assert Made.at(cube, s3_server.options) == undisturbed


def test_a_killed_client_loses_nothing(
    steady: DaskProcesses,
    settings: Settings,
    trained: str,
    whole: str,
    undisturbed: Made,
    cube: str,
    s3_server: S3Server,
    fault_proxy: ProxiedS3,
    tmp_path: Path,
) -> None:
    """Its cluster is its own, and ends with it."""
    file, log = settings_file(tmp_path, settings, fault_proxy.options), tmp_path / "log"
    command = (sys.executable, "-m", "h2mv_dist.cli", "infer", file, "--job", trained, "--cube", cube)
    with program(log, command, {}) as client:
        some_receipts(cube, s3_server.options)
        workers = psutil.Process(client.pid).children(recursive=True)
        client.kill()
        # by themselves, once their scheduler is gone
        wait_until(lambda: not any(map(is_alive, workers)), "the end of all workers", log)
    kept = Made.at(ledger_url(cube), s3_server.options).objects
    assert 0 < len(kept) < len(list_objects(ledger_url(whole), s3_server.options)), log.read_text()
    with steady.client() as dask:
        start(dask, settings, trained, cube, fault_proxy.options).wait()
    receipts = Made.at(ledger_url(cube), s3_server.options).objects
    assert {name: receipts[name] for name in kept} == kept, "finished tiles were not redone"
    assert Made.at(cube, s3_server.options) == undisturbed


def test_a_straggler_and_its_successor_write_the_same(
    steady: DaskProcesses,
    own: DaskProcesses,
    settings: Settings,
    trained: str,
    undisturbed: Made,
    cube: str,
    s3_server: S3Server,
    fault_proxy: ProxiedS3,
) -> None:
    """Two clusters that know nothing of each other fill the same cube; one hangs in its tiles."""
    proxy, options = fault_proxy.proxy, fault_proxy.options
    proxy.stall_seconds = 5.0
    proxy.plan("stall", 2, "PUT", "/runoff/c/")
    with steady.client() as one, own.client() as other:
        straggler = start(other, settings, trained, cube, options)
        wait_until(lambda: proxy.faults["stall"] == 2, "writes that hang")
        start(one, settings, trained, cube, options).wait()
        straggler.wait()
    assert [path for path, times in proxy.puts.items() if "/runoff/c/" in path and times > 1]
    assert verify_cube(cube, s3_server.options).complete
    assert Made.at(cube, s3_server.options) == undisturbed


def test_a_second_run_on_the_same_cluster_is_refused(
    steady: DaskProcesses,
    settings: Settings,
    trained: str,
    undisturbed: Made,
    cube: str,
    s3_server: S3Server,
) -> None:
    with steady.client() as client:
        handle = start(client, settings, trained, cube, s3_server.options)
        with pytest.raises(JobError, match="already running"):
            start(client, settings, trained, cube, s3_server.options)
        handle.wait()
    assert Made.at(cube, s3_server.options) == undisturbed


def test_a_crash_in_an_append_leaves_the_old_days_readable(
    steady: DaskProcesses,
    longer: Settings,
    trained: str,
    whole: str,
    s3_server: S3Server,
    fault_proxy: ProxiedS3,
    tmp_path: Path,
) -> None:
    options = s3_server.options
    cube, appended = copied(whole, options), copied(whole, options)
    with steady.client() as client:
        start(client, longer, trained, appended, options, append=True).wait()
    n_receipts = len(list_objects(ledger_url(cube), options))
    with DaskProcesses(tmp_path) as doomed:
        doomed.start_scheduler()
        doomed.start_worker("w0")
        doomed.wait_for_workers(1)
        with doomed.client() as client:
            start(client, longer, trained, cube, fault_proxy.options, append=True)
            some_receipts(cube, options, more_than=n_receipts)
            assert doomed.scheduler is not None
            families = [doomed.scheduler, doomed.workers["w0"].nanny, doomed.workers["w0"].process]
            send(signal.SIGKILL, families)
    new = len(list_objects(ledger_url(cube), options)) - n_receipts
    assert 0 < new < n_receipts, "some tiles were appended to, and some not"
    xr.testing.assert_identical(runoff(cube, options), runoff(whole, options))
    with steady.client() as client:
        start(client, longer, trained, cube, options, append=True).wait()
    assert Made.at(cube, options) == Made.at(appended, options)
    assert Made.at(snapshots_url(cube), options) == Made.at(snapshots_url(appended), options)


def runoff(cube: str, options: StorageOptions) -> xr.DataArray:
    """As a reader sees it."""
    with xr.open_zarr(cube, chunks=None, storage_options=dict(options["s3"])) as opened:
        loaded: xr.DataArray = opened["runoff"].load()
        return loaded


def test_a_store_that_may_only_be_read_is_told_before_anything_is_computed(
    steady: DaskProcesses,
    settings: Settings,
    longer: Settings,
    trained: str,
    whole: str,
    undisturbed: Made,
    cube: str,
    s3_server: S3Server,
) -> None:
    readers = storage_options(s3_server.endpoint, READERS_KEY)
    refused = r"access to the store was refused(.|\n)*given the rights"
    receipts = Made.at(ledger_url(whole), s3_server.options)
    with steady.client() as client:
        with pytest.raises(StoreError, match=refused):
            start(client, settings, trained, cube, readers)
        with pytest.raises(StoreError, match=refused):
            start(client, longer, trained, whole, readers, append=True)
        assert running(client, job_id("infer", cube)) is None
        assert running(client, job_id("infer", whole)) is None
    assert not list_objects(cube, s3_server.options)
    assert Made.at(ledger_url(whole), s3_server.options) == receipts
    assert Made.at(whole, s3_server.options) == undisturbed, "it is as long as it was"


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
    settings: Settings,
    trained: str,
    undisturbed: Made,
    cube: str,
    s3_server: S3Server,
    fault_proxy: ProxiedS3,
) -> None:
    with steady.client() as client:
        handle = start(client, settings, trained, cube, fault_proxy.options)
        done = some_receipts(cube, s3_server.options)
        fault_proxy.proxy.share({"expired": 1.0})
        with pytest.raises(JobError, match=r"^[-_0-9]+ \(attempt.*access to the store was refused"):
            handle.wait()
        fault_proxy.proxy.share({})
        ledger = ledger_url(cube)
        kept = Made.at(ledger, s3_server.options).objects
        assert len(kept) >= done
        start(client, settings, trained, cube, s3_server.options).wait()
    after = Made.at(ledger, s3_server.options).objects
    assert {name: after[name] for name in kept} == kept, "finished tiles were not redone"
    assert Made.at(cube, s3_server.options) == undisturbed
