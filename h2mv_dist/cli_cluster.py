"""``h2mv-dist cluster``: workers that stay, and those of a scheduler that runs."""

import signal
import threading
from contextlib import ExitStack
from typing import Annotated

import typer
from rich.table import Table

from h2mv_dist.cli_common import (
    Address,
    AsJson,
    ClusterFile,
    Overrides,
    console,
    named_scheduler,
    print_json,
    with_address,
)

STOPPED_SECONDS = 0.5

cluster_app = typer.Typer(help="Workers: on this machine, its GPUs or through Slurm.", no_args_is_help=True)


@cluster_app.command("start")
def start(
    settings: Annotated[
        str | None, typer.Option(help="Settings file (TOML); its [cluster] says what to start.")
    ] = None,
    set_: Overrides = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes: cluster.workers.")] = None,
    cuda: Annotated[
        bool, typer.Option("--cuda", help="One worker for each GPU (needs h2mv-dist[cuda]).")
    ] = False,
    scheduler_file: Annotated[
        str | None, typer.Option(help="File to leave the address in, for cluster.scheduler_file.")
    ] = None,
) -> None:
    """Keep workers running and print the address for --address; stop with Ctrl-C or SIGTERM."""
    from h2mv_dist.jobs import cluster
    from h2mv_dist.jobs.configuration import load_cluster

    overrides = [*(set_ or [])]
    overrides += [] if workers is None else [f"cluster.workers={workers}"]
    overrides += ["cluster.kind=cuda"] if cuda else []
    chosen = load_cluster(settings, overrides)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with ExitStack() as stack:
        running = stack.enter_context(cluster.start_cluster(chosen))
        if scheduler_file is not None:
            stack.enter_context(cluster.scheduler_file(scheduler_file, running))
        console.print(f"scheduler: {running.scheduler_address}", soft_wrap=True)
        console.print(f"dashboard: {running.dashboard_link}", soft_wrap=True)
        # it may also be stopped by others, with h2mv-dist cluster stop
        while not stop.wait(STOPPED_SECONDS) and running.scheduler.status.name == "running":
            pass
        console.print("stopping")


@cluster_app.command("info")
def info(address: Address = None, settings: ClusterFile = None, as_json: AsJson = False) -> None:
    """Show the workers of a running scheduler."""
    from dask.utils import format_bytes

    from h2mv_dist.jobs.cluster import connect, scheduler_address, workers_of

    with connect(named_scheduler(settings, with_address(None, address))) as client:
        where, dashboard, workers = scheduler_address(client), client.dashboard_link, workers_of(client)
    shown = ("host", "nthreads", "memory_limit", "status")
    rows = [{"address": at, **{key: worker[key] for key in shown}} for at, worker in workers.items()]
    if as_json:
        print_json({"scheduler": where, "dashboard": dashboard, "workers": rows})
        return
    console.print(f"scheduler: {where}\ndashboard: {dashboard}", soft_wrap=True)
    table = Table("worker", "host", "threads", "memory", "state")
    for row in rows:
        memory = format_bytes(row["memory_limit"]) if row["memory_limit"] else "no limit"
        table.add_row(row["address"], row["host"], str(row["nthreads"]), memory, row["status"])
    console.print(table)


@cluster_app.command("stop")
def stop(address: Address = None, settings: ClusterFile = None, as_json: AsJson = False) -> None:
    """Stop a running scheduler and its workers; jobs stop with them, and go on when submitted again."""
    from h2mv_dist.jobs.cluster import connect, scheduler_address

    with connect(named_scheduler(settings, with_address(None, address))) as client:
        where = scheduler_address(client)
        client.shutdown()
    if as_json:
        print_json({"stopped": where})
    else:
        console.print(f"stopped {where}", soft_wrap=True)
