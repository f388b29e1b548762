"""The sink: writes every shard of a cube once and whole, by one owner.

Axes are those of :mod:`h2mv_dist.io.cube`; values come packed, [member, (time,) land cell].
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import zarr
from zarr.abc.store import Store

from h2mv_dist.config import StorageOptions
from h2mv_dist.errors import DataError, StoreError, describe
from h2mv_dist.grid import BoolArray, Period, Tile
from h2mv_dist.io.cube import MONTHLY, ONE_OWNER, CubeLayout, Form, lengths, monthly_arrays
from h2mv_dist.io.cube_store import require_cube
from h2mv_dist.io.shards import Where, write_shards
from h2mv_dist.io.stores import ZarrArray, displayed, explained, open_store, with_shape
from h2mv_dist.spec import Budget, Float32Array, largest_gap

ARRAYS_AT_ONCE: Final = 4
"""Arrays that are written at a time: an object store takes most of a put's time to answer."""
VALUES_AT_ONCE: Final = 2**14
"""Values whose mean and spread over members are worked out at a time."""


@dataclass(frozen=True)
class Sink:
    """Writes whole shards into a cube that exists; one tile may be written by one process only."""

    layout: CubeLayout
    arrays: Mapping[str, ZarrArray]
    url: str
    options: StorageOptions

    @staticmethod
    def open(url: str, layout: CubeLayout, options: StorageOptions) -> "Sink":
        """Open the cube at ``url``.

        Raises:
            StoreError: there is no finished cube of exactly this layout.
        """
        require_cube(url, layout, options)
        return Sink.over(open_store(url, options, read_only=False), url, layout, options)

    @staticmethod
    def over(store: Store, url: str, layout: CubeLayout, options: StorageOptions) -> "Sink":
        """A sink over an open store; ``url`` and ``options`` only serve to explain its failures."""
        names = (*layout.daily, *layout.static, *layout.constants)
        with explained(url, options):
            return Sink(layout, _opened(store, layout, names), url, options)

    def write(self, tile: Tile, period: Period, values: Mapping[str, Float32Array]) -> str:
        """Write all daily variables of one tile and time block.

        Args:
            tile: whole shards; ragged only at the grid's edge.
            period: one shard long, from a multiple of ``shard_days`` on; shorter only at the cube's end.
            values: variable -> [member, time, cell], the tile's land cells in row-major order.

        Returns:
            SHA-256 over the stored values, for the receipt.

        Raises:
            StoreError: tile or period would write part of a shard, or the store fails.
            DataError: ``values`` have other names, shapes or types.
        """
        return self._put(_writable(self.layout, tile, period), values)

    def write_static(self, tile: Tile, values: Mapping[str, Float32Array]) -> str:
        """Write all static variables of one tile, each [member, cell]; see :meth:`write`."""
        return self._put(_writable(self.layout, tile), values)

    def write_month(self, tile: Tile, month: Period, values: Mapping[str, Float32Array]) -> str:
        """Write the means of one month of one tile, each [member, cell]; see :meth:`write`."""
        return self._put(_writable(self.layout, tile, month=month), values)

    def write_constants(self, values: Mapping[str, Float32Array]) -> str:
        """Write all constants, each [member]; see :meth:`write`."""
        return self._put(_writable(self.layout), values)

    def write_stored(
        self,
        boxes: Iterable[Float32Array],
        *,
        tile: Tile | None = None,
        period: Period | None = None,
        month: Period | None = None,
    ) -> str:
        """Write what the arrays of another cube hold of this part, as :meth:`StoredValues.read` gives it.

        Args:
            boxes: one for each array, sea included; taken one by one, so that few are in memory.
            tile, period, month: the part, as for :meth:`StoredValues.checksum`.

        Returns:
            SHA-256 over the stored values; the same for the same values, however they were made.

        Raises:
            StoreError: tile or period would write part of a shard, or the store fails.
        """
        return self._stored(_writable(self.layout, tile, period, month), boxes)

    def _put(self, region: "_Region", values: Mapping[str, Float32Array]) -> str:
        _check_values(region, values, len(self.layout.members))
        return self._stored(region, _boxes(self.layout, region, values))

    def _stored(self, region: "_Region", boxes: Iterable[Float32Array]) -> str:
        with explained(self.url, self.options):
            return _checksum(self._written(region, boxes))

    def _written(self, region: "_Region", boxes: Iterable[Float32Array]) -> Iterator[Float32Array]:
        """Write some arrays at a time, each handed on in its order, so that no more are in memory."""
        writing: deque[Future[None]] = deque()
        with ThreadPoolExecutor(ARRAYS_AT_ONCE, "h2mv-shards") as pool:
            for name, box in zip(region.arrays(self.layout), boxes, strict=True):
                if len(writing) == ARRAYS_AT_ONCE:
                    writing.popleft().result()
                writing.append(pool.submit(self._write_array, name, region.where, box))
                yield box
            for array in writing:
                array.result()

    def _write_array(self, name: str, where: Where, box: Float32Array) -> None:
        write_shards(self.arrays[name], where, box)


