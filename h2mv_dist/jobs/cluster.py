"""From cluster settings to a connected Dask client with the coordinator installed.

Nothing listens beyond this machine unless an interface, or Slurm, is asked for.
"""

import gc
import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Final, Literal

import dask
from dask.system import CPU_COUNT
from dask.utils import parse_bytes
from distributed import Client, LocalCluster, Security
from distributed.system import MEMORY_LIMIT
from distributed.utils import LoopRunner, get_ip, get_ip_interface
from tornado.ioloop import IOLoop

from h2mv_dist.config import ClusterSettings, StorageOptions, TlsSettings
from h2mv_dist.errors import JobError, describe
from h2mv_dist.jobs.preload import READY_HANDLER, InstalledCoordinator
from h2mv_dist.jobs.slurm import slurm_cluster

CONNECT_SECONDS: Final = 30
LOOPBACK: Final = "127.0.0.1"
PRELOAD: Final = "h2mv_dist.jobs.preload"
WORKER_BYTES: Final = 2 * 2**30
"""Memory there must be for each worker, where settings leave both open."""
_POLL_SECONDS: Final = 0.2
_SPARING: Final = {"distributed": {"worker": {"profile": {"interval": "100ms", "cycle": "60s"}}}}
"""Dask's profiler, for workers that do one thing for minutes: by default it looks every 10 ms, taking turns
from the work, and keeps an hour of what it saw, second by second, in their memory."""

dask.config.update_defaults(_SPARING)
_log = logging.getLogger(__name__)


@contextmanager
def connect(settings: ClusterSettings) -> Iterator[Client]:
    """A client of a fresh cluster (closed at the end) or of a running scheduler (left alone).

    Of Slurm's workers one is waited for: others may come much later, and each job waits for those it needs.

    Raises:
        JobError: the cluster cannot be started or reached, or does not take the coordinator.
    """
    with ExitStack() as stack:
        if chosen_kind(settings) == "address":
            client = stack.enter_context(_client(_running_scheduler(settings), _security(settings.tls)))
        else:
            cluster = stack.enter_context(start_cluster(settings))
            client = stack.enter_context(_client(cluster, cluster.security))
            _await_workers(client, 1 if chosen_kind(settings) == "slurm" else len(cluster.plan))
        yield install(client)


def chosen_kind(settings: ClusterSettings) -> Literal["local", "cuda", "address", "slurm"]:
    """What ``auto`` stands for here and now."""
    if settings.kind != "auto":
        return settings.kind
    if settings.address is not None or settings.scheduler_file is not None:
        return "address"
    return "cuda" if no_gpu_because() is None else "local"


