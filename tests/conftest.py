"""Fixtures shared by all tests: a real object store, and the folder of shared reference data."""

import signal
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from h2mv_dist.config import StorageOptions
from tests.fault_proxy import FaultProxy
from tests.seaweed import SECRET, S3Server, free_port, running_server, storage_options

__all__ = ["PLACES", "SECRET", "Place", "ProxiedS3", "S3Server", "free_port", "new_place", "storage_options"]


def pytest_configure() -> None:
    """What tests start hears Ctrl-C, also where the tests were started in the background of a shell."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class ProxiedS3:
    """The running SeaweedFS as seen through a proxy that can fail."""

    endpoint: str
    options: StorageOptions
    proxy: FaultProxy


@dataclass(frozen=True)
class Place:
    """An empty store and the options that open it."""

    url: str
    options: StorageOptions


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """SeaweedFS on free ports of 127.0.0.1."""
    with running_server(tmp_path_factory.mktemp("weed")) as server:
        yield server


@pytest.fixture(scope="session")
def s3_bucket(s3_server: S3Server) -> str:
    """URL of one bucket that tests share: SeaweedFS runs out of volumes when each makes its own."""
    return s3_server.new_bucket()


@pytest.fixture(scope="session")
def running_proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    """One proxy for all tests; use ``fault_proxy``."""
    with FaultProxy(s3_server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def fault_proxy(running_proxy: FaultProxy) -> Iterator[ProxiedS3]:
    """The object store behind a proxy, at first without faults and with counts of zero."""
    running_proxy.clear()
    yield ProxiedS3(running_proxy.url, storage_options(running_proxy.url), running_proxy)
    running_proxy.clear()


PLACES = ("folder", "memory", "s3")


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """An empty store of each kind."""
    return new_place(request.param, request, tmp_path_factory)


def new_place(kind: str, request: pytest.FixtureRequest, folders: pytest.TempPathFactory) -> Place:
    """An empty store of one of the kinds in ``PLACES``."""
    if kind == "folder":
        return Place(str(folders.mktemp("store") / "store"), StorageOptions())
    if kind == "memory":
        return Place(f"memory://{uuid.uuid4().hex}", StorageOptions())
    server: S3Server = request.getfixturevalue("s3_server")
    return Place(f"{request.getfixturevalue('s3_bucket')}/{uuid.uuid4().hex}/store", server.options)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder ``../shared`` beside the repository; tests that need it are skipped elsewhere."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"no shared reference data at {folder}")
    return folder
