"""Jobs from a notebook or a script: connect, submit, watch, leave, come back.

    import h2mv_dist as hd

    hd.connect("tcp://host:8786")
    job = hd.train("settings.toml", "s3://bucket/job")
    job                                   # its state, as HTML
    job.wait()
    cube = hd.infer("settings.toml", job, "s3://bucket/cube.zarr").wait().result().cube

A job lives on the scheduler and in its records, not here: ``hd.job`` finds it again from any machine. Only
who submits one imports torch.
"""

import atexit
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from io import BytesIO
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pandas as pd
import xarray as xr
from distributed import Client
from rich.console import Console

from h2mv_dist.config import (
    ClusterSettings,
    Settings,
    SettingsLike,
    StorageOptions,
    layered,
    shared_place,
)
from h2mv_dist.display import watching
from h2mv_dist.errors import ConfigError, H2mvError, JobError, describe
from h2mv_dist.io.cube_store import read_cube
from h2mv_dist.io.ledger import Ledger
from h2mv_dist.io.netcdf import select
from h2mv_dist.io.stores import displayed, get_object, join
from h2mv_dist.jobs.cluster import connect as connected
from h2mv_dist.jobs.cluster import install, known_options, scheduler_address
from h2mv_dist.jobs.configuration import load, load_cluster
from h2mv_dist.jobs.export import fold_curves, metrics_table
from h2mv_dist.jobs.handle import (
    POLL_SECONDS,
    JobHandle,
    Watcher,
    known_jobs,
    raise_failures,
    running,
    status_of,
)
from h2mv_dist.jobs.html import jobs_html
from h2mv_dist.jobs.logs import RankLog, recorded_logs, with_what_runs
from h2mv_dist.jobs.messages import is_id, job_id, kind_of
from h2mv_dist.jobs.page import page_of
from h2mv_dist.jobs.progress import duration, progress_of, speed
from h2mv_dist.jobs.recorded import RecordedJob, find_job, recorded_folds, recorded_jobs, unreadable
from h2mv_dist.jobs.records import JobFolder
from h2mv_dist.jobs.summary import FILE as SUMMARY
from h2mv_dist.variables import nearest

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_log: Final = logging.getLogger(__name__)


class _Session:
    """The connection of this process, and what closes it."""

    def __init__(self) -> None:
        self.client: Client | None = None
        self.stack = ExitStack()


_session: Final = _Session()


def connect(target: Any = None, *, settings: SettingsLike | None = None, **cluster: Any) -> Client:
    """Connect this process to a cluster; jobs are submitted there from now on.

    Args:
        target: address of a running scheduler, a ``distributed.Client``, or any cluster object of Dask's.
        settings: TOML file or mapping whose section ``cluster`` counts, if there is no target.
        **cluster: settings of that section, such as ``workers=4``, over those of the file. Without any
            target and settings, workers start on this machine, and end with this process. Of workers that
            are Slurm jobs one is waited for; the others join when Slurm has room for them.

    Returns:
        The client, for whatever else Dask can do.

    Raises:
        JobError: the cluster cannot be reached or started, or does not take the coordinator.
    """
    disconnect()
    if target is None or isinstance(target, str):
        address = {} if target is None else {"address": target}
        chosen = _cluster_settings(settings, {**cluster, **address})
        client = _session.stack.enter_context(connected(chosen))
    elif isinstance(target, Client):
        client = install(target)
    else:
        client = install(_session.stack.enter_context(Client(target, set_as_default=False)))
    _session.client = client
    return client


def disconnect() -> None:
    """Close what :func:`connect` opened; jobs on a scheduler that was running before go on."""
    _session.client = None
    _session.stack.close()


atexit.register(disconnect)


def _cluster_settings(settings: SettingsLike | None, changes: Mapping[str, Any]) -> ClusterSettings:
    of_file = load_cluster(settings).model_dump(exclude_unset=True)
    return load_cluster(layered({"cluster": of_file}, {"cluster": changes}))


