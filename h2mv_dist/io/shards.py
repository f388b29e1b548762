"""Whole shards, coded in the thread that writes them.

zarr 3.1 runs tasks on its one event loop for each codec of each chunk, under the interpreter's lock, which
computing needs, too: twice the processor time of the codecs themselves. It also merges each shard with the
one that is stored, even where all of it is written: a useless request, and a torn shard would stop its own
replacement. What is stored is the same, but for the order of the chunks in a shard: the ``sharding_indexed``
codec of the Zarr 3 specification, its index at the end.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from types import EllipsisType
from typing import Any, Final, NamedTuple, TypeAlias

import numcodecs
import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.common import concurrent_map
from zarr.core.sync import sync
from zarr.storage import StorePath

from h2mv_dist.io.stores import ZarrArray
from h2mv_dist.spec import Float32Array

Where: TypeAlias = tuple[slice | int | EllipsisType, ...]
"""Part of an array; axes that are left out are taken whole."""

_ABSENT: Final = (2**64 - 1, 2**64 - 1)
"""What the index says of a chunk of nothing but the fill value."""
_INDEX: Final = numcodecs.get_codec({"id": "crc32c"})
_INDEX_CODECS: Final = (BytesCodec(), Crc32cCodec())


def write_shards(array: ZarrArray, where: Where, values: Float32Array) -> None:
    """Write part of an array; its shards replace those that are stored.

    Args:
        array: of float32, filled with NaN, with shards as zarr makes them or without, in a store that can be
            written.
        where: slices from an edge of a shard to another one, or to the array's end; or shards of one cell.
        values: of the shape of that part.

    Raises:
        ValueError: these do not fit together, or the array is another one than that.
    """
    if array.shards is None:
        array[where] = values
        return
    coding = _Coding.of(array)
    axes = _axes(where, array.shape)
    _check_whole(axes, array, values)
    part = values.reshape(list(map(len, axes)))
    shards = [
        (array.store_path / _key(array, axes, origin), coding(shard))
        for origin, shard in _boxes(part, part.shape, array.shards)
    ]
    sync(concurrent_map(shards, _replace, zarr.config.get("async.concurrency")))


class _Coding(NamedTuple):
    """How the shards of an array become bytes."""

    shard: tuple[int, ...]
    chunk: tuple[int, ...]
    codecs: tuple[Any, ...]

    @staticmethod
    def of(array: ZarrArray) -> "_Coding":
        (sharding,) = array.async_array.metadata.codecs
        assert isinstance(sharding, ShardingCodec)
        assert array.shards is not None
        first, *compressing = sharding.codecs
        known = sharding.index_codecs == _INDEX_CODECS and sharding.index_location.value == "end"
        filled = array.dtype == np.float32 and np.isnan(array.fill_value)
        if not (known and filled and first == BytesCodec() and compressing):
            raise ValueError(
                f"array {array.name} is not as this package makes them: {sharding}, {array.dtype}"
            )
        return _Coding(array.shards, array.chunks, tuple(_codec(c.to_dict()) for c in compressing))

    def __call__(self, values: Float32Array) -> bytes | None:
        """The shard of these values, which may end before it does; None if there is nothing to store."""
        chunks, index, length = [], [], 0
        for _, inside in _boxes(values, self.shard, self.chunk):
            if np.isnan(inside).all():
                index.append(_ABSENT)
                continue
            coded = self._filled(inside)
            for codec in self.codecs:
                coded = codec.encode(coded)
            chunks.append(coded)
            index.append((length, len(coded)))
            length += len(coded)
        return b"".join((*chunks, _INDEX.encode(np.array(index, "<u8")))) if chunks else None

    def _filled(self, inside: Float32Array) -> Any:
        """A chunk whole and in one piece, where the array ends within it, too."""
        if inside.shape == self.chunk:
            return np.ascontiguousarray(inside, "<f4")
        whole = np.full(self.chunk, np.nan, "<f4")
        whole[tuple(map(slice, inside.shape))] = inside
        return whole


def _codec(stored: dict[str, Any]) -> Any:
    """The codec of numcodecs for what a store's metadata says of it."""
    configuration = dict(stored.get("configuration", {}))
    if "shuffle" in configuration:
        configuration["shuffle"] = ("noshuffle", "shuffle", "bitshuffle").index(configuration["shuffle"])
    return numcodecs.get_codec({"id": stored["name"], **configuration})


def _boxes(
    values: Float32Array, shape: Sequence[int], step: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], Float32Array]]:
    """Boxes of ``step`` cells that fill ``shape``, row by row: where each begins, and the values it has."""
    for origin in product(*(range(0, n, size) for n, size in zip(shape, step, strict=True))):
        yield origin, values[tuple(slice(o, o + size) for o, size in zip(origin, step, strict=True))]


def _axes(where: Where, shape: tuple[int, ...]) -> list[range]:
    """Cells of a part along each axis."""
    given = list(where) if ... in where else [*where, ...]
    rest = given.index(...)
    given[rest : rest + 1] = [...] * (len(shape) - len(given) + 1)
    return [_cells(axis, size) for axis, size in zip(given, shape, strict=True)]


def _cells(axis: slice | int | EllipsisType, size: int) -> range:
    match axis:
        case int():
            return range(size)[axis : axis + 1]
        case slice():
            return range(size)[axis]
        case _:
            return range(size)


def _check_whole(axes: list[range], array: ZarrArray, values: Float32Array) -> None:
    """What is left of a shard would be lost."""
    assert array.shards is not None
    whole = all(
        len(axis) > 0
        and axis.step == 1
        and axis.start % shard == 0
        and (axis.stop % shard == 0 or axis.stop == size)
        for axis, shard, size in zip(axes, array.shards, array.shape, strict=True)
    )
    fitting = [n for n in values.shape if n != 1] == [len(axis) for axis in axes if len(axis) != 1]
    if not (whole and fitting):
        shape = f"values of shape {values.shape}"
        raise ValueError(f"{shape} are no whole shards {array.shards} of {array.name} at {axes}")


def _key(array: ZarrArray, axes: list[range], origin: tuple[int, ...]) -> str:
    """Name of the shard that begins at this cell of a part."""
    assert array.shards is not None
    starts = (axis.start + offset for axis, offset in zip(axes, origin, strict=True))
    return array.metadata.encode_chunk_key(
        tuple(start // size for start, size in zip(starts, array.shards, strict=True))
    )


async def _replace(place: StorePath, shard: bytes | None) -> None:
    if shard is None:
        await place.delete()
    else:
        await place.set(default_buffer_prototype().buffer.from_bytes(shard))
