"""Stores: a URL and its options become a Zarr store, or the bytes of one object.

Plain paths and ``file://`` are local; every other URL goes through fsspec with the options of its protocol.
Requests to S3 that fail for a moment (overload, a broken connection, a lost reply) are repeated for about a
minute, see :mod:`h2mv_dist.io.s3`; the packages of other protocols have retries of their own. What fails all
the same leaves this module as a :class:`StoreError` that says what to do and holds no credentials.
"""

import errno
import fcntl
import hashlib
import os
import random
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import fsspec
import zarr
from fsspec.core import url_to_fs
from zarr.abc.store import Store
from zarr.storage import FsspecStore, LocalStore

from h2mv_dist.config import StorageOptions
from h2mv_dist.errors import StoreError, describe
from h2mv_dist.io.failures import is_store_failure, store_error
from h2mv_dist.io.fast_reads import with_fast_reads

ZarrArray: TypeAlias = "zarr.Array[zarr.core.metadata.ArrayV3Metadata]"
"""An array of Zarr's format 3."""

_TEMPORARY: Final = ".h2mv-part-"
"""Prefix of the local files that are not yet in place."""
_LOCK: Final = ".h2mv-lock-"
"""Prefix of the local files that are locked while an object is swapped; they stay."""
_HIDDEN: Final = (_TEMPORARY, _LOCK)
"""Local files that are no objects."""

_LOCK_SECONDS: Final = 60.0
_NO_LOCKS: Final = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK})
_S3: Final = frozenset({"s3", "s3a"})
_USER_INFO: Final = re.compile(r"(?<=://)[^/@]+@")


def open_store(url: str, options: StorageOptions, *, read_only: bool) -> Store:
    """The Zarr store at ``url``; nothing is read or written yet.

    Raises:
        StoreError: no package on this machine speaks the URL's protocol, or it refuses the options.
    """
    local = local_path(url)
    if local is not None:
        return LocalStore(local, read_only=read_only)
    _check_protocol(url)
    with explained(url, options):
        if _speaks_s3(url):
            place = _s3(url, options, asynchronous=True)
            store = FsspecStore(place.filesystem, path=place.path, read_only=read_only)
            return with_fast_reads(store, _given(url, options)) if read_only else store
        return FsspecStore.from_url(url, storage_options=_given(url, options), read_only=read_only)


def with_shape(array: ZarrArray, shape: tuple[int, ...]) -> ZarrArray:
    """The same array, taken to have this shape; what is stored says so later, or never."""
    metadata = replace(array.async_array.metadata, shape=shape)
    return zarr.Array(zarr.AsyncArray(metadata, array.store_path))


def put_object(url: str, data: bytes, options: StorageOptions) -> None:
    """Write one object whole: a reader sees the old bytes or the new ones, never a part.

    Raises:
        StoreError: the store cannot be reached or written.
    """
    with explained(url, options):
        local = local_path(url)
        if local is not None:
            _replace_file(local, data)
        else:
            place = _remote(url, options)
            place.filesystem.pipe_file(place.path, data)


def get_object(url: str, options: StorageOptions) -> bytes:
    """The bytes of one object.

    Raises:
        StoreError: there is no such object, or the store cannot be reached or read.
    """
    with explained(url, options):
        local = local_path(url)
        if local is not None:
            return local.read_bytes()
        place = _remote(url, options)
        return bytes(place.filesystem.cat_file(place.path))


class Versioned(NamedTuple):
    """The bytes of an object, and what tells them from other bytes it had or will have."""

    data: bytes
    version: str


def get_versioned(url: str, options: StorageOptions) -> Versioned | None:
    """One small object and its version for :func:`swap_object`, or None if there is none.

    Raises:
        StoreError: the store cannot be reached or read.
    """
    with explained(url, options):
        local = local_path(url)
        if local is not None:
            return _versioned_file(local)
        place = _remote(url, options)
        if _speaks_s3(url):
            found = place.filesystem.get_versioned(place.path)
            return None if found is None else Versioned(*found)
        return _versioned_elsewhere(place)


