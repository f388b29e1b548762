"""Chunks read through obstore: the same bytes, and s3fs wherever obstore cannot be sure or fails."""

import uuid
from typing import Any

import numpy as np
import pytest
import zarr

from h2mv_dist.config import StorageOptions
from h2mv_dist.io.stores import open_store
from tests.conftest import ProxiedS3, S3Server

VALUES = np.arange(20, dtype=np.float32)


@pytest.fixture
def url(s3_server: S3Server, s3_bucket: str) -> str:
    """An array of ten chunks, of which the last is not stored, being empty."""
    url = f"{s3_bucket}/{uuid.uuid4().hex}"
    store = open_store(url, s3_server.options, read_only=False)
    array = zarr.create_array(store, shape=(20,), chunks=(2,), dtype=np.float32, fill_value=19.0)
    array[:18] = VALUES[:18]
    return url


def _read(url: str, options: StorageOptions) -> tuple[Any, Any]:
    store = open_store(url, options, read_only=True)
    return store, np.asarray(zarr.open_array(store, mode="r"))


def test_chunks_come_through_obstore(url: str, s3_server: S3Server) -> None:
    store, found = _read(url, s3_server.options)
    np.testing.assert_array_equal(found[:18], VALUES[:18])
    np.testing.assert_array_equal(found[18:], 19.0)
    assert store._worked


def test_credentials_of_the_environment(
    url: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = s3_server.options["s3"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", str(known["key"]))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", str(known["secret"]))
    store, found = _read(url, StorageOptions({"s3": {"endpoint_url": s3_server.endpoint}}))
    np.testing.assert_array_equal(found[:18], VALUES[:18])
    assert store._worked


@pytest.mark.parametrize("fault", ["unavailable", "reset", "truncate"])
def test_what_fails_is_read_by_s3fs(url: str, fault_proxy: ProxiedS3, fault: Any) -> None:
    fault_proxy.proxy.plan(fault, times=3, method="GET", match="/c/")
    store, found = _read(url, fault_proxy.options)
    np.testing.assert_array_equal(found[:18], VALUES[:18])
    assert fault_proxy.proxy.faults[fault] == 3
    # nothing that came while some failed may be taken for missing later
    np.testing.assert_array_equal(np.asarray(zarr.open_array(store, mode="r"))[:18], VALUES[:18])
    assert store._worked


def test_a_way_that_keeps_failing_is_left(url: str, fault_proxy: ProxiedS3) -> None:
    store: Any = open_store(url, fault_proxy.options, read_only=True)
    array = zarr.open_array(store, mode="r")
    for _ in range(8):
        assert store._direct is not None or not store._begun
        fault_proxy.proxy.plan("unavailable", times=1, method="GET", match="/c/0")
        assert array[0] == 0.0
    assert store._direct is None
    np.testing.assert_array_equal(np.asarray(zarr.open_array(store, mode="r"))[:18], VALUES[:18])


def test_options_that_only_s3fs_understands(url: str, s3_server: S3Server) -> None:
    options = StorageOptions({"s3": {**s3_server.options["s3"], "default_block_size": 2**20}})
    store, found = _read(url, options)
    assert isinstance(store, zarr.storage.FsspecStore)
    np.testing.assert_array_equal(found[:18], VALUES[:18])
