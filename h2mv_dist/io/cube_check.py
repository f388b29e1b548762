"""Checking a cube: whether what is stored is what its receipts say, and whether its budget closes."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np

from h2mv_dist.config import StorageOptions
from h2mv_dist.errors import JobError, describe
from h2mv_dist.grid import Tile
from h2mv_dist.io.cube import CubeLayout, Progress
from h2mv_dist.io.cube_store import read_cube
from h2mv_dist.io.ledger import Covered, Ledger, Receipt, ended_months, gaps
from h2mv_dist.io.sink import Closure, DamagedError, StoredValues
from h2mv_dist.io.stores import displayed
from h2mv_dist.spec import Budget

_AT_ONCE: Final = 4
_BUDGET_DAYS: Final = 64
_UNKNOWN: Final = Closure(math.nan, closes=True)


@dataclass(frozen=True, slots=True)
class CubeCheck:
    """What was found.

    Attributes:
        sound: receipts whose stored values are those that were computed.
        missing: stretches without a receipt, ``TILE/START..END``; ``h2mv-dist infer`` computes them.
        damaged: receipt -> what is wrong with it; deleted, it lets ``h2mv-dist infer`` write its days anew.
        constants: what is wrong with the constants, or nothing.
        unseen: how many receipts are of days that readers do not see yet, and were left out.
        residual: largest gap of the water budget on any checked day and cell, from the stored values, mm;
            NaN where they do not hold all of its terms.
        unbalanced: receipts of days with a gap beyond what storing explains, ``Budget.tolerance``; computing
            them again gives the same.
        not_finite: receipt -> how many of its values on land are NaN or infinite; a member computed them.
    """

    sound: tuple[Covered, ...]
    missing: tuple[str, ...]
    damaged: Mapping[Covered, str]
    constants: str
    unseen: int
    residual: float
    unbalanced: tuple[Covered, ...]
    not_finite: Mapping[Covered, int]

    @property
    def complete(self) -> bool:
        """Whether everything is there, sound and a number, and the budget closes."""
        problems = (self.missing, self.damaged, self.constants, self.unbalanced, self.not_finite)
        return not any(problems)


def verify_cube(
    url: str, options: StorageOptions, *, budget: Budget | None = None, share: float = 1.0, seed: int = 0
) -> CubeCheck:
    """Read a cube and compare it with its receipts; nothing is written.

    Args:
        url: of the cube.
        options: of its store.
        budget: what must balance, if anything.
        share: of the receipts that are checked, chosen at random; missing ones are always found.
        seed: of that choice.

    Raises:
        StoreError: there is no complete cube, a receipt is unreadable, or the store fails.
    """
    layout, progress = read_cube(url, options)
    ledger = Ledger(url, options, progress.rollbacks)
    covered = ledger.covered()
    stored = StoredValues.open(url, layout, options)
    receipts = [one for parts in covered.values() for one in parts]
    seen = [one for one in receipts if one.period.start < layout.period.stop]
    chosen = _chosen(seen, share, seed)
    tiles = {tile.name: tile for tile in layout.tiles}

    def check(one: Covered, receipt: Receipt) -> tuple[str, Closure, int]:
        problem = _problem(stored, tiles.get(one.tile), one, receipt)
        return problem, _closure(stored, tiles, one, budget), receipt.missing

    with ThreadPoolExecutor(_AT_ONCE, "h2mv-check") as pool:
        found = dict(zip(chosen, pool.map(check, chosen, ledger.receipts(chosen)), strict=True))
    residuals = [closure.residual for _, closure, _ in found.values() if not math.isnan(closure.residual)]
    return CubeCheck(
        sound=tuple(one for one, (problem, *_) in found.items() if not problem),
        missing=tuple(_missing(layout, covered)),
        damaged={one: problem for one, (problem, *_) in found.items() if problem},
        constants=_constants_problem(stored, progress),
        unseen=len(receipts) - len(seen),
        residual=max(residuals, default=math.nan),
        unbalanced=tuple(one for one, (_, closure, _) in found.items() if not closure.closes),
        not_finite={one: count for one, (*_, count) in found.items() if count},
    )


def _chosen(covered: Sequence[Covered], share: float, seed: int) -> list[Covered]:
    """A random share, at least one, in order."""
    count = min(len(covered), max(1, round(share * len(covered))))
    return [covered[i] for i in sorted(np.random.default_rng(seed).permutation(len(covered))[:count])]


def require_receipts(layout: CubeLayout, ledger: Ledger, command: str) -> None:
    """Make sure that receipts cover all tiles and days, before readers are shown them.

    Raises:
        JobError: some are missing; ``command`` is what makes them.
        StoreError: the receipts cannot be read.
    """
    left = list(_missing(layout, ledger.covered()))
    if left:
        raise JobError(
            describe(
                "tiles of the cube have no receipt",
                where=displayed(ledger.url),
                expected=f"receipts of all {len(layout.tiles)} tiles before readers are shown the days",
                actual=f"none of {len(left)} stretches of days, such as {left[0]}",
                fix=f"do not delete receipts while a cube is made; run {command} again",
            )
        )


def _missing(layout: CubeLayout, covered: Mapping[str, Sequence[Covered]]) -> Iterator[str]:
    for tile in layout.tiles:
        for gap in gaps(covered.get(tile.name, ()), layout.period):
            yield f"{tile.name}/{gap}"


def _problem(stored: StoredValues, tile: Tile | None, one: Covered, receipt: Receipt) -> str:
    """What is wrong with the days of a receipt, if anything."""
    if tile is None:
        return "the cube has no such tile"
    if receipt.fingerprint != stored.layout.fingerprint:
        return f"its receipt belongs to another cube, of fingerprint {receipt.fingerprint}"
    try:
        changed = (
            what for what, written, found in _checksums(stored, tile, one, receipt) if found() != written
        )
        first = next(changed, "")
    except DamagedError as error:
        return str(error)
    return first and f"{first} are not those that were written"


def _checksums(
    stored: StoredValues, tile: Tile, one: Covered, receipt: Receipt
) -> Iterator[tuple[str, str, Callable[[], str]]]:
    """What a receipt tells of days that are seen: its name, its checksum, and how that follows from them."""
    layout, end = stored.layout, stored.layout.period.stop
    if receipt.static:
        yield "static variables", receipt.static, partial(stored.checksum, tile=tile)
    for block, written in zip(one.period.blocks(layout.shard_days), receipt.blocks, strict=True):
        if block.stop <= end:
            yield f"values of {block}", written, partial(stored.checksum, tile=tile, period=block)
    months = ended_months(layout.period, one.period) if layout.monthly else ()
    for month, written in zip(months, receipt.months, strict=True):
        if month.stop <= end:
            yield f"means of {month}", written, partial(stored.checksum, tile=tile, month=month)


def _closure(stored: StoredValues, tiles: Mapping[str, Tile], one: Covered, budget: Budget | None) -> Closure:
    """How the budget closes in a stretch, from what is stored; damaged parts are told of elsewhere."""
    seen = one.period.common(stored.layout.period)
    if budget is None or seen is None or one.tile not in tiles:
        return _UNKNOWN
    if not set(budget.terms) <= set(stored.layout.daily):
        return _UNKNOWN
    # whole chunks of days, but not all of a long shard's: several terms, of all members, are in memory
    at_once = stored.layout.chunk_days * max(_BUDGET_DAYS // stored.layout.chunk_days, 1)
    try:
        parts = seen.blocks(at_once)
        found = [stored.closure(tiles[one.tile], part, budget) for part in parts]
        return Closure(max(part.residual for part in found), all(part.closes for part in found))
    except DamagedError:
        return _UNKNOWN


def _constants_problem(stored: StoredValues, progress: Progress) -> str:
    if not stored.layout.constants or not progress.complete:
        return ""
    try:
        return "" if stored.checksum() == progress.constants else "constants are not those that were written"
    except DamagedError as error:
        return str(error)