@dataclass(frozen=True)
class StoredValues:
    """What a cube holds, read back to be compared with receipts, or to be copied."""

    layout: CubeLayout
    arrays: Mapping[str, ZarrArray]
    url: str
    options: StorageOptions

    @staticmethod
    def open(url: str, layout: CubeLayout, options: StorageOptions) -> "StoredValues":
        """Open the arrays of the cube at ``url``.

        Raises:
            StoreError: there is none, or it cannot be reached.
        """
        store = open_store(url, options, read_only=True)
        names = (*layout.daily, *layout.static, *layout.constants)
        with explained(url, options):
            return StoredValues(layout, _opened(store, layout, names), url, options)

    def checksum(
        self, *, tile: Tile | None = None, period: Period | None = None, month: Period | None = None
    ) -> str:
        """What the matching ``write`` returned, worked out again from the stored values.

        With a tile and a period: daily variables; with a tile and a month: their means over it; with a tile
        only: static ones; with nothing: constants.

        Raises:
            DamagedError: what is stored does not match its own checksums.
            StoreError: the region is not made of whole shards, or cannot be read.
        """
        return _checksum(self._read(_writable(self.layout, tile, period, month)))

    def read(
        self, *, tile: Tile | None = None, period: Period | None = None, month: Period | None = None
    ) -> Iterator[Float32Array]:
        """What each array holds of a part, in the order of the layout, sea included; read one by one.

        The part is named as for :meth:`checksum`; its period may be any days of the cube.

        Raises:
            DamagedError: what is stored does not match its own checksums.
            StoreError: it cannot be read.
        """
        return self._read(_region(self.layout, tile, period, month))

    def _read(self, region: "_Region") -> Iterator[Float32Array]:
        for name in region.arrays(self.layout):
            with explained(self.url, self.options):
                box = _read(self.arrays[name], region.where, self.url)
            yield box

    def closure(self, tile: Tile, period: Period, budget: Budget) -> "Closure":
        """How the budget closes on the days of a period, over members and land cells.

        The cube's first day has none before it, and is left out.

        Raises:
            DamagedError: what is stored does not match its own checksums.
            StoreError: it cannot be read.
        """
        first = period.first - self.layout.period.first
        days = slice(max(first - 1, 0), first + period.n_days)
        land = self.layout.grid.mask[tile.slices]
        with explained(self.url, self.options):
            parts = {n: _read(self.arrays[n], (..., days, *tile.slices), self.url) for n in budget.terms}
        daily = {n: np.asarray(p[..., land], np.float64) for n, p in parts.items()}
        gaps = budget.gaps(daily)
        errors = {n: rounding_error(bits) for n, bits in self.layout.rounded.items() if n in budget.terms}
        allowed = budget.tolerance(daily, errors)
        return Closure(largest_gap(gaps), not (gaps > allowed).any())


class Closure(NamedTuple):
    """The largest gap of a budget, mm, and whether all gaps are within ``Budget.tolerance``."""

    residual: float
    closes: bool


class DamagedError(StoreError):
    """Stored values do not match their own checksums."""


