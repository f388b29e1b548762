"""Workers as Slurm jobs, through dask-jobqueue; jobs that Slurm ended are replaced.

The scheduler lives in the process that starts the cluster, and ends with it. Work that must outlive a login
session needs ``h2mv-dist cluster start`` or ``dask scheduler --scheduler-file`` as a batch job of its own.
"""

import asyncio
import getpass
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from distributed import Security, Status
from tornado.ioloop import IOLoop

from h2mv_dist.config import ClusterSettings
from h2mv_dist.errors import JobError, describe

WORKERS: Final = 2
"""If settings leave it open."""
WATCH_SECONDS: Final = 30.0
"""How often Slurm is asked which jobs it still has."""


@contextmanager
def slurm_cluster(
    settings: ClusterSettings, host: str, security: Security | None, loop: IOLoop | None = None
) -> Iterator[Any]:
    """A scheduler listening on ``host``, and jobs of workers in Slurm's queue (they may start much later).

    Raises:
        JobError: dask-jobqueue is missing, or Slurm refuses the jobs.
    """
    with new_cluster(settings, host, security, loop) as cluster:
        n_jobs = -(-(settings.workers or WORKERS) // settings.slurm.processes)
        _submit(cluster, n_jobs)
        watch = asyncio.run_coroutine_threadsafe(_keep_jobs(cluster, n_jobs), cluster.loop.asyncio_loop)
        try:
            yield cluster
        finally:
            watch.cancel()


def new_cluster(
    settings: ClusterSettings, host: str, security: Security | None, loop: IOLoop | None = None
) -> Any:
    """The cluster without any job yet; its ``job_script()`` is what Slurm would be given.

    Raises:
        JobError: dask-jobqueue is missing.
    """
    slurm = settings.slurm
    return _cluster_type()(
        queue=slurm.queue,
        account=slurm.account,
        cores=slurm.cores,
        memory=slurm.memory,
        processes=slurm.processes,
        walltime=slurm.walltime,
        job_extra_directives=list(slurm.directives),
        job_script_prologue=list(slurm.prologue),
        log_directory=slurm.log_directory,
        worker_command=slurm.worker_command,
        worker_extra_args=_worker_arguments(settings),
        interface=settings.interface,
        local_directory=settings.local_directory,
        security=security,
        loop=loop,
        scheduler_options={"host": host, "dashboard_address": f"{host}:0"},
    )


def _worker_arguments(settings: ClusterSettings) -> list[str]:
    """Options of the worker command; the last one of a name wins over dask-jobqueue's own."""
    arguments = ["--nthreads", str(settings.threads_per_worker), "--dashboard-address", "127.0.0.1:0"]
    if settings.memory_limit != "auto":
        arguments += ["--memory-limit", settings.memory_limit]
    if settings.port_range is not None:
        arguments += ["--worker-port", settings.port_range]
        if settings.slurm.worker_command != "dask_cuda.cli":
            arguments += ["--nanny-port", settings.port_range]
    return arguments


def _cluster_type() -> Any:
    try:
        from dask_jobqueue.slurm import SLURMCluster
    except ImportError as error:
        raise JobError(
            describe(
                "Slurm workers need dask-jobqueue",
                where='cluster.kind = "slurm"',
                expected="the package dask-jobqueue",
                actual=str(error),
                fix="install h2mv-dist[slurm] on a host that submits Slurm jobs",
            )
        ) from error
    return SLURMCluster


def _submit(cluster: Any, n_jobs: int) -> None:
    _plan(cluster, n_jobs)
    try:
        cluster.sync(cluster._correct_state)
    except (OSError, RuntimeError) as error:
        for job in cluster._created:
            job.status = Status.failed  # as Dask's own workers do; otherwise the cluster cannot be closed
        raise JobError(
            describe(
                "Slurm did not take the jobs",
                where="cluster.slurm",
                expected=f"sbatch to accept {n_jobs} jobs",
                actual=str(error).strip(),
                fix="run this on a host that submits Slurm jobs, and correct cluster.slurm",
            )
        ) from error


def _plan(cluster: Any, n_jobs: int) -> None:
    """Names for new jobs, up to ``n_jobs``; ``cluster.scale`` would only log what goes wrong with them."""
    while len(cluster.worker_spec) < n_jobs:
        cluster.worker_spec.update(cluster.new_worker_spec())


async def _keep_jobs(cluster: Any, n_jobs: int) -> None:
    """Replace jobs that Slurm ended, for as long as the cluster lives; dask-jobqueue does not."""
    while True:
        await asyncio.sleep(WATCH_SECONDS)
        # sbatch and squeue fail while Slurm's controller is away; the next round tries again
        with suppress(OSError, RuntimeError):
            await replace_ended_jobs(cluster, n_jobs)


async def replace_ended_jobs(cluster: Any, n_jobs: int) -> None:
    """Submit a new job for each one that has left Slurm's queue; runs on the cluster's event loop.

    Waiting, requeued and suspended jobs are still in the queue and left alone.
    """
    jobs = {name: job.job_id for name, job in cluster.workers.items()}
    listing = await cluster.job_cls._call(
        ["squeue", "--noheader", "--format=%i", f"--user={getpass.getuser()}"]
    )
    ended = [name for name, job_id in jobs.items() if job_id not in listing.split()]
    for name in ended:
        cluster.worker_spec.pop(name, None)
    if ended:
        # new names: the scheduler may take minutes to notice that a host is gone, and knows no namesakes
        cluster._i += n_jobs
    # at once: whoever asks meanwhile how many workers are to come counts the new ones
    _plan(cluster, n_jobs)
    await cluster._correct_state()
