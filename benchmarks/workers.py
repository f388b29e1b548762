"""One Dask worker of one thread against two: two folds trained, and a cube of ten members filled, end to end.

Whole jobs through the scheduler, from submission to the last record, on clusters that are there already and
machines that have compiled the days before; children still start, import and load what was compiled. Each
worker has a core of its own, with all of its threads and children: else one that is alone reads, writes and
starts children on the other core, too. Client and scheduler go where there is room, and look at their
clocks less often than they do by default: fifty times a second takes a twelfth of a core.
"""

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import dask
import psutil
from distributed import Client

from benchmarks.members import write_members
from h2mv_dist.config import ClusterSettings, Settings, StorageOptions, validate
from h2mv_dist.io.source import open_source
from h2mv_dist.jobs.cluster import connect, workers_of
from h2mv_dist.jobs.inference import submit_inference
from h2mv_dist.jobs.records import JobFolder
from h2mv_dist.jobs.training import submit_training
from h2mv_dist.jobs.worlds import make_world
from h2mv_dist.model.h2mv import SPEC
from h2mv_dist.model.truth import true_model

RESOLUTION: Final = 3.0
YEARS: Final = 1
EPOCHS: Final = 6
MEMBERS: Final = 10
REPEATS: Final = 5
NO_OPTIONS: Final = StorageOptions()


def main() -> None:
    """Print a table; one worker and two take turns."""
    with (
        dask.config.set({"distributed.admin.tick.interval": "500ms"}),
        tempfile.TemporaryDirectory() as folder,
        connect(ClusterSettings(kind="local", workers=1)) as one,
        connect(ClusterSettings(kind="local", workers=2)) as two,
    ):
        place = Path(folder)
        for client in (one, two):
            for core, worker in enumerate(sorted(workers_of(client))):
                client.run(_stay_on, core, workers=[worker])
        world = str(place / "world.zarr")
        made = make_world(world, resolution=RESOLUTION, years=YEARS, seed=0, options=NO_OPTIONS)
        settings = _settings(world, place / "cache")
        _write_members(settings, str(place / "members"))
        works = {"training": _training(settings, place), "inference": _inference(settings, place)}
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
        for repeat in range(REPEATS + 1):
            for name, work in works.items():
                pair = _seconds(work, one), _seconds(work, two)
                # the first one finds nothing compiled or staged
                taken[name] += [pair] if repeat else []
        waiting = _waiting(place)
    print(f"{made.n_land} land cells, {made.period.n_days} days, a core for each worker")
    print(f"time of epochs that is not spent in forward, backward and step: {waiting:.1%}\n")
    print("| job | one worker, s | two workers, s | times as fast |\n|---|---|---|---|")
    for name, pairs in taken.items():
        alone, together = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
        print(f"| {name} | {alone:.1f} | {together:.1f} | {alone / together:.2f} |")


def _stay_on(core: int) -> None:
    """On a worker: use one core only, as will the threads and processes that are started later."""
    for thread in psutil.Process().threads():
        os.sched_setaffinity(thread.id, {core})


def _seconds(work: Callable[[Client], None], client: Client) -> float:
    started = time.perf_counter()
    work(client)
    return time.perf_counter() - started


def _waiting(place: Path) -> Any:
    """Over all epochs of all jobs."""
    epochs = [
        epoch
        for job in place.glob("job-*")
        for fold in JobFolder(str(job), NO_OPTIONS).trained_folds()
        for epoch in JobFolder(str(job), NO_OPTIONS).fold(fold).metrics()
    ]
    return 1 - sum(epoch["seconds_computing"] for epoch in epochs) / sum(epoch["seconds"] for epoch in epochs)


def _training(settings: Settings, place: Path) -> Callable[[Client], None]:
    numbers = itertools.count()

    def train(client: Client) -> None:
        submit_training(client, settings, str(place / f"job-{next(numbers)}"), NO_OPTIONS).wait()

    return train


def _inference(settings: Settings, place: Path) -> Callable[[Client], None]:
    numbers = itertools.count()

    def infer(client: Client) -> None:
        cube = str(place / f"cube-{next(numbers)}.zarr")
        job = submit_inference(client, settings, str(place / "members"), cube, NO_OPTIONS)
        assert job is not None, "a new cube"
        job.wait()

    return infer


def _settings(world: str, cache: Path) -> Settings:
    tree: dict[str, Any] = {
        "data": {"url": world},
        "folds": {"block": 2},
        "training": {"folds": [0, 1], "epochs": EPOCHS, "cache": str(cache), "code_path": "compiled"},
        "inference": {"tile": [18, 18], "shard": [18, 18], "chunk": [18, 18], "code_path": "compiled"},
    }
    return validate(tree, where="benchmark")


def _write_members(settings: Settings, job: str) -> None:
    source = open_source(settings.data, forcing=SPEC.forcing, targets=(), options=NO_OPTIONS)
    scaler = source.published_scaler()
    models = [true_model(scaler, source.static) for _ in range(MEMBERS)]
    write_members(job, settings, models, source.static, NO_OPTIONS)


if __name__ == "__main__":
    main()
