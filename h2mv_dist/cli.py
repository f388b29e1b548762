"""The command line: parse, load settings, call one job.

Exit codes: 0 done, 1 a comparison failed (``verify``), 2 wrong input or a failed job.
"""

import sys
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from h2mv_dist.config import ClusterSettings, Settings, StorageOptions, load
from h2mv_dist.errors import H2mvError

FAILED = 1
WRONG_INPUT = 2

app = typer.Typer(
    name="h2mv-dist",
    help="Train hybrid land models in folds on a Dask cluster, and run them over the globe.\n\n"
    "First steps: h2mv-dist demo my-demo. Then: world or your own data -> train -> infer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
cluster_app = typer.Typer(help="Workers on this machine.", no_args_is_help=True)
app.add_typer(cluster_app, name="cluster")
console = Console()
errors = Console(stderr=True)

SettingsFile = Annotated[str, typer.Argument(help="Settings file (TOML); at least data.url.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="Override a setting: --set training.epochs=20. Can be repeated."),
]
Job = Annotated[str, typer.Option(help="Job folder: where checkpoints, metrics and logs are kept (URL).")]
Address = Annotated[
    str | None, typer.Option(help="Running Dask scheduler to use, instead of cluster.* in the settings.")
]


@app.command()
def world(
    path: Annotated[str, typer.Argument(help="Where to write the Zarr store (URL); must not exist.")],
    resolution: Annotated[float, typer.Option(help="Edge of a grid cell, degrees; divides 180.")] = 4.0,
    years: Annotated[int, typer.Option(min=1, help="Whole years of weather, from 2001 on.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weather, noise and gaps.")] = 0,
) -> None:
    """Make up a plausible world on the real land mask, to try everything without any download."""
    from h2mv_dist.jobs.cluster import known_options
    from h2mv_dist.jobs.worlds import make_world

    options = known_options(StorageOptions())
    made = make_world(path, resolution=resolution, years=years, seed=seed, options=options)
    console.print(f"wrote {made.url}: {made.n_land} land cells, {made.period}", soft_wrap=True)
    console.print(f"its hidden true model: {made.truth_url}", soft_wrap=True)


@app.command()
def train(settings: SettingsFile, job: Job, set_: Overrides = None, address: Address = None) -> None:
    """Train the folds of a model; run again with the same --job to resume."""
    from h2mv_dist.display import watching_folds
    from h2mv_dist.jobs.cluster import connect
    from h2mv_dist.jobs.training import plan_training, start_training

    chosen, options = _settings(settings, set_, address)
    plan = plan_training(chosen, job, options)
    with connect(chosen.cluster) as client:
        console.print(f"dashboard: {client.dashboard_link}", soft_wrap=True)
        handle = start_training(client, plan)
        with watching_folds(console) as watch:
            handle.wait(watch)
    console.print(f"trained; checkpoints, metrics and logs: {job}", soft_wrap=True)


@app.command()
def infer(
    settings: SettingsFile,
    job: Job,
    cube: Annotated[str, typer.Option(help="Zarr store to fill (URL); resumed if it is there.")],
    set_: Overrides = None,
    address: Address = None,
) -> None:
    """Run trained folds over the whole grid into an output cube; run again to finish what is missing."""
    from h2mv_dist.display import watching_tiles
    from h2mv_dist.jobs.cluster import connect
    from h2mv_dist.jobs.inference import plan_inference, start_inference

    chosen, options = _settings(settings, set_, address)
    plan = plan_inference(chosen, job, options)
    with connect(chosen.cluster) as client:
        console.print(f"dashboard: {client.dashboard_link}", soft_wrap=True)
        handle = start_inference(client, plan, job, cube, options)
        if handle is None:
            console.print(f"nothing to do: every tile of {cube} has its receipt", soft_wrap=True)
            return
        with watching_tiles(console) as watch:
            handle.wait(watch)
    console.print(f'finished; open it with xarray.open_zarr("{cube}")', soft_wrap=True)


@app.command()
def verify(file: Annotated[str, typer.Argument(help="Golden file (.npz).")]) -> None:
    """Compare the model with a golden file; exit status 1 if any array is beyond its tolerance."""
    from h2mv_dist.model.verify import verify as verify_file

    verification = verify_file(file)
    table = Table("group", "worst array", "largest error", "of tolerance")
    for d in verification.worst():
        table.add_row(d.group, d.name, f"{d.error:.3g}", f"{d.excess:.1%}")
    console.print(table)
    failed = [f"{d.group}/{d.name}" for d in verification.deviations if not d.excess <= 1.0]
    if failed:
        console.print(f"beyond tolerance: {', '.join(failed)}", soft_wrap=True)
        raise typer.Exit(FAILED)
    console.print(f"{len(verification.deviations)} arrays agree")


@app.command()
def demo(
    path: Annotated[str, typer.Argument(help="Folder for everything the demo makes.")] = "demo-output",
) -> None:
    """Make a world, train two folds with two ranks each, run them over the globe, and show maps."""
    from h2mv_dist.demo import run_demo

    run_demo(path, console)


@cluster_app.command("start")
def start(
    workers: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 2,
    cuda: Annotated[bool, typer.Option(help="One worker for each GPU (needs h2mv-dist[cuda]).")] = False,
) -> None:
    """Keep workers running and print the address for --address; stop with Ctrl-C."""
    from h2mv_dist.jobs.cluster import start_cluster

    settings = ClusterSettings(kind="cuda" if cuda else "local", workers=workers)
    with start_cluster(settings) as running:
        console.print(f"scheduler: {running.scheduler_address}", soft_wrap=True)
        console.print(f"dashboard: {running.dashboard_link}", soft_wrap=True)
        try:
            while True:
                time.sleep(1)
        except KeyboardInterrupt:
            console.print("stopping")


def _settings(path: str, overrides: list[str] | None, address: str | None) -> tuple[Settings, StorageOptions]:
    from h2mv_dist.jobs.cluster import known_options

    extra = [] if address is None else ["cluster.kind=address", f"cluster.address={address}"]
    settings, secrets = load(path, [*(overrides or []), *extra])
    return settings, known_options(secrets)


def main() -> None:
    """Entry point; an error of ours is a message, not a traceback."""
    try:
        app()
    except H2mvError as error:
        errors.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(WRONG_INPUT)


if __name__ == "__main__":
    main()
