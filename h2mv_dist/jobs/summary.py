"""One table of a whole training job: ``summary.csv`` in its folder, a line for each fold of each run."""

import csv
import io
from collections.abc import Iterable, Mapping
from typing import Any, Final

from h2mv_dist.config import StorageOptions
from h2mv_dist.io import stores
from h2mv_dist.jobs.messages import Message
from h2mv_dist.jobs.records import FoldRecord, JobFolder
from h2mv_dist.jobs.sweep import variants

FILE: Final = "summary.csv"


def summarize_unit(message: Message) -> None:
    """The last unit of a training job: write its table."""
    write_summary(JobFolder(message["folder"], StorageOptions(message["storage_options"])))


def write_summary(folder: JobFolder) -> None:
    """Write the table of what the folder holds now."""
    rows = []
    for variant in variants(folder.settings()):
        run = folder.run(variant.name)
        rows += [{**variant.values, **_row(run.fold(fold), fold)} for fold in run.begun_folds()]
    stores.put_object(stores.join(folder.url, FILE), to_csv(rows), folder.options)


def to_csv(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Rows as CSV; columns in order of first appearance, nothing where a row has no value."""
    rows = list(rows)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _row(record: FoldRecord, fold: int) -> dict[str, Any]:
    metrics, done = record.metrics(), record.done()
    finite = [m for m in metrics if m["valid_loss"] is not None]
    best = min(finite, key=lambda m: float(m["valid_loss"]), default={})
    ranks = record.attempts()
    return {
        "fold": fold,
        "state": "done" if done is not None and done["epoch"] == len(metrics) else "unfinished",
        "epochs": len(metrics),
        "best_epoch": best.get("epoch"),
        "best_loss": best.get("valid_loss"),
        "train_loss": best.get("train_loss"),
        **{f"valid_{name}": value for name, value in best.get("valid_terms", {}).items()},
        "seconds": round(sum(m["seconds"] for m in metrics), 1),
        "attempts": len({rank["attempt"] for rank in ranks}),
        "hosts": " ".join(sorted({rank["host"] for rank in ranks})),
    }