def train(
    settings: SettingsLike,
    folder: str,
    overrides: Sequence[str] = (),
    *,
    storage_options: Mapping[str, Mapping[str, object]] | None = None,
) -> "Job":
    """Train folds; returns at once. A job that is running is found again, an interrupted one goes on.

    Where the workers are Slurm jobs of this process, it first waits until there is one for each rank.

    Args:
        settings: TOML file, or mapping.
        folder: URL of the job folder, which every worker reaches.
        overrides: such as ``["training.epochs=20"]``.
        storage_options: protocol -> options of its stores, over those of the settings; never recorded.

    Raises:
        H2mvError: anything that can be found wrong before work starts.
    """
    client, url = _client(), shared_place(folder)
    chosen, options = _settings(settings, overrides, storage_options)
    name = job_id("train", url)
    if running(client, name) is not None:
        _log.warning("%s is running already, with the settings it was started with", name)
    else:
        from h2mv_dist.jobs.training import plan_training, start_training

        start_training(client, plan_training(chosen, url, options))
    return Job(name, url, options)


def infer(
    settings: SettingsLike,
    job: "Job | str",
    cube: str,
    overrides: Sequence[str] = (),
    *,
    append: bool = False,
    storage_options: Mapping[str, Mapping[str, object]] | None = None,
) -> "Job":
    """Run the trained folds of a job over the grid into a cube; returns at once.

    Args:
        settings: TOML file, or mapping.
        job: training job, or URL of its folder.
        cube: URL of the Zarr store; what is complete there is not computed again.
        overrides: such as ``["inference.members=spread"]``.
        append: extend a finished cube by the days its forcing has grown.
        storage_options: as for :func:`train`.

    Raises:
        NothingNewError: there is no day to append yet.
        H2mvError: anything that can be found wrong before work starts.
    """
    client, url = _client(), shared_place(cube)
    folder = job.place if isinstance(job, Job) else shared_place(job)
    chosen, options = _settings(settings, overrides, storage_options)
    name = job_id("infer", url)
    if running(client, name) is not None:
        _log.warning("%s is running already, with the settings it was started with", name)
    else:
        from h2mv_dist.jobs.cube_plan import plan_inference
        from h2mv_dist.jobs.inference import start_inference

        plan = plan_inference(chosen, folder, options, cube=url, append=append)
        start_inference(client, plan, folder, url, options)
    return Job(name, url, options)


def job(name_or_place: str, *, storage_options: Mapping[str, Mapping[str, object]] | None = None) -> "Job":
    """Find a job again, from any machine.

    Args:
        name_or_place: id of a job that the connected scheduler knows, or URL of its folder or store; for
            the latter no cluster is needed.
        storage_options: protocol -> options of its stores.

    Raises:
        JobError: there is none.
    """
    options = _options(storage_options)
    if not is_id(name_or_place):
        found = find_job(shared_place(name_or_place), options)
        return Job(found.id, found.place, options)
    known = {status["id"]: status["place"] for status in known_jobs(_client())}
    if name_or_place in known:
        return Job(name_or_place, known[name_or_place], options)
    raise JobError(
        describe(
            "the scheduler does not know the job",
            where=scheduler_address(_client()),
            expected=f"the id of one of its jobs: {', '.join(known) or 'it has none yet'}",
            actual=name_or_place,
            fix="give the URL of its folder or cube, which tells all that was recorded",
        )
    )


def jobs(
    folder: str | None = None, *, storage_options: Mapping[str, Mapping[str, object]] | None = None
) -> "Jobs":
    """The jobs that the connected scheduler knows, and those with records below a folder.

    Raises:
        JobError: neither a connection nor a folder is there.
    """
    options = _options(storage_options)
    found: dict[str, Job] = {}
    if folder is not None:
        found |= {
            one.place: Job(one.id, one.place, options) for one in recorded_jobs(shared_place(folder), options)
        }
    if folder is None or _connected():
        found |= {s["place"]: Job(s["id"], s["place"], options) for s in known_jobs(_client())}
    return Jobs(found.values())


def _connected() -> bool:
    return _session.client is not None and _session.client.status == "running"


def _client() -> Client:
    client = _session.client
    if client is None or client.status != "running":
        raise JobError(
            describe(
                "there is no cluster",
                where="this process",
                expected="a connection to a Dask scheduler",
                actual="none" if client is None else f"one that is {client.status}",
                fix="h2mv_dist.connect(address), or h2mv_dist.connect(workers=2) to start workers here",
            )
        )
    return client


def _settings(
    settings: SettingsLike, overrides: Sequence[str], given: Mapping[str, Mapping[str, object]] | None
) -> tuple[Settings, StorageOptions]:
    chosen, secrets = load(settings, overrides)
    return chosen, known_options(secrets, StorageOptions(given))


def _options(given: Mapping[str, Mapping[str, object]] | None) -> StorageOptions:
    return known_options(StorageOptions(given))


