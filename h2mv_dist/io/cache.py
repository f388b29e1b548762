"""The host's cache: every land cell of a source, unscaled, in memory-mapped files that processes share.

Cells are numbered 0 .. n_land - 1, row-major over land. Files of one folder, named by what was read:
``forcing`` [cell, time, var], ``static`` [cell, feature], ``target-NAME`` [cell, step], float32, in the units
of :mod:`h2mv_dist.variables`; ``steps-NAME`` [step]; ``lat``, ``lon``, ``mask``, ``area``; ``meta.json``.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import platformdirs
from numpy.typing import NDArray

from h2mv_dist.config import StorageOptions, canonical_json
from h2mv_dist.errors import StoreError, describe
from h2mv_dist.grid import BoolArray, Grid, IntArray, Period, Tile
from h2mv_dist.io.cache_room import META, Hold, new_part, room, turn, turn_file, unfinished
from h2mv_dist.io.handles import Handle, whole_chunks
from h2mv_dist.io.source import Source
from h2mv_dist.io.stores import explained, put_object
from h2mv_dist.io.times import Frequency, StepAxis
from h2mv_dist.spec import Float32Array

_FORMAT: Final = 1
_BOXES_AT_ONCE: Final = 4
_BOX_BYTES: Final = 2**25
"""What one box aims at in memory; a single chunk larger than this is still read whole."""

_LOCAL: Final = StorageOptions()

_Mapped: TypeAlias = "np.memmap[Any, np.dtype[np.float32]]"


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """Observations of one target: its steps, and values [cell, step], NaN where there is none."""

    axis: StepAxis
    values: Float32Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StagedCells:
    """Every land cell of a source, mapped into memory, read only.

    Attributes:
        path: the folder, from which any process of this host can open the same cells.
        grid: the cells' grid; cell i is the i-th land cell, row-major.
        period: days of the forcing.
        forcing_names: columns of ``forcing``.
        static_names: columns of ``static``.
        forcing: [cell, time, var].
        static: [cell, feature].
        targets: variable -> observed series.
        hold: keeps the folder from being deleted to make room for another one.
    """

    path: Path
    grid: Grid
    period: Period
    forcing_names: tuple[str, ...]
    static_names: tuple[str, ...]
    forcing: Float32Array
    static: Float32Array
    targets: Mapping[str, Series]
    hold: Hold | None = field(default=None, repr=False)

    @property
    def n_cells(self) -> int:
        """Number of land cells."""
        return int(self.forcing.shape[0])


def default_cache() -> Path:
    """The user's cache folder on this host."""
    return Path(platformdirs.user_cache_dir("h2mv-dist"))


def stage(source: Source, directory: Path, limit_bytes: int | None = None) -> StagedCells:
    """Write every land cell of ``source`` below ``directory``, unless that was done before.

    With a limit, folders that nobody on this host has open make room first, those that were not opened for
    longest before others.

    Processes of one host wait for the one that is at it; what killed ones left is removed. Where locks do not
    work across processes all of them stage, the first one's folder stays, and the others use it.

    Raises:
        DataError: forcing or static features are not finite on land.
        StoreError: the source cannot be read, or there is no room below ``directory`` or within the limit.
    """
    return stage_once(lambda: source, source.cache_key, directory, limit_bytes)


def stage_once(
    find: Callable[[], Source], key: str, directory: Path, limit_bytes: int | None = None
) -> StagedCells:
    """As :func:`stage`, for a source that is only looked for by the process that writes its cells.

    Args:
        find: opens the source.
        key: its ``cache_key``.
        directory: where the cells are kept.
        limit_bytes: see :func:`stage`.
    """
    final = directory / key
    with explained(str(directory), _LOCAL):
        directory.mkdir(parents=True, exist_ok=True)
        with turn(turn_file(final)) as locked:
            if locked:
                _remove_left_overs(final)
            if not is_staged(directory, final.name):
                _write_once(find(), final, limit_bytes)
            # opened while it is our turn: nobody deletes the folder in between
            return open_staged(final)


