"""Chunks on a file system, read without zarr: the same values for every box, and what is left to zarr."""

from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import xarray as xr
import zarr
from numcodecs import Blosc, Delta, Zlib
from xarray.backends import ZarrStore
from zarr.codecs import BloscCodec, BytesCodec, GzipCodec, TransposeCodec, ZstdCodec
from zarr.storage import LocalStore, MemoryStore

from h2mv_dist.io.local_chunks import AT_ONCE, with_fast_reads

DIMS: Final = ("time", "lat", "lon")
SHAPE, CHUNKS = (7, 5, 6), (3, 2, 4)
BOXES = (
    (slice(None), slice(None), slice(None)),
    (slice(2, 7), slice(1, 2), slice(3, 6)),
    (slice(6, 7), 4, slice(None, None, -1)),
    (slice(None, None, 2), slice(None, None, -2), 5),
    (slice(3, 3), slice(0, 9), slice(1, 4)),
    (slice(1, 4), [0, 3, 4], slice(2, 5)),
)
PLAIN: dict[str, dict[str, Any]] = {
    "2-blosc": {"zarr_format": 2, "compressors": Blosc()},
    "2-zlib": {"zarr_format": 2, "compressors": Zlib()},
    "2-unpacked": {"zarr_format": 2, "compressors": None},
    "2-fortran": {"zarr_format": 2, "order": "F"},
    "2-big-endian": {"zarr_format": 2, "dtype": ">f4"},
    "3-blosc": {"compressors": BloscCodec()},
    "3-zstd": {"compressors": ZstdCodec()},
    "3-gzip": {"compressors": GzipCodec()},
    "3-unpacked": {"compressors": None},
    "3-big-endian": {"compressors": None, "serializer": BytesCodec(endian="big")},
    "3-integers": {"dtype": "int16", "fill_value": -1},
}
LEFT: dict[str, dict[str, Any]] = {
    "2-filter": {"zarr_format": 2, "filters": [Delta("<f4")]},
    "2-no-fill-value": {"zarr_format": 2, "fill_value": None},
    "3-transposed": {"filters": [TransposeCodec(order=(2, 1, 0))]},
    "3-packed-twice": {"compressors": [ZstdCodec(), GzipCodec()]},
    "3-sharded": {"shards": (6, 4, 4)},
}


def opened(store: Any, options: dict[str, Any]) -> tuple[xr.Variable, xr.Variable]:
    """Lazy variables over an array of which some chunks were never written: xarray's, and ours."""
    given: dict[str, Any] = {"dtype": "float32", "fill_value": np.nan} | options
    names: dict[str, Any] = (
        {} if given.get("zarr_format") == 2 else {"dimension_names": ("time", "lat", "lon")}
    )
    group = zarr.create_group(store, zarr_format=given.pop("zarr_format", 3))
    array = group.create_array("data", shape=SHAPE, chunks=CHUNKS, **names, **given)
    array.attrs["_ARRAY_DIMENSIONS"] = list(DIMS)
    array[:6, :, :4] = np.arange(6 * 5 * 4).reshape(6, 5, 4)
    dataset = xr.open_dataset(ZarrStore(group), decode_cf=False, chunks=None, cache=False)
    variable = dataset.variables["data"]
    return variable, with_fast_reads(variable, group["data"])


@pytest.mark.parametrize("options", PLAIN.values(), ids=PLAIN.keys())
def test_plain_arrays_are_read_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    theirs, ours = opened(LocalStore(tmp_path), options)
    assert ours is not theirs
    assert (ours.dims, ours.dtype, ours.attrs, ours.encoding) == (
        theirs.dims,
        theirs.dtype,
        theirs.attrs,
        {**theirs.encoding, AT_ONCE: 1},
    )
    for box in BOXES:
        np.testing.assert_array_equal(ours[box].to_numpy(), theirs[box].to_numpy())


@pytest.mark.parametrize("options", LEFT.values(), ids=LEFT.keys())
def test_other_arrays_are_left_to_zarr(options: dict[str, Any], tmp_path: Path) -> None:
    theirs, ours = opened(LocalStore(tmp_path), options)
    assert ours is theirs


def test_other_stores_are_left_to_zarr() -> None:
    theirs, ours = opened(MemoryStore(), {})
    assert ours is theirs