def swap_object(url: str, data: bytes, expected: str | None, options: StorageOptions) -> str | None:
    """Replace one small object only if its version still is ``expected``; of several writers one wins.

    On S3 this is one conditional PUT, race-free in every store that honours If-Match and If-None-Match (AWS,
    SeaweedFS, MinIO; Swift checks before it writes). On a file system it is a locked check and an atomic
    rename, race-free among all hosts for which ``flock`` works (NFS; Lustre mounted with ``flock``), else
    only nearly so. On any other store it is a check and a put: two writers at the same moment may both win.

    A reply that was lost is made up for by reading back, so ``data`` must differ from all other writers'.
    Overwritten in between, a write of our own is reported as lost, and its bytes were current for a while.

    Args:
        url: the object.
        data: its new bytes, unlike any others it ever had (an attempt number or random name among them).
        expected: version from :func:`get_versioned` or an earlier swap; None if it must not exist yet.
        options: credentials of the store.

    Returns:
        The new version, or None if somebody else was faster; then nothing was changed.

    Raises:
        StoreError: the store cannot be reached or written.
    """
    with explained(url, options):
        local = local_path(url)
        if local is not None:
            return _swap_file(local, data, expected)
        place = _remote(url, options)
        if _speaks_s3(url):
            swapped: str | None = place.filesystem.swap(place.path, data, expected)
            return swapped
        return _swap_elsewhere(place, data, expected)


def exists(url: str, options: StorageOptions) -> bool:
    """Whether there is an object at ``url``, or any object below it.

    Raises:
        StoreError: the store cannot be reached or read.
    """
    with explained(url, options):
        local = local_path(url)
        if local is not None:
            return local.exists()
        place = _remote(url, options)
        try:
            place.filesystem.info(place.path)  # exists() takes every failure for absence
        except FileNotFoundError:
            return False
        return True


def list_objects(url: str, options: StorageOptions) -> tuple[str, ...]:
    """Names of all objects below ``url``, relative to it, sorted; none where nothing was written.

    Raises:
        StoreError: the store cannot be reached or read.
    """
    with explained(url, options):
        local = local_path(url)
        return tuple(sorted(_names(local) if local is not None else _found_remote(url, options)))


class Listing(NamedTuple):
    """Names of the objects and of the folders right in a folder, sorted."""

    objects: tuple[str, ...]
    folders: tuple[str, ...]


def list_folder(url: str, options: StorageOptions) -> Listing:
    """What is right in a folder, without what lies deeper; nothing where nothing was written.

    Raises:
        StoreError: the store cannot be reached or read.
    """
    with explained(url, options):
        local = local_path(url)
        found = _in_local(local) if local is not None else _in_remote(_remote(url, options))
    folders = {name for name, is_folder in found.items() if is_folder}
    return Listing(tuple(sorted(found.keys() - folders)), tuple(sorted(folders)))


def delete_tree(url: str, options: StorageOptions) -> None:
    """Delete the object at ``url`` and every object below it; a bucket itself stays.

    Raises:
        StoreError: the store cannot be reached or written.
    """
    with explained(url, options):
        local = local_path(url)
        if local is not None:
            if local.is_dir():
                shutil.rmtree(local)
            else:
                local.unlink(missing_ok=True)
            return
        place = _remote(url, options)
        names = place.filesystem.find(place.path)
        if names:
            place.filesystem.rm(names)


def delete_unfinished(url: str, options: StorageOptions, older_than_seconds: float) -> None:
    """Delete what killed processes were writing below ``url``; only local files can be left unfinished.

    Raises:
        StoreError: the folder cannot be read or written.
    """
    with explained(url, options):
        local = local_path(url)
        if local is not None:
            latest = time.time() - older_than_seconds
            for path in local.rglob(f"{_TEMPORARY}*"):
                with suppress(FileNotFoundError):
                    if path.stat().st_mtime < latest:
                        path.unlink()


def join(url: str, *parts: str) -> str:
    """Extend a URL or path by names.

    >>> join("s3://bucket/cube/", "ledger", "0-10.json")
    's3://bucket/cube/ledger/0-10.json'
    >>> join("memory://", "cube")
    'memory://cube'
    """
    names = [part.strip("/") for part in parts if part.strip("/")]
    if not names:
        return url
    base = url if url.endswith("://") or url == "/" else url.rstrip("/") + "/"
    return base + "/".join(names)


