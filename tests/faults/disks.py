"""File systems that only some processes see: small ones that fill up, and empty ones over a folder."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

_NAMESPACES = (("unshare", "--mount"), ("unshare", "--mount", "--user", "--map-root-user"))
"""As root, or as anybody where users may have namespaces of their own."""
_MOUNT = 'mount -t tmpfs -o size="$1" tmpfs "$0" && shift && exec "$@"'


class Disk(NamedTuple):
    """A file system of its own.

    Attributes:
        inside: where processes that are started with ``wrapper`` see it.
        outside: where all others do.
        wrapper: put before a command.
    """

    inside: Path
    outside: Path
    wrapper: tuple[str, ...]

    def fill(self) -> Path:
        """Leave no free byte; returns the file to delete."""
        filler = self.outside / "filler"
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                return filler


@contextmanager
def small_disk(folder: Path, size: str = "2m") -> Iterator[Disk]:
    """A file system of this size at ``folder``, in a mount namespace that a sleeping process holds."""
    folder.mkdir()
    command = (*over(folder, size), "sh", "-c", "echo mounted && exec sleep 3600")
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"mounted\n"
            target = ("nsenter", f"--target={holder.pid}", "--mount", "--wd")
            user = () if "--user" not in command else ("--user", "--preserve-credentials")
            yield Disk(folder, Path(f"/proc/{holder.pid}/root{folder}"), (*target, *user))
        finally:
            holder.kill()


def over(folder: Path, size: str = "1m") -> tuple[str, ...]:
    """Put before a command: it sees an empty file system at ``folder``; skips where that is not allowed."""
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        pytest.skip("no unshare and nsenter (util-linux) to mount a file system for a test")
    for namespace in _NAMESPACES:
        command = (*namespace, "sh", "-c", _MOUNT, str(folder), size)
        if subprocess.run((*command, "true"), capture_output=True, check=False).returncode == 0:
            return command
    pytest.skip(f"user {os.getuid()} may not mount a file system, not even in a namespace of its own")
