"""Snapshots: what a tile's models remember at the end of some days, kept beside a cube.

From them appended days go on, and days whose forcing was replaced are computed anew. Arrays are
[member, cell, ...], in the order of the tile's land cells.
"""

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Final

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from h2mv_dist.config import StorageOptions
from h2mv_dist.errors import StoreError, describe
from h2mv_dist.io.ledger import is_current
from h2mv_dist.io.stores import delete_tree, displayed, get_object, join, list_objects, put_object

_NAME: Final = re.compile(r"(?P<tile>[\d_-]+)/(?P<day>[\d-]{10})\.v(?P<edition>\d+)\.safetensors", re.ASCII)


Arrays = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class Snapshots:
    """The snapshots of the cube at ``url``.

    Attributes:
        url: of the cube.
        options: of its store.
        fingerprint: which model, data, grid and settings they belong to.
        rollbacks: as in :class:`h2mv_dist.io.ledger.Ledger`.
    """

    url: str
    options: StorageOptions
    fingerprint: str
    rollbacks: tuple[date, ...] = ()

    def save(self, tile: str, day: date, arrays: Arrays) -> None:
        """Keep what is remembered when ``day`` begins.

        Raises:
            StoreError: the store cannot be reached or written.
        """
        content = save(dict(sorted(arrays.items())))
        checked = hashlib.sha256((self.fingerprint + tile).encode() + content).digest()
        put_object(self._place(tile, day, len(self.rollbacks)), checked + content, self.options)

    def load(self, tile: str, day: date) -> Arrays:
        """What :meth:`save` was given.

        Raises:
            StoreError: there is none, it is damaged or belongs to another cube, or the store cannot be read.
        """
        place = self._place(tile, day, self._editions(tile)[day])
        data = get_object(place, self.options)
        checked, content = data[: hashlib.sha256().digest_size], data[hashlib.sha256().digest_size :]
        if hashlib.sha256((self.fingerprint + tile).encode() + content).digest() != checked:
            raise StoreError(
                describe(
                    "a snapshot of states is damaged, or belongs to another model or cube",
                    where=displayed(place),
                    expected="the bytes that were written for this tile of this cube",
                    actual="another checksum",
                    fix="delete this object: the tile then goes on from an earlier one",
                )
            )
        found: Arrays = load(content)
        return found

    def days(self, tile: str) -> tuple[date, ...]:
        """Days at whose beginning there is a valid snapshot of a tile, in order; costs a listing.

        Raises:
            StoreError: the store cannot be read.
        """
        return tuple(sorted(self._editions(tile)))

    def forget(self, tile: str, kept: Collection[date]) -> None:
        """Delete the snapshots of a tile but for those of some days.

        Raises:
            StoreError: the store cannot be reached or written.
        """
        for name, day, edition in self._listed(tile):
            if day not in kept or not is_current(edition, day, self.rollbacks):
                delete_tree(join(snapshots_url(self.url), name), self.options)

    def _editions(self, tile: str) -> dict[date, int]:
        """The newest valid edition for each day."""
        valid = [(day, e) for _, day, e in self._listed(tile) if is_current(e, day, self.rollbacks)]
        return dict(sorted(valid))

    def _listed(self, tile: str) -> list[tuple[str, date, int]]:
        names = [f"{tile}/{name}" for name in list_objects(join(snapshots_url(self.url), tile), self.options)]
        matches = [match for name in names if (match := _NAME.fullmatch(name))]
        return [(m.string, date.fromisoformat(m["day"]), int(m["edition"])) for m in matches]

    def _place(self, tile: str, day: date, edition: int) -> str:
        return join(snapshots_url(self.url), tile, f"{day}.v{edition}.safetensors")


def snapshots_url(cube_url: str) -> str:
    """Where the snapshots of a cube are kept.

    >>> snapshots_url("s3://bucket/cube.zarr/")
    's3://bucket/cube.states'
    """
    return cube_url.rstrip("/").removesuffix(".zarr") + ".states"
