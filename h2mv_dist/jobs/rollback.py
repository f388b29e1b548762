"""How a cube is computed anew from some day on: where its tiles can go on from; nothing is written here."""

from dataclasses import replace
from datetime import date

from h2mv_dist.config import StorageOptions
from h2mv_dist.errors import JobError, describe
from h2mv_dist.grid import Period
from h2mv_dist.io.cube import Progress
from h2mv_dist.io.cube_store import Cube
from h2mv_dist.io.ledger import Ledger
from h2mv_dist.io.snapshots import Snapshots
from h2mv_dist.io.stores import displayed


def rolled_back(url: str, cube: Cube, day: date, options: StorageOptions) -> Progress:
    """How far a cube is once it ends at the last day, not after ``day``, from which every tile can go on.

    What lies behind that day then counts as not computed, and is to be there again.

    Raises:
        JobError: there is no such day, or the cube is not finished.
        StoreError: the store fails.
    """
    before = cube.progress
    require_finished(before)
    starts = _possible_starts(url, cube, options)
    usable = [start for start in starts if start <= min(day, before.period.stop)]
    if not usable:
        raise JobError(
            describe(
                "no tile can go on from there",
                where=displayed(url),
                expected=f"snapshots of all tiles at or before {day}",
                actual=f"they are there for {', '.join(map(str, starts)) or 'no day'}",
                fix="choose a later day, or make the cube anew with inference.overwrite; state_days and "
                "keep_states of [inference] say which snapshots are kept from now on",
            )
        )
    shorter, rollbacks = Period(before.period.start, usable[-1]), (*before.rollbacks, usable[-1])
    return replace(before, period=shorter, rollbacks=rollbacks, until=before.intended.stop)


def require_finished(progress: Progress) -> None:
    """Refuse to lengthen, or to shorten, a cube whose first days were not all shown yet.

    Raises:
        JobError: they were not.
    """
    if not progress.complete:
        raise JobError("the cube is not finished yet; run h2mv-dist infer without --append or --from first")


def _possible_starts(url: str, cube: Cube, options: StorageOptions) -> list[date]:
    """Days from which every tile can go on: its receipts end there, and it has a snapshot."""
    layout, rollbacks = cube.layout, cube.progress.rollbacks
    covered = Ledger(url, options, rollbacks).covered()
    snapshots = Snapshots(url, options, layout.fingerprint, rollbacks)
    ends = [
        {one.period.stop for one in covered.get(tile.name, ())} & set(snapshots.days(tile.name))
        for tile in layout.tiles
    ]
    return sorted(set.intersection(*ends))
