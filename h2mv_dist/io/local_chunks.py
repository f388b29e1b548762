"""Chunks of arrays on a file system, read one after the other by the thread that asks for them.

zarr passes each chunk from its event loop to a thread and back, once to read it and once to unpack it, which
takes longer than the work itself where chunks are small (``python -m benchmarks staging``). Only the plainest
arrays are read here: numbers, no shards, no filters, at most one codec that packs. All others, and all other
stores, are left to zarr.
"""

from collections.abc import Callable
from itertools import product
from typing import Any, Final, NamedTuple

import numpy as np
import xarray as xr
import zarr
from numcodecs import get_codec
from numpy.typing import NDArray
from xarray.backends import BackendArray
from xarray.core import indexing
from zarr.storage import LocalStore

_PACKING: Final = frozenset({"blosc", "zstd", "gzip"})
"""Codecs of format 3 that numcodecs knows by the same name, and unpacks without being told how."""
_NUMBERS: Final = "fiu"
AT_ONCE: Final = "chunks_at_once"
"""Entry of a variable's encoding: how many of its chunks are in memory at a time while it is read."""

Decode = Callable[[bytes], Any]


def with_fast_reads(variable: xr.Variable, array: zarr.Array[Any] | zarr.Group) -> xr.Variable:
    """A lazy variable over the same array, whose chunks are read here where they can be.

    Args:
        variable: as xarray opened it.
        array: what it was opened from.
    """
    assert isinstance(array, zarr.Array), "variables are arrays"
    codec = _codec(array)
    if codec is None:
        return variable
    lazy = indexing.LazilyIndexedArray(_LocalArray(array, codec, variable.dtype))
    return xr.Variable(variable.dims, lazy, variable.attrs, {**variable.encoding, AT_ONCE: 1})


class _Codec(NamedTuple):
    """How the bytes of a chunk become numbers.

    Attributes:
        decode: unpacks them.
        dtype: of the unpacked bytes.
        order: of the axes in them.
    """

    decode: Decode
    dtype: np.dtype[Any]
    order: Any


def _codec(array: zarr.Array[Any]) -> _Codec | None:
    """The codec of an array that is plain enough, else None."""
    if type(array.store_path.store) is not LocalStore or array.dtype.kind not in _NUMBERS or not array.shape:
        return None
    metadata: Any = array.metadata
    if metadata.fill_value is None:
        return None
    if metadata.zarr_format == 2:
        packing = metadata.compressor
        decode = packing.decode if packing is not None else _as_it_is
        return None if metadata.filters else _Codec(decode, metadata.dtype.to_native_dtype(), metadata.order)
    return _codec_of_format_3([codec.to_dict() for codec in metadata.codecs], array.dtype)


def _codec_of_format_3(codecs: list[dict[str, Any]], dtype: np.dtype[Any]) -> _Codec | None:
    """First what makes numbers bytes, then at most one codec that packs them."""
    (first, *packing), names = codecs, [codec["name"] for codec in codecs]
    if first["name"] != "bytes" or not set(names[1:]) <= _PACKING or len(packing) > 1:
        return None
    decode = get_codec({"id": names[1]}).decode if packing else _as_it_is
    endian = first.get("configuration", {}).get("endian", "little")
    return _Codec(decode, dtype.newbyteorder("<" if endian == "little" else ">"), "C")


def _as_it_is(data: bytes) -> bytes:
    return data


class _LocalArray(BackendArray):
    def __init__(self, array: zarr.Array[Any], codec: _Codec, dtype: np.dtype[Any]) -> None:
        self.shape, self.dtype = array.shape, dtype
        self._chunks, self._codec = array.chunks, codec
        self._fill, self._key = array.metadata.fill_value, array.metadata.encode_chunk_key
        store: Any = array.store_path.store
        self._folder = store.root / array.store_path.path

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(
            key, self.shape, indexing.IndexingSupport.BASIC, self._select
        )

    def _select(self, key: tuple[int | slice, ...]) -> NDArray[Any]:
        """Positions, and slices of positive steps."""
        bounds = [
            k.indices(size) if isinstance(k, slice) else (k, k + 1, 1)
            for k, size in zip(key, self.shape, strict=True)
        ]
        values = self._box([range(start, max(start, stop)) for start, stop, _ in bounds])
        return values[tuple(slice(None, None, k.step) if isinstance(k, slice) else 0 for k in key)]

    def _box(self, box: list[range]) -> NDArray[Any]:
        values = np.empty([len(along) for along in box], self.dtype)
        touched = [range(b.start // c, -(-b.stop // c)) for b, c in zip(box, self._chunks, strict=True)]
        for position in product(*touched) if values.size else ():
            firsts = [p * c for p, c in zip(position, self._chunks, strict=True)]
            common = [
                range(max(b.start, f), min(b.stop, f + c))
                for b, f, c in zip(box, firsts, self._chunks, strict=True)
            ]
            ours = tuple(_shifted(part, along.start) for part, along in zip(common, box, strict=True))
            theirs = tuple(_shifted(part, first) for part, first in zip(common, firsts, strict=True))
            chunk = self._chunk(position)
            values[ours] = self._fill if chunk is None else chunk[theirs]
        return values

    def _chunk(self, position: tuple[int, ...]) -> NDArray[Any] | None:
        """The values of a chunk, or None if it was never written."""
        try:
            data = (self._folder / self._key(position)).read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None
        values = np.frombuffer(self._codec.decode(data), self._codec.dtype)
        return values.reshape(self._chunks, order=self._codec.order)


def _shifted(part: range, origin: int) -> slice:
    return slice(part.start - origin, part.stop - origin)
