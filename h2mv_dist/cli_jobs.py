"""``h2mv-dist jobs``: by id on a scheduler, or by URL, for which the records alone will do."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from h2mv_dist.cli_common import (
    INTERRUPTED,
    Address,
    AsJson,
    ClusterFile,
    Overrides,
    console,
    errors,
    named_scheduler,
    place,
    print_json,
    scheduler_if_named,
    with_address,
)
from h2mv_dist.config import ClusterSettings, load_options
from h2mv_dist.errors import JobError

if TYPE_CHECKING:
    from h2mv_dist.notebook import Job

jobs_app = typer.Typer(help="Jobs that run, or ran: list, show, logs, cancel, watch.", no_args_is_help=True)

JobName = Annotated[
    str,
    typer.Argument(
        metavar="JOB", help="Job folder, or store that is filled (URL); or a job's id on a scheduler."
    ),
]


@jobs_app.command("list")
def list_jobs(
    folder: Annotated[
        str | None, typer.Argument(help="Folder (URL) below which to look for records.", callback=place)
    ] = None,
    address: Address = None,
    settings: ClusterFile = None,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """List the jobs a scheduler knows, and those with records below FOLDER."""
    import h2mv_dist.notebook as nb
    from h2mv_dist.jobs.progress import progress_of

    changes = with_address(set_, address)
    with _connected(settings, changes, needed=folder is None):
        found = nb.jobs(folder, storage_options=load_options(settings, changes)).statuses()
    if as_json:
        print_json([_as_record(status) for status in found])
        return
    table = Table("job", "state", "done", "place")
    for status in found:
        progress = progress_of(status)
        done = f"{progress.done} of {progress.total} {progress.counted}"
        table.add_row(status["id"], progress.state, done, status["place"])
    console.print(table if found else "no jobs")


@jobs_app.command("show")
def show(
    job: JobName,
    address: Address = None,
    settings: ClusterFile = None,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show how far a job is, and what its units said when they failed."""
    from h2mv_dist.display import table_of

    with _found(job, settings, with_address(set_, address)) as found:
        status = found.status()
    if as_json:
        print_json(_as_record(status))
        return
    console.print(table_of(status))
    if where := status.get("scheduler"):
        console.print(f"last known on {where}: --address {where} shows it live, if it is", soft_wrap=True)
    for unit in status["units"]:
        if unit["error"]:
            console.print(f"{unit['name']}: {unit['error']}", markup=False, highlight=False, soft_wrap=True)


@jobs_app.command("logs")
def logs(
    job: JobName,
    unit: Annotated[str | None, typer.Option(help="One fold: fold-00.")] = None,
    attempt: Annotated[int | None, typer.Option(min=1, help="An attempt; the last one if left out.")] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="One rank.")] = None,
    address: Address = None,
    settings: ClusterFile = None,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Print what the ranks of a training job printed, and how they ended."""
    with _found(job, settings, with_address(set_, address)) as found:
        printed = found.logs(unit, attempt=attempt, rank=rank)
    if as_json:
        print_json([log._asdict() for log in printed])
    else:
        typer.echo(str(printed))


@jobs_app.command("cancel")
def cancel(
    job: JobName,
    address: Address = None,
    settings: ClusterFile = None,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Stop a job on a running scheduler at once; what is complete stays, and the job can go on later."""
    from h2mv_dist.jobs.handle import cancel_jobs

    with _connected(settings, with_address(set_, address), needed=True) as client:
        cancelled = cancel_jobs(client, job)
    if as_json:
        print_json({"cancelled": cancelled})
        return
    for name in cancelled:
        console.print(f"cancelled {name}; the same command that started it goes on", soft_wrap=True)


@jobs_app.command("watch")
def watch(
    job: JobName,
    address: Address = None,
    settings: ClusterFile = None,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Watch a job until it ends; Ctrl-C stops watching, not the job. Exit code 2 if it did not end well."""
    with _found(job, settings, with_address(set_, address)) as found:
        try:
            found.wait(progress=not as_json)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except JobError:
            if as_json:
                print_json(_as_record(found.status()))
            raise
        record = _as_record(found.status())
    if as_json:
        print_json(record)
    else:
        console.print(f"{record['id']} is {record['state']}", soft_wrap=True)


@contextmanager
def _found(name: str, settings: str | None, changes: list[str]) -> Iterator["Job"]:
    """A job, while its scheduler is connected if one is named, as it must be for an id."""
    import h2mv_dist.notebook as nb
    from h2mv_dist.jobs.messages import is_id

    with _connected(settings, changes, needed=is_id(name)):
        yield nb.job(name, storage_options=load_options(settings, changes))


@contextmanager
def _connected(settings: str | None, changes: list[str], *, needed: bool) -> Iterator[Any]:
    """The client of the scheduler that options, file or configuration name; no cluster is ever started.

    None if there is no such scheduler, and none is needed.
    """
    import h2mv_dist.notebook as nb

    chosen = named_scheduler(settings, changes) if needed else scheduler_if_named(settings, changes)
    if chosen is None:
        yield None
        return
    try:
        yield _reached(chosen, needed=needed)
    finally:
        nb.disconnect()


def _reached(chosen: ClusterSettings, *, needed: bool) -> Any:
    import h2mv_dist.notebook as nb

    try:
        return nb.connect(settings={"cluster": chosen.model_dump(exclude_unset=True)})
    except JobError as error:
        if needed:
            raise
        said = f"{error}\nso this is what was recorded"
        errors.print(said, markup=False, highlight=False, soft_wrap=True)
        return None


def _as_record(status: dict[str, Any]) -> dict[str, Any]:
    """A status, and what follows from it."""
    from h2mv_dist.jobs.progress import progress_of

    return {**status, **progress_of(status)._asdict(), "units": status["units"]}
