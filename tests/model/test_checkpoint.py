"""Checkpoints: equal bytes for equal runs, nothing unpickled, damage noticed."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save

from h2mv_dist.config import ModelSettings
from h2mv_dist.errors import CheckpointError
from h2mv_dist.model.checkpoint import Checkpoint, code_versions, model_tensors
from tests.model import builders


def checkpoint(seed: int = 0) -> Checkpoint:
    return Checkpoint(
        model=ModelSettings(hidden=16, encoder=12, condensed=4),
        scaler=builders.scaler(),
        static_names=tuple(f"feature_{i}" for i in range(builders.N_STATIC)),
        fold=3,
        settings={"learning_rate": 0.01, "batch_size": 4},
        progress={"epoch": 7, "best_loss": 0.5},
        tensors=model_tensors(builders.model(seed)),
        versions=code_versions(),
    )


def test_bytes_are_reproducible_and_read_back() -> None:
    data = checkpoint().to_bytes()
    assert all(checkpoint().to_bytes() == data for _ in range(5))
    again = Checkpoint.from_bytes(data, "here")
    assert again.to_bytes() == data
    assert again.scaler == builders.scaler()


def test_the_model_comes_back_bit_identical() -> None:
    model, batch = builders.model(), builders.batch()
    again = Checkpoint.from_bytes(checkpoint().to_bytes(), "here").build_model()
    with torch.no_grad():
        ours, theirs = (m(batch, m.initial_state(4)).daily["runoff"] for m in (model, again))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_truncated_checkpoint_is_refused(length: int) -> None:
    with pytest.raises(CheckpointError, match=r"truncated(.|\n)*s3://bucket/best"):
        Checkpoint.from_bytes(checkpoint().to_bytes()[:length], "s3://bucket/best")


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('unpickled')",))


def test_foreign_objects_are_refused_and_never_unpickled() -> None:
    foreign = [pickle.dumps(Bomb()), save({"w": torch.zeros(2)}), save({}, metadata={"h2mv_dist": "{}"})]
    for data in foreign:
        with pytest.raises(CheckpointError, match="not a checkpoint"):
            Checkpoint.from_bytes(data, "here")


def test_another_schema_is_refused() -> None:
    data = save({}, metadata={"h2mv_dist": json.dumps({"schema": 99})})
    with pytest.raises(CheckpointError, match="schema 99"):
        Checkpoint.from_bytes(data, "here")


def test_weights_of_another_size_are_refused() -> None:
    small = checkpoint()
    wrong = Checkpoint(
        model=ModelSettings(hidden=8, encoder=12, condensed=4),
        scaler=small.scaler,
        static_names=small.static_names,
        fold=3,
        settings={},
        progress={},
        tensors=small.tensors,
        versions={},
    )
    with pytest.raises(CheckpointError, match="do not fit"):
        wrong.build_model()