def no_gpu_because() -> str | None:
    """Why workers started here would see no GPU; None if they would.

    CUDA is not initialised: a process with a CUDA context cannot be the parent of GPU workers.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None and listed.strip() in ("", "-1"):
        return f'CUDA_VISIBLE_DEVICES = "{listed}"'
    if (problem := _nvml_problem()) is not None:
        return problem
    import torch

    return None if torch.version.cuda is not None else f"torch {torch.__version__} is built without CUDA"


def _nvml_problem() -> str | None:
    try:
        import pynvml
    except ImportError:
        return "the package nvidia-ml-py, which comes with h2mv-dist[cuda], is not installed"
    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        return f"NVIDIA's driver does not answer: {error}"
    return None if count > 0 else "NVIDIA's driver knows no GPU"


def install(client: Client) -> Client:
    """Make sure that the scheduler runs the coordinator; one that is there already stays.

    Raises:
        JobError: the scheduler takes no plugins, or cannot load this one, and has none preloaded.
    """
    ready, problem = False, Exception("no answer")
    try:
        client.register_plugin(InstalledCoordinator())
    except Exception as error:  # whatever it is, it does not matter if the coordinator was preloaded
        problem = error
    try:
        ready = client.sync(getattr(client.scheduler, READY_HANDLER)) is True
    except Exception as error:
        problem = error
    if not ready:
        raise JobError(
            describe(
                "the scheduler does not run the coordinator",
                where=scheduler_address(client),
                expected="a scheduler that takes plugins, in an environment with the same h2mv-dist",
                actual=f"{type(problem).__name__}: {problem}",
                fix=f"start it with: dask scheduler --preload {PRELOAD}",
            )
        ) from problem
    return client


@contextmanager
def start_cluster(settings: ClusterSettings) -> Iterator[Any]:
    """A scheduler in this process and workers in others; Slurm's may join much later.

    Raises:
        JobError: there is no GPU, a package is missing, or the cluster cannot be started as asked for.
    """
    kind = chosen_kind(settings)
    if kind == "address":
        raise JobError(
            describe(
                "there is nothing to start",
                where="cluster.address, cluster.scheduler_file",
                expected="settings of a new cluster",
                actual="a scheduler that runs already",
                fix="leave the address out",
            )
        )
    if kind == "cuda":
        _require_gpu()
    host, security = _host(settings, kind), _security(settings.tls)
    with ExitStack() as stack:
        loop = stack.enter_context(_event_loop())
        try:
            cluster = _new_cluster(kind, settings, host, security, loop)
            started = stack.enter_context(_ended_at_last(cluster))
        except (OSError, RuntimeError, ValueError) as error:
            raise JobError(
                describe(
                    "the cluster did not start",
                    where=f'[cluster], kind = "{kind}"',
                    expected=f"a scheduler and workers on {host}",
                    actual=f"{type(error).__name__}: {error}",
                    fix="look at port_range, local_directory, memory_limit and interface",
                )
            ) from error
        yield started


@contextmanager
def _ended_at_last(cluster: AbstractContextManager[Any]) -> Iterator[Any]:
    """The cluster; that its end took long says nothing of the work that was done on it.

    On a host that is busy, workers may not be gone when Dask, which has killed them by then, stops waiting.
    """
    started = cluster.__enter__()
    try:
        yield started
    finally:
        try:
            cluster.__exit__(None, None, None)
        except TimeoutError:
            _log.warning("workers took too long to end, and were killed")


@contextmanager
def _event_loop() -> Iterator[IOLoop]:
    """A thread for the cluster that, with the workers it starts, does not hear Ctrl-C.

    A terminal sends it to every process, and workers that die of it spoil the orderly end.
    """
    runner = LoopRunner()
    # A client that could not connect is closed when it is collected. If that happened in the new thread while
    # the runner starts, both would wait for the same lock.
    gc.collect()
    resource_tracker.ensure_running()  # it unblocks Ctrl-C in the thread that starts it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        runner.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield runner.loop
    finally:
        runner.stop()


def _new_cluster(
    kind: Literal["local", "cuda", "slurm"],
    settings: ClusterSettings,
    host: str,
    security: Security | None,
    loop: IOLoop,
) -> AbstractContextManager[Any]:
    if kind == "slurm":
        return slurm_cluster(settings, host, security, loop)
    options: dict[str, Any] = {
        "threads_per_worker": settings.threads_per_worker,
        "local_directory": settings.local_directory,
        "host": host,
        "dashboard_address": f"{host}:0",
        "security": security,
        "loop": loop,
    }
    if settings.memory_limit != "auto":
        options["memory_limit"] = settings.memory_limit
    if settings.port_range is not None:
        options |= {"port": settings.port_range, "worker_port": settings.port_range}
    if kind == "cuda":
        # tasks leave no arrays on a GPU, so that there is nothing for Dask to move off it
        cluster: AbstractContextManager[Any] = _cuda_type()(device_memory_limit=None, **options)
    else:
        # CPU workers must not meet on a GPU that they would share
        unseen = {"CUDA_VISIBLE_DEVICES": ""}
        cluster = LocalCluster(n_workers=local_workers(settings), processes=True, env=unseen, **options)
    return cluster


def local_workers(
    settings: ClusterSettings, *, threads: int = 1, cores: int = CPU_COUNT, memory: int = MEMORY_LIMIT
) -> int:
    """Workers on this machine's cores: as set, else as many as compute at once and have memory.

    Args:
        settings: of the cluster.
        threads: of torch in each worker.
        cores: that this process may use, by its affinity and control group.
        memory: of the machine, or of this process's control group, bytes.

    >>> [local_workers(ClusterSettings(), cores=8, memory=gib * 2**30) for gib in (64, 6)]
    [8, 3]
    """
    if settings.workers is not None:
        return settings.workers
    each = memory_limit(settings) or WORKER_BYTES
    return max(1, min(cores // max(threads, settings.threads_per_worker), memory // each))


def for_work(
    settings: ClusterSettings, *, threads: int = 1, least: int = 1, most: int | None = None
) -> ClusterSettings:
    """With the workers that some work needs, where settings leave open how many start on this machine.

    Args:
        settings: of the cluster.
        threads: of torch in each worker.
        least: workers without which it cannot begin.
        most: workers it has use for; each has more memory if they are few.
    """
    if settings.workers is not None or chosen_kind(settings) != "local":
        return settings
    wanted = local_workers(settings, threads=threads)
    return settings.model_copy(update={"workers": max(least, min(wanted, most or wanted))})


def memory_limit(settings: ClusterSettings) -> int | None:
    """Bytes of a worker that would be started, or None where settings alone do not say.

    >>> memory_limit(ClusterSettings(kind="local", memory_limit="4GiB"))
    4294967296
    >>> memory_limit(ClusterSettings(kind="local", memory_limit="0.5"))
    """
    if settings.memory_limit == "auto" or chosen_kind(settings) == "address":
        return None
    limit = parse_bytes(settings.memory_limit)
    # Dask takes numbers up to 1 for shares of the machine, and 0 for no limit
    return limit if limit > 1 else None


def _host(settings: ClusterSettings, kind: str) -> str:
    """The address to listen on."""
    if settings.interface is None:
        return str(get_ip()) if kind == "slurm" else LOOPBACK
    try:
        return str(get_ip_interface(settings.interface))
    except ValueError as error:
        raise JobError(
            describe(
                "no such network interface",
                where="cluster.interface",
                expected="an interface of this machine that has an IPv4 address",
                actual=str(error),
                fix="choose another one, or leave it out",
            )
        ) from error


def _security(tls: TlsSettings | None) -> Security | None:
    """One certificate for client, scheduler and workers alike; None leaves it to Dask's configuration."""
    if tls is None:
        return None
    for name, path in tls.model_dump().items():
        if not Path(path).is_file():
            raise JobError(
                describe(
                    "a TLS file is missing",
                    where=f"cluster.tls.{name}",
                    expected="a PEM file",
                    actual=f"no file {path}",
                    fix="check the path; it must exist on every host of the cluster",
                )
            )
    pairs = {f"tls_{role}_cert": tls.cert for role in ("client", "scheduler", "worker")}
    pairs |= {f"tls_{role}_key": tls.key for role in ("client", "scheduler", "worker")}
    return Security(require_encryption=True, tls_ca_file=tls.ca_file, **pairs)


