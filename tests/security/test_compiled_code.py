"""Compiled code is run by whoever loads it: none is, from a folder where others may have put theirs."""

import subprocess
import tempfile
from pathlib import Path

import pytest

from h2mv_dist.errors import ConfigError
from h2mv_dist.model import days, lstm
from h2mv_dist.model.code_folder import keeps_headers
from h2mv_dist.model.h2mv import H2MV

pytestmark = pytest.mark.skipif(bool(days.no_compiler_because()), reason=days.no_compiler_because())


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What exists as soon as code was loaded from a folder that is open to all, where it lies in wait."""
    folder, trace = tmp_path / "open", tmp_path / "loaded"
    (folder / "h2mv_dist").mkdir(parents=True)
    source = f'#include <cstdio>\n__attribute__((constructor)) void run() {{ fopen("{trace}", "w"); }}\n'
    code = folder / "h2mv_dist" / lstm._name(lstm._command())
    command = [days.compiler(), "-shared", "-fPIC", "-x", "c++", "-", "-o", str(code)]
    subprocess.run(command, input=source, text=True, check=True)
    folder.chmod(0o777)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    return trace


def test_an_operator_that_others_may_have_put_there_is_not_loaded(trap: Path) -> None:
    with pytest.raises(ConfigError, match="others may write"):
        lstm._load()
    assert not trap.exists()


@pytest.mark.usefixtures("trap")
def test_nor_does_torch_look_for_code_there() -> None:
    with pytest.raises(ConfigError, match="others may write"):
        days._compiled.__wrapped__(H2MV.day_block, "cpu")
    with pytest.raises(ConfigError, match="others may write"), days.one_compiles("days"):
        pass
    assert "others may write" in days.no_compiler_because()


def test_headers_are_not_kept_where_others_may_have_put_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch keeps them in its usual folder, wherever it keeps all else."""
    (tmp_path / "openssl").touch(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert keeps_headers()
    [usual] = tmp_path.glob("torchinductor_*")
    assert usual.stat().st_mode & 0o777 == 0o700
    usual.chmod(0o777)
    assert not keeps_headers()
    usual.chmod(0o700)
    (tmp_path / "openssl").unlink()
    assert not keeps_headers()
