"""Source: boxes of a data set as arrays, checked, in our units, each chunk read once for an aligned box.

Forcing is [time, *tile, var], static features are [*tile, feature], targets [step, *tile]; float32. Several
arrays, and several chunks of each, are fetched at once.
"""

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

import numpy as np

from h2mv_dist.config import DataSettings, StorageOptions, canonical_json
from h2mv_dist.errors import DataError, describe
from h2mv_dist.grid import BoolArray, Grid, Period, Tile, as_date
from h2mv_dist.io.handles import (
    Beyond,
    Handle,
    Touched,
    arrays_at_once,
    bytes_beyond,
    contents_of,
    fixed_values,
    whole_chunks,
)
from h2mv_dist.io.layouts import Arrays, open_arrays
from h2mv_dist.io.stores import content_fingerprint
from h2mv_dist.io.times import StepAxis
from h2mv_dist.spec import Float32Array, Moments, Scaler, moments

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Source:
    """A data set that has been found and checked.

    Attributes:
        grid: its spatial axes, as stored.
        period: days of the forcing that are used: those of ``data.period``, else all that every variable has.
        forcing: names of the columns of :meth:`read_forcing`.
        static: names of the columns of :meth:`read_static`.
        targets: observed variables and their steps, all wholly inside ``period``.
        arrays: what is read.
    """

    grid: Grid
    period: Period
    forcing: tuple[str, ...]
    static: tuple[str, ...]
    targets: Mapping[str, StepAxis]
    arrays: Arrays = field(repr=False)

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """Smallest box of cells that holds whole chunks (or shards) of every forcing variable."""
        return self.box_of_whole_chunks(self.arrays.forcing)

    def box_of_whole_chunks(self, handles: Sequence[Handle]) -> tuple[int, ...]:
        """Smallest box of cells, no larger than the grid, that holds whole chunks of each array."""
        n_axes = len(self.grid.shape)
        # only the feature axis of a static array comes after the spatial ones
        spatial = (h.chunks[len(h.dims) - n_axes - h.has_features :][:n_axes] for h in handles)
        return tuple(
            min(math.lcm(*sizes), n)
            for sizes, n in zip(zip(*spatial, strict=True), self.grid.shape, strict=True)
        )

    def time_blocks(self, period: Period, n_days: int) -> Iterator[Period]:
        """Cut a period where chunks of all forcing variables start, into blocks of at most ``n_days``.

        Longer chunks give longer blocks; where those of different variables never start together, the block
        is the whole period.
        """
        days = self._days(period)
        starts = [handle.chunk_starts(days) for handle in self.arrays.forcing]
        for block in whole_chunks(starts, n_days):
            yield Period(as_date(period.first + block.start), as_date(period.first + block.stop))

    def touched(self, tile: Tile, period: Period) -> list[Touched]:
        """The chunks of each forcing variable that are read for a tile and some days."""
        return [handle.touched(self._days(period), *tile.slices) for handle in self.arrays.forcing]

    def bytes_beyond(self, tile: Tile, period: Period) -> int:
        """Most bytes of forcing from outside a tile and some days in memory while these are read."""
        return bytes_beyond(self._beyond((self._days(period), *tile.slices)))

    def _beyond(self, box: tuple[slice, ...]) -> list[Beyond]:
        return [handle.beyond(*box) for handle in self.arrays.forcing]

    def read_forcing(self, tile: Tile, period: Period) -> Float32Array:
        """Forcing of a tile, [time, *tile.shape, var]; sea may hold anything.

        Raises:
            DataError: the tile or period is not part of this source, or a land cell has no finite value.
            StoreError: the store cannot be read.
        """
        values = np.empty((period.n_days, *tile.shape, len(self.forcing)), np.float32)
        for column, part in enumerate(self._read_forcing(tile, period)):
            values[..., column] = part
        return values

    def read_land_forcing(self, tile: Tile, period: Period) -> Float32Array:
        """Forcing of a tile's land cells in row-major order, [cell, time, var]; see :meth:`read_forcing`."""
        land = self.grid.mask[tile.slices]
        values = np.empty((int(land.sum()), period.n_days, len(self.forcing)), np.float32)
        for column, part in enumerate(self._read_forcing(tile, period)):
            values[..., column] = _packed(part, land).T
        return values

    def _read_forcing(self, tile: Tile, period: Period) -> Iterator[Float32Array]:
        """One variable after the other, [time, *tile.shape]."""
        self._check_tile(tile)
        box = (self._days(period), *tile.slices)
        parts = _read_each(self.arrays.forcing, box, arrays_at_once(self._beyond(box)))
        for name, part in zip(self.forcing, parts, strict=True):
            self._check_forcing(name, part, tile, period)
            yield part

    def read_static(self, tile: Tile) -> Float32Array:
        """Static features of a tile, [*tile.shape, feature]; sea may hold anything.

        Raises:
            DataError: the tile is not part of this source, or a land cell has no finite value.
            StoreError: the store cannot be read.
        """
        self._check_tile(tile)
        parts = _read_each(self.arrays.static, tile.slices, len(self.arrays.static))
        values = np.concatenate([part.reshape(*tile.shape, -1) for part in parts], axis=-1)
        bad = ~np.isfinite(values) & self.grid.mask[tile.slices][..., None]
        if bad.any():
            raise self._static_error(bad, tile)
        return values

    def read_targets(self, tile: Tile) -> Mapping[str, Float32Array]:
        """Observations of a tile, variable -> [step, *tile.shape]; NaN where there is none.

        Raises:
            DataError: the tile is not part of this source, or an observation is infinite.
            StoreError: the store cannot be read.
        """
        self._check_tile(tile)
        handles = [target.handle for target in self.arrays.targets.values()]
        parts = list(_read_each(handles, (slice(None), *tile.slices), len(handles)))
        for name, part in zip(self.targets, parts, strict=True):
            self._check_target(name, part, tile)
        return MappingProxyType(dict(zip(self.targets, parts, strict=True)))

    def read_land_target(self, name: str, tile: Tile, steps: slice) -> Float32Array:
        """Some steps of one target, [cell, step], as :meth:`read_land_forcing`; see :meth:`read_targets`."""
        self._check_tile(tile)
        values = self.arrays.targets[name].handle.read(steps, *tile.slices)
        self._check_target(name, values, tile)
        return _packed(values, self.grid.mask[tile.slices]).T

    def published_scaler(self) -> Scaler:
        """The statistics published with the data.

        Raises:
            DataError: the data set has none for one of its arrays.
        """
        static = [self._statistics(handle.name) for handle in self.arrays.static]
        return Scaler(
            _joined([self._statistics(name) for name in self.forcing]),
            _joined(static),
            {name: self._statistics(name) for name in self.targets},
        )

    def fingerprint(self) -> str:
        """SHA-256 of what is read: the objects of every array, and how they are turned into ours."""
        handles = [
            *self.arrays.forcing,
            *self.arrays.static,
            *(t.handle for t in self.arrays.targets.values()),
        ]
        contents = contents_of(handles)
        meaning = {
            "period": str(self.period),
            "columns": [self.forcing, self.static, tuple(self.targets)],
            "conversions": [list(handle.conversion) for handle in handles],
            "mask": hashlib.sha256(np.packbits(self.grid.mask).tobytes()).hexdigest(),
        }
        return hashlib.sha256(canonical_json([contents, meaning]).encode()).hexdigest()

    @cached_property
    def identity(self) -> str:
        """SHA-256 of what the data are; the same while forcing merely grows, is replaced, or was copied.

        Forcing counts with its names and units but not with its values; static features, coordinates and mask
        with their values, which are read for it, see :func:`fixed_values`.
        """
        meaning = {
            "columns": [self.forcing, self.static],
            "conversions": [list(handle.conversion) for handle in self.arrays.forcing],
            "fixed": fixed_values(self.grid, self.arrays.static),
        }
        return hashlib.sha256(canonical_json(meaning).encode()).hexdigest()

    def take_over_identity(self, identity: str, objects: str) -> None:
        """Believe what another process has worked out from values, if they lie in the very same objects.

        Args:
            identity: its :attr:`identity`.
            objects: its :meth:`identity_by_objects`.
        """
        if self.identity_by_objects() == objects:
            self.__dict__["identity"] = identity

    def identity_by_objects(self) -> str:
        """What :attr:`identity` was for cubes that do not record values.

        Static features and their coordinates counted with their objects, on a file system with the times of
        files, so a copied store, or one whose coordinates are written again when it grows, is another one.
        """
        static = self.arrays.static
        contents = [content_fingerprint(h.url, h.options, h.paths) for h in static]
        grid = (self.grid.lat, self.grid.lon, self.grid.mask.astype(np.float64))
        meaning = {
            "columns": [self.forcing, self.static],
            "conversions": [list(handle.conversion) for handle in (*self.arrays.forcing, *static)],
            "grid": [
                hashlib.sha256(np.ascontiguousarray(axis, "<f8").tobytes()).hexdigest() for axis in grid
            ],
        }
        return hashlib.sha256(canonical_json([contents, meaning]).encode()).hexdigest()

    def tell_uneven_days(self) -> None:
        """Log which forcing variables have fewer days than others, if that decides which days are used."""
        if self.arrays.uneven:
            _log.warning(
                "days that every forcing variable has are used, %s: %s", self.period, self.arrays.uneven
            )

    @cached_property
    def cache_key(self) -> str:
        """Name of the folder the cells are staged in; the objects are listed once to find it."""
        return self.fingerprint()[:32]

    def _check_tile(self, tile: Tile) -> None:
        inside = len(tile.stop) == len(self.grid.shape) and all(
            0 <= start < stop <= size
            for start, stop, size in zip(tile.start, tile.stop, self.grid.shape, strict=True)
        )
        if not inside:
            raise DataError(f"tile {tile.name} is not part of a grid of shape {self.grid.shape}")

    def _days(self, period: Period) -> slice:
        if not self.period.contains(period):
            raise DataError(f"{period} is not part of the days that are used, {self.period}")
        first = period.first - self.period.first
        return slice(first, first + period.n_days)

    def _check_forcing(self, name: str, values: Float32Array, tile: Tile, period: Period) -> None:
        bad = ~np.isfinite(values) & self.grid.mask[tile.slices]
        if not bad.any():
            return
        step, *cell = (int(i) for i in np.argwhere(bad)[0])
        count, cells = int(bad.sum()), int(bad.any(axis=0).sum())
        raise DataError(
            describe(
                f"{name} is not finite on land",
                where=f"first at {self._place(tile, cell)} on {as_date(period.first + step)}",
                expected="a finite value on every land cell and day",
                actual=f"{count} values that are not, in {cells} cells of tile {tile.name}",
                fix="fill the gaps, or take the cells out of the mask",
            )
        )

    def _check_target(self, name: str, values: Float32Array, tile: Tile) -> None:
        bad = np.isinf(values) & self.grid.mask[tile.slices]
        if bad.any():
            _, *cell = (int(i) for i in np.argwhere(bad)[0])
            raise DataError(
                describe(
                    f"{name} holds infinite observations",
                    where=f"first at {self._place(tile, cell)}",
                    expected="a number, or NaN where nothing was observed",
                    actual=f"{int(bad.sum())} infinite values in tile {tile.name}",
                    fix="write NaN instead",
                )
            )

    def _static_error(self, bad: BoolArray, tile: Tile) -> DataError:
        *cell, feature = (int(i) for i in np.argwhere(bad)[0])
        return DataError(
            describe(
                f"static feature {self.static[feature]} is not finite on land",
                where=f"first at {self._place(tile, cell)}",
                expected="a finite value on every land cell",
                actual=f"{int(bad.sum())} values that are not, in {int(bad.any(axis=-1).sum())} cells",
                fix="fill the gaps, or take the cells out of the mask",
            )
        )

    def _place(self, tile: Tile, cell: list[int]) -> str:
        """Where a cell of a tile is, for messages."""
        position = [start + offset for start, offset in zip(tile.start, cell, strict=True)]
        lat, lon = self.grid.lat[position[0]], self.grid.lon[position[-1]]
        return f"lat {lat:g}, lon {lon:g}"

    def _statistics(self, name: str) -> Moments:
        if name not in self.arrays.statistics:
            raise DataError(
                describe(
                    "the data set publishes no statistics",
                    where=name,
                    expected="attributes mean and std on the variable's group (published layout)",
                    actual="none",
                    fix='set training.scaler = "fit"',
                )
            )
        mean, std = self.arrays.statistics[name]
        return moments(mean, std, tuple(f"{name}[{i}]" for i in range(mean.size)))