def _require_gpu() -> None:
    if (reason := no_gpu_because()) is not None:
        raise JobError(
            describe(
                "there is no GPU to use",
                where='cluster.kind = "cuda"',
                expected="an NVIDIA GPU with its driver, a CUDA build of torch and h2mv-dist[cuda]",
                actual=reason,
                fix='use a machine with GPUs, or cluster.kind = "local"',
            )
        )


def _cuda_type() -> Any:
    try:
        from dask_cuda import LocalCUDACluster
    except ImportError as error:
        raise JobError(
            describe(
                "GPU workers need dask-cuda",
                where='cluster.kind = "cuda"',
                expected="the package dask-cuda",
                actual=str(error),
                fix='install h2mv-dist[cuda], or use cluster.kind = "local"',
            )
        ) from error
    return LocalCUDACluster


def _running_scheduler(settings: ClusterSettings) -> str:
    """The address in the settings, or in their scheduler file."""
    if settings.address is not None:
        return settings.address
    path = str(settings.scheduler_file)
    try:
        return str(json.loads(Path(path).read_text())["address"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JobError(
            describe(
                "cannot read the scheduler file",
                where=f"cluster.scheduler_file = {path}",
                expected="the file of a running scheduler",
                actual=f"{type(error).__name__}: {error}",
                fix="start one: h2mv-dist cluster start --scheduler-file FILE",
            )
        ) from error


@contextmanager
def _client(target: Any, security: Security | None) -> Iterator[Client]:
    try:
        client = Client(target, timeout=CONNECT_SECONDS, set_as_default=False, security=security)
    # Dask's RuntimeError and TypeError: one side wants TLS and the other has none, or no certificate
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise JobError(
            describe(
                "cannot reach the Dask scheduler",
                where=f"cluster.address = {target}",
                expected="a running scheduler, such as tcp://host:8786, or tls://host:8786 with cluster.tls",
                actual=f"{type(error).__name__}: {error}",
                fix="start one (h2mv-dist cluster start), check the address, or leave it out",
            )
        ) from error
    with client:
        yield client


@contextmanager
def scheduler_file(path: str | Path, cluster: Any) -> Iterator[None]:
    """Leave a cluster's address in a file while it runs, as ``dask scheduler --scheduler-file`` does.

    Raises:
        JobError: the file cannot be written.
    """
    target = Path(path)
    written = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        written.write_text(json.dumps(dict(cluster.scheduler_info), indent=2))
        written.replace(target)
    except OSError as error:
        raise JobError(
            describe(
                "cannot write the scheduler file",
                where=str(path),
                expected="a file in an existing folder",
                actual=error.strerror or str(error),
                fix="choose another place",
            )
        ) from error
    try:
        yield
    finally:
        target.unlink(missing_ok=True)


def scheduler_address(client: Client) -> str:
    """Where the client's scheduler listens."""
    return str(client.scheduler_info(n_workers=0)["address"])


def workers_of(client: Client) -> dict[str, dict[str, Any]]:
    """What the scheduler knows of its workers now, by address.

    Not ``client.scheduler_info``: the client replaces what that returns every other second, without workers.
    """
    assert client.scheduler is not None, "an open client"
    identity: dict[str, Any] = client.sync(client.scheduler.identity, n_workers=-1)
    return dict(identity["workers"])


def require_workers(client: Client, needed: int, setting: str) -> None:
    """Refuse gangs the cluster cannot hold; batch jobs that are to bring enough workers are waited for.

    Raises:
        JobError: fewer workers than needed; such a gang would wait for ever.
    """
    if needed <= _workers_of_batch_jobs(client):
        _await_workers(client, needed)
    available = len(workers_of(client))
    if needed > available:
        raise JobError(
            describe(
                "not enough workers",
                where=scheduler_address(client),
                expected=f"at least {needed} for {setting}",
                actual=str(available),
                fix="start more workers (cluster.workers)" + (f", or lower {setting}" if needed > 1 else ""),
            )
        )


def _workers_of_batch_jobs(client: Client) -> int:
    """How many workers there are once a batch system has started all jobs of the client's own cluster.

    Zero if it has none: workers of other clusters that are not there may be gone for good.
    """
    cluster = client.cluster
    # dask-jobqueue's clusters have one, also those that users made themselves
    return len(cluster.plan) if cluster is not None and hasattr(cluster, "job_script") else 0


def _await_workers(client: Client, count: int) -> None:
    """Wait, as long as it takes, until the client's own cluster has so many workers."""
    if len(workers_of(client)) < count:
        _log.warning("waiting for %d workers; dashboard: %s", count, client.dashboard_link)
    # with Dask's own way, a cluster forgets workers that leave meanwhile before it hears of it, and fails
    while len(workers_of(client)) < count:
        time.sleep(_POLL_SECONDS)


def smallest_memory(client: Client) -> int | None:
    """Memory limit of the smallest worker, bytes; None where there is no limit."""
    limits = [worker["memory_limit"] for worker in workers_of(client).values()]
    return min(filter(None, limits), default=None)


def known_options(*given: StorageOptions) -> StorageOptions:
    """Storage options of Dask's configuration (``h2mv_dist.storage_options``), under those that are given.

    Of the given ones, later ones count. fsspec's own environment variables (``FSSPEC_S3_KEY``,
    ``AWS_ACCESS_KEY_ID`` ...) work without being mentioned here.
    """
    layers = (StorageOptions(dask.config.get("h2mv_dist.storage-options", None)), *given)
    protocols = {protocol for layer in layers for protocol in layer}
    return StorageOptions(
        {p: {key: value for layer in layers for key, value in layer.get(p, {}).items()} for p in protocols}
    )