class Jobs(tuple["Job", ...]):
    """Some jobs; shown as a list."""

    def statuses(self) -> list[dict[str, Any]]:
        """Status of each; of one that cannot be read, a failed one that says so."""
        found = []
        for one in self:
            try:
                found.append(one.status())
            except H2mvError as error:
                found.append(unreadable(one.id, one.place, str(error)))
        return found

    def __repr__(self) -> str:
        return "\n".join(map(_told, self.statuses())) or "no jobs"

    def _repr_html_(self) -> str:
        return jobs_html(self.statuses(), _link())


class Logs(tuple[RankLog, ...]):
    """What ranks printed; shown as text."""

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "nothing was printed"

    __repr__ = __str__


class JobResult(NamedTuple):
    """What a job has made.

    Attributes:
        place: URL of the folder or store.
        checkpoints: name of a fold -> URL of its best checkpoint; empty for a cube.
        summary: a line a fold; None for a cube.
        cube: opened lazily; None for training.
    """

    place: str
    checkpoints: Mapping[str, str]
    summary: pd.DataFrame | None
    cube: xr.Dataset | None


class Job:
    """A job by what the connected scheduler says of it, or its records if that does not know it.

    Attributes:
        id: of the job.
        place: URL of the folder or store it fills.
    """

    def __init__(self, name: str, place: str, options: StorageOptions) -> None:
        self.id, self.place, self._stores = name, place, options

    def status(self) -> dict[str, Any]:
        """State of every unit; see :meth:`h2mv_dist.jobs.messages.Job.status`.

        Raises:
            StoreError: the records cannot be read.
        """
        return self._live() or self._recorded().status()

    @property
    def state(self) -> str:
        """running, done, failed, cancelled or unfinished."""
        return progress_of(self.status()).state

    def wait(self, *, progress: bool = True) -> "Job":
        """Wait until nothing more will happen, and show how far it is meanwhile.

        Raises:
            JobError: a unit failed, with its own error first; or the job was cancelled, or runs nowhere.
        """
        with _watching(self) if progress else nullcontext(_ignore) as watch:
            while not (status := self._going_on())["finished"]:
                watch(status)
                time.sleep(POLL_SECONDS)
            watch(status)
        raise_failures(status)
        return self

    def cancel(self) -> bool:
        """Stop the job, so that its workers are free; False if there was nothing to stop any more.

        Raises:
            JobError: the connected scheduler does not know the job.
        """
        handle = JobHandle(self.id, _client())
        # an unknown job is an error, not one that had nothing to stop
        handle.status()
        stopped = handle.cancel()
        while stopped and not handle.status()["finished"]:
            time.sleep(POLL_SECONDS)
        return stopped

    def metrics(self) -> pd.DataFrame:
        """Training: a line for each epoch of each fold. A cube: one for each receipt of a tile.

        Raises:
            StoreError: the records cannot be read.
        """
        if self._is_training:
            return metrics_table(JobFolder(self.place, self._stores))
        if kind_of(self.id) == "prepare":
            raise ConfigError("metrics: a prepared store has none; look at status()")
        rollbacks = read_cube(self.place, self._stores).progress.rollbacks
        ledger = Ledger(self.place, self._stores, rollbacks)
        covered = [one for tile in ledger.covered().values() for one in tile]
        rows = zip(covered, ledger.receipts(covered), strict=True)
        return pd.DataFrame(
            {
                "tile": one.tile,
                "start": one.period.start,
                "stop": one.period.stop,
                "seconds": receipt.seconds,
                "missing": receipt.missing,
                "residual": receipt.residual,
            }
            for one, receipt in rows
        )

    def plot(self) -> "Figure":
        """Losses of all folds so far, as a matplotlib figure.

        Raises:
            ConfigError: this is no training job.
        """
        from h2mv_dist.analysis.figures import loss_curves

        self._require_training("plot")
        if _is_notebook():
            _show_figures()
        return loss_curves(fold_curves(JobFolder(self.place, self._stores)))

    def logs(self, unit: str | None = None, *, attempt: int | None = None, rank: int | None = None) -> Logs:
        """What the ranks of a training job printed; of ranks that run, so far.

        Args:
            unit: name of a fold, such as ``fold-00``; all if None.
            attempt: number of an attempt; the last one of each fold if None.
            rank: number of a rank; all if None.

        Raises:
            ConfigError: this is no training job, or it has no such fold; what tiles say is in the status.
        """
        self._require_training("logs")
        folds = list(recorded_folds(self._recorded()))
        if unit is not None and unit not in (names := tuple(fold.name for fold in folds)):
            raise ConfigError(f"{self.id} has no {unit!r}; {nearest(unit, names)}")
        chosen = [fold for fold in folds if unit in (None, fold.name)]
        found = [log for fold in chosen for log in recorded_logs(fold.name, fold.record, attempt)]
        if (live := self._live()) is not None:
            found = list(with_what_runs(_client(), live, found))
        return Logs(log for log in found if rank in (None, log.rank))

    def result(self) -> JobResult:
        """What a job that has ended has made: checkpoints and summary, or the cube.

        Raises:
            StoreError: it is not there yet, or cannot be read.
        """
        if not self._is_training:
            return JobResult(self.place, {}, None, select(self.place, self._stores))
        trained = [fold for fold in recorded_folds(self._recorded()) if fold.record.has_checkpoint("best")]
        urls = {fold.name: fold.record.checkpoint_path(fold.record.state().best) for fold in trained}
        table = get_object(join(self.place, SUMMARY), self._stores)
        summary = pd.read_csv(BytesIO(table)) if table.strip() else pd.DataFrame()
        return JobResult(self.place, urls, summary, None)

    @property
    def _is_training(self) -> bool:
        return kind_of(self.id) == "train"

    def _require_training(self, what: str) -> None:
        if not self._is_training:
            raise ConfigError(
                f"{what}: {self.id} is no training job; look at metrics(), status() and result()"
            )

    def _live(self) -> dict[str, Any] | None:
        """What the connected scheduler knows of the job; one that was lost knows nothing."""
        if not _connected():
            return None
        with suppress(JobError):
            return status_of(_client(), self.id)
        return None

    def _recorded(self) -> RecordedJob:
        return find_job(self.place, self._stores)

    def _going_on(self) -> dict[str, Any]:
        """Status of a job that has ended, or that somebody here can tell when it ends.

        Raises:
            JobError: nobody can.
        """
        if (live := self._live()) is not None:
            return live
        recorded = self._recorded()
        if (status := recorded.status())["finished"]:
            return status
        run = recorded.run
        raise JobError(
            describe(
                "nobody here can tell when the job ends",
                where=displayed(self.place),
                expected="a connection to the scheduler that runs it",
                actual=f"{progress_of(status).state}, by its records",
                fix="submit it again to go on"
                + (f", or h2mv_dist.connect({run.scheduler!r}) if that still runs" if run else ""),
            )
        )

    def __repr__(self) -> str:
        return _told(self.status())

    def _repr_html_(self) -> str:
        return jobs_html([self.status()], _link())


