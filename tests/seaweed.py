"""SeaweedFS on this machine, a real S3 server for tests and benchmarks."""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import s3fs

from h2mv_dist.config import StorageOptions

ACCESS_KEY = "testkey"
READERS_KEY = "readerskey"
"""Of a user who may list and read, but not write; with the same secret."""
SECRET = "testsecret-canary"
_START_SECONDS = 120.0
_PORTS = range(11_000, 22_000)


@dataclass(frozen=True)
class S3Server:
    """A running SeaweedFS; ``metrics`` is where it counts requests and bytes, if it was told to."""

    endpoint: str
    options: StorageOptions
    metrics: str = ""

    def new_bucket(self) -> str:
        """URL of a fresh, empty bucket."""
        name = f"b{uuid.uuid4().hex[:12]}"
        _client(self.endpoint).mkdir(name)
        return f"s3://{name}"


def storage_options(endpoint: str, key: str = ACCESS_KEY, secret: str = SECRET) -> StorageOptions:
    """Options whose timeouts are short, so that tests of failures are, too."""
    client = {"connect_timeout": 2, "read_timeout": 10}
    return StorageOptions(
        {"s3": {"key": key, "secret": secret, "endpoint_url": endpoint, "config_kwargs": client}}
    )


def free_port() -> int:
    """A port of 127.0.0.1 that is free together with the one 10000 above it (SeaweedFS' gRPC).

    Both are below those that systems give to connections, which would take one before the server does.
    """
    while True:
        port = secrets.choice(_PORTS)
        with socket.socket() as low, socket.socket() as high, contextlib.suppress(OSError):
            low.bind(("127.0.0.1", port))
            high.bind(("127.0.0.1", port + 10_000))
            return port


@contextlib.contextmanager
def running_server(folder: Path, memory: str = "1GiB") -> Iterator[S3Server]:
    """SeaweedFS on free ports of 127.0.0.1, stopped by its own process id; its files are in ``folder``.

    ``memory`` is what its garbage collector aims at.
    """
    port, metrics_port = free_port(), free_port()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*server_command(folder, port), f"-metricsPort={metrics_port}"],
            stdout=log,
            stderr=subprocess.STDOUT,
            # every bucket takes volumes of its own: one at a time, not seven
            env={**os.environ, "GOMEMLIMIT": memory, "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"},
        )
        try:
            endpoint = f"http://127.0.0.1:{port}"
            wait_for_server(endpoint, process, folder / "log")
            metrics = f"http://127.0.0.1:{metrics_port}/metrics"
            yield S3Server(endpoint, storage_options(endpoint), metrics)
        finally:
            # Its own shutdown waits for clients; nothing in the temporary folder is worth that.
            process.kill()
            process.wait()


def server_command(folder: Path, port: int) -> list[str]:
    actions = {
        ACCESS_KEY: ["Admin", "Read", "Write", "List", "Tagging"],
        READERS_KEY: ["Read", "List"],
    }
    identities = [
        {"name": key, "credentials": [{"accessKey": key, "secretKey": SECRET}], "actions": allowed}
        for key, allowed in actions.items()
    ]
    config = folder / "s3.json"
    config.write_text(json.dumps({"identities": identities}))
    weed = shutil.which("weed") or str(Path(sys.executable).with_name("weed"))
    return [
        *(weed, "-logtostderr", "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder}"),
        *("-master.telemetry=false", "-master.raftHashicorp=true", "-master.volumeSizeLimitMB=1024"),
        *("-volume.max=500", "-volume.preStopSeconds=0", "-s3", f"-s3.port={port}", f"-s3.config={config}"),
        *("-s3.autoCreateBucket=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
        *(f"-{part}.port={free_port()}" for part in ("master", "volume", "filer")),
    ]


def wait_for_server(endpoint: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a bucket can be made and an object written and read back."""
    filesystem = _client(endpoint)
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        if _answers(endpoint) and _stores_an_object(filesystem):
            return
        time.sleep(0.2)
    raise RuntimeError(f"SeaweedFS did not start:\n{log.read_text()[-4000:]}")


def _client(endpoint: str) -> s3fs.S3FileSystem:
    """A client of our own, not the one under test, that does not retry."""
    options = storage_options(endpoint)["s3"]
    timeouts = {"connect_timeout": 2, "read_timeout": 10, "retries": {"max_attempts": 0}}
    return s3fs.S3FileSystem(**{**options, "config_kwargs": timeouts})


def _answers(endpoint: str) -> bool:
    try:
        urllib.request.urlopen(endpoint, timeout=1).close()
    except urllib.error.HTTPError as refusal:
        refusal.close()
        return True
    except OSError:
        return False
    return True


def _stores_an_object(filesystem: s3fs.S3FileSystem) -> bool:
    bucket = f"ready{uuid.uuid4().hex[:12]}"
    try:
        filesystem.mkdir(bucket)
        filesystem.pipe_file(f"{bucket}/probe", b"ok")
        return bool(filesystem.cat_file(f"{bucket}/probe") == b"ok")
    except OSError:
        return False
