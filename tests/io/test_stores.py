"""One suite over folders, memory and a real object store."""

import os
import pickle
import threading
import traceback
from pathlib import Path

import numpy as np
import pytest
import zarr

from h2mv_dist.config import StorageOptions
from h2mv_dist.errors import StoreError
from h2mv_dist.io import stores
from tests.conftest import SECRET, Place, S3Server, storage_options

NO_OPTIONS = StorageOptions()


def test_an_object_comes_back_whole(place: Place) -> None:
    url = stores.join(place.url, "records", "a.json")
    assert not stores.exists(url, place.options)
    stores.put_object(url, b"one", place.options)
    stores.put_object(url, b"two", place.options)
    assert stores.get_object(url, place.options) == b"two"
    assert stores.exists(url, place.options)


def test_listing_is_recursive_relative_and_sorted(place: Place) -> None:
    assert stores.list_objects(place.url, place.options) == ()
    for name in ("b", "a/2", "a/1"):
        stores.put_object(stores.join(place.url, name), name.encode(), place.options)
    assert stores.list_objects(place.url, place.options) == ("a/1", "a/2", "b")
    assert stores.list_objects(stores.join(place.url, "a"), place.options) == ("1", "2")


def test_deleting_a_tree_leaves_its_neighbours(place: Place) -> None:
    for name in ("cube/a", "cube/deep/b", "cube_too/c"):
        stores.put_object(stores.join(place.url, name), b"x", place.options)
    stores.delete_tree(stores.join(place.url, "cube"), place.options)
    stores.delete_tree(stores.join(place.url, "never"), place.options)
    assert stores.list_objects(place.url, place.options) == ("cube_too/c",)
    assert not stores.exists(stores.join(place.url, "cube", "a"), place.options)


def test_a_zarr_array_written_through_a_store_is_read_back(place: Place) -> None:
    values = np.arange(12.0).reshape(3, 4)
    writable = stores.open_store(place.url, place.options, read_only=False)
    zarr.create_array(writable, data=values, chunks=(2, 2))
    again = zarr.open_array(stores.open_store(place.url, place.options, read_only=True), mode="r")
    np.testing.assert_array_equal(again[...], values)


def test_a_read_only_store_refuses_writes(place: Place) -> None:
    store = stores.open_store(place.url, place.options, read_only=True)
    with pytest.raises(ValueError, match="read-only"):
        zarr.create_array(store, shape=(1,), dtype="f4")


def test_the_fingerprint_follows_content_below_its_prefixes(place: Place) -> None:
    def put(name: str, data: bytes) -> None:
        stores.put_object(stores.join(place.url, name), data, place.options)

    def fingerprint() -> str:
        return stores.content_fingerprint(place.url, place.options, ("rn", "prec"))

    put("rn/0", b"one")
    first = fingerprint()
    put("fapar/0", b"elsewhere")
    assert fingerprint() == first
    put("rn/0", b"two")
    changed = fingerprint()
    assert changed != first
    put("prec/1", b"more")
    assert fingerprint() != changed


def test_a_missing_object_says_where_and_what_to_do(place: Place) -> None:
    with pytest.raises(StoreError, match=r"nothing is stored there\n.*never(.|\n)*check the URL"):
        stores.get_object(stores.join(place.url, "never"), place.options)


def test_readers_never_see_a_part_of_a_local_object(tmp_path: Path) -> None:
    url = str(tmp_path / "deep" / "pointer")
    versions = {bytes([letter]) * 200_000 for letter in b"ab"}
    stores.put_object(url, next(iter(versions)), NO_OPTIONS)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for version in versions:
                stores.put_object(url, version, NO_OPTIONS)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    seen = {stores.get_object(url, NO_OPTIONS) for _ in range(100)}
    stop.set()
    for writer in writers:
        writer.join()
    assert seen <= versions
    assert stores.list_objects(str(tmp_path), NO_OPTIONS) == ("deep/pointer",)
    assert len(os.listdir(tmp_path / "deep")) == 1


