"""Receipts beside a cube: what is finished is what they say, never what happens to be stored.

A receipt covers a tile over a stretch of days, and is put whole after the last of its shards. Its name says
what it covers, so one listing tells what is left to do.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from typing import Final, NamedTuple

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from h2mv_dist.config import StorageOptions, canonical_json
from h2mv_dist.errors import ConfigError, StoreError, describe
from h2mv_dist.grid import Period
from h2mv_dist.io.stores import delete_tree, displayed, get_object, join, list_objects, put_object

_NAME: Final = re.compile(
    r"(?P<tile>[\d_-]+)/(?P<period>[\d-]+\.\.[\d-]+)\.v(?P<edition>\d+)\.json", re.ASCII
)
_READERS: Final = 8
"""Receipts read at a time: they are tiny, so a remote ledger costs round trips and nothing else."""


class Covered(NamedTuple):
    """What a receipt's name says.

    Attributes:
        tile: name of the tile.
        period: its days.
        edition: how often the cube had been rolled back when it was made.
    """

    tile: str
    period: Period
    edition: int

    @property
    def key(self) -> str:
        """Name of the receipt's object.

        >>> Covered("0-10_0-10", Period(date(2001, 1, 1), date(2002, 1, 1)), 0).key
        '0-10_0-10/2001-01-01..2002-01-01.v0.json'
        """
        return f"{self.tile}/{self.period}.v{self.edition}.json"


@with_config(ConfigDict(strict=True, extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """Says that a tile is finished and stored over some days.

    Attributes:
        fingerprint: which model, data, grid and settings it was made with.
        static: SHA-256 of the static values, from the sink; empty where the stretch is not the cube's first.
        blocks: SHA-256 of the daily values of each time block, from the sink.
        months: SHA-256 of the means over each month that ends in the stretch.
        forcing: SHA-256 of the forcing it was computed from; empty where the days were copied.
        missing: values on land that are not finite.
        residual: largest gap of the water budget on any day and cell, mm; None for models without one and for
            days that were copied.
        seconds: how long it took.
    """

    fingerprint: str
    static: str
    blocks: tuple[str, ...]
    months: tuple[str, ...]
    forcing: str
    missing: int
    residual: float | None
    seconds: float

    def to_json(self) -> bytes:
        """One spelling for one receipt."""
        return canonical_json(asdict(self)).encode()

    @staticmethod
    def from_json(data: bytes) -> "Receipt":
        """Inverse of :meth:`to_json`.

        Raises:
            StoreError: the bytes are not a complete receipt.
        """
        try:
            return _RECEIPT.validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise StoreError(f"not a complete receipt: {name} {first['msg']}") from None


_RECEIPT: Final = TypeAdapter(Receipt)


@dataclass(frozen=True, slots=True)
class Ledger:
    """The receipts of the cube at ``url``.

    Attributes:
        url: of the cube.
        options: of its store.
        rollbacks: days from which the cube was computed anew, in order; see :func:`is_current`.
    """

    url: str
    options: StorageOptions
    rollbacks: tuple[date, ...] = ()

    @property
    def edition(self) -> int:
        """What new receipts are marked with."""
        return len(self.rollbacks)

    def record(self, tile: str, period: Period, receipt: Receipt) -> None:
        """Store a receipt; the last thing done for its tile and days.

        Raises:
            StoreError: the store cannot be reached or written.
        """
        put_object(self._place(Covered(tile, period, self.edition).key), receipt.to_json(), self.options)

    def covered(self, tile: str = "") -> Mapping[str, tuple[Covered, ...]]:
        """Tile -> what its valid receipts cover, by day; costs a listing.

        Raises:
            StoreError: an object is not a receipt, or the store cannot be read.
        """
        found: dict[str, list[Covered]] = {}
        for name in list_objects(join(ledger_url(self.url), tile), self.options):
            one = self._parsed(join(tile, name) if tile else name)
            if is_current(one.edition, one.period.stop, self.rollbacks):
                found.setdefault(one.tile, []).append(one)
        return {name: tuple(sorted(parts, key=_by_day)) for name, parts in found.items()}

    def receipts(self, covered: Sequence[Covered]) -> Iterator[Receipt]:
        """Their receipts, in their order.

        Raises:
            StoreError: an object is not a receipt, or the store cannot be read.
        """
        with ThreadPoolExecutor(_READERS) as pool:
            yield from pool.map(self._read, covered)

    def forget(self, covered: Iterable[Covered]) -> None:
        """Delete receipts, so that what they cover is done again."""
        for one in covered:
            delete_tree(self._place(one.key), self.options)

    def _parsed(self, name: str) -> Covered:
        match = _NAME.fullmatch(name)
        try:
            if match is None:
                raise ConfigError("its name is not TILE/START..END.vN.json")
            return Covered(match["tile"], Period.parse(match["period"]), int(match["edition"]))
        except ConfigError as error:
            raise self._unreadable(name, str(error)) from error

    def _read(self, covered: Covered) -> Receipt:
        data = get_object(self._place(covered.key), self.options)
        try:
            return Receipt.from_json(data)
        except StoreError as error:
            raise self._unreadable(covered.key, str(error)) from error

    def _place(self, name: str) -> str:
        return join(ledger_url(self.url), name)

    def _unreadable(self, name: str, reason: str) -> StoreError:
        return StoreError(
            describe(
                "a receipt cannot be used, so nobody knows whether its tile is finished",
                where=displayed(self._place(name)),
                expected="one complete receipt, named after what it covers",
                actual=reason,
                fix="delete this object: its tile is then done again",
            )
        )


def _by_day(covered: Covered) -> tuple[date, date]:
    return covered.period.start, covered.period.stop


def is_current(edition: int, until: date, rollbacks: Sequence[date]) -> bool:
    """Whether what was made in an edition, and reaches until some day, outlived all later rollbacks.

    >>> rollbacks = [date(2003, 1, 1)]
    >>> is_current(0, date(2002, 1, 1), rollbacks), is_current(0, date(2004, 1, 1), rollbacks)
    (True, False)
    """
    return edition <= len(rollbacks) and all(until <= day for day in rollbacks[edition:])


def gaps(covered: Sequence[Covered], wanted: Period) -> tuple[Period, ...]:
    """The days of ``wanted`` that no receipt covers, as stretches.

    >>> days = [date(2001, 1, d) for d in (1, 3, 5, 9)]
    >>> [str(g) for g in gaps([Covered("t", Period(days[1], days[2]), 0)], Period(days[0], days[3]))]
    ['2001-01-01..2001-01-03', '2001-01-05..2001-01-09']
    """
    found, reached = [], wanted.start
    for _, period, _ in sorted(covered, key=_by_day):
        if period.start > reached:
            found.append(Period(reached, min(period.start, wanted.stop)))
        reached = max(reached, period.stop)
        if reached >= wanted.stop:
            break
    if reached < wanted.stop:
        found.append(Period(reached, wanted.stop))
    return tuple(found)


def cut_off(covered: Sequence[Covered], wanted: Period, shard_days: int) -> tuple[Covered, ...]:
    """Receipts that end within a shard, which holds more days by now; nobody reads it yet.

    That is where a cube ended whose last days were to be computed anew, before the forcing grew.

    >>> days = [date(2001, 1, d) for d in (1, 11, 15, 31)]
    >>> receipts = [Covered("t", Period(days[0], days[1]), 0), Covered("t", Period(days[1], days[2]), 1)]
    >>> [one.key for one in cut_off(receipts, Period(days[0], days[3]), shard_days=10)]
    ['t/2001-01-11..2001-01-15.v1.json']
    """
    ending = (one for one in covered if one.period.stop < wanted.stop)
    return tuple(one for one in ending if (one.period.stop - wanted.start).days % shard_days)


def unfilled(covered: Sequence[Covered], wanted: Period, shard_days: int) -> tuple[Period, ...]:
    """The days that have to be computed: those of :func:`gaps`, and of shards that are written anew."""
    left_out = cut_off(covered, wanted, shard_days)
    return gaps([one for one in covered if one not in left_out], wanted)


def ended_months(whole: Period, part: Period) -> tuple[Period, ...]:
    """Whole months of a cube that end in a part of its days, or of days it has not shown yet.

    >>> whole = Period(date(2001, 1, 15), date(2001, 4, 10))
    >>> [str(m) for m in ended_months(whole, Period(date(2001, 2, 5), date(2001, 3, 1)))]
    ['2001-02-01..2001-03-01']
    >>> [str(m) for m in ended_months(whole, Period(date(2001, 4, 1), date(2001, 5, 1)))]
    ['2001-04-01..2001-05-01']
    """
    longest = Period(whole.start, max(whole.stop, part.stop))
    return tuple(month for month in longest.months() if part.start < month.stop <= part.stop)


def ledger_url(cube_url: str) -> str:
    """Where the receipts of a cube are kept.

    >>> ledger_url("s3://bucket/cube.zarr/")
    's3://bucket/cube.ledger'
    """
    return cube_url.rstrip("/").removesuffix(".zarr") + ".ledger"


def other_spelling(cube_url: str) -> str:
    """The one other place whose cube would have the same receipts.

    >>> other_spelling("s3://bucket/cube.zarr/"), other_spelling("s3://bucket/cube")
    ('s3://bucket/cube', 's3://bucket/cube.zarr')
    """
    place = cube_url.rstrip("/")
    return place.removesuffix(".zarr") if place.endswith(".zarr") else place + ".zarr"
