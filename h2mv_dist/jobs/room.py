"""Room that a job needs, on a disk and in workers; what cannot fit is refused before anything is written."""

import logging
import shutil
from typing import Final

from dask.utils import format_bytes

from h2mv_dist.errors import StoreError, describe
from h2mv_dist.io.stores import local_path

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
