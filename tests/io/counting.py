"""A file system in memory that counts how often each chunk is read."""

import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from h2mv_dist.config import StorageOptions
from tests.conftest import Place


class CountingFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """fsspec's memory file system, which also counts what is read and how much at once."""

    protocol = "counting"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    reads: ClassVar[Counter[str]] = Counter()
    at_once: ClassVar[int] = 0
    most_at_once: ClassVar[int] = 0
    lock: ClassVar[Any] = threading.Lock()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = super()._strip_protocol(path.replace("counting://", "memory://"))
        return stripped

    def cat_file(self, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        kind = type(self)
        with self.lock:
            kind.reads[self._strip_protocol(path)] += 1
            kind.at_once += 1
            kind.most_at_once = max(kind.most_at_once, kind.at_once)
        time.sleep(0.002)
        try:
            return bytes(super().cat_file(path, start, end, **kwargs))
        finally:
            with self.lock:
                kind.at_once -= 1


@contextmanager
def counting_place() -> Iterator[Place]:
    """An empty store that counts its reads."""
    fsspec.register_implementation("counting", CountingFileSystem, clobber=True)
    CountingFileSystem.store.clear()
    yield Place(f"counting://{uuid.uuid4().hex}", StorageOptions())
    CountingFileSystem.store.clear()


def forget_reads() -> None:
    CountingFileSystem.reads.clear()
    CountingFileSystem.most_at_once = 0


def chunk_reads(group: str) -> dict[str, int]:
    """How often each chunk of a group's data was read."""
    return {path: n for path, n in CountingFileSystem.reads.items() if f"/{group}/data/c/" in path}
