"""Stores: a URL and its options become a Zarr store, or the bytes of one object.

Plain paths and ``file://`` are local; every other URL goes through fsspec with the options of its protocol.
This module owns what can go wrong between us and a store: every failure leaves it as a :class:`StoreError`
that says what to do and holds no credentials.
"""

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import fsspec
from fsspec.core import url_to_fs
from zarr.abc.store import Store
from zarr.storage import FsspecStore, LocalStore

from h2mv_dist.config import StorageOptions
from h2mv_dist.errors import StoreError, describe

_TEMPORARY: Final = ".h2mv-part-"
"""Prefix of the local files that are not yet in place; they are never listed."""

_TRANSPORTS: Final = frozenset({"aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "s3fs", "urllib3"})
"""Packages whose own exceptions mean that a store failed; everything else they raise is an OSError."""

_UNREACHABLE: Final = re.compile(r"Endpoint|Connect|Timeout|HTTPClientError|ServerDisconnected|ClientOSError")
_SECRET_KEY: Final = re.compile(r"key|secret|token|pass|cred|auth|sas", re.IGNORECASE)
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
        return FsspecStore.from_url(url, storage_options=_protocol_options(url, options), read_only=read_only)


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
        return bool(place.filesystem.exists(place.path))


def list_objects(url: str, options: StorageOptions) -> tuple[str, ...]:
    """Names of all objects below ``url``, relative to it, sorted; none where nothing was written.

    Raises:
        StoreError: the store cannot be reached or read.
    """
    return tuple(sorted(_found(url, options)))


def delete_tree(url: str, options: StorageOptions) -> None:
    """Delete every object below ``url``; a bucket itself stays.

    Raises:
        StoreError: the store cannot be reached or written.
    """
    with explained(url, options):
        local = local_path(url)
        if local is not None:
            if local.exists():
                shutil.rmtree(local)
            return
        place = _remote(url, options)
        names = place.filesystem.find(place.path)
        if names:
            place.filesystem.rm(names)


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
        if not _is_store_failure(error):
            raise
        failure = _store_error(url, options, error)
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


class _Remote(NamedTuple):
    filesystem: Any
    path: str


def _remote(url: str, options: StorageOptions) -> _Remote:
    _check_protocol(url)
    return _Remote(*url_to_fs(url, **_protocol_options(url, options)))


def _check_protocol(url: str) -> None:
    protocol = fsspec.core.split_protocol(url)[0]
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


def _protocol_options(url: str, options: StorageOptions) -> dict[str, object]:
    protocol = fsspec.core.split_protocol(url)[0]
    given = dict(options.get(protocol, {}))
    if protocol not in {"s3", "s3a"}:
        return given
    # s3fs retries by itself; botocore's retries below it would multiply. Listings change under us.
    client = {"retries": {"max_attempts": 0}, **_mapping(given.get("config_kwargs"))}
    return {"use_listings_cache": False, **given, "config_kwargs": client}


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _replace_file(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{_TEMPORARY}{secrets.token_hex(8)}"
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _found(url: str, options: StorageOptions) -> dict[str, str]:
    """Relative name -> size and version of every object below ``url``."""
    with explained(url, options):
        local = local_path(url)
        return _found_local(local) if local is not None else _found_remote(url, options)


def _found_local(folder: Path) -> dict[str, str]:
    files = {path: path.stat() for path in _walk(folder)}
    return {path.relative_to(folder).as_posix(): f"{s.st_size}:{s.st_mtime_ns}" for path, s in files.items()}


def _walk(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if path.is_file() and not path.name.startswith(_TEMPORARY):
            yield path


def _found_remote(url: str, options: StorageOptions) -> dict[str, str]:
    place = _remote(url, options)
    found = place.filesystem.find(place.path, detail=True)
    root = place.path.rstrip("/") + "/"
    return {name.removeprefix(root): _version(info) for name, info in found.items() if name != place.path}


def _version(info: Mapping[str, object]) -> str:
    keys = ("ETag", "etag", "LastModified", "mtime", "created")
    return f"{info.get('size')}:{next((info[key] for key in keys if info.get(key) is not None), '')}"


def _is_store_failure(error: Exception) -> bool:
    if isinstance(error, OSError):
        return True
    return type(error).__module__.split(".")[0] in _TRANSPORTS


def _store_error(url: str, options: StorageOptions, error: Exception) -> StoreError:
    diagnosis = _diagnose(error, local=local_path(url) is not None)
    message = describe(
        diagnosis.what,
        where=displayed(url),
        expected=diagnosis.expected,
        actual=f"{type(error).__name__}: {error}",
        fix=diagnosis.fix,
    )
    return StoreError(_without_secrets(message, options))


class _Diagnosis(NamedTuple):
    what: str
    expected: str
    fix: str


def _diagnose(error: Exception, *, local: bool) -> _Diagnosis:
    if isinstance(error, FileNotFoundError):
        return _Diagnosis(
            "nothing is stored there", "an existing bucket and object", "check the URL for a typing error"
        )
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        fix = "check the rights of this user" if local else "check key and secret in storage_options"
        return _Diagnosis("access to the store was refused", "the right to read or write there", fix)
    if isinstance(error, TimeoutError | ConnectionError) or _UNREACHABLE.search(type(error).__name__):
        return _Diagnosis(
            "the store cannot be reached",
            "an answer from its endpoint",
            "check that the server runs and that endpoint_url in storage_options names it",
        )
    return _Diagnosis(
        "the store failed", "a complete answer", "see the reason above; check free space and quota"
    )


def _without_secrets(text: str, options: StorageOptions) -> str:
    for value in _secret_values(options):
        text = text.replace(value, "***")
    return text


def _secret_values(options: Mapping[str, object]) -> Iterator[str]:
    """Every text among the options whose name says that it is secret."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _secret_values(value)
        elif isinstance(value, str) and value and _SECRET_KEY.search(name):
            yield value