def is_staged(directory: Path, key: str) -> bool:
    """Whether the cells of a source with this ``cache_key`` are complete below ``directory``."""
    return (directory / key / META).exists()


def open_staged(path: Path) -> StagedCells:
    """Open the folder that :func:`stage` wrote; nothing is read into memory but coordinates.

    As long as the cells are referred to, no process of this host deletes the folder to make room.

    Raises:
        StoreError: there is no complete folder of this version.
    """
    with explained(str(path), _LOCAL):
        hold = Hold(path)
        meta = json.loads((path / META).read_text())
        if meta["format"] != _FORMAT:
            raise _other_format(path, meta["format"])
        targets = {name: _open_series(path, name, frequency) for name, frequency in meta["targets"]}
        return StagedCells(
            path=path,
            grid=Grid(tuple(meta["dims"]), *(_load(path, name) for name in ("lat", "lon", "mask", "area"))),
            period=Period.parse(meta["period"]),
            forcing_names=tuple(meta["forcing"]),
            static_names=tuple(meta["static"]),
            forcing=_load(path, "forcing", mapped=True),
            static=_load(path, "static", mapped=True),
            targets=MappingProxyType(targets),
            hold=hold,
        )


def _other_format(path: Path, found: object) -> StoreError:
    return StoreError(
        describe(
            "the cache was written by another version",
            where=str(path),
            expected=f"format {_FORMAT}",
            actual=f"format {found}",
            fix="delete this folder",
        )
    )


def _open_series(path: Path, name: str, frequency: Frequency) -> Series:
    axis = StepAxis(_load(path, f"steps-{name}"), frequency)
    return Series(axis, _load(path, f"target-{name}", mapped=True))


def _load(path: Path, name: str, *, mapped: bool = False) -> NDArray[Any]:
    values: NDArray[Any] = np.load(path / f"{name}.npy", mmap_mode="r" if mapped else None)
    return values


# -------------------- writing


def _remove_left_overs(final: Path) -> None:
    """Delete what killed processes left; under the lock nobody else of this host is filling a folder."""
    for path in final.parent.iterdir():
        if path.name.startswith(unfinished(final)):
            shutil.rmtree(path, ignore_errors=True)


def _write_once(source: Source, final: Path, limit_bytes: int | None) -> None:
    """Fill a folder of our own and give it its name; whoever names it first has written the same."""
    part = new_part(final)
    part.mkdir()
    try:
        with room(final.parent, _staged_bytes(source), limit_bytes):
            arrays = _create_arrays(source, part)
        _fill(source, part, arrays)
        # a rename that fails because of anything else shows as soon as the folder is opened
        with suppress(OSError):
            part.rename(final)
    finally:
        shutil.rmtree(part, ignore_errors=True)


class _Arrays(NamedTuple):
    """The large arrays of a folder that is being filled."""

    forcing: _Mapped
    static: _Mapped
    targets: Mapping[str, _Mapped]


def _staged_bytes(source: Source) -> int:
    """About what a folder takes, bytes."""
    columns = source.period.n_days * len(source.forcing) + len(source.static)
    columns += sum(len(axis) for axis in source.targets.values())
    grid = source.grid
    return 4 * grid.n_land * columns + sum(a.nbytes for a in (grid.lat, grid.lon, grid.mask, grid.area))


def _create_arrays(source: Source, folder: Path) -> _Arrays:
    n_cells = source.grid.n_land
    return _Arrays(
        _create(folder, "forcing", (n_cells, source.period.n_days, len(source.forcing))),
        _create(folder, "static", (n_cells, len(source.static))),
        {n: _create(folder, f"target-{n}", (n_cells, len(a))) for n, a in source.targets.items()},
    )


def _fill(source: Source, folder: Path, arrays: _Arrays) -> None:
    targets = arrays.targets
    _run_all(
        [
            *_static_boxes(source, arrays.static),
            *_forcing_boxes(source, arrays.forcing),
            *(box for name, values in targets.items() for box in _target_boxes(source, name, values)),
        ]
    )
    for values in (arrays.forcing, arrays.static, *targets.values()):
        values.flush()
    for name, axis in source.targets.items():
        np.save(folder / f"steps-{name}.npy", axis.days)
    for name in ("lat", "lon", "mask", "area"):
        np.save(folder / f"{name}.npy", getattr(source.grid, name))
    put_object(str(folder / META), canonical_json(_meta(source)).encode(), _LOCAL)


