"""Chunks of S3 stores read through obstore, with half of the processor time that s3fs takes.

Measured by ``python -m benchmarks stores``; writing gains too little to be worth a second way. s3fs stays the
one that knows: place and credentials come from it, what it would do differently is left to it, and a request
that fails here is made again by it, with its patience and its explanations.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import FsspecStore, ObjectStore, WrapperStore

_SAME_HERE: Final = frozenset(
    {
        "key",
        "secret",
        "token",
        "profile",
        "anon",
        "endpoint_url",
        "client_kwargs",
        "config_kwargs",
        "patience",
    }
)
"""Options of s3fs that matter to place, credentials and timeouts only."""
_SAME_OF_CLIENT: Final = frozenset({"endpoint_url", "region_name"})
_SAME_OF_CONFIG: Final = frozenset({"connect_timeout", "read_timeout", "max_pool_connections"})
_METADATA: Final = ("zarr.json", ".zarray", ".zattrs", ".zgroup", ".zmetadata")
_FAILURES: Final = 8
"""Requests in a row after whose failure s3fs gets all that follow."""
_RENEWED: Final = timedelta(minutes=5)
"""How often s3fs is asked for its credentials, which may be short-lived."""

_log = logging.getLogger(__name__)


def with_fast_reads(store: FsspecStore, options: Mapping[str, Any]) -> Store:
    """A read-only store on S3 whose chunks come through obstore, where these options mean the same to it."""
    client, config = options.get("client_kwargs") or {}, options.get("config_kwargs") or {}
    same = set(options) <= _SAME_HERE and set(client) <= _SAME_OF_CLIENT and set(config) <= _SAME_OF_CONFIG
    return _FastReads(store) if same else store


class _FastReads(WrapperStore[FsspecStore]):
    def __init__(self, store: FsspecStore) -> None:
        super().__init__(store)
        self._direct: Store | None = None
        self._begun = self._worked = False
        self._failures = 0

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        if not key.endswith(_METADATA):
            try:
                if (direct := await self._other_way()) is not None:
                    found = await direct.get(key, prototype, byte_range)
                    self._failures, self._worked = 0, self._worked or found is not None
                    # that there is nothing is believed of a way that has found something
                    if self._worked:
                        return found
            except Exception as error:
                self._note_failure(error)
        return await super().get(key, prototype, byte_range)

    async def _other_way(self) -> Store | None:
        """obstore, but for requests that come while it is being opened, and once it has failed too often."""
        if not self._begun:
            self._begun = True
            self._direct = await _opened(self._store)
        return self._direct

    def _note_failure(self, error: Exception) -> None:
        self._failures += 1
        if self._failures == _FAILURES:
            # only its type: what it says may hold credentials
            _log.debug("chunks are read by s3fs from now on; obstore failed: %s", type(error).__name__)
            self._direct = None


async def _opened(store: FsspecStore) -> Store:
    """The same place through obstore."""
    # not at the top: only where a store of this kind is read
    from obstore.store import S3Store

    filesystem: Any = store.fs
    client = await filesystem.set_session()
    bucket, _, prefix = store.path.partition("/")
    endpoint, config = client.meta.endpoint_url, client.meta.config
    return ObjectStore(
        S3Store(
            bucket,
            prefix=prefix,
            endpoint=endpoint,
            region=client.meta.region_name or "us-east-1",
            virtual_hosted_style_request=False,
            client_options={
                "allow_http": endpoint.startswith("http://"),
                "connect_timeout": timedelta(seconds=config.connect_timeout),
                "timeout": timedelta(seconds=config.read_timeout),
            },
            # s3fs repeats what failed
            retry_config={"max_retries": 0},
            **_access(filesystem),
        ),
        read_only=True,
    )


def _access(filesystem: Any) -> dict[str, Any]:
    """Who asks: nobody, the user named in the options, or the one that botocore finds on this machine."""
    if filesystem.anon:
        return {"skip_signature": True}
    if filesystem.key and filesystem.secret:
        token = {"session_token": filesystem.token} if filesystem.token else {}
        return {"access_key_id": filesystem.key, "secret_access_key": filesystem.secret, **token}
    return {"credential_provider": _found_by(filesystem.session)}


def _found_by(session: Any) -> Callable[[], Awaitable[dict[str, Any]]]:
    async def credentials() -> dict[str, Any]:
        found = await (await session.get_credentials()).get_frozen_credentials()
        return {
            "access_key_id": found.access_key,
            "secret_access_key": found.secret_key,
            "token": found.token,
            "expires_at": datetime.now(UTC) + _RENEWED,
        }

    return credentials