def _told(status: Mapping[str, Any]) -> str:
    """A job in one line."""
    progress = progress_of(status)
    told = f"<{status['id']} {progress.state}: {progress.done} of {progress.total} {progress.counted}"
    if speed(progress):
        told += f", {speed(progress)}, {duration(progress.seconds_left)} left"
    return f"{told}, {displayed(status['place'])}>"


def _link() -> str | None:
    """The page of all jobs, if this process is connected."""
    if not _connected():
        return None
    # a scheduler may be gone, or have no dashboard
    with suppress(OSError, KeyError):
        return page_of(_client().dashboard_link)
    return None


def _watching(job: Job) -> AbstractContextManager[Watcher]:
    """Live HTML in a notebook, rich text in a terminal, lines anywhere else."""
    return _in_notebook(job) if _is_notebook() else watching(Console())


def _is_notebook() -> bool:
    """Whether a kernel shows what this process displays."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and getattr(shell, "kernel", None) is not None


def _show_figures() -> None:
    """Let the kernel show figures that pyplot does not know of."""
    from IPython import get_ipython
    from IPython.core.pylabtools import select_figure_formats

    select_figure_formats(get_ipython(), {"png"})


@contextmanager
def _in_notebook(job: Job) -> Iterator[Watcher]:
    from IPython.display import HTML, display

    shown = display(HTML(job._repr_html_()), display_id=True)
    before: list[str] = []

    def watch(status: Mapping[str, Any]) -> None:
        html = jobs_html([status], _link())
        if before[-1:] != [html]:
            before[:] = [html]
            shown.update(HTML(html))

    yield watch


def _ignore(_status: Mapping[str, Any]) -> None:
    """A watcher that shows nothing."""