def _meta(source: Source) -> dict[str, object]:
    return {
        "format": _FORMAT,
        "dims": source.grid.dims,
        "period": str(source.period),
        "forcing": source.forcing,
        "static": source.static,
        "targets": [(name, axis.frequency) for name, axis in source.targets.items()],
    }


def _create(folder: Path, name: str, shape: tuple[int, ...]) -> _Mapped:
    path = folder / f"{name}.npy"
    values = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    if sys.platform == "linux":
        # A full disk is an error here; met while writing through the map it would kill the process.
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return values


def _run_all(boxes: Sequence[Callable[[], None]]) -> None:
    """Do a few boxes at a time; the first failure stops those that have not begun."""
    with ThreadPoolExecutor(_BOXES_AT_ONCE, "h2mv-stage") as pool:
        try:
            for done in as_completed([pool.submit(box) for box in boxes]):
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _forcing_boxes(source: Source, staged: Float32Array) -> Iterator[Callable[[], None]]:
    bytes_a_step = 4 * len(source.forcing)
    shape = _box_shape(source, source.arrays.forcing, bytes_a_step * source.period.n_days)
    for tile in source.grid.land_tiles(shape):
        n_days = _BOX_BYTES // (bytes_a_step * prod(tile.shape))
        for period in source.time_blocks(source.period, n_days):
            yield partial(_stage_forcing, source, tile, period, staged)


def _target_boxes(source: Source, name: str, staged: Float32Array) -> Iterator[Callable[[], None]]:
    handle, n_steps = source.arrays.targets[name].handle, len(source.targets[name])
    shape = _box_shape(source, [handle], 4 * n_steps)
    for tile in source.grid.land_tiles(shape):
        starts = [handle.chunk_starts(slice(0, n_steps))]
        for steps in whole_chunks(starts, _BOX_BYTES // (4 * prod(tile.shape))):
            yield partial(_stage_target, source, name, tile, steps, staged)


def _static_boxes(source: Source, staged: Float32Array) -> Iterator[Callable[[], None]]:
    shape = _box_shape(source, source.arrays.static, 4 * len(source.static))
    for tile in source.grid.land_tiles(shape):
        yield partial(_stage_static, source, tile, staged)


def _box_shape(source: Source, handles: Sequence[Handle], bytes_a_cell: int) -> tuple[int, ...]:
    """Whole chunks, and as many of them along the last axis as fit the size a box aims at."""
    *rows, columns = source.box_of_whole_chunks(handles)
    fitting = _BOX_BYTES // (bytes_a_cell * prod(rows) * columns)
    return (*rows, min(max(fitting, 1) * columns, source.grid.shape[-1]))


def _stage_forcing(source: Source, tile: Tile, period: Period, staged: Float32Array) -> None:
    first = period.first - source.period.first
    cells = _positions(source.grid, tile, source.grid.mask[tile.slices])
    staged[cells, first : first + period.n_days] = source.read_land_forcing(tile, period)


def _stage_target(source: Source, name: str, tile: Tile, steps: slice, staged: Float32Array) -> None:
    cells = _positions(source.grid, tile, source.grid.mask[tile.slices])
    staged[cells, steps] = source.read_land_target(name, tile, steps)


def _stage_static(source: Source, tile: Tile, staged: Float32Array) -> None:
    land = source.grid.mask[tile.slices]
    staged[_positions(source.grid, tile, land)] = source.read_static(tile)[land]


def _positions(grid: Grid, tile: Tile, land: BoolArray) -> IntArray:
    """Numbers of a tile's land cells among all land cells, [cell]."""
    corners = np.meshgrid(*(np.arange(s.start, s.stop) for s in tile.slices), indexing="ij")
    flat = np.ravel_multi_index(tuple(axis[land] for axis in corners), grid.shape)
    return np.searchsorted(grid.land_index(), flat)
