"""User data with which a virtual machine sets itself up."""

import subprocess
from typing import Any

import yaml

from tests.deploy.files import DEPLOY, ROOT

REPOSITORY = "https://git.example.org/h2mv-dist.git"
SCRIPT = str(DEPLOY / "cloud" / "user-data")


def user_data(*arguments: str) -> dict[str, Any]:
    done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("#cloud-config\n")
    made: dict[str, Any] = yaml.safe_load(done.stdout)
    return made


def test_a_machine_with_gpus_gets_its_driver() -> None:
    made = user_data(REPOSITORY, "v0.1")
    clone, driver, install = made["runcmd"]
    assert clone == ["git", "clone", "--branch", "v0.1", REPOSITORY, "/opt/src/h2mv-dist"]
    assert driver[0] == "ubuntu-drivers"
    assert install[1] == "cuda,monitor"
    assert set(made) == {"package_update", "packages", "runcmd", "power_state"}


def test_a_machine_without_gpus_gets_none() -> None:
    clone, install = user_data(REPOSITORY, "main", "monitor")["runcmd"]
    assert clone[-1] in install[0]
    assert (ROOT / install[0].removeprefix(f"{clone[-1]}/")).stat().st_mode & 0o111


def test_a_password_is_refused() -> None:
    done = subprocess.run(
        [SCRIPT, "https://me:hush@git.example.org/x.git"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "no password" in done.stderr
    assert "hush" not in done.stdout + done.stderr
