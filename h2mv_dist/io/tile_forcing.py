"""The forcing of a tile's land cells, block by block, each [cell, time, var].

It is read along the chunks of the source, so that a pass over time reads each of them once; what was read is
cut into the blocks that are asked for. A tile that is small enough is kept, and read once for all passes.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from typing import Any, Final, TypeVar

import numpy as np

from h2mv_dist.grid import Period, Tile
from h2mv_dist.io.source import Source
from h2mv_dist.spec import Float32Array

KEPT_BYTES: Final = 16 * 2**20
"""A tile whose forcing is no larger than this (some ten years) is kept while the tile is worked on. Longer
ones are read again for each pass, so that memory does not grow with the period."""

_T = TypeVar("_T")


class TileForcing:
    """Forcing of one tile over a period; nothing is read before the first block is asked for.

    Attributes:
        parts: what is read at once, one after the other.
        keeps: whether what was read stays in memory.
    """

    def __init__(self, source: Source, tile: Tile, period: Period, block_days: int) -> None:
        self.source, self.tile, self.period, self.block_days = source, tile, period, block_days
        self.parts = tuple(source.time_blocks(period, block_days))
        # two parts are in memory in any case: one is used up while the next one is read
        self.keeps = self._packed(period.n_days) <= max(KEPT_BYTES, 2 * self._packed(self._longest.n_days))
        self._kept: dict[Period, Float32Array] = {}
        self._ahead: Future[Any] | None = None

    def blocks(self, n_days: int) -> Iterator[Float32Array]:
        """The first ``n_days`` days in blocks of ``block_days``; the next is read while one is used.

        Raises:
            DataError: a land cell has no finite value.
            StoreError: the store cannot be read.
        """
        lengths = [min(self.block_days, n_days - first) for first in range(0, n_days, self.block_days)]
        return one_ahead(recut(map(self._part, self.parts), lengths), self._note)

    def require_readable(self) -> None:
        """Raise what has become of the block that is read ahead, if that has failed by now.

        Raises:
            DataError, StoreError: as :meth:`blocks`.
        """
        if self._ahead is not None and self._ahead.done():
            self._ahead.result()

    def begins(self, period: Period) -> bool:
        """Whether :meth:`blocks` can give the days of a period."""
        return self.period.start == period.start and period.stop <= self.period.stop

    @property
    def n_bytes(self) -> int:
        """Projected peak of what is in memory at once."""
        part = self._packed(self._longest.n_days)
        held = self._packed(self.period.n_days) if self.keeps else 2 * part
        # a box with its sea, as stored and decoded
        box = 2 * self._bytes(prod(self.tile.shape), self._longest.n_days)
        joined = 2 * self._packed(min(self.block_days, self.period.n_days))
        # what chunks that are larger than that box take on their way
        return held + box + joined + self.source.bytes_beyond(self.tile, self._longest)

    @property
    def n_bytes_left(self) -> int:
        """Projected bytes that are still in memory while the last block is used."""
        days = self.period.n_days if self.keeps else self._longest.n_days
        return self._packed(days) + self._packed(min(self.block_days, self.period.n_days))

    def _note(self, ahead: Future[Any]) -> None:
        self._ahead = ahead

    def _part(self, part: Period) -> Float32Array:
        if part in self._kept:
            return self._kept[part]
        values = self.source.read_land_forcing(self.tile, part)
        if self.keeps:
            self._kept[part] = values
        return values

    @property
    def _longest(self) -> Period:
        return max(self.parts, key=lambda part: part.n_days)

    def _packed(self, n_days: int) -> int:
        return self._bytes(int(self.source.grid.mask[self.tile.slices].sum()), n_days)

    def _bytes(self, cells: int, n_days: int) -> int:
        return cells * n_days * len(self.source.forcing) * np.dtype(np.float32).itemsize


def recut(parts: Iterable[Float32Array], lengths: Iterable[int]) -> Iterator[Float32Array]:
    """Cut consecutive parts [cell, time, var] anew; each part is held until it is used up.

    >>> parts = np.split(np.arange(5).reshape(1, 5, 1), [3], axis=1)
    >>> [block.ravel().tolist() for block in recut(parts, [2, 2, 1])]
    [[0, 1], [2, 3], [4]]
    """
    following = iter(parts)
    rest = next(following)
    for length in lengths:
        pieces, wanted = [], length
        while wanted > rest.shape[1]:
            pieces.append(rest)
            wanted -= rest.shape[1]
            rest = next(following)
        pieces.append(rest[:, :wanted])
        rest = rest[:, wanted:]
        yield _joined([piece for piece in pieces if piece.shape[1]])


def _joined(pieces: list[Float32Array]) -> Float32Array:
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)


def one_ahead(items: Iterator[_T], begun: Callable[[Future[Any]], None]) -> Iterator[_T]:
    """The same items; while one is used, a thread makes the next one, of which ``begun`` is told."""
    with ThreadPoolExecutor(1, "h2mv-ahead") as pool:
        waiting = pool.submit(next, items, None)
        while (item := waiting.result()) is not None:
            waiting = pool.submit(next, items, None)
            begun(waiting)
            yield item
