"""Who gets which workers: pure rules, without any Dask object."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

QUARANTINE_AFTER: Final = 3
"""Failures in a row of one slot, each blamed on the machine, after which it is used no more; a host may have
twice as many over all of its slots."""


@dataclass(frozen=True, slots=True)
class Seat:
    """A worker that can hold one rank.

    Attributes:
        host: machine it runs on.
        name: its name, which a restarted worker keeps; dask-cuda names workers by GPU.
        address: where it listens; new after a restart.
    """

    host: str
    name: str
    address: str

    @property
    def slot(self) -> str:
        """What stays the same when the worker is restarted."""
        return f"{self.host}/{self.name}"

    @property
    def position(self) -> tuple[str, tuple[tuple[int, str], ...], str]:
        """Sort key: host, then device (numbers in numeric order).

        >>> [s.name for s in sorted((Seat("a", n, "") for n in ("10", "9")), key=lambda s: s.position)]
        ['9', '10']
        """
        return self.host, _in_numeric_order(self.name), self.address


@lru_cache(maxsize=2**16)
def _in_numeric_order(name: str) -> tuple[tuple[int, str], ...]:
    """Sort key of a name; a gang is chosen among all free seats, in a loop that all else waits for."""
    parts = re.findall(r"\d+|\D+", name)
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in parts)


def choose_seats(free: Iterable[Seat], n: int) -> tuple[Seat, ...] | None:
    """Seats for ``n`` ranks, packed on few hosts and in order of (host, device); None if there are too few.

    >>> seats = [Seat("b", "0", "b:1"), Seat("a", "1", "a:2"), Seat("a", "0", "a:1")]
    >>> [s.address for s in choose_seats(seats, 2)]
    ['a:1', 'a:2']
    >>> [s.address for s in choose_seats(seats, 1)]
    ['b:1']
    >>> choose_seats(seats, 4) is None
    True
    """
    hosts: dict[str, list[Seat]] = {}
    for seat in sorted(free, key=lambda s: s.position):
        hosts.setdefault(seat.host, []).append(seat)
    # the host with the least room to spare that holds the whole gang, or else the fullest hosts first
    whole = sorted((h for h in hosts.values() if len(h) >= n), key=len)
    ordered = whole[0] if whole else [s for h in sorted(hosts.values(), key=len, reverse=True) for s in h]
    if len(ordered) < n:
        return None
    return tuple(sorted(ordered[:n], key=lambda s: s.position))


def choose_unit(queued: Sequence[str], last: str, elsewhere: Collection[str]) -> int:
    """Which unit a free worker takes, by the neighbourhoods of those that are queued, in their order.

    Args:
        queued: not empty.
        last: the neighbourhood it worked in last.
        elsewhere: where the other workers worked last.

    >>> choose_unit(["a", "a", "b"], "b", {"a"}), choose_unit(["a", "a", "b"], "", {"a"})
    (2, 2)
    >>> choose_unit(["a", "a", "b"], "c", {"a", "b"})
    0
    """
    return min(range(len(queued)), key=lambda i: (queued[i] != last, queued[i] in elsewhere, i))


@dataclass(slots=True)
class Health:
    """Which slots, and which hosts, keep failing."""

    reasons: dict[str, list[str]] = field(default_factory=dict)

    def blame(self, slot: str, reason: str) -> None:
        """Count a failure that was the machine's, for the slot and its host."""
        for place in (slot, _host(slot)):
            self.reasons.setdefault(place, []).append(reason)

    def clear(self, slots: Iterable[str]) -> None:
        """Forget failures of slots that did their work, and of their hosts."""
        for slot in slots:
            self.reasons.pop(slot, None)
            self.reasons.pop(_host(slot), None)

    @property
    def quarantined(self) -> Mapping[str, str]:
        """Slots and hosts not to use, each with the reason of its last failure."""
        return {place: why[-1] for place, why in self.reasons.items() if len(why) >= _limit(place)}

    def usable(self, seats: Sequence[Seat], n: int) -> Sequence[Seat]:
        """The seats out of quarantine; all, if a gang of ``n`` could not be formed otherwise.

        >>> health = Health({"a/0": ["was ended by SIGKILL"] * 3})
        >>> seats = [Seat("a", "0", "a:1"), Seat("a", "1", "a:2")]
        >>> [s.name for s in health.usable(seats, 1)], len(health.usable(seats, 2))
        (['1'], 2)
        """
        banned = self.quarantined
        sound = [seat for seat in seats if seat.slot not in banned and seat.host not in banned]
        return sound if len(sound) >= n else seats


def _host(slot: str) -> str:
    return slot.split("/", maxsplit=1)[0]


def _limit(place: str) -> int:
    return QUARANTINE_AFTER if "/" in place else 2 * QUARANTINE_AFTER