class _Region(NamedTuple):
    """Part of a cube that one call writes or reads.

    ``where`` is the same for arrays with and without a member axis, which comes first; ``land`` is the tile's
    mask [*space]; ``packed`` the shape of its values after the member axis; ``suffix`` of the arrays' names.
    """

    names: tuple[str, ...]
    where: Where
    packed: tuple[int, ...]
    land: BoolArray | None
    suffix: str = ""

    def arrays(self, layout: CubeLayout) -> Iterator[str]:
        """Names of the arrays, in the order of the layout."""
        for name in self.names:
            yield from (array + self.suffix for array in layout.arrays_of(name))


def _writable(
    layout: CubeLayout, tile: Tile | None = None, period: Period | None = None, month: Period | None = None
) -> _Region:
    """A part that is made of whole shards."""
    if period is not None:
        _check_whole_time_shard(layout, period)
    return _region(layout, tile, period, month)


def _region(layout: CubeLayout, tile: Tile | None, period: Period | None, month: Period | None) -> _Region:
    if tile is None:
        return _Region(layout.constants, (...,), (), None)
    _check_tile(layout, tile)
    land = layout.grid.mask[tile.slices]
    n_land = int(land.sum())
    if month is not None:
        index = layout.period.months().index(month)
        return _Region(layout.monthly, (..., index, *tile.slices), (n_land,), land, MONTHLY)
    if period is None:
        return _Region(layout.static, (..., *tile.slices), (n_land,), land)
    first = period.first - layout.period.first
    days = slice(first, first + period.n_days)
    return _Region(layout.daily, (..., days, *tile.slices), (period.n_days, n_land), land)


def _boxes(layout: CubeLayout, region: _Region, values: Mapping[str, Float32Array]) -> Iterator[Float32Array]:
    """What each array of a region holds of its variable's values [member, ...]."""
    for name in region.names:
        for form in layout.forms_of(name).values():
            formed = _formed(values[name], form)
            kept = rounded(formed, layout.rounded[name]) if name in layout.rounded else formed
            yield kept if region.land is None else _expanded(kept, region.land)


def _formed(values: Float32Array, form: Form) -> Float32Array:
    """Members as they are, or their mean or spread."""
    match form:
        case "members":
            return values
        case "mean":
            return _over_members(values, np.mean)
        case "spread":
            return _over_members(values, np.std)


