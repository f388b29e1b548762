"""Room that a job needs, on a disk and in workers; what cannot fit is refused before anything is written."""

import logging
import shutil
from typing import Final

from dask.utils import format_bytes, parse_bytes

from h2mv_dist.config import ClusterSettings
from h2mv_dist.errors import StoreError, describe
from h2mv_dist.io.stores import local_path
from h2mv_dist.jobs.cluster import chosen_kind

COMPRESSION: Final = 10
"""What is written is not compressed any further than by about this factor."""

_log = logging.getLogger(__name__)


def require_disk(what: str, url: str, needed: int, fix: str) -> None:
    """Refuse what cannot fit on this machine's disk; object stores do not say what is free.

    Args:
        what: is to be written, such as "cube".
        url: where.
        needed: bytes that are missing of it, before compression.
        fix: what helps besides free space.

    Raises:
        StoreError: not even a tenth of these bytes is free.
    """
    place = local_path(url)
    if place is None:
        return
    folder = next(path for path in (place, *place.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if free * COMPRESSION < needed:
        raise StoreError(
            describe(
                f"the {what} does not fit on the disk",
                where=str(folder),
                expected=f"at least {format_bytes(needed // COMPRESSION)} free for what is missing of the "
                f"{what} ({format_bytes(needed)} before compression)",
                actual=f"{format_bytes(free)} free",
                fix=f"free space (a {what} that is to be replaced can be deleted first), choose another "
                f"disk, or {fix}",
            )
        )
    if free < needed:
        _log.warning(
            "%s has %s free; what is missing of the %s takes %s before compression",
            *(folder, format_bytes(free), what, format_bytes(needed)),
        )


def memory_limit(settings: ClusterSettings) -> int | None:
    """Bytes of a worker that would be started, or None where settings alone do not say.

    >>> memory_limit(ClusterSettings(kind="local", memory_limit="4GiB"))
    4294967296
    >>> memory_limit(ClusterSettings(kind="local", memory_limit="0.5"))
    """
    if settings.memory_limit == "auto" or chosen_kind(settings) == "address":
        return None
    limit = parse_bytes(settings.memory_limit)
    # Dask takes numbers up to 1 for shares of the machine, and 0 for no limit
    return limit if limit > 1 else None
