"""Checking a cube: whether every receipt is there and says what is stored."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final

from h2mv_dist.config import StorageOptions
from h2mv_dist.io.cube_store import read_layout
from h2mv_dist.io.ledger import FINISH_UNIT, Ledger, Receipt
from h2mv_dist.io.sink import DamagedError, StoredValues, unit_checksum

_UNITS_AT_ONCE: Final = 4


@dataclass(frozen=True, slots=True)
class CubeCheck:
    """What was found.

    Attributes:
        sound: units (tiles, and the finishing one) whose stored values are those that were computed.
        missing: units without a receipt; ``h2mv-dist infer`` computes them.
        damaged: unit -> what is wrong with it; deleting its receipt lets ``h2mv-dist infer`` write it anew.
    """

    sound: tuple[str, ...]
    missing: tuple[str, ...]
    damaged: Mapping[str, str]

    @property
    def complete(self) -> bool:
        """Whether every unit is there and sound."""
        return not self.missing and not self.damaged


def verify_cube(url: str, options: StorageOptions) -> CubeCheck:
    """Read a whole cube and compare it with its receipts; nothing is written.

    Raises:
        StoreError: there is no complete cube, a receipt is unreadable, or the store fails.
    """
    layout = read_layout(url, options)
    receipts = Ledger(url, options).receipts()
    units = dict(_checksums(StoredValues.open(url, layout, options)))
    done = tuple(name for name in units if name in receipts)

    def problem(name: str) -> str:
        return _problem(receipts[name], layout.fingerprint, units[name])

    with ThreadPoolExecutor(_UNITS_AT_ONCE, "h2mv-check") as pool:
        found = dict(zip(done, pool.map(problem, done), strict=True))
    return CubeCheck(
        sound=tuple(name for name in done if not found[name]),
        missing=tuple(name for name in units if name not in receipts),
        damaged={name: text for name, text in found.items() if text},
    )


def _checksums(stored: StoredValues) -> Iterator[tuple[str, Callable[[], str]]]:
    """Every unit, and how its checksum is worked out from what is stored."""
    for tile in stored.layout.tiles:
        yield tile.name, partial(stored.tile_checksum, tile)
    yield FINISH_UNIT, partial(_constants_checksum, stored)


def _constants_checksum(stored: StoredValues) -> str:
    return unit_checksum([stored.checksum()] if stored.layout.constants else [])


def _problem(receipt: Receipt, fingerprint: str, stored: Callable[[], str]) -> str:
    if receipt.fingerprint != fingerprint:
        return f"its receipt belongs to another cube, of fingerprint {receipt.fingerprint}"
    try:
        found = stored()
    except DamagedError as error:
        return str(error)
    if found == receipt.checksum:
        return ""
    return f"its receipt says {receipt.checksum}, but what is stored gives {found}"
