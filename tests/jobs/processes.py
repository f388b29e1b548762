"""Real processes for tests: started as users start them, waited for, and ended whatever became of them."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

START_SECONDS = 120.0
"""Limits only end what hangs: a busy machine may take a while for what is no failure."""


def wait_until(
    condition: Callable[[], object], what: str, log: Path | None = None, seconds: float = START_SECONDS
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        output = log.read_text()[-4000:] if log is not None else ""
        assert time.monotonic() < deadline, f"{what} took too long\n{output}"
        time.sleep(0.05)


def launch(log: Path, command: tuple[str, ...], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """A program in a session of its own, so that signals can be sent to all of it; it writes to ``log``."""
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )


@contextmanager
def process(log: Path, *command: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """``python -m`` with this command."""
    with program(log, (sys.executable, "-m", *command), environment) as started:
        yield started


@contextmanager
def program(
    log: Path, command: tuple[str, ...], environment: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A program that at the end is asked to stop, then made to."""
    started = launch(log, command, environment)
    try:
        yield started
    finally:
        started.terminate()
        try:
            started.wait(20)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()