def content_fingerprint(url: str, options: StorageOptions, prefixes: tuple[str, ...]) -> str:
    """SHA-256 over name, size and version (etag, or time of change) of the objects below ``prefixes``.

    It changes when any object changes and costs one listing, not a read.

    Raises:
        StoreError: the store cannot be reached or read.
    """
    digest = hashlib.sha256()
    for prefix in sorted(set(prefixes)):
        for name, version in sorted(_found(join(url, prefix), options).items()):
            digest.update(f"{prefix}\0{name}\0{version}\n".encode())
    return digest.hexdigest()


@contextmanager
def explained(url: str, options: StorageOptions) -> Iterator[None]:
    """Turn every failure of the store at ``url`` into a :class:`StoreError` without credentials.

    Errors that are not the store's (a wrong type, an error of this package) pass unchanged.
    """
    try:
        yield
    except Exception as error:
        if not is_store_failure(error):
            raise
        failure = store_error(displayed(url), options, error, local=local_path(url) is not None)
        try:
            raise failure from None
        finally:
            # "from None" only hides the original; pickled for another process it would still travel along,
            # with all that was sent to the store.
            failure.__context__ = None


def local_path(url: str) -> Path | None:
    """The path a URL names on this machine, or None for any other kind of store.

    >>> local_path("file:///data/cube"), local_path("s3://bucket")
    (PosixPath('/data/cube'), None)
    """
    if url.startswith("file://"):
        return Path(url.removeprefix("file://"))
    return None if "://" in url else Path(url)


def displayed(url: str) -> str:
    """``url`` as it may be shown: without a user name or password.

    >>> displayed("ftp://me:hush@host/cube")
    'ftp://***@host/cube'
    """
    return _USER_INFO.sub("***@", url)


def resolved(url: str) -> str:
    """One spelling for one place."""
    local = local_path(url)
    return url.rstrip("/") if local is None else str(local.resolve())


def public(url: str) -> str:
    """``url`` without what may be a secret: user, password, and the signature of a signed one."""
    return displayed(url).partition("?")[0] if "://" in url else url


class _Remote(NamedTuple):
    filesystem: Any
    path: str


def _remote(url: str, options: StorageOptions) -> _Remote:
    _check_protocol(url)
    if _speaks_s3(url):
        return _s3(url, options, asynchronous=False)
    return _Remote(*url_to_fs(url, **_given(url, options)))


def _s3(url: str, options: StorageOptions, *, asynchronous: bool) -> _Remote:
    from h2mv_dist.io.s3 import open_filesystem

    filesystem = open_filesystem(_given(url, options), asynchronous=asynchronous)
    return _Remote(filesystem, filesystem._strip_protocol(url))


def _speaks_s3(url: str) -> bool:
    return _protocol(url) in _S3


def _protocol(url: str) -> str:
    return str(fsspec.core.split_protocol(url)[0])


def _given(url: str, options: StorageOptions) -> dict[str, object]:
    return dict(options.get(_protocol(url), {}))


def _check_protocol(url: str) -> None:
    protocol = _protocol(url)
    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        raise StoreError(
            describe(
                "no package here speaks this protocol",
                where=displayed(url),
                expected="a plain path, or a URL such as s3://bucket/name",
                actual=f"{protocol}:// ({error})",
                fix="check the URL, or install the fsspec package for this protocol",
            )
        ) from error


def _replace_file(path: Path, data: bytes) -> None:
    with _written_beside(path, data) as temporary:
        temporary.replace(path)
    _sync_folder(path.parent)


