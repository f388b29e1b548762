"""Handles: arrays on our axes, our days and in our units, read box by box.

A handle gives [time, *space], [*space] or [*space, feature], float32; ``space`` is (lat, lon) or (cell,).
"""

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import prod
from typing import Final, NamedTuple

import numpy as np
import xarray as xr
import zarr

from h2mv_dist.config import StorageOptions
from h2mv_dist.errors import DataError, StoreError, describe
from h2mv_dist.grid import BoolArray, Grid, Period, as_date
from h2mv_dist.io.cf import Coordinate, decode, values_of
from h2mv_dist.io.library import Found
from h2mv_dist.io.local_chunks import AT_ONCE
from h2mv_dist.io.spaces import Space, flipped_dims, space_of
from h2mv_dist.io.stores import content_fingerprint, explained, public
from h2mv_dist.io.times import DailyTimes, StepAxis, Times, target_steps
from h2mv_dist.io.units import Conversion, conversion_of
from h2mv_dist.spec import Float32Array

_VALUES_AT_ONCE: Final = 2**21
"""Of a static array, if its chunks hold no more."""
_BEYOND_BYTES: Final = 64 * 2**20
"""Of chunks that are larger than their box; with more of them, arrays are read one after the other."""


class Touched(NamedTuple):
    """The chunks that hold a box.

    Attributes:
        n_chunks: how many they are.
        cells: of all of them, cut where the array ends.
    """

    n_chunks: int
    cells: int


class Beyond(NamedTuple):
    """What chunks take that stick out of a box while it is read.

    Attributes:
        held: chunks in memory at a time.
        n_bytes: of each of them, what does not fit into the box.
    """

    held: int
    n_bytes: int

    @property
    def in_memory(self) -> int:
        """Most bytes of all of them: as received, and unpacked."""
        return 2 * self.held * self.n_bytes


