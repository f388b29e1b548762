"""Whole shards coded without zarr's pipeline: zarr reads them, and finds what it would have written."""

from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, BloscShuffle, BytesCodec, Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from h2mv_dist.io.shards import Where, write_shards

COMPRESSORS = (
    ZstdCodec(level=1),
    BloscCodec(cname="lz4", clevel=5, shuffle=BloscShuffle.shuffle, typesize=4),
)


def new_array(
    store: MemoryStore,
    shape: tuple[int, ...],
    shards: tuple[int, ...],
    chunks: tuple[int, ...],
    coded: int = 0,
) -> Any:
    return zarr.create_array(
        store,
        shape=shape,
        shards=shards,
        chunks=chunks,
        dtype="f4",
        fill_value=np.nan,
        compressors=(COMPRESSORS[coded], Crc32cCodec()),
    )


def noise(shape: tuple[int, ...], seed: int = 0, sea: float = 0.5) -> Any:
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < sea, np.nan, rng.normal(size=shape)).astype(np.float32)


@st.composite
def axes(draw: st.DrawFn) -> tuple[int, int, int]:
    """Cells, and those of a shard and of a chunk: the last shard and chunk may end beyond the axis."""
    chunk = draw(st.integers(1, 4))
    return draw(st.integers(1, 11)), chunk * draw(st.integers(1, 3)), chunk


@settings(deadline=None)
@given(
    st.lists(axes(), min_size=1, max_size=4),
    st.integers(0, 1),
    st.integers(0, 9),
    st.sampled_from([0, 0.5, 0.99]),
)
def test_zarr_reads_what_it_would_have_written(
    sizes: list[tuple[int, int, int]], coded: int, seed: int, sea: float
) -> None:
    shape, shards, chunks = zip(*sizes, strict=True)
    ours, theirs = MemoryStore(), MemoryStore()
    values = noise(shape, seed, sea)
    write_shards(new_array(ours, shape, shards, chunks, coded), (...,), values)
    new_array(theirs, shape, shards, chunks, coded)[...] = values
    np.testing.assert_array_equal(zarr.open_array(ours, mode="r")[...], values)
    assert sorted(ours._store_dict) == sorted(theirs._store_dict)
    lengths = [{key: len(value) for key, value in s._store_dict.items()} for s in (ours, theirs)]
    assert lengths[0] == lengths[1], "the same chunks, in another order"


@pytest.mark.parametrize(
    "where",
    [(slice(2, 4),), (..., slice(6, 7)), (slice(2, 4), ..., slice(3, 6)), (slice(None), 2, slice(3, 6))],
)
def test_a_part_replaces_its_shards_only(where: Where) -> None:
    array = new_array(MemoryStore(), (5, 3, 7), (2, 1, 3), (1, 1, 3))
    expected = noise((5, 3, 7))
    array[...] = expected
    expected[where] = noise(expected[where].shape, seed=1)
    write_shards(array, where, expected[where])
    np.testing.assert_array_equal(array[...], expected)


def test_a_shard_of_nothing_is_not_stored() -> None:
    store = MemoryStore()
    array = new_array(store, (4, 4), (2, 4), (2, 2))
    array[...] = 1.0
    write_shards(array, (slice(0, 2),), np.full((2, 4), np.nan, np.float32))
    assert sorted(store._store_dict) == ["c/1/0", "zarr.json"]
    assert np.isnan(array[:2]).all()


@pytest.mark.parametrize(
    ("where", "shape"),
    [
        ((slice(1, 3),), (2, 4)),
        ((slice(0, 1),), (1, 4)),
        ((slice(0, 4, 2),), (4, 4)),
        ((slice(None, None, -1),), (4, 4)),
        ((slice(4, 6),), (2, 4)),
        ((-1,), (4,)),
        ((4,), (4,)),
        ((...,), (2, 8)),
        ((slice(0, 2),), (4, 2)),
    ],
)
def test_what_is_no_whole_shard_is_refused(where: Where, shape: tuple[int, ...]) -> None:
    array = new_array(MemoryStore(), (4, 4), (2, 4), (2, 2))
    array[...] = 1.0
    with pytest.raises(ValueError, match="no whole shards"):
        write_shards(array, where, noise(shape))
    assert (array[...] == 1.0).all()


@pytest.mark.parametrize(
    "made",
    [
        {"fill_value": 0},
        {"dtype": "f8"},
        {"compressors": None},
        {"serializer": BytesCodec(endian="big")},
        {"shards": {"shape": (4,), "index_location": "start"}},
    ],
    ids=lambda made: next(iter(made)),
)
def test_arrays_of_another_kind_are_refused(made: dict[str, Any]) -> None:
    ours: dict[str, Any] = {
        "shape": (4,),
        "shards": (4,),
        "chunks": (2,),
        "dtype": "f4",
        "fill_value": np.nan,
    }
    array = zarr.create_array(MemoryStore(), **ours | made)
    with pytest.raises(ValueError, match="not as this package makes them"):
        write_shards(array, (...,), noise((4,)))


@pytest.mark.parametrize("position", [3, -10])
def test_a_flipped_bit_is_seen(position: int) -> None:
    store = MemoryStore()
    write_shards(new_array(store, (4,), (4,), (2,)), (...,), noise((4,), sea=0.0))
    damaged = bytearray(store._store_dict["c/0"].to_bytes())
    damaged[position] ^= 1
    store._store_dict["c/0"] = type(store._store_dict["c/0"]).from_bytes(bytes(damaged))
    with pytest.raises(ValueError, match="checksum"):
        zarr.open_array(store, mode="r")[...]


def test_an_array_without_shards_is_written_too() -> None:
    array = zarr.create_array(MemoryStore(), shape=(), dtype="f4", fill_value=np.nan)
    write_shards(array, (...,), np.array(2.5, np.float32))
    assert array[...] == 2.5
