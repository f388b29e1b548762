"""The whole road on one machine: a made-up world, two folds trained with DDP, a global cube, a page of maps.

Everything is kept in one folder; running the demo again resumes whatever is not finished.
"""

import time
from pathlib import Path
from typing import Any, Final

import torch
import xarray as xr
from distributed import Client
from rich.console import Console

from h2mv_dist.analysis.figures import FoldCurve
from h2mv_dist.analysis.report import write_report
from h2mv_dist.config import Settings, StorageOptions, load
from h2mv_dist.display import watching
from h2mv_dist.io.cache import StagedCells, stage
from h2mv_dist.io.folds import chosen_folds
from h2mv_dist.io.source import open_source
from h2mv_dist.io.stores import delete_tree, exists
from h2mv_dist.jobs.cluster import connect
from h2mv_dist.jobs.export import fold_curve
from h2mv_dist.jobs.inference import submit_inference
from h2mv_dist.jobs.records import JobFolder
from h2mv_dist.jobs.training import submit_training
from h2mv_dist.jobs.worlds import loss_floor, make_world, truth_url
from h2mv_dist.model.registry import model_kind

RESOLUTION: Final = 6.0
YEARS: Final = 1
SEED: Final = 0

SETTINGS: Final = """\
# Settings of the demo; every one of them can be changed, or overridden with --set section.key=value.

[data]
url = "{folder}/world.zarr"
layout = "published"

[training]
folds = [0, 1]           # two of the ten
ranks = 2                # processes a fold, joined by torch DDP
epochs = 9
batch_size = 96
cache = "{folder}/cache"

[inference]
tile = [12, 24]
shard = [12, 24]
chunk = [12, 12]
shard_days = 366
chunk_days = 122

[cluster]
kind = "local"           # "auto" takes GPUs where there are any; two ranks need two
workers = 4
"""

MAPS: Final = (
    "evapotranspiration",
    "runoff",
    "fapar",
    "snow_water_equivalent",
    "soil_moisture",
    "soil_moisture_capacity",
)


def run_demo(path: str, console: Console) -> Path:
    """Run everything and return the path of the page."""
    started = time.monotonic()
    folder = Path(path).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    settings_file = folder / "settings.toml"
    if not settings_file.exists():
        settings_file.write_text(SETTINGS.format(folder=folder))
    settings, options = load(settings_file)
    job, cube = str(folder / "job"), str(folder / "cube.zarr")
    _make_world_once(settings.data.url, options, console)
    with connect(settings.cluster) as client:
        console.print(f"Dask dashboard: {client.dashboard_link}", soft_wrap=True)
        _train(client, settings, job, options, console)
        _infer(client, settings, job, cube, options, console)
    page = _report(folder, settings, job, cube, options, console)
    console.print(f"finished in {time.monotonic() - started:.0f} s; look at {page}", soft_wrap=True)
    return page


def _make_world_once(url: str, options: StorageOptions, console: Console) -> None:
    if exists(truth_url(url), options):
        console.print(f"world: {url} (already there)", soft_wrap=True)
        return
    # what is there without its truth, which is written last, was interrupted
    delete_tree(url, options)
    made = make_world(url, resolution=RESOLUTION, years=YEARS, seed=SEED, options=options)
    console.print(f"world: {made.n_land} land cells, {made.period}, in {url}", soft_wrap=True)


def _train(client: Client, settings: Settings, job: str, options: StorageOptions, console: Console) -> None:
    console.print(f"training folds {list(chosen_folds(settings))} with {settings.training.ranks} ranks each")
    handle = submit_training(client, settings, job, options)
    with watching(console) as watch:
        handle.wait(watch)


def _infer(
    client: Client, settings: Settings, job: str, cube: str, options: StorageOptions, console: Console
) -> None:
    console.print(f"running all trained folds over the globe into {cube}", soft_wrap=True)
    handle = submit_inference(client, settings, job, cube, options)
    if handle is not None:
        with watching(console) as watch:
            handle.wait(watch)


def _report(
    folder: Path, settings: Settings, job: str, cube: str, options: StorageOptions, console: Console
) -> Path:
    staged = _staged(settings, options)
    curves = [_curve(settings, staged, job, fold, options) for fold in chosen_folds(settings)]
    for curve in curves:
        best = min(loss for loss in curve.valid_loss if loss is not None)
        ratio = best / curve.floor if curve.floor else float("nan")
        console.print(f"fold {curve.fold}: validation loss {best:.3f}, {ratio:.2f} x its floor")
    with xr.open_zarr(cube) as opened:
        return write_report(
            folder / "report.html",
            title="H2MV on a made-up world",
            curves=curves,
            cube=opened,
            maps=MAPS,
            places={
                "settings": str(folder / "settings.toml"),
                "input data (made up)": settings.data.url,
                "training job: checkpoints, metrics, logs": job,
                "output cube": cube,
            },
            facts={"grid": f"{RESOLUTION:g} degrees", "days": str(staged.period)},
        )


def _staged(settings: Settings, options: StorageOptions) -> StagedCells:
    spec = model_kind(settings.model.name).spec
    source = open_source(settings.data, forcing=spec.forcing, targets=spec.targets, options=options)
    return stage(source, Path(str(settings.training.cache)))


def _curve(
    settings: Settings, staged: StagedCells, job: str, fold: int, options: StorageOptions
) -> FoldCurve:
    metrics: list[dict[str, Any]] = JobFolder(job, options).fold(fold).metrics()
    torch.set_num_threads(1)
    floor = loss_floor(
        settings.data.url, staged, settings.folds, fold, settings.training.spinup_days, options
    )
    return fold_curve(fold, metrics, floor)
