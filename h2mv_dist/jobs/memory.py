"""A process's memory, how the C library keeps what was freed, and what Python searches for garbage.

All of that decides how fast results are made.
"""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import psutil

_TRIM_THRESHOLD: Final = -1
_MMAP_THRESHOLD: Final = -3
_ARENA_MAX: Final = -8
"""Numbers of glibc's settings of these names (malloc.h)."""

KEPT_BYTES: Final = 4 * 2**20
"""What each arena of a worker keeps of what was freed."""
RANK_BYTES: Final = 2**31 - 1
"""What each arena of a rank keeps: the next step needs as much, and mapping it anew takes up to a tenth."""
LARGE_BYTES: Final = 1 * 2**20
"""Arrays from this size on are mapped one by one, so that they leave no holes; smaller ones come each day."""
_ARENAS: Final = 2


def keep_freed_memory(most: int = KEPT_BYTES) -> None:
    """Let results of a day take what results of the day before have left, whichever thread freed it.

    Nannies have their workers give back all that is freed, and with it glibc maps every array above 128 KiB
    anew, which costs models up to half of their speed. On other C libraries nothing is changed.

    Args:
        most: bytes that each arena keeps.
    """
    if (set_option := getattr(ctypes.CDLL(None), "mallopt", None)) is None:
        return
    for name, value in (
        (_MMAP_THRESHOLD, LARGE_BYTES),
        (_TRIM_THRESHOLD, most),
        (_ARENA_MAX, _ARENAS),
    ):
        set_option(name, value)


def own_bytes(pid: int) -> int:
    """Memory of a process's own; mapped files, which others share and the kernel may drop, do not count."""
    try:
        memory = psutil.Process(pid).memory_info()
    except psutil.NoSuchProcess:
        return 0
    return int(memory.rss - getattr(memory, "shared", 0))


def give_back_freed_memory() -> None:
    """Give back what was kept, before something else needs the room."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


@contextmanager
def loading() -> Iterator[None]:
    """Import within: Python does not search for garbage meanwhile, which takes a fifth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def set_apart_what_is_loaded() -> None:
    """Have Python search for garbage only among what is made from now on.

    Modules, compiled code and models are half a million objects; to search them takes a quarter of a second,
    a rank after some ten steps. What is garbage by now goes first, whatever was set apart before.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
