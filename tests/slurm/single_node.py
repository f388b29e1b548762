"""A real Slurm on this machine: munged, slurmctld and slurmd as processes of the tests, all on 127.0.0.1."""

import getpass
import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from tests.conftest import free_port
from tests.faults.processes import is_alive
from tests.jobs.processes import program, wait_until

DAEMONS: Final = ("munged", "slurmctld", "slurmd")
_TEMPLATE: Final = Path(__file__).with_name("slurm.conf.template")
_PATH: Final = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
"""Debian's daemons are where only root looks."""


def missing_daemons() -> list[str]:
    """What of Slurm is not installed."""
    return [name for name in DAEMONS if shutil.which(name, path=_PATH) is None]


@dataclass(frozen=True)
class SingleNode:
    """A running Slurm with one node of four CPUs, named as the host is."""

    folder: Path
    node: str

    @property
    def environment(self) -> Mapping[str, str]:
        """With it, Slurm's commands find this Slurm."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(
            command,
            env={**os.environ, **self.environment, **environment},
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """RUNNING, COMPLETED ..."""
        return self.detail(job, "JobState")

    def detail(self, job: str, name: str) -> str:
        """What Slurm knows of a job, ended ones included."""
        words = self.run("scontrol", "show", "job", "--oneliner", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)[name]

    def jobs(self, *states: str) -> list[str]:
        """Jobs in the queue, in these states if any are named."""
        chosen = ["--states", ",".join(states)] if states else []
        return self.run("squeue", "--noheader", "--format=%i", *chosen).split()

    def processes(self) -> list[psutil.Process]:
        """All that Slurm has started, and its commands that still run: their environment names this Slurm."""
        return [p for p in psutil.process_iter() if p.pid != os.getpid() and self._has(p, "SLURM_CONF")]

    def processes_of_jobs(self) -> list[psutil.Process]:
        """Those of them that run in a job."""
        return [process for process in self.processes() if self._has(process, "SLURM_JOB_ID")]

    def _has(self, process: psutil.Process, name: str) -> bool:
        """Whether the process has the variable, with this Slurm's value if that is known."""
        try:
            value = process.environ().get(name)
        except psutil.Error:
            return False
        return value is not None and value == self.environment.get(name, value)


@contextmanager
def single_node(folder: Path) -> Iterator[SingleNode]:
    """Start a Slurm, and end it with all it has started."""
    slurm = SingleNode(folder, socket.gethostname().partition(".")[0])
    _configure(slurm)
    with ExitStack() as stack:
        stack.callback(_end_the_rest, slurm)
        for name, options in _daemons(slurm).items():
            stack.enter_context(_daemon(slurm, name, options))
            if name == "munged":
                wait_until((folder / "munge.sock").exists, name, folder / f"{name}.log")
        wait_until(lambda: _is_idle(slurm), "Slurm", folder / "slurmctld.log")
        stack.callback(_cancel_all, slurm)
        yield slurm


def _configure(slurm: SingleNode) -> None:
    for name in ("state", "spool"):
        (slurm.folder / name).mkdir()
    values = {
        "HOST": slurm.node,
        "USER": getpass.getuser(),
        "DIR": str(slurm.folder),
        "CONTROLLER_PORT": str(free_port()),
        "NODE_PORT": str(free_port()),
    }
    text = _TEMPLATE.read_text()
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    (slurm.folder / "slurm.conf").write_text(text)
    key = slurm.folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))


def _daemons(slurm: SingleNode) -> Mapping[str, tuple[str, ...]]:
    files = {"key": "munge.key", "socket": "munge.sock", "pid": "munged.pid", "seed": "munged.seed"}
    at = {name: str(slurm.folder / file) for name, file in files.items()}
    own = ("--key-file", at["key"], "--socket", at["socket"], "--pid-file", at["pid"])
    return {
        # --force: the folders above belong to others than munged's usual user
        "munged": ("--foreground", "--force", *own, "--seed-file", at["seed"]),
        "slurmctld": ("-D", "-i"),
        "slurmd": ("-D", "-N", slurm.node),
    }


@contextmanager
def _daemon(slurm: SingleNode, name: str, options: tuple[str, ...]) -> Iterator[None]:
    path = shutil.which(name, path=_PATH)
    assert path is not None, f"{name} is not installed"
    with program(slurm.folder / f"{name}.log", (path, *options), dict(slurm.environment)):
        yield


def _is_idle(slurm: SingleNode) -> bool:
    asked = subprocess.run(
        ["sinfo", "--noheader", "--format=%T"],
        env={**os.environ, **slurm.environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return asked.stdout.strip() == "idle"


def _cancel_all(slurm: SingleNode) -> None:
    if jobs := slurm.jobs():
        slurm.run("scancel", *jobs)
    wait_until(lambda: not slurm.jobs(), "the end of all jobs")


def _end_the_rest(slurm: SingleNode) -> None:
    """Steps that outlived their slurmd."""
    left = slurm.processes()
    for process in filter(is_alive, left):
        process.kill()
    psutil.wait_procs(left, timeout=10)
