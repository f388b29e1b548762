"""The command line: parse, load settings, call one job.

Exit codes: 0 done, 1 a comparison failed (``verify``, ``verify-cube``), 2 wrong input or a failed job,
75 nothing to append or compact yet (EX_TEMPFAIL: a timer may try again), 130 Ctrl-C, 143 SIGTERM.
"""

import json
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from h2mv_dist.cli_cluster import cluster_app
from h2mv_dist.cli_common import (
    INTERRUPTED,
    Address,
    AsJson,
    ClusterFile,
    Overrides,
    console,
    errors,
    place,
    print_json,
    with_address,
)
from h2mv_dist.cli_jobs import jobs_app
from h2mv_dist.config import (
    ClusterSettings,
    DataSettings,
    Settings,
    StorageOptions,
    as_toml,
    load_options,
    revise,
    validate,
)
from h2mv_dist.errors import ConfigError, H2mvError, NothingNewError

if TYPE_CHECKING:
    from distributed import Client
    from rich.console import Console

    from h2mv_dist.io.cube_check import CubeCheck
    from h2mv_dist.jobs.handle import JobHandle

FAILED = 1
WRONG_INPUT = 2
TRY_LATER = 75
TERMINATED = 143
_THE_SAME = "the same command"

app = typer.Typer(
    name="h2mv-dist",
    help="Train hybrid land models in folds on a Dask cluster, and run them over the globe.\n\n"
    "First steps: h2mv-dist demo my-demo. Then: world or your own data -> train -> infer.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(cluster_app, name="cluster")
app.add_typer(jobs_app, name="jobs")


SETTINGS_HELP = "Settings file (TOML); at least data.url. `h2mv-dist settings` prints all settings."
SettingsFile = Annotated[str, typer.Argument(help=SETTINGS_HELP)]
Job = Annotated[
    str, typer.Option(help="Job folder: where checkpoints, metrics and logs are kept (URL).", callback=place)
]


@app.command()
def world(
    path: Annotated[
        str, typer.Argument(help="Where to write the Zarr store (URL); must not exist.", callback=place)
    ],
    resolution: Annotated[float, typer.Option(help="Edge of a grid cell, degrees; divides 180.")] = 4.0,
    years: Annotated[int, typer.Option(min=1, help="Whole years of weather, from 2001 on.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weather, noise and gaps.")] = 0,
    settings: ClusterFile = None,
) -> None:
    """Make up a plausible world on the real land mask, to try everything without any download."""
    from h2mv_dist.jobs.cluster import known_options
    from h2mv_dist.jobs.worlds import make_world

    options = known_options(load_options(settings))
    made = make_world(path, resolution=resolution, years=years, seed=seed, options=options)
    console.print(f"wrote {made.url}: {made.n_land} land cells, {made.period}", soft_wrap=True)
    console.print(f"its hidden true model: {made.truth_url}", soft_wrap=True)


@app.command()
def train(
    settings: Annotated[str | None, typer.Argument(help=SETTINGS_HELP)] = None,
    job: Annotated[
        str | None, typer.Option(help="Folder (URL) for checkpoints, metrics and logs.", callback=place)
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="JOB", help="Go on with the job in this folder, with its settings.", callback=place
        ),
    ] = None,
    file: ClusterFile = None,
    set_: Overrides = None,
    address: Address = None,
    sweep: Annotated[
        list[str] | None, typer.Option(help="Train with each value: --sweep lr=0.005,0.01. Can be repeated.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Train with this many seeds each.")] = None,
) -> None:
    """Train the folds of a model: SETTINGS and --job, or --resume and, for storage options, --settings.

    The same command again goes on, or watches the job if it is running. SIGTERM ends it like Ctrl-C.
    """
    folder = resume or job
    if folder is None or (settings is None) == (resume is None) or (settings and file):
        raise typer.BadParameter("give a settings file and --job, or --resume, alone or with --settings")
    extra = [*(set_ or []), *_sweep_overrides(sweep, seeds)]
    chosen, options = _settings(settings or file, extra, address, resume)
    # what is wrong with settings is said before torch is imported
    from h2mv_dist.jobs.cluster import for_work
    from h2mv_dist.jobs.messages import job_id
    from h2mv_dist.jobs.training import plan_training, start_training

    plan, training = plan_training(chosen, folder, options), chosen.training
    name, gangs = job_id("train", folder), sum(len(run.attempts) for run in plan.runs)
    _run(
        for_work(
            chosen.cluster,
            threads=training.threads or 1,
            least=training.ranks,
            most=training.ranks * gangs,
        ),
        lambda client: _found_running(client, name) or start_training(client, plan),
        resuming=_resuming(folder, settings or file, with_address(set_, address)),
    )
    console.print(f"trained; checkpoints, metrics, logs and summary.csv: {folder}", soft_wrap=True)


