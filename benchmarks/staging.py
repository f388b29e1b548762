"""Cells for training: staged once a host, against read from the store cell by cell.

Cell by cell is what scripts do: ``isel`` of one cell, all days and variables, for each cell they need. The
staged cells are read in batches, as ranks read them; what staging costs is shared by all cells it serves.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import torch
import xarray as xr

from h2mv_dist.config import StorageOptions, validate
from h2mv_dist.io.cache import stage
from h2mv_dist.io.folds import make_folds
from h2mv_dist.io.source import open_source
from h2mv_dist.jobs.batches import CellBank
from h2mv_dist.jobs.worlds import make_world
from h2mv_dist.model.registry import model_kind

RESOLUTION: Final = 2.0
REPEATS: Final = 5
SAMPLE: Final = 20
BATCH: Final = 256


def main() -> None:
    """Print a table."""
    with tempfile.TemporaryDirectory() as folder:
        url = str(Path(folder) / "world.zarr")
        options = StorageOptions()
        make_world(url, resolution=RESOLUTION, years=3, seed=0, options=options)
        settings, spec = validate({"data": {"url": url}}, where="benchmark"), model_kind("h2mv").spec
        source = open_source(settings.data, forcing=spec.forcing, targets=spec.targets, options=options)
        staged = stage(source, Path(folder) / "cache")
        n_cells = len(staged.forcing)
        fold = make_folds(staged.grid, settings.folds)[0]
        bank = CellBank.open(staged, fold, torch.device("cpu"), step_bytes=0)
        train = fold.cells("train")
        rows, columns = np.nonzero(staged.grid.mask)
        order = np.random.default_rng(0)
        tree = xr.open_datatree(url, engine="zarr", chunks=None, cache=False)
        arrays = [a for node in tree.subtree for a in node.data_vars.values() if {"lat", "lon"} <= {*a.dims}]

        def by_isel() -> None:
            for cell in order.choice(n_cells, SAMPLE, replace=False):
                for array in arrays:
                    array.isel(lat=rows[cell], lon=columns[cell]).copy(deep=True).load()

        def by_batch() -> None:
            bank.gather("train", order.choice(train, min(BATCH, len(train)), replace=False))

        def staged_anew() -> None:
            with tempfile.TemporaryDirectory(dir=folder) as cache:
                stage(source, Path(cache))

        ways: list[tuple[str, Callable[[], None], int]] = [
            ("isel", by_isel, SAMPLE),
            ("staging", staged_anew, n_cells),
            ("a batch of staged cells", by_batch, min(BATCH, len(train))),
        ]
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name, _, _ in ways}
        for _ in range(REPEATS):
            for name, read, cells in ways:
                started = time.perf_counter(), time.process_time()
                read()
                ended = time.perf_counter(), time.process_time()
                taken[name].append(((ended[0] - started[0]) / cells, (ended[1] - started[1]) / cells))
    seconds = {
        name: [statistics.median(t) for t in zip(*pairs, strict=True)] for name, pairs in taken.items()
    }
    print(f"{n_cells} land cells, {staged.period.n_days} days, a local store\n")
    print("| way | milliseconds a cell | of isel | processor milliseconds | of isel |\n|---|---|---|---|---|")
    for name, pair in seconds.items():
        shown = (f"{1e3 * s:.3f} | 1 / {i / s:.0f}" for s, i in zip(pair, seconds["isel"], strict=True))
        print(f"| {name} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()
