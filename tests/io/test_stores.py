"""One suite over folders, memory and a real object store."""

import errno
import fcntl
import json
import multiprocessing
import os
import pickle
import threading
import traceback
import uuid
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import s3fs
import zarr

from h2mv_dist.config import StorageOptions
from h2mv_dist.errors import StoreError
from h2mv_dist.io import s3, stores
from tests.conftest import SECRET, Place, ProxiedS3, S3Server, new_place, storage_options
from tests.fault_proxy import Fault
from tests.seaweed import READERS_KEY

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


def test_a_folder_is_listed_without_what_lies_deeper(place: Place) -> None:
    assert stores.list_folder(place.url, place.options) == ((), ())
    for name in ("b", "a/2", "a/deep/1", "c/1"):
        stores.put_object(stores.join(place.url, name), b"x", place.options)
    assert stores.list_folder(place.url, place.options) == (("b",), ("a", "c"))
    assert stores.list_folder(stores.join(place.url, "a"), place.options) == (("2",), ("deep",))


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


def test_who_may_only_read_is_told_that_rights_are_missing(s3_server: S3Server, s3_bucket: str) -> None:
    url, readers = stores.join(s3_bucket, "readers", "a"), storage_options(s3_server.endpoint, READERS_KEY)
    stores.put_object(url, b"old", s3_server.options)
    found = stores.get_versioned(url, readers)
    assert found is not None
    refused = r"access to the store was refused(.|\n)*given the rights"
    with pytest.raises(StoreError, match=refused):
        stores.put_object(url, b"new", readers)
    with pytest.raises(StoreError, match=refused):
        stores.swap_object(url, b"new", found.version, readers)
    with pytest.raises(StoreError, match=refused):
        stores.delete_tree(url, readers)
    assert stores.get_object(url, readers) == b"old"


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


# -------------------- a store that fails for a moment


@pytest.fixture
def url(s3_bucket: str) -> str:
    """An empty place in the object store."""
    return f"{s3_bucket}/{uuid.uuid4().hex}"


PASSING: tuple[Fault, ...] = ("unavailable", "reset", "lose")


@pytest.mark.parametrize("fault", PASSING)
def test_every_operation_outlasts_a_fifth_of_failures(fault_proxy: ProxiedS3, url: str, fault: Fault) -> None:
    options = fault_proxy.options
    names = [f"{i:02d}" for i in range(10)]
    fault_proxy.proxy.share({fault: 0.2})
    for name in names:
        stores.put_object(stores.join(url, "some", name), name.encode(), options)
        assert stores.get_object(stores.join(url, "some", name), options) == name.encode()
        assert stores.exists(stores.join(url, "some", name), options)
        assert not stores.exists(stores.join(url, "none", name), options)
        assert stores.list_objects(url, options)[-1] == f"some/{name}"
    before = stores.content_fingerprint(url, options, ("some",))
    assert stores.content_fingerprint(url, options, ("some",)) == before
    stores.delete_tree(url, options)
    assert stores.list_objects(url, options) == ()
    assert fault_proxy.proxy.faults[fault] >= 10


@pytest.mark.parametrize("fault", [*PASSING, "truncate"])
def test_a_zarr_array_outlasts_a_fifth_of_failures(fault_proxy: ProxiedS3, url: str, fault: Fault) -> None:
    values = np.arange(4096.0).reshape(64, 64)
    fault_proxy.proxy.share({fault: 0.2})
    writable = stores.open_store(url, fault_proxy.options, read_only=False)
    zarr.create_array(writable, data=values, chunks=(8, 8))
    copy = pickle.loads(pickle.dumps(stores.open_store(url, fault_proxy.options, read_only=True)))
    np.testing.assert_array_equal(zarr.open_array(copy, mode="r")[...], values)
    assert fault_proxy.proxy.faults[fault] >= 15


def test_all_requests_in_flight_outlast_an_outage(fault_proxy: ProxiedS3, url: str) -> None:
    """A quota for retries, as botocore's standard mode has one, gives up when many requests fail at once."""
    values = np.arange(160.0)
    options = changed(fault_proxy.options, config_kwargs={"max_pool_connections": 160})
    zarr.create_array(stores.open_store(url, options, read_only=False), data=values, chunks=(1,))
    array = zarr.open_array(stores.open_store(url, options, read_only=True), mode="r")
    fault_proxy.proxy.share({"unavailable": 0.5, "reset": 0.5})
    end = threading.Timer(2.0, fault_proxy.proxy.share, [{}])
    end.start()
    with zarr.config.set({"async.concurrency": 160}):
        np.testing.assert_array_equal(array[...], values)
    end.join()
    assert sum(fault_proxy.proxy.faults.values()) >= 150


