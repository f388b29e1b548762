"""A training job's numbers for other tools: one table, or TensorBoard's event files."""

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from h2mv_dist.analysis.figures import FoldCurve
from h2mv_dist.errors import ConfigError, describe
from h2mv_dist.jobs.records import JobFolder
from h2mv_dist.jobs.sweep import variants


def metrics_table(folder: JobFolder) -> pd.DataFrame:
    """All epochs of all folds and runs, a line each: what distinguishes the run, ``fold``, then the numbers.

    Terms of the loss have columns of their own, such as ``valid_terms.runoff``.

    Raises:
        StoreError: there is no job, or it cannot be read.
    """
    return pd.DataFrame([row for _, rows in _folds(folder) for row in rows])


def fold_curves(folder: JobFolder) -> list[FoldCurve]:
    """The losses of every fold that has finished an epoch, in all runs.

    Raises:
        StoreError: there is no job, or it cannot be read.
    """
    settings = folder.settings()
    runs = [folder.run(variant.name) for variant in variants(settings)]
    found = [(fold, run.fold(fold).metrics()) for run in runs for fold in run.begun_folds()]
    return [fold_curve(fold, metrics, None) for fold, metrics in found if metrics]


def fold_curve(fold: int, metrics: Sequence[Mapping[str, Any]], floor: float | None) -> FoldCurve:
    """The course of a fold from the numbers of its epochs; ``floor`` is the loss of the truth, if known."""
    return FoldCurve(
        fold=fold,
        epochs=tuple(m["epoch"] for m in metrics),
        train_loss=tuple(m["train_loss"] for m in metrics),
        valid_loss=tuple(m["valid_loss"] for m in metrics),
        best_epoch=int(metrics[-1]["best_epoch"]),
        floor=floor,
    )


def to_tensorboard(folder: JobFolder, directory: Path) -> int:
    """Write every number of every epoch as a scalar; returns the number of folds.

    Args:
        folder: of the job.
        directory: for ``tensorboard --logdir``; one folder a fold is made in it.

    Raises:
        ConfigError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            describe(
                "TensorBoard's event files need its package",
                where="h2mv-dist export --tensorboard",
                expected="the package tensorboard",
                actual=str(error),
                fix="install h2mv-dist[monitor]",
            )
        ) from error
    count = 0
    for name, rows in _folds(folder):
        with SummaryWriter(str(directory / name)) as writer:
            for row in rows:
                for key, value in row.items():
                    if isinstance(value, float):
                        writer.add_scalar(key.replace(".", "/"), value, row["epoch"])
        count += 1
    return count


def _folds(folder: JobFolder) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for variant in variants(folder.settings()):
        run = folder.run(variant.name)
        for fold in run.begun_folds():
            first = {**variant.values, "fold": fold}
            rows = [{**first, **dict(_flat(m))} for m in run.fold(fold).metrics()]
            yield posixpath.join(variant.name, f"fold-{fold:02d}"), rows


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif not isinstance(value, list):
            yield prefix + key, value
