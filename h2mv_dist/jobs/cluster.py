"""From cluster settings to a connected Dask client with the coordinator installed."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import dask
from distributed import Client, LocalCluster

from h2mv_dist.config import ClusterSettings, StorageOptions
from h2mv_dist.errors import JobError, describe
from h2mv_dist.jobs.gang import Coordinator

CONNECT_SECONDS: Final = 30
LOOPBACK: Final = "127.0.0.1"


@contextmanager
def connect(settings: ClusterSettings) -> Iterator[Client]:
    """A client of a fresh local cluster (closed at the end) or of a running scheduler (left alone)."""
    with ExitStack() as stack:
        target: Any = settings.address
        if settings.kind != "address":
            target = stack.enter_context(start_cluster(settings))
        yield install(stack.enter_context(_client(target)))


def install(client: Client) -> Client:
    """Make sure that the scheduler runs the coordinator."""
    client.register_plugin(Coordinator())
    return client


@contextmanager
def start_cluster(settings: ClusterSettings) -> Iterator[Any]:
    """A cluster of worker processes on this machine, one thread each; one worker a GPU for ``cuda``."""
    if settings.kind == "cuda":
        cluster = _cuda_cluster()
    else:
        cluster = LocalCluster(
            n_workers=settings.workers,
            threads_per_worker=1,
            processes=True,
            host=LOOPBACK,
            dashboard_address=f"{LOOPBACK}:0",
            memory_limit=settings.memory_limit,
        )
    with cluster:
        cluster.wait_for_workers(len(cluster.worker_spec))
        yield cluster


def _cuda_cluster() -> Any:
    try:
        from dask_cuda import LocalCUDACluster
    except ImportError as error:
        raise JobError(
            describe(
                "GPU workers need dask-cuda",
                where='cluster.kind = "cuda"',
                expected="the package dask-cuda",
                actual=str(error),
                fix="install h2mv-dist[cuda] on a machine with NVIDIA GPUs, or use cluster.kind = 'local'",
            )
        ) from error
    return LocalCUDACluster(host=LOOPBACK, dashboard_address=f"{LOOPBACK}:0")


@contextmanager
def _client(target: Any) -> Iterator[Client]:
    try:
        client = Client(target, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise JobError(
            describe(
                "cannot reach the Dask scheduler",
                where=f"cluster.address = {target}",
                expected="a running scheduler, such as tcp://host:8786",
                actual=f"{type(error).__name__}: {error}",
                fix="start one (h2mv-dist cluster), check the address, or leave it out for a local cluster",
            )
        ) from error
    with client:
        yield client


def scheduler_address(client: Client) -> str:
    """Where the client's scheduler listens."""
    return str(client.scheduler_info(n_workers=0)["address"])


def n_workers(client: Client) -> int:
    """Workers the scheduler has now."""
    return len(client.scheduler_info(n_workers=-1)["workers"])


def require_workers(client: Client, ranks: int, setting: str) -> None:
    """Refuse gangs the cluster cannot hold.

    Raises:
        JobError: fewer workers than ranks; such a gang would wait for ever.
    """
    available = n_workers(client)
    if ranks > available:
        raise JobError(
            describe(
                "more ranks than workers",
                where=setting,
                expected=f"at most {available}, the workers of {scheduler_address(client)}",
                actual=str(ranks),
                fix=f"lower {setting}, or start more workers (cluster.workers)",
            )
        )


def known_options(from_settings: StorageOptions) -> StorageOptions:
    """Storage options of the settings, over those of Dask's configuration (``h2mv_dist.storage_options``).

    fsspec's own environment variables (``FSSPEC_S3_KEY``, ``AWS_ACCESS_KEY_ID`` ...) work without being
    mentioned here.
    """
    configured = dask.config.get("h2mv_dist.storage-options", {})
    protocols = {*configured, *from_settings}
    return StorageOptions({p: {**configured.get(p, {}), **from_settings.get(p, {})} for p in protocols})