def open_source(
    data: DataSettings, *, forcing: tuple[str, ...], targets: tuple[str, ...], options: StorageOptions
) -> Source:
    """Find and check a data set; values are read later, box by box.

    Args:
        data: where it is and how it is laid out.
        forcing: daily inputs, in column order.
        targets: observed variables; none for inference.
        options: credentials of its stores.

    Raises:
        ConfigError: a setting names an unknown variable.
        DataError: something is missing or is not on the axes and in the units it should have.
        StoreError: a store cannot be reached or read.
    """
    arrays = open_arrays(data, forcing=forcing, targets=targets, options=options)
    return Source(
        grid=arrays.grid,
        period=arrays.period,
        forcing=forcing,
        static=tuple(column for handle in arrays.static for column in handle.columns),
        targets=MappingProxyType({name: target.axis for name, target in arrays.targets.items()}),
        arrays=arrays,
    )


def _read_each(handles: Sequence[Handle], box: tuple[slice, ...], at_once: int) -> Iterator[Float32Array]:
    """Read the same box of several arrays; hand them out in their order, and let go of each."""
    if handles:
        with ThreadPoolExecutor(at_once, "h2mv-read") as pool:
            yield from pool.map(lambda handle: handle.read(*box), handles)


def _packed(values: Float32Array, land: BoolArray) -> Float32Array:
    """Values [step, *tile] of a tile's land cells, row-major, [step, cell]."""
    return values.reshape(len(values), -1).take(np.flatnonzero(land), axis=1)


def _joined(parts: list[Moments]) -> Moments:
    return Moments(
        tuple(value for part in parts for value in part.mean),
        tuple(value for part in parts for value in part.std),
    )
