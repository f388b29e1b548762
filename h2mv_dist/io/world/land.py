"""The land mask and climate of the made-up world.

Maps are [lat, lon], lat descending; ``mask.npz`` beside this file holds them at 1 degree.
"""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from h2mv_dist.errors import ConfigError, describe
from h2mv_dist.grid import FloatArray, Grid, IntArray

CLIMATES: Final = ("tropical", "arid", "temperate", "cold", "polar")
"""Simplified Koeppen classes; class k of :attr:`Land.climate` is ``CLIMATES[k - 1]``."""

MaskArray = NDArray[np.bool_]
ClassArray = NDArray[np.int8]

_FEWEST_CELLS: Final = 10

_SOUTHERN_LIMIT: Final = -60.0
"""Land south of it (the Antarctic) is left out, degrees north."""


@dataclass(frozen=True, slots=True, eq=False)
class Land:
    """Where there is land, and its climate.

    Attributes:
        grid: the whole globe, lat descending; the Antarctic counts as sea.
        climate: class 1..5 of :data:`CLIMATES` on land, 0 at sea, [lat, lon].
    """

    grid: Grid
    climate: ClassArray

    def cell_climate(self) -> ClassArray:
        """Class of every land cell, [cell]."""
        return self.climate[self.grid.mask]


def load_land(resolution: float = 1.0) -> Land:
    """The Earth's land north of 60 S.

    A coarse cell is land where at least half of its 1 degree cells are, and has the class most of those have
    (the lower one of two that are equally common).

    Args:
        resolution: edge of a cell, a whole number of degrees that divides 180.

    Raises:
        ConfigError: no such grid, or one with hardly any land.

    >>> load_land(1.0).grid.n_land
    15408
    """
    step = _whole_degrees(resolution)
    classes = _read_classes()
    counts = np.stack([_box_sums(classes == k, step) for k in range(1, len(CLIMATES) + 1)])
    mask = 2 * counts.sum(axis=0) >= step * step
    _require_land(int(mask.sum()), resolution)
    climate = np.where(mask, counts.argmax(axis=0) + 1, 0).astype(np.int8)
    return Land(Grid.lat_lon(_centres(90.0, -step, 180), _centres(-180.0, step, 360), mask), climate)


def pack_land(land_mask: MaskArray, classes: NDArray[np.uint8], path: str | Path) -> None:
    """Write the file :func:`load_land` reads; ``mask.npz`` was made from landmask_koppen_1deg.nc by it.

    Args:
        land_mask: True on land, [180, 360], lat descending, lon from 180 W.
        classes: Koeppen class 1..5 where there is land, any value elsewhere, [180, 360].
        path: the .npz file.
    """
    np.savez_compressed(path, land=np.packbits(land_mask), climate=classes[land_mask])


def _read_classes() -> ClassArray:
    """Class of each 1 degree cell, 0 at sea and in the Antarctic, [180, 360]."""
    with resources.files(__package__).joinpath("mask.npz").open("rb") as file, np.load(file) as packed:
        land = np.unpackbits(packed["land"], count=180 * 360).astype(bool).reshape(180, 360)
        classes = np.zeros((180, 360), np.int8)
        classes[land] = packed["climate"]
    classes[_centres(90.0, -1, 180) < _SOUTHERN_LIMIT] = 0
    return classes


def _whole_degrees(resolution: float) -> int:
    if not resolution >= 1 or resolution % 1 or 180 % resolution:
        raise ConfigError(
            describe(
                "no such grid",
                where="resolution of the made-up world",
                expected="a whole number of degrees that divides 180",
                actual=f"{resolution}",
                fix="use 1, 2, 3, 4, 5, 6, 9, 10, 12, 15, ...",
            )
        )
    return int(resolution)


def _require_land(n_land: int, resolution: float) -> None:
    if n_land < _FEWEST_CELLS:
        raise ConfigError(
            describe(
                "too little land for a world",
                where="resolution of the made-up world",
                expected=f"at least {_FEWEST_CELLS} land cells, so that folds can be made of them",
                actual=f"{n_land} land cells of {resolution:g} degrees",
                fix="use a finer grid: 30 degrees or less",
            )
        )


def _box_sums(values: MaskArray, step: int) -> IntArray:
    """Number of true cells in each box of ``step`` x ``step`` cells, [lat, lon]."""
    n_lat, n_lon = values.shape
    boxes = values.reshape(n_lat // step, step, n_lon // step, step)
    return np.asarray(boxes.sum(axis=(1, 3)), np.int64)


def _centres(first_edge: float, step: int, extent: int) -> FloatArray:
    """Cell centres from an edge on, degrees."""
    return np.asarray(first_edge + step * (np.arange(extent // abs(step)) + 0.5), np.float64)
