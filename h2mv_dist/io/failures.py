"""What a failure of a store means: transient or not, full or not, what to do about it."""

import errno
import re
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from h2mv_dist.config import StorageOptions
from h2mv_dist.errors import StoreError, describe

_TRANSPORTS: Final = frozenset(
    {"aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "numcodecs", "s3fs", "urllib3"}
)
"""Packages whose own exceptions mean that a store failed, or that it holds pickled objects, which numcodecs
does not load; everything else they raise is an OSError."""

_UNREACHABLE: Final = re.compile(r"Endpoint|Connect|Timeout|HTTPClientError|ServerDisconnected|ClientOSError")
_FULL: Final = re.compile(r"Quota|StorageFull|InsufficientStorage|NoSpace", re.IGNORECASE)
"""S3 codes without a standard: QuotaExceeded (Ceph), XMinioStorageFull (MinIO), ..."""
_FULL_ERRNO: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_BUSY_STATUS: Final = frozenset({408, 429, 500, 502, 503, 504})
_BUSY_CODES: Final = frozenset(
    {
        *("SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "OperationAborted"),
        *("ConditionalRequestConflict", "IncompleteBody", "XAmzContentSHA256Mismatch"),
    }
)
"""S3's answers that may differ the next time: overload, a part that broke, a body damaged on its way."""
_SECRET_KEY: Final = re.compile(r"key|secret|token|pass|cred|auth|sas", re.IGNORECASE)


class Answer(NamedTuple):
    """What an S3 store answered instead of success."""

    status: int
    code: str

    @property
    def full(self) -> bool:
        """Whether there is no room for what was sent."""
        return self.status == 507 or _FULL.search(self.code) is not None

    @property
    def busy(self) -> bool:
        """Whether the same request may succeed later."""
        return not self.full and (self.status in _BUSY_STATUS or self.code in _BUSY_CODES)


def answer_in(error: BaseException) -> Answer | None:
    """The store's answer that an exception of botocore, or one that s3fs made of it, carries."""
    for carrier in (error, error.__cause__):
        response = getattr(carrier, "response", None)
        if isinstance(response, Mapping):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return Answer(int(status), str(response.get("Error", {}).get("Code", "")))
    return None


def is_store_failure(error: Exception) -> bool:
    """Whether a store failed, or holds what cannot be read; False for a mistake in a program."""
    if isinstance(error, OSError | MemoryError):
        return True
    return type(error).__module__.split(".")[0] in _TRANSPORTS


def store_error(where: str, options: StorageOptions, error: Exception, *, local: bool) -> StoreError:
    """The error of this package that tells what failed and what to do, without any secret."""
    diagnosis = _NO_MEMORY if isinstance(error, MemoryError) else _diagnose(error, local=local)
    message = describe(
        diagnosis.what,
        where=where,
        expected=diagnosis.expected,
        actual=f"{type(error).__name__}: {error}",
        fix=diagnosis.fix,
    )
    return StoreError(_without_secrets(message, options), full=_is_full(error))


class _Diagnosis(NamedTuple):
    what: str
    expected: str
    fix: str


_NO_MEMORY: Final = _Diagnosis(
    "what is stored does not fit into memory",
    "chunks and axes that this machine can hold",
    "check the array's metadata, use smaller chunks or tiles, or a larger machine",
)


def _is_full(error: Exception) -> bool:
    answer = answer_in(error)
    return answer.full if answer is not None else getattr(error, "errno", None) in _FULL_ERRNO


def _diagnose(error: Exception, *, local: bool) -> _Diagnosis:
    if _is_full(error):
        return _Diagnosis(
            "the store is full",
            "room for what is written",
            "free space there or raise the quota, then start again; what is complete stays",
        )
    answer = answer_in(error)
    if answer is not None and answer.busy:
        return _Diagnosis(
            "the store kept failing",
            "success within the time that requests are repeated",
            "look at the server and start again; if it is overloaded, use fewer workers, "
            "or set patience (seconds) in storage_options",
        )
    if isinstance(error, FileNotFoundError):
        return _Diagnosis(
            "nothing is stored there", "an existing bucket and object", "check the URL for a typing error"
        )
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        fix = "check the rights of this user" if local else _access_fix(answer)
        return _Diagnosis("access to the store was refused", "the right to read or write there", fix)
    if isinstance(error, TimeoutError | ConnectionError) or _UNREACHABLE.search(type(error).__name__):
        return _Diagnosis(
            "the store cannot be reached",
            "an answer from its endpoint",
            "check that the server runs and that endpoint_url in storage_options names it",
        )
    return _Diagnosis("the store failed", "a complete answer", "see the reason above")


def _access_fix(answer: Answer | None) -> str:
    if answer is not None and answer.code == "AccessDenied":
        return (
            "have the user of this key given the rights to list, read and write there, "
            "or name another key in storage_options"
        )
    return "check key and secret in storage_options, and the rights they give"


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