@dataclass(frozen=True, slots=True, eq=False)
class Handle:
    """An array that can be read box by box; its axes are ours, its days those that are used.

    Attributes:
        name: variable, or static array.
        where: store and array, for messages.
        url: its store.
        paths: what it is made of inside the store: the array and its coordinates, or its group.
        variable: the decoded array, lazy, in the axis order of the store.
        dims: the stored names of our axes, in our order.
        shape: of the stored array, along our axes.
        chunks: cells of a shard, or of a chunk where there are none, along our axes.
        inner: cells of a chunk, along our axes: what is read and unpacked whole.
        at_once: shards, or chunks where there are none, that are read at a time.
        origin: step of the store that is the first one here.
        conversion: from the stored units to ours.
        columns: names along the feature axis of a static array; its own name without such an axis.
        has_features: whether the last axis is a feature axis.
        options: how its store is opened.
    """

    name: str
    where: str
    url: str
    paths: tuple[str, ...]
    variable: xr.Variable = field(repr=False)
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    inner: tuple[int, ...]
    at_once: int
    origin: int
    conversion: Conversion
    columns: tuple[str, ...]
    has_features: bool
    options: StorageOptions

    def read(self, *box: slice) -> Float32Array:
        """Values of a box along our axes; axes left out are read whole.

        Raises:
            StoreError: the store cannot be read, or a chunk of it cannot be decoded.
        """
        along = dict(zip(self.dims, box, strict=False))
        stored = tuple(str(d) for d in self.variable.dims)
        lazy = self.variable[tuple(along.get(d, slice(None)) for d in stored)]
        with explained(self.url, self.options):
            try:
                values = lazy.to_numpy()
            except (RuntimeError, ValueError, EOFError, zlib.error) as error:
                raise StoreError(
                    describe(
                        "a chunk cannot be decoded",
                        where=self.where,
                        expected="the bytes that were written",
                        actual=f"{type(error).__name__}: {error}",
                        fix="write the array again, or fetch a fresh copy",
                    )
                ) from error
        return self.conversion.apply(values.transpose([stored.index(d) for d in self.dims]))

    def touched(self, *box: slice) -> Touched:
        """The chunks that are read for a box along our axes."""
        first, *others = box
        stored = (slice(first.start + self.origin, first.stop + self.origin), *others)
        axes = list(zip(stored, self.inner, self.shape, strict=True))
        return Touched(
            n_chunks=prod(-(-b.stop // c) - b.start // c for b, c, _ in axes),
            cells=prod(min(-(-b.stop // c) * c, size) - b.start // c * c for b, c, size in axes),
        )

    def beyond(self, *box: slice) -> Beyond:
        """What chunks that are larger than a box take while it is read."""
        in_shard = prod(s // c for s, c in zip(self.chunks, self.inner, strict=True))
        common = prod(min(c, b.stop - b.start) for c, b in zip(self.inner, box, strict=True))
        stored = np.dtype(self.variable.encoding.get("dtype", self.variable.dtype))
        return Beyond(
            held=min(self.touched(*box).n_chunks, self.at_once * in_shard),
            n_bytes=(prod(self.inner) - common) * stored.itemsize,
        )

    def chunk_starts(self, steps: slice) -> BoolArray:
        """Whether a chunk starts at each of the steps along the first axis, [step]."""
        stored = np.arange(self.origin + steps.start, self.origin + steps.stop)
        return np.asarray(stored % self.chunks[0] == 0)


def arrays_at_once(arrays: Sequence[Beyond]) -> int:
    """How many of several arrays are read at the same time: all, or one where their chunks are large.

    >>> arrays_at_once([Beyond(held=10, n_bytes=2**10), Beyond(held=10, n_bytes=2**20)])
    2
    >>> arrays_at_once([Beyond(held=10, n_bytes=2**22), Beyond(held=10, n_bytes=2**20)])
    1
    """
    return len(arrays) if sum(array.in_memory for array in arrays) <= _BEYOND_BYTES else 1


def bytes_beyond(arrays: Sequence[Beyond]) -> int:
    """Most bytes that chunks of several arrays take beyond their box, read as :func:`arrays_at_once` says.

    >>> bytes_beyond([Beyond(held=10, n_bytes=8), Beyond(held=1, n_bytes=4)])
    168
    """
    largest = sorted((array.in_memory for array in arrays), reverse=True)
    return sum(largest[: arrays_at_once(arrays)])


def contents_of(handles: Sequence[Handle]) -> list[str]:
    """A fingerprint of all objects that arrays are made of, one a store; costs listings, no reads.

    Raises:
        StoreError: a store cannot be reached or read.
    """
    places: dict[str, set[str]] = {}
    for handle in handles:
        places.setdefault(handle.url, set()).update(handle.paths)
    options = handles[0].options
    return [content_fingerprint(url, options, tuple(paths)) for url, paths in places.items()]


def places_of(handles: Sequence[Handle]) -> str:
    """The stores that arrays are read from, for people."""
    return ", ".join(sorted({public(handle.url) for handle in handles}))


def fixed_values(grid: Grid, static: Sequence[Handle]) -> str:
    """SHA-256 of what does not change with time: coordinates, mask, and static arrays on land, in our units.

    Values are read for it, some whole chunks at a time; how they are stored, and when, does not count.

    Raises:
        StoreError: a store cannot be read.
    """
    axes = (grid.lat, grid.lon, grid.mask.astype(np.float64))
    digest = hashlib.sha256(repr(grid.shape).encode())
    for values in (*axes, *(part for handle in static for part in _land_values(grid, handle))):
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def _land_values(grid: Grid, handle: Handle) -> Iterator[Float32Array]:
    """A static array on land, [cell] or [cell, feature], some rows of the grid after the other."""
    rows = handle.chunks[0]
    rows *= max(1, _VALUES_AT_ONCE // (rows * prod(handle.variable.shape) // grid.shape[0]))
    for first in range(0, grid.shape[0], rows):
        part = slice(first, first + rows)
        yield handle.read(part)[grid.mask[part]]


def whole_chunks(starts: Sequence[BoolArray], n_steps: int) -> Iterator[slice]:
    """Cut steps where chunks of every array start, into parts of at most ``n_steps`` if chunks are no longer.

    Args:
        starts: for each array, whether a chunk starts at a step, [step].
        n_steps: most steps of a part; a part that has no cut inside may be longer.

    >>> starts = np.array([False, True, False, True, False])
    >>> [(part.start, part.stop) for part in whole_chunks([starts], 3)]
    [(0, 3), (3, 5)]
    """
    common = np.logical_and.reduce(starts)
    stops = [*(int(i) for i in np.flatnonzero(common) if i > 0), common.size]
    start = 0
    for stop, following in pairwise([*stops, common.size + n_steps + 1]):
        if following - start > n_steps:
            yield slice(start, stop)
            start = stop


class Target(NamedTuple):
    """A target's steps and its array [step, *space]."""

    axis: StepAxis
    handle: Handle


def forcing_handle(found: Found, stored: DailyTimes, period: Period, reference: Space) -> Handle:
    """A forcing variable, [time, *space], on the days of ``period`` and the axes of ``reference``.

    Args:
        found: the variable.
        stored: its time axis.
        period: days that it has.
        reference: the axes of the source.

    Raises:
        DataError: it is on another grid or on further axes, or its units cannot be converted.
        StoreError: its coordinates cannot be read.
    """
    first = period.first - stored.period.first
    return series_handle(found, stored.times, slice(first, first + period.n_days), reference)


def series_handle(found: Found, times: Times, steps: slice, reference: Space) -> Handle:
    """Some steps of a series, [step, *space]; errors as for :func:`forcing_handle`."""
    handle = _handle(found, space_of(found), reference, (times.dim,), None)
    return _cut(handle, times, steps)


def target_of(found: Found, period: Period, reference: Space) -> Target:
    """A target, [step, *space], on its steps inside ``period`` and the axes of ``reference``.

    Raises:
        DataError: it has no such step, or is refused as a forcing variable would be; it may be monthly.
        StoreError: its coordinates cannot be read.
    """
    times, axis = target_steps(found)
    steps = axis.within(period)
    if steps.stop <= steps.start:
        raise DataError(
            describe(
                "a target has no step inside the days that are used",
                where=found.where,
                expected=f"a whole {'month' if axis.frequency == 'monthly' else 'day'} inside {period}",
                actual=f"{as_date(int(axis.days[0]))} to {as_date(int(axis.days[-1]))}",
                fix="choose another data.period, or leave the target out",
            )
        )
    return Target(axis.cut(steps), series_handle(found, times, steps, reference))


def static_handle(found: Found, reference: Space) -> Handle:
    """A static array, [*space] or [*space, feature], on the axes of ``reference``.

    Raises:
        DataError: it is on another grid or on further axes, or its features are not named one by one.
        StoreError: its coordinates cannot be read.
    """
    space = space_of(found)
    further = [str(d) for d in found.variable.dims if d not in space.dims]
    feature = further[0] if len(further) == 1 else None
    handle = _handle(found, space, reference, (), feature)
    return replace(handle, columns=_feature_names(found, feature)) if feature else handle


def map_handle(found: Found, reference: Space) -> Handle:
    """An array of one value a cell, [*space], on the axes of ``reference``.

    Raises:
        DataError: it is on another grid or on further axes.
        StoreError: its coordinates cannot be read.
    """
    return _handle(found, space_of(found), reference, (), None)


def _handle(
    found: Found, space: Space, reference: Space, leading: tuple[str, ...], last: str | None
) -> Handle:
    """Put an array on our axes: time and a feature axis where it has them, space as the reference has it."""
    dims = (*leading, *space.dims, *((last,) if last else ()))
    decoded = decode(found.array, _without_unit_axes(found, dims))
    flips = flipped_dims(space, reference)
    lazy = decoded[tuple(slice(None, None, -1) if d in flips else slice(None) for d in decoded.dims)]
    coordinates = (found.path, *space.coordinate_paths)
    return Handle(
        name=found.name,
        where=found.where,
        url=found.group.url,
        paths=(found.group.path,) if found.published else coordinates,
        variable=lazy,
        dims=dims,
        shape=tuple(found.variable.sizes[d] for d in dims),
        chunks=_chunks(found.variable, dims, "shards", "chunks"),
        inner=_chunks(found.variable, dims, "chunks"),
        at_once=found.variable.encoding.get(AT_ONCE, zarr.config.get("async.concurrency")),
        origin=0,
        conversion=conversion_of(found),
        columns=(found.name,),
        has_features=last is not None,
        options=found.options,
    )


def _without_unit_axes(found: Found, dims: tuple[str, ...]) -> xr.Variable:
    """Drop further axes of length one, such as a height.

    Raises:
        DataError: an axis is missing, or a further one is longer.
    """
    array = found.variable
    further = [str(d) for d in array.dims if d not in dims]
    if set(dims) - set(map(str, array.dims)) or any(array.sizes[d] != 1 for d in further):
        raise DataError(
            describe(
                "an array has other axes than it should",
                where=found.where,
                expected=str(dims),
                actual=str(dict(array.sizes)),
                fix="select or average over the further axis, or name the axes in the store",
            )
        )
    return array[tuple(0 if d in further else slice(None) for d in array.dims)]


def _chunks(array: xr.Variable, dims: tuple[str, ...], *kinds: str) -> tuple[int, ...]:
    """Cells of the first of these kinds that an array is made of, along ``dims``."""
    sizes = next(filter(None, map(array.encoding.get, kinds)), array.shape)
    along = dict(zip(map(str, array.dims), sizes, strict=True))
    return tuple(int(along[d]) for d in dims)


def _cut(handle: Handle, times: Times, steps: slice) -> Handle:
    index = tuple(steps if d == times.dim else slice(None) for d in handle.variable.dims)
    paths = handle.paths if times.path.startswith(handle.paths[0] + "/") else (*handle.paths, times.path)
    return replace(handle, variable=handle.variable[index], origin=steps.start, paths=paths)


def _feature_names(found: Found, feature: str) -> tuple[str, ...]:
    """From attribute ``names``, else a coordinate of text, else numbered."""
    size = found.variable.sizes[feature]
    names = found.variable.attrs.get("names", found.group.attributes.get("names"))
    coordinate = found.group.arrays.get(feature)
    if names is None and coordinate is not None and coordinate.dtype.kind in "OSUT":
        names = [str(v) for v in values_of(found, Coordinate(feature, coordinate))]
    if names is None:
        return tuple(f"feature_{i}" for i in range(size))
    if not isinstance(names, Sequence) or isinstance(names, str) or len(set(names)) != size:
        raise DataError(f"{found.where} has {size} features, but the names {names!r}")
    return tuple(map(str, names))
