"""The job folder: what a job is, how far it is, and what it made; on disk or object storage.

    job.json                       kind and settings, written once
    folds/NN/metrics/EEEEE.json    one object an epoch
    folds/NN/best.safetensors      weights of the best epoch
    folds/NN/last.safetensors      weights, optimizer and progress of the last epoch
    folds/NN/last.json             sidecar: when, where and in which attempt it was written
    folds/NN/logs/A-R.log          what rank R printed in attempt A
    folds/NN/done.json             present when the fold is finished

A job can be resumed from its folder alone. Credentials are never in it.
"""

import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from h2mv_dist.config import Settings, StorageOptions, canonical_json, to_json, validate
from h2mv_dist.errors import JobError, describe
from h2mv_dist.io import stores
from h2mv_dist.model.checkpoint import Checkpoint, checksum

Which = Literal["best", "last"]


@dataclass(frozen=True, slots=True)
class FoldRecord:
    """The part of a job folder that belongs to one fold; only its rank 0 writes here."""

    url: str
    options: StorageOptions

    def write_checkpoint(self, which: Which, checkpoint: Checkpoint, attempt: int) -> None:
        """Replace the best or last checkpoint, then its sidecar."""
        data = checkpoint.to_bytes()
        stores.put_object(self._path(f"{which}.safetensors"), data, self.options)
        sidecar = {
            "checksum": checksum(data),
            "written": datetime.now(UTC).isoformat(),
            "host": socket.gethostname(),
            "attempt": attempt,
        }
        self._write_json(f"{which}.json", sidecar)

    def has_checkpoint(self, which: Which) -> bool:
        """Whether such a checkpoint was written."""
        return stores.exists(self._path(f"{which}.safetensors"), self.options)

    def checkpoint_bytes(self, which: Which) -> bytes:
        """The object as stored."""
        return stores.get_object(self._path(f"{which}.safetensors"), self.options)

    def read_checkpoint(self, which: Which) -> Checkpoint:
        """The best or last checkpoint.

        Raises:
            StoreError: there is none.
            CheckpointError: it is damaged or foreign.
        """
        return Checkpoint.from_bytes(self.checkpoint_bytes(which), self._path(f"{which}.safetensors"))

    def write_metrics(self, epoch: int, metrics: Mapping[str, Any]) -> None:
        """Store the numbers of one epoch; a resumed epoch replaces its own."""
        self._write_json(f"metrics/{epoch:05d}.json", metrics)

    def metrics(self) -> list[dict[str, Any]]:
        """The numbers of all epochs, in order."""
        folder = self._path("metrics")
        names = stores.list_objects(folder, self.options)
        return [json.loads(stores.get_object(stores.join(folder, n), self.options)) for n in names]

    def write_log(self, attempt: int, rank: int, text: bytes) -> None:
        """Keep what a rank printed."""
        stores.put_object(self._path(f"logs/{attempt}-{rank}.log"), text, self.options)

    def mark_done(self, summary: Mapping[str, Any]) -> None:
        """Say that the fold is finished; written last."""
        self._write_json("done.json", summary)

    def done(self) -> dict[str, Any] | None:
        """The summary of the last run that finished the fold."""
        if not stores.exists(self._path("done.json"), self.options):
            return None
        summary: dict[str, Any] = json.loads(stores.get_object(self._path("done.json"), self.options))
        return summary

    def _path(self, name: str) -> str:
        return stores.join(self.url, *name.split("/"))

    def _write_json(self, name: str, record: Mapping[str, Any]) -> None:
        stores.put_object(self._path(name), canonical_json(record).encode(), self.options)


@dataclass(frozen=True, slots=True)
class JobFolder:
    """A training job's folder."""

    url: str
    options: StorageOptions

    def create(self, settings: Settings) -> None:
        """Write ``job.json``; a job that is there is resumed.

        Raises:
            JobError: see :meth:`require_same_job`.
        """
        self.require_same_job(settings)
        record = {"kind": "train", "settings": to_json(settings)}
        stores.put_object(stores.join(self.url, "job.json"), canonical_json(record).encode(), self.options)

    def require_same_job(self, settings: Settings) -> None:
        """Check that the folder is free, or that its job may go on with these settings.

        Raises:
            JobError: the folder holds a job whose numbers would differ.
        """
        if self.exists():
            _require_same_job(self.settings(), settings, self.url)

    def exists(self) -> bool:
        """Whether a job was created here."""
        return stores.exists(stores.join(self.url, "job.json"), self.options)

    def settings(self) -> Settings:
        """The settings the job runs with.

        Raises:
            StoreError: there is no job here.
        """
        path = stores.join(self.url, "job.json")
        return validate(json.loads(stores.get_object(path, self.options))["settings"], where=path)

    def fold(self, index: int) -> FoldRecord:
        """The records of one fold."""
        return FoldRecord(stores.join(self.url, "folds", f"{index:02d}"), self.options)

    def trained_folds(self) -> tuple[int, ...]:
        """Folds that have a best checkpoint."""
        names = stores.list_objects(stores.join(self.url, "folds"), self.options)
        return tuple(sorted(int(n.split("/")[0]) for n in names if n.endswith("/best.safetensors")))


def _require_same_job(found: Settings, wanted: Settings, url: str) -> None:
    """A resumed job may train longer, on other folds or hardware, but not on other numbers."""
    before, after = _identity(found), _identity(wanted)
    changed = sorted(key for key in after if before.get(key) != after[key])
    if changed:
        raise JobError(
            describe(
                "the job folder holds a job with other settings",
                where=url,
                expected="; ".join(f"{k} = {before.get(k)}" for k in changed),
                actual="; ".join(f"{k} = {after[k]}" for k in changed),
                fix="choose another folder for the new job, or restore the settings to resume this one",
            )
        )


def _identity(settings: Settings) -> dict[str, Any]:
    tree = to_json(settings)
    sections = {"training": settings.training.identity()} | {k: tree[k] for k in ("data", "folds", "model")}
    return {f"{s}.{key}": value for s, section in sections.items() for key, value in section.items()}
