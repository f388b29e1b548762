"""Days of a cube copied into another one that differs only in how it is cut.

What is read is compared with the receipts of the cube it is from: a shard that is gone reads as NaN, and no
checksum of a chunk would tell.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from h2mv_dist.errors import describe
from h2mv_dist.grid import BoolArray, Period, Tile
from h2mv_dist.io.cube import Progress
from h2mv_dist.io.cube_store import still_as_planned
from h2mv_dist.io.ledger import Ledger, Receipt, ended_months
from h2mv_dist.io.shards import Where
from h2mv_dist.io.sink import DamagedError, Sink, StoredValues
from h2mv_dist.io.stores import displayed
from h2mv_dist.spec import Float32Array


class _Written(NamedTuple):
    """What receipts say of a tile: checksums of static values, of each shard's days, and of each month."""

    static: str
    blocks: dict[Period, str]
    months: dict[Period, str]


@dataclass(frozen=True, slots=True)
class CubeCopy:
    """Copies parts of a cube into another one, of the same variables, members, grid and tiles.

    Attributes:
        source: the cube to read; its shards of days lie whole in those of the target.
        written: its receipts.
        target: the cube to write.
        ledger: its receipts.
    """

    source: StoredValues
    written: Ledger
    target: Sink
    ledger: Ledger

    def copy(self, tile: Tile, block: Period, require_wanted: Callable[[], None] = lambda: None) -> None:
        """Copy a tile over one shard of days of the target, with the months that end in it; then the receipt.

        In memory are one array that is read and those that are being written. ``require_wanted`` raises what
        ends the work early; it is called between reads.

        Raises:
            DamagedError: what is read is not what was written there.
            JobError: the target was replaced or rolled back since it was planned with.
            StoreError: a store fails, or the block is no shard of the target.
        """
        started, layout = time.monotonic(), self.target.layout
        self._require_current()
        written = self._written(tile, block)
        first = block.start == layout.period.start and layout.static
        stretches = tuple(block.blocks(self.source.layout.shard_days))
        passing = _Passing(stretches, layout.grid.mask[tile.slices], require_wanted)
        static = self._same(written.static, "static variables", tile) if first else ""
        months = ended_months(layout.period, block) if layout.monthly else ()
        means = tuple(self._same(written.months.get(m, ""), f"means of {m}", tile, m) for m in months)
        boxes = passing.through(self.source.read(tile=tile, period=block))
        daily = self.target.write_stored(boxes, tile=tile, period=block)
        for days, found in passing.checksums().items():
            self._require_same(written.blocks.get(days, ""), found, f"values of {days}", tile)
        receipt = Receipt(
            fingerprint=layout.fingerprint,
            static=static,
            blocks=(daily,),
            months=means,
            forcing="",
            missing=passing.missing,
            residual=None,
            seconds=round(time.monotonic() - started, 3),
        )
        self._require_current()
        self.ledger.record(tile.name, block, receipt)

    def _require_current(self) -> None:
        still_as_planned(self.ledger.url, self.target.layout, self.ledger.rollbacks, self.ledger.options)

    def copy_constants(self, progress: Progress) -> str:
        """Copy what belongs to no tile; returns its checksum.

        Args:
            progress: of the source.

        Raises:
            DamagedError: what is read is not what was written there.
            StoreError: a store fails.
        """
        if not self.target.layout.constants:
            return ""
        found = self.target.write_stored(self.source.read())
        self._require_same(progress.constants, found, "constants", None)
        return found

    def _same(self, expected: str, what: str, tile: Tile, month: Period | None = None) -> str:
        """Copy static values, or the means of a month, and compare them with the source's receipt."""
        found = self.target.write_stored(self.source.read(tile=tile, month=month), tile=tile, month=month)
        self._require_same(expected, found, what, tile)
        return found

    def _written(self, tile: Tile, block: Period) -> _Written:
        """What the source's receipts say of these days of a tile."""
        layout, found = self.source.layout, _Written("", {}, {})
        covered = self.written.covered(tile.name).get(tile.name, ())
        chosen = [one for one in covered if one.period.common(block)]
        for one, receipt in zip(chosen, self.written.receipts(chosen), strict=True):
            if receipt.fingerprint != layout.fingerprint:
                continue  # of another cube that was here: as good as none
            months = ended_months(layout.period, one.period) if layout.monthly else ()
            found.blocks.update(zip(one.period.blocks(layout.shard_days), receipt.blocks, strict=True))
            found.months.update(zip(months, receipt.months, strict=True))
            found = found._replace(static=receipt.static or found.static)
        return found

    def _require_same(self, expected: str, found: str, what: str, tile: Tile | None) -> None:
        if found == expected:
            return
        raise DamagedError(
            describe(
                f"{what} of the cube to be copied are not those that were written",
                where=f"{displayed(self.source.url)}, {'all tiles' if tile is None else f'tile {tile.name}'}",
                expected=f"SHA-256 {expected}" if expected else "a receipt of what is read",
                actual=f"SHA-256 {found}",
                fix="h2mv-dist verify-cube CUBE --repair computes again what is missing or damaged; then "
                "compact again",
            )
        )


class _Passing:
    """Looks at daily values on their way: a checksum of each stretch of days, and what is missing on land."""

    def __init__(
        self, stretches: Sequence[Period], land: BoolArray, require_wanted: Callable[[], None]
    ) -> None:
        self.land, self.require_wanted, self.missing = land, require_wanted, 0
        self._digests = {days: hashlib.sha256() for days in stretches}

    def through(self, boxes: Iterable[Float32Array]) -> Iterator[Float32Array]:
        """The same boxes [(member,) time, *space]."""
        for box in boxes:
            self.require_wanted()
            reached = 0
            for days, digest in self._digests.items():
                where: Where = (..., slice(reached, reached + days.n_days), *[slice(None)] * self.land.ndim)
                part = box[where]
                digest.update(np.ascontiguousarray(part, "<f4").tobytes())
                self.missing += int(np.count_nonzero(~np.isfinite(part[..., self.land])))
                reached += days.n_days
            yield box

    def checksums(self) -> dict[Period, str]:
        """SHA-256 of each stretch of days, over all arrays that passed, as a sink makes it."""
        return {days: digest.hexdigest() for days, digest in self._digests.items()}
