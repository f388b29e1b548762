"""Checkpoints: one safetensors object with one metadata key of sorted JSON; nothing is ever unpickled.

No time, host or attempt is in it, so equal runs give equal bytes. Tensor names: ``model/NAME``,
``optimizer/SLOT/NAME``, ``rng``.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from h2mv_dist.config import ModelSettings, canonical_json
from h2mv_dist.errors import CheckpointError, describe
from h2mv_dist.model.base import ProcessModel
from h2mv_dist.model.registry import model_kind
from h2mv_dist.spec import Scaler
from h2mv_dist.version import __version__

METADATA_KEY: Final = "h2mv_dist"
SCHEMA: Final = 1
"""Raised when older code could misread what newer code writes."""
MODEL_PREFIX: Final = "model/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model and, in the last one of a run, what a resume needs.

    Attributes:
        model: which model, and its sizes.
        scaler: what its inputs and targets are z-scored with.
        static_names: static features in column order.
        fold: fold it was trained on.
        settings: settings that change numbers.
        progress: epoch, best epoch and loss; within an epoch also its steps so far.
        tensors: named as the module docstring says.
        versions: of the code that wrote it, see :func:`code_versions`.
    """

    model: ModelSettings
    scaler: Scaler
    static_names: tuple[str, ...]
    fold: int
    settings: Mapping[str, Any]
    progress: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    versions: Mapping[str, str]

    def to_bytes(self) -> bytes:
        """One safetensors object; equal checkpoints give equal bytes."""
        record = {
            "schema": SCHEMA,
            "model": self.model.model_dump(mode="json"),
            "scaler": self.scaler.as_dict(),
            "static_names": list(self.static_names),
            "fold": self.fold,
            "settings": dict(self.settings),
            "progress": dict(self.progress),
            "versions": dict(self.versions),
        }
        tensors = {name: t.detach().cpu().contiguous() for name, t in sorted(self.tensors.items())}
        return save(tensors, metadata={METADATA_KEY: canonical_json(record)})

    @staticmethod
    def from_bytes(data: bytes, where: str) -> "Checkpoint":
        """Read a checkpoint.

        Args:
            data: the object.
            where: its place, for messages.

        Raises:
            CheckpointError: truncated, foreign, or written by newer code.
        """
        record = _metadata(data, where)
        try:
            return Checkpoint(
                model=ModelSettings.model_validate(record["model"]),
                scaler=Scaler.from_dict(record["scaler"]),
                static_names=tuple(record["static_names"]),
                fold=record["fold"],
                settings=record["settings"],
                progress=record["progress"],
                tensors=load(data),
                versions=record["versions"],
            )
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            raise CheckpointError(_foreign(where, f"{type(error).__name__}: {error}")) from error

    def build_model(self) -> ProcessModel:
        """The model with its weights, in evaluation mode.

        Raises:
            CheckpointError: the weights do not fit the model.
        """
        model = new_model(self.model, self.scaler)
        weights = {
            name.removeprefix(MODEL_PREFIX): t
            for name, t in self.tensors.items()
            if name.startswith(MODEL_PREFIX)
        }
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise CheckpointError(f"weights of fold {self.fold} do not fit {self.model}: {error}") from error
        return model.eval()


def new_model(settings: ModelSettings, scaler: Scaler) -> ProcessModel:
    """A freshly initialised model; its weights come from torch's global generator."""
    sizes = settings.model_dump(exclude={"name"})
    return model_kind(settings.name).build(scaler, **sizes)


def model_tensors(model: ProcessModel) -> dict[str, Tensor]:
    """Copies of the weights, under the names a checkpoint uses."""
    return {f"{MODEL_PREFIX}{name}": t.detach().clone() for name, t in model.state_dict().items()}


def checksum(data: bytes) -> str:
    """SHA-256 of an object, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def code_versions() -> dict[str, str]:
    """Versions that can change numbers."""
    return {"h2mv_dist": __version__, "torch": torch.__version__}


def _metadata(data: bytes, where: str) -> dict[str, Any]:
    """The JSON record in the header; safetensors checks lengths and offsets while loading."""
    try:
        load(data)
        header_length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + header_length])
        record = json.loads(header["__metadata__"][METADATA_KEY])
        schema = record["schema"]
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(_foreign(where, f"{type(error).__name__}: {error}")) from error
    if schema != SCHEMA:
        raise CheckpointError(
            describe(
                "checkpoint of another code schema",
                where=where,
                expected=f"schema {SCHEMA}",
                actual=f"schema {schema!r}",
                fix="use the version of h2mv-dist that wrote it, or train again",
            )
        )
    return dict(record)


def _foreign(where: str, reason: str) -> str:
    return describe(
        "not a checkpoint of this package, or a truncated one",
        where=where,
        expected=f"a complete safetensors object with the metadata key {METADATA_KEY!r}",
        actual=reason,
        fix="restore the file from a copy, or train the fold again; nothing was changed",
    )