def test_a_body_that_ends_early_is_read_again(fault_proxy: ProxiedS3, url: str) -> None:
    data = os.urandom(100_000)
    stores.put_object(url, data, fault_proxy.options)
    fault_proxy.proxy.plan("truncate", 2, "GET")
    assert stores.get_object(url, fault_proxy.options) == data
    assert fault_proxy.proxy.faults["truncate"] == 2
    assert fault_proxy.proxy.body_bytes[url.removeprefix("s3:/")] == len(data)


def test_a_silent_server_is_asked_again(fault_proxy: ProxiedS3, url: str) -> None:
    options = changed(fault_proxy.options, config_kwargs={"read_timeout": 0.5})
    fault_proxy.proxy.plan("stall", 2)
    stores.put_object(url, b"x", options)
    assert stores.get_object(url, options) == b"x"
    assert fault_proxy.proxy.faults["stall"] == 2


def test_a_put_whose_reply_is_lost_is_in_place(fault_proxy: ProxiedS3, url: str) -> None:
    fault_proxy.proxy.plan("lose", 3, "PUT")
    stores.put_object(url, b"new", fault_proxy.options)
    assert stores.get_object(url, fault_proxy.options) == b"new"
    assert fault_proxy.proxy.faults["lose"] == 3


def test_objects_that_a_bulk_delete_left_are_an_error(
    fault_proxy: ProxiedS3, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store answers 200 and lists them; s3fs passes over that."""
    sent = s3fs.S3FileSystem._call_s3
    failures = iter(["InternalError", "SlowDown", "AccessDenied"])

    async def refuse(filesystem: object, method: str, *args: object, **kwargs: object) -> object:
        if method != "delete_objects":
            return await sent(filesystem, method, *args, **kwargs)
        errors = [{"Key": "a", "Code": next(failures), "Message": "no"}]
        return {"Errors": errors, "ResponseMetadata": {"HTTPStatusCode": 200}}

    stores.put_object(stores.join(url, "a"), b"x", fault_proxy.options)
    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", refuse)
    with pytest.raises(StoreError, match="access to the store was refused"):
        stores.delete_tree(url, fault_proxy.options)
    assert next(failures, None) is None


# -------------------- a store that goes on failing


def test_an_unreachable_endpoint_fails_within_seconds() -> None:
    options = changed(storage_options("http://127.0.0.1:9"), patience=1e6)  # the test's own limit is shorter
    with pytest.raises(StoreError, match="cannot be reached"):
        zarr_of("s3://bucket/a", options)


@pytest.mark.parametrize("broken", ["credentials", "key", "bucket"])
def test_a_refusal_is_not_repeated(fault_proxy: ProxiedS3, url: str, broken: str) -> None:
    options = storage_options(fault_proxy.endpoint, secret="wrong") if broken == "credentials" else None
    place = "s3://no-such-bucket-here/a" if broken == "bucket" else url
    with pytest.raises(StoreError):
        stores.get_object(place, options or fault_proxy.options)
    asked = fault_proxy.proxy.requests
    assert asked == {"GET": 1}


def test_patience_ends_and_no_layer_multiplies_it(
    fault_proxy: ProxiedS3, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = 0
    attempt = s3.PatientS3FileSystem._attempt

    async def counted(
        filesystem: s3.PatientS3FileSystem, method: str, *args: object, **kwargs: Any
    ) -> object:
        nonlocal attempts
        attempts += url.endswith(kwargs.get("Key", "-"))
        return await attempt(filesystem, method, *args, **kwargs)

    monkeypatch.setattr(s3.PatientS3FileSystem, "_attempt", counted)
    # an attempt takes a quarter of a second, a pause a tenth, on any machine and whatever else it does
    monkeypatch.setattr(s3, "time", SimpleNamespace(monotonic=lambda: attempts / 4))
    monkeypatch.setattr(s3, "_pause", lambda attempt: 0.1)
    fault_proxy.proxy.share({"unavailable": 1.0})
    with pytest.raises(StoreError, match=r"kept failing(.|\n)*patience") as caught:
        stores.put_object(url, b"x", changed(fault_proxy.options, patience=1.5))
    assert not caught.value.full
    assert attempts == 6
    assert 0 < fault_proxy.proxy.requests["PUT"] <= attempts


def test_retries_that_a_user_gives_replace_ours(fault_proxy: ProxiedS3, url: str) -> None:
    options = changed(fault_proxy.options, config_kwargs={"retries": {"total_max_attempts": 2}})
    fault_proxy.proxy.share({"unavailable": 1.0})
    with pytest.raises(StoreError, match="kept failing"):
        stores.put_object(url, b"x", options)
    assert fault_proxy.proxy.requests["PUT"] == 2


def test_a_bucket_that_does_not_answer_is_not_taken_for_absent(
    fault_proxy: ProxiedS3, s3_bucket: str
) -> None:
    options = changed(fault_proxy.options, patience=0.2)
    assert stores.exists(s3_bucket, options)
    assert not stores.exists("s3://no-such-bucket-here", options)
    fault_proxy.proxy.share({"unavailable": 1.0})
    with pytest.raises(StoreError, match="kept failing"):
        stores.exists(s3_bucket, options)


# -------------------- a store without room


def test_a_full_object_store_is_told_from_a_failing_one(fault_proxy: ProxiedS3, url: str) -> None:
    fault_proxy.proxy.plan("full", 1, "PUT")
    with pytest.raises(StoreError, match=r"the store is full(.|\n)*free space") as caught:
        stores.put_object(url, b"x", fault_proxy.options)
    assert pickle.loads(pickle.dumps(caught.value)).full
    assert fault_proxy.proxy.requests["PUT"] == 1


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_from_a_failing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(reason, os.strerror(reason))

    stores.put_object(str(tmp_path / "a"), b"old", NO_OPTIONS)
    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(StoreError, match="the store is full") as caught:
        stores.put_object(str(tmp_path / "a"), b"new", NO_OPTIONS)
    assert caught.value.full
    assert os.listdir(tmp_path) == ["a"]
    assert stores.get_object(str(tmp_path / "a"), NO_OPTIONS) == b"old"


def test_other_failures_are_not_for_want_of_room(tmp_path: Path) -> None:
    with pytest.raises(StoreError) as caught:
        stores.get_object(str(tmp_path / "never"), NO_OPTIONS)
    assert not caught.value.full


# -------------------- compare and swap


def test_a_swap_needs_the_current_version(place: Place) -> None:
    url, options = stores.join(place.url, "state"), place.options
    assert stores.get_versioned(url, options) is None
    assert stores.swap_object(url, b"early", "a version of something else", options) is None
    assert stores.get_versioned(url, options) is None
    first = stores.swap_object(url, b"one", None, options)
    assert first is not None
    assert stores.get_versioned(url, options) == (b"one", first)
    second = stores.swap_object(url, b"two", first, options)
    assert second not in {None, first}
    for stale in (None, first):
        assert stores.swap_object(url, b"three", stale, options) is None
    assert stores.get_versioned(url, options) == (b"two", second)
    assert stores.list_objects(place.url, options) == ("state",)


def test_a_missing_bucket_is_not_a_missing_version(s3_server: S3Server) -> None:
    with pytest.raises(StoreError, match="nothing is stored there"):
        stores.get_versioned("s3://no-such-bucket-here/a", s3_server.options)
    for expected in (None, '"0"'):
        with pytest.raises(StoreError, match="nothing is stored there"):
            stores.swap_object("s3://no-such-bucket-here/a", b"x", expected, s3_server.options)


@pytest.mark.parametrize("times", [1, 3])
def test_a_swap_whose_reply_is_lost_has_won(fault_proxy: ProxiedS3, url: str, times: int) -> None:
    options = fault_proxy.options
    version = None
    for data in (b"one", b"two"):
        fault_proxy.proxy.plan("lose", times, "PUT")
        version = stores.swap_object(url, data, version, options)
        assert version is not None
        assert stores.get_versioned(url, options) == (data, version)
    assert fault_proxy.proxy.faults["lose"] == 2 * times


def test_a_swap_that_lost_while_its_reply_was_lost_says_so(fault_proxy: ProxiedS3, url: str) -> None:
    first = stores.swap_object(url, b"one", None, fault_proxy.options)
    current = stores.swap_object(url, b"theirs", first, fault_proxy.options)
    fault_proxy.proxy.plan("lose", 1, "PUT")
    assert stores.swap_object(url, b"ours", first, fault_proxy.options) is None
    assert stores.get_versioned(url, fault_proxy.options) == (b"theirs", current)
    assert fault_proxy.proxy.faults["lose"] == 1


@pytest.mark.parametrize("kind", ["folder", "s3", "faulty"])
def test_racing_writers_lose_no_step(
    kind: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Two processes of two threads each count up; "faulty" answers a fifth of the requests with 503."""
    place = new_place("folder" if kind == "folder" else "s3", request, tmp_path_factory)
    options, steps = place.options, 8
    if kind == "faulty":
        proxied: ProxiedS3 = request.getfixturevalue("fault_proxy")
        proxied.proxy.share({"unavailable": 0.2})
        options = proxied.options
    count = partial(count_up_in_threads, stores.join(place.url, "counter"), options, steps)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as processes:
        list(processes.map(count, ("a", "b")))
    found = stores.get_versioned(stores.join(place.url, "counter"), place.options)
    assert found is not None
    assert json.loads(found.data)["count"] == 2 * 2 * steps
    if kind == "faulty":
        assert proxied.proxy.faults["unavailable"] >= 15


def count_up_in_threads(url: str, options: StorageOptions, steps: int, name: str) -> None:
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda i: count_up(url, options, steps, f"{name}{i}"), range(2)))


