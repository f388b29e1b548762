"""Units, and the script that installs them."""

import configparser
import shutil
import subprocess
from pathlib import Path

import pytest

from h2mv_dist.cli import TRY_LATER
from tests.deploy.files import DEPLOY

UNITS = DEPLOY / "systemd"
PROGRAM = "/opt/h2mv-dist/bin/h2mv-dist"


def section(unit: str, name: str) -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None, strict=True, delimiters="=")
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string((UNITS / unit).read_text())
    return dict(parser[name])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd")
def test_systemd_understands_the_units(tmp_path: Path) -> None:
    for unit in UNITS.glob("*@.*"):
        # the program is not installed where tests run
        (tmp_path / unit.name).write_text(unit.read_text().replace(PROGRAM, "/bin/true"))
    names = [str(path) for path in sorted(tmp_path.iterdir())]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *names], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_nothing_new_is_a_success() -> None:
    assert section("h2mv-append@.service", "Service")["SuccessExitStatus"] == str(TRY_LATER)


def test_the_timer_starts_the_service() -> None:
    assert (UNITS / "h2mv-append@.timer").with_suffix(".service").exists()
    assert section("h2mv-append@.timer", "Timer")["Persistent"] == "yes"


def test_the_program_is_where_it_is_installed() -> None:
    assert section("h2mv-append@.service", "Service")["ExecStart"].startswith(PROGRAM)
    assert f"PREFIX:-{Path(PROGRAM).parents[1]}" in (UNITS / "install").read_text()