def _over_members(values: Float32Array, statistic: Callable[..., Any]) -> Float32Array:
    """In float64 and in the order of the members, so that the same values give the same bytes."""
    found = np.empty(values.shape[1:], np.float32)
    columns = values.reshape(len(values), found.size)
    # so few at a time that what lies between two steps stays in the processor's cache; of even parts none is
    # a single value of many, whose members NumPy would add in another order
    n_parts = -(-found.size // VALUES_AT_ONCE) or 1
    parts = (np.array_split(columns, n_parts, axis=1), np.array_split(found.reshape(-1), n_parts))
    for part, place in zip(*parts, strict=True):
        place[...] = statistic(part.astype(np.float64), axis=0)
    return found


def rounded(values: Float32Array, kept_bits: int) -> Float32Array:
    """Values to the nearest that has so many bits of mantissa, ties to even; what is not finite stays.

    >>> rounded(np.array([1.0, 0.1, np.nan], np.float32), 2)
    array([1.     , 0.09375,     nan], dtype=float32)
    """
    dropped = np.uint32(23 - kept_bits)
    bits = values.view(np.uint32)
    odd = (bits >> dropped) & np.uint32(1)
    half = (np.uint32(1) << (dropped - np.uint32(1))) - np.uint32(1)
    nearest = ((bits + half + odd) >> dropped) << dropped
    return np.where(np.isfinite(values), nearest.view(np.float32), values)


def rounding_error(kept_bits: int) -> float:
    """The largest relative one of values with so many bits of mantissa."""
    return 2.0 ** -(kept_bits + 1)


def _expanded(packed: Float32Array, land: BoolArray) -> Float32Array:
    """Land cells [..., cell] put back into their tile [..., *space]; NaN over sea."""
    full = np.full((*packed.shape[:-1], land.size), np.nan, np.float32)
    full[..., np.flatnonzero(land)] = packed
    # one NaN for all: a chunk of nothing else is not stored, and is read as the fill value
    np.copyto(full, np.float32(np.nan), where=np.isnan(full))
    return full.reshape(*packed.shape[:-1], *land.shape)


def _checksum(blocks: Iterable[Float32Array]) -> str:
    """SHA-256 over the little-endian row-major bytes of each array, in the order of the layout."""
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(np.ascontiguousarray(block, "<f4").data)
    return digest.hexdigest()


def _read(array: ZarrArray, where: Where, url: str) -> Float32Array:
    try:
        return np.asarray(array[where], np.float32)
    # What zarr raises where the CRC-32C of a chunk or of a shard's index does not match.
    except ValueError as error:
        raise DamagedError(
            describe(
                "stored values are damaged",
                where=f"{displayed(url)}, array {array.name}, {where}",
                expected="chunks that match their checksums",
                actual=str(error),
                fix="h2mv-dist verify-cube --repair writes what is damaged anew",
            )
        ) from error


def _opened(store: Store, layout: CubeLayout, names: Iterable[str]) -> dict[str, ZarrArray]:
    """The arrays of these variables, in the order of the layout, and as long as the layout says.

    Days that are appended are written before readers are shown them.
    """
    found = [array_name for name in names for array_name in layout.arrays_of(name)]
    found += monthly_arrays(layout)
    mode: Literal["r", "r+"] = "r" if store.read_only else "r+"
    return {
        name: _as_long(zarr.open_array(store, path=name, mode=mode, zarr_format=3), layout) for name in found
    }


def _as_long(array: ZarrArray, layout: CubeLayout) -> ZarrArray:
    metadata = array.async_array.metadata
    axes = zip(metadata.dimension_names or (), metadata.shape, strict=True)
    grown = lengths(layout.period)
    shape = tuple(grown.get(str(axis), size) for axis, size in axes)
    return with_shape(array, shape)


def _check_tile(layout: CubeLayout, tile: Tile) -> None:
    shape = layout.grid.shape
    if len(tile.start) == len(shape) and all(
        0 <= start < stop <= size and start % shard == 0 and (stop % shard == 0 or stop == size)
        for start, stop, shard, size in zip(tile.start, tile.stop, layout.shard, shape, strict=True)
    ):
        return
    raise StoreError(
        describe(
            f"tile would write part of a shard: {ONE_OWNER}",
            where=f"tile {tile.name} of a grid of shape {shape}",
            expected=f"start and stop at multiples of the shard {layout.shard}, or stop at the grid's edge",
            actual=f"{tile.start} to {tile.stop}",
            fix="take tiles from grid.tiles(layout.tile)",
        )
    )


def _check_whole_time_shard(layout: CubeLayout, period: Period) -> None:
    """Make sure that ``period`` is exactly one shard long, or the rest of the cube."""
    first = period.first - layout.period.first
    rest = layout.period.n_days - first
    if first >= 0 and first % layout.shard_days == 0 and period.n_days == min(layout.shard_days, rest):
        return
    raise StoreError(
        describe(
            f"period would write part of a shard: {ONE_OWNER}",
            where=f"period {period} of a cube of {layout.period}",
            expected=f"{layout.shard_days} days, or the rest of the cube, from a multiple of that on",
            actual=f"{period.n_days} days from day {first} on",
            fix="take periods from layout.period.blocks(layout.shard_days)",
        )
    )


def _check_values(region: _Region, values: Mapping[str, Float32Array], n_members: int) -> None:
    if set(values) != set(region.names):
        missing = sorted(set(region.names) - set(values))
        unknown = sorted(set(values) - set(region.names))
        raise DataError(f"values for the cube lack {missing} and hold unknown {unknown}")
    shape = (n_members, *region.packed)
    for name, array in values.items():
        if array.shape != shape or array.dtype != np.float32:
            raise DataError(
                describe(
                    "values do not fit the part of the cube they are written to",
                    where=name,
                    expected=f"float32 [member, (time,) land cell] of shape {shape}",
                    actual=f"{array.dtype} of shape {array.shape}",
                    fix="pass the tile's land cells, packed, for every member",
                )
            )