def count_up(url: str, options: StorageOptions, steps: int, name: str) -> None:
    done = 0
    while done < steps:
        found = stores.get_versioned(url, options)
        count = 0 if found is None else json.loads(found.data)["count"]
        data = json.dumps({"count": count + 1, "by": f"{name} {uuid.uuid4()}"}).encode()
        version = stores.swap_object(url, data, None if found is None else found.version, options)
        done += version is not None


def test_without_locks_a_local_swap_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr("fcntl.flock", refuse)
    first = stores.swap_object(str(tmp_path / "a"), b"one", None, NO_OPTIONS)
    assert first is not None
    assert stores.swap_object(str(tmp_path / "a"), b"two", None, NO_OPTIONS) is None
    assert stores.swap_object(str(tmp_path / "a"), b"two", first, NO_OPTIONS) is not None


def test_a_lock_that_is_never_free_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "a")
    first = stores.swap_object(url, b"one", None, NO_OPTIONS)
    monkeypatch.setattr(stores, "_LOCK_SECONDS", 0.1)
    with (tmp_path / ".h2mv-lock-a").open() as stopped:
        fcntl.flock(stopped, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match="does not let go"):
            stores.swap_object(url, b"two", first, NO_OPTIONS)
    assert stores.get_object(url, NO_OPTIONS) == b"one"
    assert stores.swap_object(url, b"two", first, NO_OPTIONS) is not None