@contextmanager
def _written_beside(path: Path, data: bytes) -> Iterator[Path]:
    """A file in the same folder with ``data``, safe on disk; it is gone afterwards unless it was renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{_TEMPORARY}{secrets.token_hex(8)}"
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _versioned_file(path: Path) -> Versioned | None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    return Versioned(data, _content_version(data))


def _content_version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _lock_of(path: Path) -> Path:
    """Beside the object; for metadata of a Zarr group beside that, or readers would take it for a member."""
    place = path.parent if path.name == "zarr.json" else path
    return place.parent / f"{_LOCK}{place.name}"


def _swap_file(path: Path, data: bytes, expected: str | None) -> str | None:
    # Written before the check: a folder that it has itself changed is looked up anew by an NFS client.
    with _locked(path), _written_beside(path, data) as temporary:
        if _version_in(_versioned_file(path)) != expected:
            return None
        temporary.replace(path)
        _sync_folder(path.parent)
    return _content_version(data)


def _version_in(found: Versioned | None) -> str | None:
    return None if found is None else found.version


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of ``path``; it ends with this process."""
    lock = _lock_of(path)
    lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _wait_for_lock(descriptor, path)
        yield
    finally:
        os.close(descriptor)


def _wait_for_lock(descriptor: int, path: Path) -> None:
    """Return with the lock, or without where the file system has none; never wait for ever."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return
            if error.errno not in {errno.EAGAIN, errno.EACCES, errno.EINTR}:
                raise
        if time.monotonic() > deadline:
            raise _lock_never_free(path)
        time.sleep(random.SystemRandom().uniform(0.002, 0.02))


def _lock_never_free(path: Path) -> StoreError:
    return StoreError(
        describe(
            "another process does not let go of this object",
            where=str(path),
            expected=f"the lock {_lock_of(path)} within {_LOCK_SECONDS:g} s",
            actual="still locked",
            fix="end the process that holds it (lsof names it); perhaps it was stopped",
        )
    )


def _versioned_elsewhere(place: _Remote) -> Versioned | None:
    try:
        data = bytes(place.filesystem.cat_file(place.path))
    except FileNotFoundError:
        return None
    return Versioned(data, _content_version(data))


def _swap_elsewhere(place: _Remote, data: bytes, expected: str | None) -> str | None:
    if _version_in(_versioned_elsewhere(place)) != expected:
        return None
    place.filesystem.pipe_file(place.path, data)
    return _content_version(data)


def _found(url: str, options: StorageOptions) -> dict[str, str]:
    """Relative name -> size and version of every object below ``url``."""
    with explained(url, options):
        local = local_path(url)
        return _found_local(local) if local is not None else _found_remote(url, options)


def _found_local(folder: Path) -> dict[str, str]:
    files = {name: os.stat(folder / name) for name in _names(folder)}
    return {name: f"{s.st_size}:{s.st_mtime_ns}" for name, s in files.items()}


def _names(folder: Path) -> Iterator[str]:
    """Of all files below a folder; a ledger of years has so many that nothing else is asked of them."""
    root = os.fspath(folder)
    for at, _, files in os.walk(root):
        within = os.path.relpath(at, root).replace(os.sep, "/")
        prefix = "" if within == "." else f"{within}/"
        yield from (prefix + name for name in files if not name.startswith(_HIDDEN))


def _in_local(folder: Path) -> dict[str, bool]:
    """Name -> whether it is a folder."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        return {
            entry.name: entry.is_dir()
            for entry in entries
            # a link to a folder may lead back
            if not entry.name.startswith(_HIDDEN) and not (entry.is_symlink() and entry.is_dir())
        }


def _in_remote(place: _Remote) -> dict[str, bool]:
    """Name -> whether it is a folder."""
    try:
        found = place.filesystem.ls(place.path, detail=True)
    except FileNotFoundError:
        return {}
    own = place.path.strip("/")
    names = {info["name"].strip("/"): info["type"] == "directory" for info in found}
    return {name.rpartition("/")[2]: deep for name, deep in names.items() if name != own}


def _found_remote(url: str, options: StorageOptions) -> dict[str, str]:
    place = _remote(url, options)
    found = place.filesystem.find(place.path, detail=True)
    root = place.path.rstrip("/") + "/"
    return {name.removeprefix(root): _version(info) for name, info in found.items() if name != place.path}


def _version(info: Mapping[str, object]) -> str:
    keys = ("ETag", "etag", "LastModified", "mtime", "created")
    return f"{info.get('size')}:{next((info[key] for key in keys if info.get(key) is not None), '')}"
