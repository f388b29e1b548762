"""Golden vectors: the model agrees, and any one compared array off by 1 % is noticed."""

from pathlib import Path

import numpy as np
import pytest

from h2mv_dist.errors import DataError
from h2mv_dist.model.verify import compare, evaluate, read_golden, verify

COMPARED = ("daily/", "static_out/", "constant/", "spinup/", "loss/", "grad/")


@pytest.fixture(scope="module")
def path(shared: Path) -> Path:
    return shared / "golden" / "h2mv.npz"


def test_the_model_agrees_in_every_group(path: Path) -> None:
    verification = verify(path)
    assert verification.passed, verification.worst()
    assert {d.group for d in verification.deviations} == {g.rstrip("/") for g in COMPARED}


@pytest.mark.slow
def test_compiled_code_agrees_too(path: Path) -> None:
    verification = verify(path, compiled=True)
    assert verification.passed, verification.worst()


def test_any_array_off_by_one_percent_fails(path: Path) -> None:
    golden = read_golden(path)
    ours = evaluate(golden, path)
    compared = [name for name in golden if name.startswith(COMPARED)]
    assert len(compared) == len(ours)
    for name in compared:
        off = {**golden, name: np.asarray(golden[name], np.float32) * np.float32(1.01)}
        wrong = [d.name for d in compare(off, ours).deviations if not d.excess <= 1.0]
        assert wrong == [name.split("/", 1)[1]]


def test_a_nan_never_passes(path: Path) -> None:
    golden = read_golden(path)
    ours = evaluate(golden, path)
    ours["daily/swe_ts"][0, 0] = np.nan
    assert not compare(golden, ours).passed


def test_a_missing_array_is_named(path: Path, tmp_path: Path) -> None:
    golden = {k: v for k, v in read_golden(path).items() if k != "param/beta_snow"}
    np.savez(tmp_path / "cut.npz", **golden)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="param/beta_snow"):
        verify(tmp_path / "cut.npz")


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "evil.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="not a golden file"):
        verify(tmp_path / "evil.npy")