def test_one_object_is_deleted_as_a_tree_is(place: Place) -> None:
    for name in ("a", "ab"):
        stores.put_object(stores.join(place.url, name), b"x", place.options)
    stores.delete_tree(stores.join(place.url, "a"), place.options)
    assert stores.list_objects(place.url, place.options) == ("ab",)


def changed(options: StorageOptions, config_kwargs: object = None, **others: object) -> StorageOptions:
    """The same options of S3 but for these."""
    s3 = dict(options["s3"])
    if isinstance(config_kwargs, dict) and isinstance(s3["config_kwargs"], dict):
        s3["config_kwargs"] = s3["config_kwargs"] | config_kwargs
    return StorageOptions({"s3": s3 | others})


def zarr_of(url: str, options: StorageOptions) -> object:
    with stores.explained(url, options):
        return zarr.open_group(stores.open_store(url, options, read_only=True), mode="r")


def assert_silent(error: StoreError, *secrets: str) -> None:
    """No secret in the text, its traceback, or the pickle that travels to another process."""
    assert error.__cause__ is None
    assert error.__context__ is None
    shown = "".join(traceback.format_exception(error))
    told = f"{error!r}{shown}".encode() + pickle.dumps(error)
    assert not [secret for secret in secrets if secret.encode() in told]
