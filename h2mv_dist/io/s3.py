"""S3 through s3fs, with one patient retry loop a request and compare-and-swap of one object.

Measured through a failing proxy (tests/fault_proxy.py), the loops of the layers below do not do:

- botocore's standard mode has a quota: ten requests in an outage used it up in 2 s, and all failed. It also
  does not see a body that ends early.
- s3fs' loop does not repeat a reset connection or a 503 to HEAD, has no jitter, and multiplies botocore's.
- aiohttp repeats a GET, HEAD or PUT once when its connection breaks, which cannot be turned off.

So the first two are off, and the loop stands where every request passes: listings page by page (since s3fs
2026.9), uploads part by part. Importing this takes half a second: do so only where an S3 store is opened.
"""

import asyncio
import io
import itertools
import random
import time
from collections.abc import Mapping
from typing import Any, Final

import aiohttp
from botocore import exceptions as botocore_errors  # type: ignore[import-untyped]
from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]
from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem
from s3fs.errors import translate_boto_error

from h2mv_dist.io.failures import answer_in

PATIENCE: Final = 60.0
"""Seconds after which a request that keeps failing is given up."""
_REACH_SECONDS: Final = 3.0
"""The same for an endpoint that never answered this process: a wrong address more likely than an outage."""
_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 8.0

_BROKEN: Final = (
    *(aiohttp.ClientError, TimeoutError, ConnectionError, ResponseParserError),
    *(botocore_errors.HTTPClientError, botocore_errors.ConnectionError),
    *(botocore_errors.IncompleteReadError, botocore_errors.FlexibleChecksumError),
)
_jitter: Final = random.SystemRandom()  # a seeded program draws the same numbers on all of its ranks
_answered: Final[set[str]] = set()
"""Endpoints that have answered this process."""


def open_filesystem(options: Mapping[str, object], *, asynchronous: bool = False) -> "PatientS3FileSystem":
    """s3fs with these options of its own, and ``patience`` (seconds).

    ``retries`` in ``config_kwargs`` are left to botocore as they are; our loop is off then, unless
    ``patience`` is given too. Listings are not cached, because other processes write.
    """
    client = dict(given) if isinstance(given := options.get("config_kwargs"), Mapping) else {}
    settings: dict[str, Any] = {
        "use_listings_cache": False,
        "patience": 0.0 if "retries" in client else PATIENCE,
        **options,
        "config_kwargs": {"retries": {"total_max_attempts": 1}, **client},
    }
    return PatientS3FileSystem(**settings, asynchronous=asynchronous)


class PatientS3FileSystem(S3FileSystem):  # type: ignore[misc]
    """Repeats each request that failed for the moment, with growing pauses, for ``patience`` seconds."""

    retries = 1  # s3fs' own loop

    def __init__(self, *args: Any, patience: float = PATIENCE, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._patience = patience

    async def _call_s3(self, method: str, *args: Any, **kwargs: Any) -> Any:
        start = time.monotonic()
        for attempt in itertools.count():
            pause = _pause(attempt)
            try:
                reply = await self._attempt(method, *args, **kwargs)
            except Exception as error:
                self._note_answer(error)
                end = start + self._patience_with(error)
                if not _may_pass(error) or time.monotonic() + pause > end:
                    raise
            else:
                self._note_answer(None)
                return reply
            await asyncio.sleep(pause)
        raise AssertionError("unreachable")

    call_s3 = sync_wrapper(_call_s3)

    async def _attempt(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """One request with all of its answer: bodies and the errors inside a success count as its failure."""
        reply = await super()._call_s3(method, *args, **kwargs)
        if method == "get_object":
            reply["Body"] = await _read_whole(reply["Body"])
        if method == "delete_objects" and reply.get("Errors"):
            failed = {"Error": reply["Errors"][0], "ResponseMetadata": reply["ResponseMetadata"]}
            raise translate_boto_error(botocore_errors.ClientError(failed, method))
        return reply

    async def _cat_file(self, path: str, *args: Any, **kwargs: Any) -> bytes:
        # one request for a whole object: to fetch parts at once, s3fs would ask for its size first
        data: bytes = await super()._cat_file(path, *args, **{"max_concurrency": 1, **kwargs})
        return data

    def _note_answer(self, error: Exception | None) -> None:
        if error is None or answer_in(error) is not None:
            _answered.add(str(self.endpoint_url))

    def _patience_with(self, error: Exception) -> float:
        if _never_connected(error) and str(self.endpoint_url) not in _answered:
            return min(_REACH_SECONDS, self._patience)
        return self._patience

    async def _get_versioned(self, path: str) -> tuple[bytes, str] | None:
        """Bytes and ETag of one object, or None if the bucket does not have it."""
        bucket, key, _ = self.split_path(path)
        try:
            reply = await self._call_s3("get_object", Bucket=bucket, Key=key)
        except FileNotFoundError as error:
            if _is_missing_bucket(error):
                raise
            return None
        return await reply["Body"].read(), str(reply["ETag"])

    get_versioned = sync_wrapper(_get_versioned)

    async def _swap(self, path: str, data: bytes, expected: str | None) -> str | None:
        """Conditional PUT: the new ETag, or None if the object's ETag is not ``expected`` (any more)."""
        bucket, key, _ = self.split_path(path)
        condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": expected}
        try:
            reply = await self._call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
        except OSError as error:
            if not _is_failed_condition(error):
                raise
        else:
            return str(reply["ETag"])
        # A request whose reply was lost is sent again, and then fails on what it has itself written.
        found = await self._get_versioned(path)
        return found[1] if found is not None and found[0] == data else None

    swap = sync_wrapper(_swap)


class _WholeBody:
    """A body that was read to its end, with the interface that s3fs expects of one."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    async def read(self, amount: int | None = None) -> bytes:
        return self._data.read(amount)

    def close(self) -> None:
        self._data.close()


async def _read_whole(body: Any) -> _WholeBody:
    try:
        return _WholeBody(await body.read())
    finally:
        body.close()


def _pause(attempt: int) -> float:
    """Seconds to wait after attempt 0, 1, ...: doubled each time, and anywhere in the upper half of that."""
    longest = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(attempt, 30))
    return longest * _jitter.uniform(0.5, 1.0)


def _may_pass(error: Exception) -> bool:
    answer = answer_in(error)
    return answer.busy if answer is not None else isinstance(error, _BROKEN)


def _never_connected(error: Exception) -> bool:
    if isinstance(error, botocore_errors.EndpointConnectionError):  # aiobotocore's name for a reset, too
        return isinstance(error.kwargs.get("error"), aiohttp.ClientConnectorError)
    return isinstance(
        error,
        botocore_errors.ConnectTimeoutError | botocore_errors.SSLError | botocore_errors.ProxyConnectionError,
    )


def _is_missing_bucket(error: Exception) -> bool:
    answer = answer_in(error)
    return answer is not None and answer.code == "NoSuchBucket"


def _is_failed_condition(error: Exception) -> bool:
    answer = answer_in(error)
    if answer is None or _is_missing_bucket(error):
        return False
    return answer.status in {404, 409, 412} or answer.code == "PreconditionFailed"