def test_a_file_url_and_its_path_are_one_place(tmp_path: Path) -> None:
    stores.put_object(f"file://{tmp_path}/a", b"x", NO_OPTIONS)
    assert stores.get_object(str(tmp_path / "a"), NO_OPTIONS) == b"x"


def test_a_failed_local_put_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "child").touch()
    with pytest.raises(StoreError, match="the store failed"):
        stores.put_object(str(tmp_path / "taken"), b"x", NO_OPTIONS)
    assert os.listdir(tmp_path) == ["taken"]


def test_an_unknown_protocol_is_refused() -> None:
    for attempt in (stores.exists, stores.list_objects, stores.get_object):
        with pytest.raises(StoreError, match="nope"):
            attempt("nope://bucket", NO_OPTIONS)
    with pytest.raises(StoreError, match="nope"):
        stores.open_store("nope://bucket", NO_OPTIONS, read_only=True)


def test_a_missing_bucket_is_told_from_an_empty_one(s3_server: S3Server) -> None:
    empty = s3_server.new_bucket()
    assert stores.list_objects(empty, s3_server.options) == ()
    with pytest.raises(StoreError, match="nothing is stored there"):
        stores.put_object("s3://no-such-bucket-here/a", b"x", s3_server.options)
    with pytest.raises(StoreError, match="nothing is stored there"):
        stores.get_object("s3://no-such-bucket-here/a", s3_server.options)


@pytest.mark.parametrize(
    ("key", "secret"), [("testkey", "wrong-secret-canary"), ("wrong-key-canary", "wrong-secret-canary")]
)
def test_wrong_credentials_are_named_but_never_shown(s3_server: S3Server, key: str, secret: str) -> None:
    url = s3_server.new_bucket()
    options = storage_options(s3_server.endpoint, key=key, secret=secret)
    actions = (stores.get_object, stores.list_objects)
    for action in actions:
        with pytest.raises(
            StoreError, match=r"access to the store was refused(.|\n)*storage_options"
        ) as caught:
            action(stores.join(url, "a"), options)
        assert_silent(caught.value, secret, "wrong-key-canary")
    with pytest.raises(StoreError, match="refused") as caught:
        stores.put_object(stores.join(url, "a"), b"x", options)
    assert_silent(caught.value, secret, "wrong-key-canary")


def test_an_unreachable_endpoint_is_named_but_no_secret_is() -> None:
    options = storage_options("http://127.0.0.1:9")
    with pytest.raises(StoreError, match=r"cannot be reached(.|\n)*endpoint_url") as caught:
        stores.put_object("s3://bucket/a", b"x", options)
    assert_silent(caught.value, SECRET)
    assert SECRET not in repr(options)
    assert SECRET not in repr(stores.open_store("s3://bucket/a", options, read_only=True))


def test_secrets_in_urls_and_paths_are_removed(tmp_path: Path) -> None:
    token = "token" + "-canary"  # so that a traceback, which quotes this line, does not hold it
    options = StorageOptions({"s3": {"client_kwargs": {"aws_session_token": token}}})
    with pytest.raises(StoreError) as caught:
        stores.get_object(str(tmp_path / token), options)
    assert_silent(caught.value, token)
    assert stores.displayed("s3://me:pass-canary@host/b") == "s3://***@host/b"


def test_errors_that_are_not_the_stores_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(TypeError), stores.explained(str(tmp_path), NO_OPTIONS):
        raise TypeError("a mistake of ours")


def assert_silent(error: StoreError, *secrets: str) -> None:
    """No secret in the text, its traceback, or the pickle that travels to another process."""
    assert error.__cause__ is None
    assert error.__context__ is None
    shown = "".join(traceback.format_exception(error))
    told = f"{error!r}{shown}".encode() + pickle.dumps(error)
    assert not [secret for secret in secrets if secret.encode() in told]
