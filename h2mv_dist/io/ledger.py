"""Receipts beside a cube: what is finished is what they say, never what happens to be stored.

A unit of work (a tile, or a part of one) has one object, put whole after the last of its shards.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Final

from h2mv_dist.config import StorageOptions, canonical_json
from h2mv_dist.errors import StoreError, describe
from h2mv_dist.io.stores import displayed, get_object, join, list_objects, put_object

FINISH_UNIT: Final = "finish"
"""The unit that comes after all tiles: constants and consolidated metadata."""

_SUFFIX: Final = ".json"
_UNIT: Final = re.compile(r"[\w.-]+", re.ASCII)
_READERS: Final = 8
"""Receipts read at a time: they are tiny, so a remote ledger costs round trips and nothing else."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """Says that a unit of work is finished and stored.

    Attributes:
        unit: name of the unit: letters, digits, ``_``, ``-`` and ``.``.
        fingerprint: which model, data, grid and settings it was made with.
        checksum: SHA-256 of the values it wrote, from the sink.
        seconds: how long it took.
    """

    unit: str
    fingerprint: str
    checksum: str
    seconds: float

    def __post_init__(self) -> None:
        texts = (self.unit, self.fingerprint, self.checksum)
        if not all(isinstance(text, str) and text for text in texts) or not _UNIT.fullmatch(self.unit):
            raise StoreError(f"a receipt needs a plain unit name, a fingerprint and a checksum, not {texts}")
        if not isinstance(self.seconds, int | float) or not 0 <= self.seconds < math.inf:
            raise StoreError(f"receipt of {self.unit}: seconds must be finite and >= 0, not {self.seconds!r}")

    def to_json(self) -> bytes:
        """One spelling for one receipt.

        >>> Receipt("0-10_0-10", "f", "c", 1.5).to_json()
        b'{"checksum":"c","fingerprint":"f","seconds":1.5,"unit":"0-10_0-10"}'
        """
        return canonical_json(asdict(self)).encode()

    @staticmethod
    def from_json(data: bytes) -> "Receipt":
        """Inverse of :meth:`to_json`.

        Raises:
            StoreError: the bytes are not a complete receipt.
        """
        try:
            return Receipt(**json.loads(data))
        except (ValueError, TypeError) as error:
            raise StoreError(f"not a complete receipt: {error}") from error


@dataclass(frozen=True, slots=True)
class Ledger:
    """The receipts of the cube at ``url``; ``options`` are those of its store."""

    url: str
    options: StorageOptions

    def record(self, receipt: Receipt) -> None:
        """Store a receipt; the last thing done for its unit.

        Raises:
            StoreError: the store cannot be reached or written.
        """
        put_object(self._place(receipt.unit + _SUFFIX), receipt.to_json(), self.options)

    def receipts(self) -> Mapping[str, Receipt]:
        """Every receipt by its unit, in order of their names.

        Raises:
            StoreError: an object is not a receipt, or the store cannot be read.
        """
        names = list_objects(ledger_url(self.url), self.options)
        with ThreadPoolExecutor(_READERS) as pool:
            found = tuple(pool.map(self._read, names))
        return MappingProxyType({receipt.unit: receipt for receipt in found})

    def missing(self, units: Sequence[str], fingerprint: str) -> tuple[str, ...]:
        """The units without a receipt, in the given order.

        Raises:
            StoreError: a receipt belongs to another fingerprint, or is not a receipt.
        """
        done = self.receipts()
        for receipt in done.values():
            if receipt.fingerprint != fingerprint:
                raise self._foreign(receipt, fingerprint)
        return tuple(unit for unit in units if unit not in done)

    def _read(self, name: str) -> Receipt:
        data = get_object(self._place(name), self.options)
        try:
            receipt = Receipt.from_json(data)
        except StoreError as error:
            raise self._unreadable(name, str(error)) from error
        if name != receipt.unit + _SUFFIX:
            raise self._unreadable(name, f"it is the receipt of {receipt.unit}")
        return receipt

    def _place(self, name: str) -> str:
        return join(ledger_url(self.url), name)

    def _unreadable(self, name: str, reason: str) -> StoreError:
        return StoreError(
            describe(
                "a receipt cannot be used, so nobody knows whether its unit is finished",
                where=displayed(self._place(name)),
                expected="one complete receipt, named after its unit",
                actual=reason,
                fix="delete this object: its unit is then done again",
            )
        )

    def _foreign(self, receipt: Receipt, fingerprint: str) -> StoreError:
        return StoreError(
            describe(
                "a receipt belongs to another model, data set or settings; nothing was touched",
                where=displayed(self._place(receipt.unit + _SUFFIX)),
                expected=f"fingerprint {fingerprint}",
                actual=f"fingerprint {receipt.fingerprint}",
                fix="choose another path for the cube, or set inference.overwrite to replace both",
            )
        )


def ledger_url(cube_url: str) -> str:
    """Where the receipts of a cube are kept.

    >>> ledger_url("s3://bucket/cube.zarr/")
    's3://bucket/cube.ledger'
    """
    return cube_url.rstrip("/").removesuffix(".zarr") + ".ledger"