@app.command()
def infer(
    settings: SettingsFile,
    job: Job,
    cube: Annotated[
        str, typer.Option(help="Zarr store to fill (URL); resumed if it is there.", callback=place)
    ],
    set_: Overrides = None,
    address: Address = None,
    append: Annotated[
        bool, typer.Option("--append", help="Extend a finished cube by the days its forcing has grown.")
    ] = False,
    from_: Annotated[
        datetime | None,
        typer.Option(
            "--from",
            formats=["%Y-%m-%d"],
            help="Compute a finished cube anew from the last kept state at or before this day on; "
            "it becomes as long as before, or as --append makes it.",
        ),
    ] = None,
    plan_only: Annotated[
        bool,
        typer.Option(
            "--plan", help="Print what it would take, and how long; refuse what cannot fit; write nothing."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run trained folds over the whole grid into an output cube; run again to finish what is missing.

    The same command again watches the job if it is running. Exit code 75 if there is nothing to append yet,
    so that a timer can try again.
    """
    chosen, options = _settings(settings, set_, address)
    # what is wrong with settings is said before torch is imported
    from h2mv_dist.jobs.cube_plan import plan_inference
    from h2mv_dist.jobs.forecast import forecast, require_room

    since = None if from_ is None else from_.date()
    if plan_only:
        plan = plan_inference(chosen, job, options, cube=cube, append=append, since=since)
        found = forecast(plan, cube, options)
        if as_json:
            print_json(asdict(found))
        else:
            console.print("\n".join(found.lines()), soft_wrap=True, highlight=False)
        require_room(plan, cube, options)
        return
    _fill(chosen, job, cube, options, append=append, since=since)


@app.command()
def prepare(
    settings: SettingsFile,
    to: Annotated[
        str, typer.Option(help="Zarr store to fill (URL); resumed if it is there.", callback=place)
    ],
    set_: Overrides = None,
    address: Address = None,
) -> None:
    """Make forcing daily, in our units and chunked for tiles, once; run again to finish what is missing."""
    from h2mv_dist.jobs.messages import job_id
    from h2mv_dist.jobs.prepare import plan_prepare, start_prepare

    chosen, options = _settings(settings, set_, address)
    plan = plan_prepare(chosen, options)
    console.print(plan.summary(), soft_wrap=True)
    name = job_id("prepare", to)
    _run(
        chosen.cluster,
        lambda client: _found_running(client, name) or start_prepare(client, plan, to, options),
    )
    section = _as_data_section(plan.layout.data(to))
    console.print(f"prepared; use it with these settings:\n{section}", markup=False, soft_wrap=True)


@app.command()
def compact(
    cube: Annotated[str, typer.Argument(help="Cube with short shards of days (URL).", callback=place)],
    target: Annotated[
        str,
        typer.Argument(help="Zarr store for the copy (URL); resumed or extended if there.", callback=place),
    ],
    shard_days: Annotated[
        int | None,
        typer.Option(min=1, help="Days of a shard, a multiple of the cube's; 360 if the copy is new."),
    ] = None,
    chunk_days: Annotated[
        int | None, typer.Option(min=1, help="Days of a chunk; at most 120 if the copy is new.")
    ] = None,
    chunk: Annotated[
        str | None, typer.Option(help="Cells of a chunk along each spatial axis: 10,10. The cube's if new.")
    ] = None,
    settings: ClusterFile = None,
    set_: Overrides = None,
    address: Address = None,
) -> None:
    """Copy a cube into one with longer shards, for time series; run again to extend it, or to finish it.

    Only whole shards of the copy are copied; days beyond stay in the first cube. Exit code 75 if there is
    nothing new to copy yet.
    """
    from h2mv_dist.jobs.cluster import known_options
    from h2mv_dist.jobs.compact import plan_compact, start_compact
    from h2mv_dist.jobs.configuration import load_cluster
    from h2mv_dist.jobs.messages import job_id

    changes = with_address(set_, address)
    options, cluster = known_options(load_options(settings, changes)), load_cluster(settings, changes)
    plan = plan_compact(
        cube, target, options, shard_days=shard_days, chunk_days=chunk_days, chunk=_sizes(chunk)
    )
    console.print(plan.summary(), soft_wrap=True)
    name = job_id("compact", target)
    _run(cluster, lambda client: _found_running(client, name) or start_compact(client, plan, options))
    console.print(f"compacted; open it with {_opening(target)}", markup=False, soft_wrap=True)


@app.command()
def export(
    job: Annotated[str, typer.Argument(help="Training job's folder (URL).")],
    metrics: Annotated[
        Path | None, typer.Option(help="CSV file to write: a line for each epoch of each fold.")
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Folder for TensorBoard's event files (needs h2mv-dist[monitor]).")
    ] = None,
    settings: ClusterFile = None,
) -> None:
    """Hand a training job's numbers to other tools."""
    from h2mv_dist.jobs.cluster import known_options
    from h2mv_dist.jobs.export import metrics_table, to_tensorboard
    from h2mv_dist.jobs.records import JobFolder

    folder = JobFolder(job, known_options(load_options(settings)))
    if metrics is None and tensorboard is None:
        raise typer.BadParameter("say what to write: --metrics FILE.csv, --tensorboard FOLDER, or both")
    if metrics is not None:
        table = metrics_table(folder)
        table.to_csv(metrics, index=False)
        console.print(f"wrote {len(table)} epochs to {metrics}", soft_wrap=True)
    if tensorboard is not None:
        count = to_tensorboard(folder, tensorboard)
        console.print(f"wrote {count} folds; look with: tensorboard --logdir {tensorboard}", soft_wrap=True)


@app.command()
def extract(
    cube: Annotated[str, typer.Argument(help="Cube to read (URL).", callback=place)],
    file: Annotated[Path, typer.Argument(help="NetCDF file to write; must not exist.")],
    variable: Annotated[
        list[str] | None, typer.Option("--variable", "-v", help="Variable; all if left out. Can be repeated.")
    ] = None,
    period: Annotated[str | None, typer.Option(help="Days, START..END without END; all if left out.")] = None,
    box: Annotated[
        tuple[float, float, float, float] | None,
        typer.Option(help="South, north, west, east, degrees; everywhere if left out."),
    ] = None,
    settings: ClusterFile = None,
) -> None:
    """Write part of a cube as one NetCDF file."""
    from h2mv_dist.grid import Period
    from h2mv_dist.io.netcdf import select, write_netcdf
    from h2mv_dist.io.stores import explained
    from h2mv_dist.jobs.cluster import known_options

    days = None if period is None else Period.parse(period)
    options = known_options(load_options(settings))
    part = select(cube, options, variables=tuple(variable or ()), period=days, box=box)
    with explained(cube, options):
        write_netcdf(part, file)
    console.print(f"wrote {file}: {dict(part.sizes)}", soft_wrap=True, markup=False)


@app.command("settings")
def print_settings(
    dask: Annotated[
        bool,
        typer.Option("--dask", help="As the section of Dask's configuration, for a site's defaults."),
    ] = False,
) -> None:
    """Print every setting with its default, to start a file: h2mv-dist settings > settings.toml."""
    from h2mv_dist.template import dask_template, settings_template

    typer.echo(dask_template() if dask else settings_template(), nl=False)


@app.command()
def verify(
    file: Annotated[str, typer.Argument(help="Golden file (.npz).")],
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Run compiled code, which takes two minutes to make.")
    ] = False,
) -> None:
    """Compare the model with a golden file; exit status 1 if any array is beyond its tolerance."""
    from h2mv_dist.model.verify import verify as verify_file

    verification = verify_file(file, compiled=compiled)
    table = Table("group", "worst array", "largest error", "of tolerance")
    for d in verification.worst():
        table.add_row(d.group, d.name, f"{d.error:.3g}", f"{d.excess:.1%}")
    console.print(table)
    failed = [f"{d.group}/{d.name}" for d in verification.deviations if not d.excess <= 1.0]
    if failed:
        console.print(f"beyond tolerance: {', '.join(failed)}", soft_wrap=True)
        raise typer.Exit(FAILED)
    console.print(f"{len(verification.deviations)} arrays agree")


@app.command("verify-cube")
def check_cube(
    cube: Annotated[str, typer.Argument(help="Cube to read again (URL).", callback=place)],
    sample: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the receipts to check, chosen at random.")
    ] = 1.0,
    repair: Annotated[
        bool, typer.Option("--repair", help="Compute again what is missing or damaged.")
    ] = False,
    file: ClusterFile = None,
    set_: Overrides = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Compare a cube with its receipts and its water budget; exit status 1 if anything is wrong.

    The budget closes if no day's gap is above 1e-3 mm, four float32 steps of the storage, and what the
    rounding of stored values explains.
    """
    from h2mv_dist.io.cube import COMPACTED
    from h2mv_dist.io.cube_check import verify_cube
    from h2mv_dist.io.cube_store import read_cube
    from h2mv_dist.jobs.cluster import known_options
    from h2mv_dist.jobs.configuration import load_cluster
    from h2mv_dist.jobs.inference import forget_damage, recorded_job
    from h2mv_dist.model.registry import model_kind

    changes = with_address(set_, address)
    options = known_options(load_options(file, changes))
    recorded, job = recorded_job(cube, options)
    settings = revise(validate(recorded, where=f"the settings in {cube}"), changes)
    # a cube says nothing of clusters
    settings = settings.model_copy(update={"cluster": load_cluster(file, changes)})
    spec = model_kind(settings.model.name).spec
    found = verify_cube(cube, options, budget=spec.budget, share=sample)
    if repair and not found.complete:
        out = errors if as_json else console
        _print_check(found, out)
        if COMPACTED in read_cube(cube, options).layout.attributes:
            # inference refuses a copy, and says what compact does with what counts as not done
            forget_damage(cube, found, options)
        _fill(settings, job, cube, options, damage=found, out=out)
        found = verify_cube(cube, options, budget=spec.budget, share=sample)
    if as_json:
        _print_check_as_json(found)
    else:
        _print_check(found)
    raise typer.Exit(0 if found.complete else FAILED)


@app.command()
def demo(
    path: Annotated[str, typer.Argument(help="Folder for everything the demo makes.")] = "demo-output",
) -> None:
    """Make a world, train two folds with two ranks each, run them over the globe, and show maps."""
    from h2mv_dist.demo import run_demo

    run_demo(path, console)


def _settings(
    path: str | None, overrides: list[str] | None, address: str | None, resume: str | None = None
) -> tuple[Settings, StorageOptions]:
    """Settings of a file, or those a job was created with, under those of the command line.

    Where a job is resumed, only the cluster and the storage options of the file count.
    """
    from h2mv_dist.jobs.cluster import known_options
    from h2mv_dist.jobs.configuration import leave_template, load
    from h2mv_dist.jobs.records import JobFolder

    leave_template()
    changes = with_address(overrides, address)
    if resume is None:
        return load(path, changes)
    options = known_options(load_options(path, changes))
    return revise(JobFolder(resume, options).settings(), changes, path), options


def _resuming(folder: str, file: str | None, changes: list[str]) -> str:
    """The command that goes on with a training job: its records hold all but storage options."""
    if load_options(None, changes):
        # they may be secrets, which are not printed
        return _THE_SAME
    words = ["h2mv-dist", "train", "--resume", folder]
    if file is not None and load_options(file):
        # its cluster comes before the recorded one, so that what came before its cluster has to be said again
        words += ["--settings", str(Path(file).absolute()), *(f"--set={change}" for change in changes)]
    return shlex.join(words)


def _fill(
    settings: Settings,
    job: str,
    cube: str,
    options: StorageOptions,
    *,
    append: bool = False,
    since: date | None = None,
    damage: "CubeCheck | None" = None,
    out: "Console" = console,
) -> None:
    """Compute what a cube lacks, what is damaged, and what it holds ``since`` some day, and wait for it."""
    from h2mv_dist.jobs.cluster import for_work
    from h2mv_dist.jobs.cube_plan import CubePlan, plan_inference
    from h2mv_dist.jobs.handle import require_idle
    from h2mv_dist.jobs.inference import forget_damage, start_inference
    from h2mv_dist.jobs.messages import job_id

    def planned() -> CubePlan:
        return plan_inference(settings, job, options, cube=cube, append=append, since=since)

    # before anything is started, or rolled back for a cube that cannot be continued
    plan, name = planned(), job_id("infer", cube)
    out.print(plan.summary(), soft_wrap=True)

    def start(client: "Client") -> "JobHandle | None":
        if damage is not None:
            # a job that runs would miss, at its end, the receipts that are taken away
            require_idle(client, name)
            forget_damage(cube, damage, options)
            return start_inference(client, planned(), job, cube, options)
        found = _found_running(client, name) if since is None else None
        handle = found or start_inference(client, plan, job, cube, options)
        if plan.before is not None and plan.progress is not None:
            out.print(f"computing anew from {plan.progress.period.stop} on")
        return handle

    again = _THE_SAME if since is None else f"{_THE_SAME}, without --from"
    if _run(for_work(settings.cluster, threads=settings.inference.threads), start, again, out):
        out.print(f"finished; open it with {_opening(cube)}", markup=False, soft_wrap=True)
    else:
        out.print(f"nothing to do: every tile of {cube} has its receipt", soft_wrap=True)


def _run(
    cluster: ClusterSettings,
    start: "Callable[[Client], JobHandle | None]",
    again: str = _THE_SAME,
    out: "Console" = console,
    *,
    resuming: str | None = None,
) -> bool:
    """Start a job, or find it running, and watch it until it has ended; False if there was nothing to do.

    Args:
        cluster: where it runs.
        start: given a client, starts the job; None if there is nothing to do.
        again: the command that goes on with it.
        out: where all this is shown.
        resuming: the command that goes on with it once it was started, if that is another one.
    """
    from h2mv_dist.display import watching

    with _client(cluster) as client:
        out.print(f"dashboard: {client.dashboard_link}", soft_wrap=True)
        with _telling_fate(cluster, again):
            handle = start(client)
        if handle is None:
            return False
        with _telling_fate(cluster, resuming or again), watching(out) as watch:
            handle.wait(watch)
    return True


def _found_running(client: "Client", job: str) -> "JobHandle | None":
    """A job that is running already, which is said then."""
    from h2mv_dist.jobs.handle import running

    handle = running(client, job)
    if handle is not None:
        console.print("the job is running already, with the settings it was started with: watching it")
    return handle


def _sizes(text: str | None) -> tuple[int, ...] | None:
    """Numbers with commas between them."""
    try:
        return None if text is None else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"--chunk {text}: expected whole numbers with commas between them, as 10,10"
        ) from None


def _print_check(found: "CubeCheck", out: "Console" = console) -> None:
    unseen = f", {found.unseen} are of days that readers do not see yet" if found.unseen else ""
    counted = f"{len(found.sound)} receipts agree with what is stored, {len(found.missing)} are missing"
    out.print(counted + unseen, soft_wrap=True)
    for one, problem in found.damaged.items():
        out.print(f"{one.tile} {one.period}: {problem}", markup=False, soft_wrap=True)
    for stretch in found.missing[:10]:
        out.print(f"missing: {stretch}", soft_wrap=True)
    if found.constants:
        out.print(found.constants, soft_wrap=True)
    if found.residual == found.residual:
        out.print(f"largest gap of the water budget, from stored values: {found.residual:.2e} mm")
    for one in found.unbalanced[:10]:
        out.print(f"{one.tile} {one.period}: the water budget does not close", soft_wrap=True)
    for one, count in list(found.not_finite.items())[:10]:
        out.print(f"{one.tile} {one.period}: {count} values on land are not finite", soft_wrap=True)


def _print_check_as_json(found: "CubeCheck") -> None:
    print_json(
        {
            "complete": found.complete,
            "sound": len(found.sound),
            "damaged": {f"{one.tile} {one.period}": problem for one, problem in found.damaged.items()},
            "missing": [str(stretch) for stretch in found.missing],
            "constants": found.constants,
            "unseen": found.unseen,
            "residual": None if found.residual != found.residual else found.residual,
            "unbalanced": [f"{one.tile} {one.period}" for one in found.unbalanced],
            "not_finite": {f"{one.tile} {one.period}": count for one, count in found.not_finite.items()},
        }
    )


def _opening(cube: str) -> str:
    """What a user types to look at a cube."""
    protocol, is_url, _ = cube.partition("://")
    if not is_url or protocol == "file":
        return f'xarray.open_zarr("{cube}")'
    options = f"the options of [storage_options.{protocol}], unless your environment has them"
    return f'xarray.open_zarr("{cube}", storage_options={{...}}), with {options}'


def _as_data_section(data: DataSettings) -> str:
    """Settings that open a prepared store."""
    names = ("url", "layout", "static")
    lines = (f"{name} = {as_toml(getattr(data, name))}" for name in names)
    return "\n".join(("[data]", *lines, 'mask = { name = "mask" }'))


def _sweep_overrides(sweep: list[str] | None, seeds: int | None) -> list[str]:
    from h2mv_dist.jobs.sweep import parse_sweep

    axes = ", ".join(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in parse_sweep(sweep or []).items())
    overrides = [f"sweep.values={{{axes}}}"] if axes else []
    return overrides if seeds is None else [*overrides, f"sweep.seeds={seeds}"]


class _Terminated(KeyboardInterrupt):
    """SIGTERM, after which everything ends as after Ctrl-C."""


def _terminate(*_: object) -> None:
    # what comes now takes its time, and must not be cut short by a second one
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Terminated


@contextmanager
def _client(cluster: ClusterSettings) -> Iterator["Client"]:
    """A client of the cluster, which both Ctrl-C and SIGTERM of a batch system close."""
    from h2mv_dist.jobs.cluster import connect

    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        with connect(cluster) as client:
            yield client
    except KeyboardInterrupt as stop:
        raise typer.Exit(TERMINATED if isinstance(stop, _Terminated) else INTERRUPTED) from None
    finally:
        if signal.getsignal(signal.SIGTERM) is _terminate:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _telling_fate(cluster: ClusterSettings, again: str) -> Iterator[None]:
    """When the command is interrupted, say what becomes of the job before the cluster takes time to close."""
    try:
        yield
    except KeyboardInterrupt:
        # after Ctrl-C, too
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        elsewhere = cluster.address or cluster.scheduler_file
        fate = "the job goes on; watch it" if elsewhere else "the job stops with its cluster; go on"
        console.print(f"{fate} with: {again}", markup=False, soft_wrap=True)
        raise


def main() -> None:
    """Entry point; an error of ours is a message, not a traceback."""
    try:
        app()
    except NothingNewError as error:
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(TRY_LATER)
    except H2mvError as error:
        errors.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(WRONG_INPUT)


if __name__ == "__main__":
    main()
