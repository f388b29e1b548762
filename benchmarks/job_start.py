"""What a job costs beside its steps: time to the first one on a warm cluster, and Dask messages an epoch.

Measured with two ranks on two workers of one thread, for two worlds of which one has several times the cells.
The number of messages must not depend on them. A child's imports are shown as the part nobody can avoid.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from distributed import Client

from h2mv_dist.config import ClusterSettings, Settings, StorageOptions, validate
from h2mv_dist.jobs.cluster import connect
from h2mv_dist.jobs.records import JobFolder
from h2mv_dist.jobs.tasks import TOPIC
from h2mv_dist.jobs.training import submit_training
from h2mv_dist.jobs.worlds import make_world

EPOCHS, REPEATS, RANKS = 3, 3, 2
NO_OPTIONS = StorageOptions()


def main() -> None:
    print(f"importing torch and the trainer in a child: {_import_seconds():.1f} s\n")
    print("| land cells | from submit to the first step, s | messages an epoch |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        worlds = {n: _world(Path(folder), n) for n in (12.0, 5.0)}
        with connect(ClusterSettings(kind="local", workers=RANKS)) as client:
            for url, cells in worlds.values():
                settings = _settings(url, Path(folder) / "cache")
                _run(client, settings, Path(folder) / f"warm-{cells}")
                before = len(client.get_events(TOPIC))
                seconds = [_run(client, settings, Path(folder) / f"{cells}-{i}") for i in range(REPEATS)]
                messages = (len(client.get_events(TOPIC)) - before) / (REPEATS * EPOCHS)
                print(f"| {cells} | {', '.join(f'{s:.1f}' for s in seconds)} | {messages:g} |", flush=True)


def _run(client: Client, settings: Settings, folder: Path) -> float:
    """Seconds from submit to the first optimizer step."""
    submit_training(client, settings, str(folder), NO_OPTIONS).wait()
    ranks = JobFolder(str(folder), NO_OPTIONS).fold(0).attempts()
    return max(float(rank["first_step"]) for rank in ranks)


def _world(folder: Path, resolution: float) -> tuple[str, int]:
    url = str(folder / f"world-{resolution:g}.zarr")
    made = make_world(url, resolution=resolution, years=1, seed=0, options=NO_OPTIONS)
    return url, made.n_land


def _settings(url: str, cache: Path) -> Settings:
    tree = {
        "data": {"url": url},
        "folds": {"block": 2},
        "model": {"hidden": 8, "encoder": 8, "condensed": 4},
        "training": {
            "folds": [0],
            "ranks": RANKS,
            "epochs": EPOCHS,
            "batch_size": 64,
            "spinup_days": 30,
            "cache": str(cache),
        },
    }
    return validate(tree, where="benchmark")


def _import_seconds() -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import h2mv_dist.jobs.trainer"], check=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
