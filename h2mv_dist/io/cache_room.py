"""Room in a host's cache: folders that were not used for longest make room, those in use are locked.

Complete folders are named by a key of 32 hexadecimal digits and hold ``meta.json``, which is locked by those
who have the folder open, and touched when they open it. ``.KEY.HOST.RANDOM`` is unfinished or being deleted;
``.KEY.lock`` is locked by whoever fills that folder, ``.room.lock`` while room is made. Nothing else counts.
"""

import fcntl
import os
import platform
import re
import secrets
import shutil
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

from pydantic import ByteSize

from h2mv_dist.errors import StoreError, describe

META: Final = "meta.json"
_FOLDER: Final = re.compile(r"([0-9a-f]{32})|\.([0-9a-f]{32})\..+")


class Hold:
    """Keeps a folder from being deleted for as long as anybody refers to this object.

    File systems without locks keep nothing, but there nothing is deleted either.
    """

    def __init__(self, folder: Path) -> None:
        descriptor = os.open(folder / META, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        # a cache that somebody else owns may not be written
        with suppress(OSError):
            os.utime(folder / META)


@contextmanager
def turn(lock: Path) -> Iterator[bool]:
    """Wait for a lock that ends with this process; without working locks, go on without and say so."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            locked = True
        except OSError:
            locked = False
        yield locked


def turn_file(final: Path) -> Path:
    """What is locked while a folder is filled."""
    return final.with_name(f".{final.name}.lock")


def unfinished(final: Path) -> str:
    """How the names of this host's unfinished folders begin: some file systems lock for one host only."""
    return f".{final.name}.{platform.node()}."


def new_part(final: Path) -> Path:
    """A name for an unfinished folder that nobody else has."""
    return final.with_name(unfinished(final) + secrets.token_hex(8))


@contextmanager
def room(directory: Path, needed: int, limit: int | None) -> Iterator[None]:
    """Make room for a new folder of ``needed`` bytes; it must have its full size when this is left.

    Args:
        directory: the cache.
        needed: bytes.
        limit: bytes that all folders may have together; None for no limit.

    Raises:
        StoreError: too much of the cache is in use.
    """
    if limit is None:
        yield
        return
    with turn(directory / ".room.lock"):
        _evict(directory, needed, limit)
        yield


class _Folder(NamedTuple):
    """A folder of the cache; ``final`` is its name when it is complete, ``used`` when it was opened last."""

    path: Path
    final: Path
    n_bytes: int
    used: float


def _evict(directory: Path, needed: int, limit: int) -> None:
    folders = sorted(_folders(directory), key=lambda folder: folder.used)
    excess = sum(folder.n_bytes for folder in folders) + needed - limit
    chosen = []
    with ExitStack() as locks:
        for folder in folders:
            if excess > 0 and _is_free(folder, locks):
                chosen.append(folder)
                excess -= folder.n_bytes
        if excess > 0:
            raise _no_room(directory, needed, limit, excess)
        for folder in chosen:
            _delete(folder)


def _folders(directory: Path) -> Iterator[_Folder]:
    for path in directory.iterdir():
        name = _FOLDER.fullmatch(path.name)
        # others may rename and delete meanwhile
        with suppress(FileNotFoundError):
            if name and path.is_dir():
                sizes = [file.stat().st_size for file in path.iterdir()]
                meta = path / META
                used = meta.stat().st_mtime if meta.exists() else 0.0
                yield _Folder(path, directory / (name[1] or name[2]), sum(sizes), used)


def _is_free(folder: _Folder, locks: ExitStack) -> bool:
    """Whether nobody fills or uses the folder; if so, nobody can begin to while ``locks`` are held."""
    if folder.path == folder.final:
        return _locked(turn_file(folder.final), "a", locks) and _locked(folder.path / META, "r+", locks)
    # another host's locks may not be seen here
    ours = folder.path.name.startswith(unfinished(folder.final))
    return ours and _locked(turn_file(folder.final), "a", locks)


def _locked(path: Path, mode: str, locks: ExitStack) -> bool:
    try:
        file = locks.enter_context(path.open(mode))
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _delete(folder: _Folder) -> None:
    """Delete a folder that is locked; whoever interrupts this leaves no folder that looks complete."""
    doomed = folder.path
    if doomed == folder.final:
        doomed = folder.path.rename(new_part(folder.final))
    shutil.rmtree(doomed)


def _no_room(directory: Path, needed: int, limit: int, excess: int) -> StoreError:
    wanted, allowed, enough = (ByteSize(n).human_readable() for n in (needed, limit, limit + excess))
    return StoreError(
        describe(
            "the cache is full, and what it holds is in use; nothing was deleted",
            where=str(directory),
            expected=f"room for {wanted} within training.cache_limit, {allowed}",
            actual=f"with what is in use it would be {enough} ({limit + excess} bytes)",
            fix="raise training.cache_limit to that, or wait for the jobs that use the other folders",
        )
    )
