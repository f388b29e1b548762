"""The output cube: its metadata is written once, then every shard once and whole, by one owner.

Array axes: daily variables [time, *space], static ones [*space], constants []; ``space`` is (lat, lon) or
(cell). With a member axis each of them starts with [member]; without one, NAME is the mean over folds and
NAME_spread their standard deviation. Float32, NaN over sea and where nothing was written.
"""

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import ByteRequest, Store
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.errors import ZarrUserWarning
from zarr.storage import WrapperStore

from h2mv_dist.config import StorageOptions, canonical_json
from h2mv_dist.errors import ConfigError, DataError, StoreError, describe
from h2mv_dist.grid import BoolArray, FloatArray, Grid, Period, Tile, cell_bounds
from h2mv_dist.io.ledger import ledger_url
from h2mv_dist.io.stores import (
    delete_tree,
    displayed,
    exists,
    explained,
    get_object,
    join,
    list_objects,
    open_store,
)
from h2mv_dist.variables import Variable, variable

FINGERPRINT: Final = "h2mv_dist_fingerprint"
"""Root attribute that says which model, data, grid and settings a cube was made with."""

SPREAD: Final = "_spread"
"""Suffix of the arrays that hold the standard deviation over folds."""

_LAYOUT: Final = "h2mv_dist_layout"
_STATE: Final = "h2mv_dist_state"
_UNFINISHED: Final = "metadata incomplete"
_TIME_METHODS: Final = {"mm d-1": "time: mean", "mm": "time: point (comment: end of the day)"}
_ONLY_OF_THE_MEAN: Final = ("standard_name", "ancillary_variables")
_ONE_OWNER: Final = "two writers in one shard lose data without any error"

Float32Array: TypeAlias = NDArray[np.float32]
ZarrArray: TypeAlias = "zarr.Array[zarr.core.metadata.ArrayV3Metadata]"


@dataclass(frozen=True, kw_only=True)
class CubeLayout:
    """What a cube holds, and how it is cut.

    Chunks, shards and tiles may be larger than the grid or the period; what lies outside is never written.

    Attributes:
        grid: cells of the cube.
        period: its days.
        daily: variables [time, *space].
        static: variables [*space].
        constants: variables without axes.
        members: fold numbers.
        member_axis: keep every member; otherwise mean and, for more than one member, spread.
        chunk: cells of a chunk along each spatial axis.
        shard: cells of a shard along each spatial axis; a multiple of the chunk.
        tile: cells of a tile along each spatial axis; a multiple of the shard.
        chunk_days: days of a chunk.
        shard_days: days of a shard; a multiple of the chunk's.
        attributes: provenance for the root; holds :data:`FINGERPRINT`, and nothing that differs between runs.
    """

    grid: Grid
    period: Period
    daily: tuple[str, ...]
    static: tuple[str, ...]
    constants: tuple[str, ...]
    members: tuple[int, ...]
    member_axis: bool
    chunk: tuple[int, ...]
    shard: tuple[int, ...]
    chunk_days: int
    shard_days: int
    tile: tuple[int, ...]
    attributes: Mapping[str, str]

    def __post_init__(self) -> None:
        _check_names(self)
        _check_axes(self)
        _check_multiples("chunk", (*self.chunk, self.chunk_days), "shard", (*self.shard, self.shard_days))
        _check_multiples("shard", self.shard, "tile", self.tile)
        if not self.attributes.get(FINGERPRINT):
            raise ConfigError(f"attributes of a cube must hold {FINGERPRINT!r}: resuming depends on it")

    @property
    def fingerprint(self) -> str:
        """Which model, data, grid and settings the cube is made with."""
        return self.attributes[FINGERPRINT]

    @property
    def sizes(self) -> dict[str, int]:
        """Length of every dimension."""
        space = dict(zip(self.grid.dims, self.grid.shape, strict=True))
        return {"member": len(self.members), "time": self.period.n_days, **space}

    def arrays_of(self, name: str) -> tuple[str, ...]:
        """Names of the arrays that hold variable ``name``."""
        alone = self.member_axis or len(self.members) == 1
        return (name,) if alone else (name, name + SPREAD)


def create_cube(url: str, layout: CubeLayout, options: StorageOptions, overwrite: bool) -> None:
    """Write the metadata and coordinates of a cube, or find that exactly this cube is already there.

    ``overwrite`` replaces a cube that holds something else, and its receipts; never anything but a cube.

    Raises:
        StoreError: another cube, receipts without a cube, or something that is no cube is there.
    """
    found = _existing(url, options)
    wanted = _root_attributes(layout)
    differences = _differences(found.attributes, wanted) if found else ()
    if found and not differences and found.finished:
        return
    if (found is None or differences) and overwrite:
        _clear(url, options, found)
    elif differences:
        raise _another_cube(url, differences)
    elif found is None:
        _refuse_orphaned_receipts(url, options)
    resumed = found is not None and not differences
    with explained(url, options):
        _write_metadata(open_store(url, options, read_only=False), layout, wanted, again=resumed)


def consolidate(url: str, options: StorageOptions) -> None:
    """Copy the metadata of all arrays into the root, so that a reader needs one request; done last."""
    store = open_store(url, options, read_only=False)
    with explained(url, options), warnings.catch_warnings():
        # Readers without it fall back to the arrays' own metadata, so leaving the specification is safe.
        warnings.filterwarnings("ignore", "Consolidated metadata is currently not", ZarrUserWarning)
        zarr.consolidate_metadata(store, zarr_format=3)


def projected_bytes(layout: CubeLayout) -> int:
    """Bytes of the whole cube before compression, coordinates included."""
    return sum(array.n_bytes for array in _planned(layout))


def block_bytes(layout: CubeLayout) -> int:
    """Bytes, before compression, that one tile writes for one time block of all daily variables."""
    cells = prod(min(t, n) for t, n in zip(layout.tile, layout.grid.shape, strict=True))
    days = min(layout.shard_days, layout.period.n_days)
    arrays = sum(len(layout.arrays_of(name)) for name in layout.daily)
    members = len(layout.members) if layout.member_axis else 1
    return 4 * arrays * members * days * cells


def stored_checksum(
    url: str,
    layout: CubeLayout,
    options: StorageOptions,
    *,
    tile: Tile | None = None,
    period: Period | None = None,
) -> str:
    """What the matching ``write`` returned, worked out again from the stored values.

    With a tile and a period: daily variables; with a tile only: static ones; with neither: constants.

    Raises:
        StoreError: the region is not made of whole shards, is damaged, or cannot be read.
    """
    region = _region(layout, tile, period)
    store = open_store(url, options, read_only=True)
    with explained(url, options):
        arrays = _opened(store, layout, region.names)
        return _checksum(_read(array, region, url) for array in arrays.values())


@dataclass(frozen=True)
class Sink:
    """Writes whole shards into a cube that exists; one tile may be written by one process only."""

    layout: CubeLayout
    arrays: Mapping[str, ZarrArray]
    url: str
    options: StorageOptions

    @staticmethod
    def open(url: str, layout: CubeLayout, options: StorageOptions) -> "Sink":
        """Open the cube at ``url``.

        Raises:
            StoreError: there is no finished cube of exactly this layout.
        """
        found = _existing(url, options)
        differences = _differences(found.attributes, _root_attributes(layout)) if found else ()
        if differences:
            raise _another_cube(url, differences)
        if found is None or not found.finished:
            raise StoreError(f"no complete cube at {displayed(url)}: call create_cube first")
        return Sink.over(open_store(url, options, read_only=False), url, layout, options)

    @staticmethod
    def over(store: Store, url: str, layout: CubeLayout, options: StorageOptions) -> "Sink":
        """A sink over an open store; ``url`` and ``options`` only serve to explain its failures."""
        names = (*layout.daily, *layout.static, *layout.constants)
        with explained(url, options):
            return Sink(layout, _opened(_NoReadBack(store), layout, names), url, options)

    def write(self, tile: Tile, period: Period, values: Mapping[str, Float32Array]) -> str:
        """Write all daily variables of one tile and time block.

        Args:
            tile: whole shards; ragged only at the grid's edge.
            period: one shard long, from a multiple of ``shard_days`` on; shorter only at the cube's end.
            values: variable -> [member, time, cell], the tile's land cells in row-major order.

        Returns:
            SHA-256 over the stored values, for the receipt.

        Raises:
            StoreError: tile or period would write part of a shard, or the store fails.
            DataError: ``values`` have other names, shapes or types.
        """
        return self._put(_region(self.layout, tile, period), values)

    def write_static(self, tile: Tile, values: Mapping[str, Float32Array]) -> str:
        """Write all static variables of one tile, each [member, cell]; see :meth:`write`."""
        return self._put(_region(self.layout, tile, None), values)

    def write_constants(self, values: Mapping[str, Float32Array]) -> str:
        """Write all constants, each [member]; see :meth:`write`."""
        return self._put(_region(self.layout, None, None), values)

    def _put(self, region: "_Region", values: Mapping[str, Float32Array]) -> str:
        _check_values(region, values, len(self.layout.members))
        with explained(self.url, self.options):
            return _checksum(self._written(region, values))

    def _written(self, region: "_Region", values: Mapping[str, Float32Array]) -> Iterator[Float32Array]:
        """Write one array after the other, each handed on, so that one at a time is in memory."""
        for name in region.names:
            for array_name, reduced in _reduced(self.layout, name, values[name]):
                block = reduced if region.land is None else _expanded(reduced, region.land)
                self.arrays[array_name][region.where] = block
                yield block


class _NoReadBack(WrapperStore[Store]):
    """Answers every read of array data with "not there".

    zarr 3.1 merges each write with the shard that is stored, even when the write covers all of it: a useless
    request, and a torn shard would stop its own replacement.
    """

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        return await super().get(key, prototype, byte_range) if key.endswith("zarr.json") else None


class _Region(NamedTuple):
    """Part of a cube that one call writes.

    ``land`` is the tile's mask [*space]; ``packed`` the shape of its values after the member axis.
    """

    names: tuple[str, ...]
    where: tuple[slice, ...]
    packed: tuple[int, ...]
    land: BoolArray | None


def _region(layout: CubeLayout, tile: Tile | None, period: Period | None) -> _Region:
    members = (slice(None),) if layout.member_axis else ()
    if tile is None:
        return _Region(layout.constants, members, (), None)
    _check_tile(layout, tile)
    land = layout.grid.mask[tile.slices]
    n_land = int(land.sum())
    if period is None:
        return _Region(layout.static, (*members, *tile.slices), (n_land,), land)
    days = _whole_time_shard(layout, period)
    return _Region(layout.daily, (*members, days, *tile.slices), (period.n_days, n_land), land)


def _reduced(layout: CubeLayout, name: str, values: Float32Array) -> Iterator[tuple[str, Float32Array]]:
    """Arrays of one variable from its values [member, ...]: as they are, or mean and spread over members."""
    if layout.member_axis:
        yield name, values
        return
    # In float64 and in the order of the members, so that the same values give the same bytes.
    yield name, np.asarray(np.mean(values, axis=0, dtype=np.float64), np.float32)
    for spread in layout.arrays_of(name)[1:]:
        yield spread, np.asarray(np.std(values, axis=0, dtype=np.float64), np.float32)


def _expanded(packed: Float32Array, land: BoolArray) -> Float32Array:
    """Land cells [..., cell] put back into their tile [..., *space]; NaN over sea."""
    full = np.full((*packed.shape[:-1], *land.shape), np.nan, np.float32)
    full[..., land] = packed
    return full


def _checksum(blocks: Iterable[Float32Array]) -> str:
    """SHA-256 over the little-endian row-major bytes of each array, in the order of the layout."""
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(np.ascontiguousarray(block, "<f4").tobytes())
    return digest.hexdigest()


def _read(array: ZarrArray, region: "_Region", url: str) -> Float32Array:
    try:
        return np.asarray(array[region.where], np.float32)
    # What zarr raises where the CRC-32C of a chunk or of a shard's index does not match.
    except ValueError as error:
        raise StoreError(
            describe(
                "stored values are damaged",
                where=f"{displayed(url)}, array {array.name}, {region.where}",
                expected="chunks that match their checksums",
                actual=str(error),
                fix="delete the receipt of this tile and run again: the tile is then written anew",
            )
        ) from error


def _opened(store: Store, layout: CubeLayout, names: Iterable[str]) -> dict[str, ZarrArray]:
    """The arrays of these variables, in the order of the layout."""
    found = (array_name for name in names for array_name in layout.arrays_of(name))
    return {name: zarr.open_array(store, path=name, mode="r" if store.read_only else "r+") for name in found}


# --- checks -----------------------------------------------------------------------------------------------


def _check_names(layout: CubeLayout) -> None:
    names = (*layout.daily, *layout.static, *layout.constants)
    for name in names:
        variable(name)
    for what, items in (("variables", names), ("members", layout.members)):
        if len(set(items)) != len(items):
            raise ConfigError(f"{what} of a cube are named twice: {', '.join(map(str, items))}")
    if not names or not layout.members:
        raise ConfigError("a cube needs at least one variable and one member (fold)")


def _check_axes(layout: CubeLayout) -> None:
    for setting in ("chunk", "shard", "tile"):
        sizes: tuple[int, ...] = getattr(layout, setting)
        if len(sizes) != len(layout.grid.dims) or min(sizes) < 1:
            raise ConfigError(
                describe(
                    f"{setting} does not fit the grid",
                    where=f"setting {setting}",
                    expected=f"one size >= 1 for each of the axes {', '.join(layout.grid.dims)}",
                    actual=str(sizes),
                    fix=f"set inference.{setting} to {len(layout.grid.dims)} positive number(s)",
                )
            )


def _check_multiples(
    inner_name: str, inner: tuple[int, ...], outer_name: str, outer: tuple[int, ...]
) -> None:
    if all(i >= 1 and o >= 1 and o % i == 0 for i, o in zip(inner, outer, strict=True)):
        return
    reason = _ONE_OWNER if outer_name == "tile" else "a shard is stored as whole chunks"
    raise ConfigError(
        describe(
            f"{outer_name} is not a multiple of {inner_name}: {reason}",
            where=f"settings {outer_name} and {inner_name}",
            expected=f"{outer_name} sizes that are multiples of {inner}",
            actual=str(outer),
            fix=f"change inference.{outer_name} or inference.{inner_name}",
        )
    )


def _check_tile(layout: CubeLayout, tile: Tile) -> None:
    shape = layout.grid.shape
    if len(tile.start) == len(shape) and all(
        0 <= start < stop <= size and start % shard == 0 and (stop % shard == 0 or stop == size)
        for start, stop, shard, size in zip(tile.start, tile.stop, layout.shard, shape, strict=True)
    ):
        return
    raise StoreError(
        describe(
            f"tile would write part of a shard: {_ONE_OWNER}",
            where=f"tile {tile.name} of a grid of shape {shape}",
            expected=f"start and stop at multiples of the shard {layout.shard}, or stop at the grid's edge",
            actual=f"{tile.start} to {tile.stop}",
            fix="take tiles from grid.tiles(layout.tile)",
        )
    )


def _whole_time_shard(layout: CubeLayout, period: Period) -> slice:
    """Position of ``period`` on the time axis, if it is exactly one shard long or the rest of the cube."""
    first = period.first - layout.period.first
    rest = layout.period.n_days - first
    if first >= 0 and first % layout.shard_days == 0 and period.n_days == min(layout.shard_days, rest):
        return slice(first, first + period.n_days)
    raise StoreError(
        describe(
            f"period would write part of a shard: {_ONE_OWNER}",
            where=f"period {period} of a cube of {layout.period}",
            expected=f"{layout.shard_days} days, or the rest of the cube, from a multiple of that on",
            actual=f"{period.n_days} days from day {first} on",
            fix="take periods from layout.period.blocks(layout.shard_days)",
        )
    )


def _check_values(region: _Region, values: Mapping[str, Float32Array], n_members: int) -> None:
    if set(values) != set(region.names):
        missing = sorted(set(region.names) - set(values))
        unknown = sorted(set(values) - set(region.names))
        raise DataError(f"values for the cube lack {missing} and hold unknown {unknown}")
    shape = (n_members, *region.packed)
    for name, array in values.items():
        if array.shape != shape or array.dtype != np.float32:
            raise DataError(
                describe(
                    "values do not fit the part of the cube they are written to",
                    where=name,
                    expected=f"float32 [member, (time,) land cell] of shape {shape}",
                    actual=f"{array.dtype} of shape {array.shape}",
                    fix="pass the tile's land cells, packed, for every member",
                )
            )


# --- what exists ------------------------------------------------------------------------------------------


class _Found(NamedTuple):
    attributes: Mapping[str, str]
    finished: bool


def _existing(url: str, options: StorageOptions) -> _Found | None:
    """The cube at ``url``, or None where nothing is.

    Raises:
        StoreError: something that is not a cube is there.
    """
    root = join(url, "zarr.json")
    if exists(root, options):
        found = _parsed(get_object(root, options))
        if found is not None:
            return found
    elif not list_objects(url, options):
        return None
    raise StoreError(
        describe(
            "what is there is not a cube of h2mv_dist; nothing was touched",
            where=displayed(url),
            expected="nothing, or a cube that an earlier run began",
            actual=f"objects without the root attribute {FINGERPRINT}",
            fix="choose another path, or move or delete it yourself (overwrite does not delete it)",
        )
    )


def _parsed(root: bytes) -> _Found | None:
    """Root attributes of a cube; None if the metadata are not a cube's."""
    try:
        attributes = json.loads(root)["attributes"]
        json.loads(attributes[_LAYOUT])
        finished = attributes.pop(_STATE, None) is None
        return _Found(attributes, finished) if FINGERPRINT in attributes else None
    except (ValueError, TypeError, KeyError):
        return None


def _differences(found: Mapping[str, str], wanted: Mapping[str, str]) -> tuple[str, ...]:
    """One line for every root attribute or part of the layout that differs."""
    there, here = _flat(found), _flat(wanted)
    names = sorted(name for name in {*there, *here} if there.get(name) != here.get(name))
    return tuple(
        f"{name} ({_short(there.get(name))} there, {_short(here.get(name))} wanted)" for name in names
    )


def _flat(attributes: Mapping[str, str]) -> dict[str, object]:
    layout = {f"layout.{name}": value for name, value in json.loads(attributes[_LAYOUT]).items()}
    return {**{name: value for name, value in attributes.items() if name != _LAYOUT}, **layout}


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _another_cube(url: str, differences: tuple[str, ...]) -> StoreError:
    return StoreError(
        describe(
            "a cube with another geometry or checkpoint is already there; nothing was touched",
            where=displayed(url),
            expected="no cube, or one made with the same model, data and settings",
            actual="it differs in " + ", ".join(differences),
            fix="choose another path, or set inference.overwrite to replace it",
        )
    )


def _refuse_orphaned_receipts(url: str, options: StorageOptions) -> None:
    """Receipts of a cube that is gone would count as done what a new cube does not hold."""
    if list_objects(ledger_url(url), options):
        raise StoreError(
            describe(
                "there are receipts but no cube; nothing was touched",
                where=displayed(ledger_url(url)),
                expected="a cube beside its receipts",
                actual="the cube was deleted or moved",
                fix="put it back, delete the receipts, or set inference.overwrite",
            )
        )


def _clear(url: str, options: StorageOptions, found: _Found | None) -> None:
    """Delete a cube and its receipts; interrupted at any point, it is still known as an unfinished cube."""
    delete_tree(ledger_url(url), options)
    if found is None:
        return
    with explained(url, options):
        group = zarr.open_group(open_store(url, options, read_only=False), mode="r+", use_consolidated=False)
        group.attrs.put({**found.attributes, _STATE: _UNFINISHED})
        names = sorted(group)
    for name in names:
        delete_tree(join(url, name), options)
    delete_tree(url, options)


# --- metadata ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Planned:
    """One array of the cube; coordinates come with their values, outputs without."""

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    attributes: Mapping[str, str | list[int]]
    chunks: tuple[int, ...]
    shards: tuple[int, ...] | None = None
    values: NDArray[np.generic] | None = None

    @property
    def n_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def _write_metadata(store: Store, layout: CubeLayout, attributes: Mapping[str, str], *, again: bool) -> None:
    """Write root and arrays; the root says that it is unfinished until the last array is there.

    ``again``: a creation was interrupted, so arrays may be there. They hold no results yet, because a sink
    opens only a finished cube.
    """
    group = zarr.open_group(
        store,
        mode="a",
        zarr_format=3,
        attributes={**attributes, _STATE: _UNFINISHED},
        use_consolidated=False,
    )
    for array in _planned(layout):
        _create_array(group, array, overwrite=again)
    group.attrs.put(dict(attributes))


def _create_array(group: zarr.Group, array: _Planned, *, overwrite: bool) -> None:
    created = group.create_array(
        array.name,
        shape=array.shape,
        dtype=array.dtype,
        chunks=array.chunks,
        shards=array.shards,
        # Flipped bits of a ranged read go unseen without the checksum of each inner chunk.
        compressors=(ZstdCodec(level=3), Crc32cCodec()),
        fill_value=np.nan if array.dtype.kind == "f" else 0,
        attributes=dict(array.attributes),
        dimension_names=array.dims,
        overwrite=overwrite,
    )
    if array.values is not None:
        created[...] = array.values


def _root_attributes(layout: CubeLayout) -> dict[str, str]:
    return {
        "title": "Water cycle of the land surface, simulated by a hybrid model",
        "source": "h2mv_dist",
        **layout.attributes,
        "Conventions": "CF-1.11",
        _LAYOUT: canonical_json(_geometry(layout)),
    }


def _geometry(layout: CubeLayout) -> dict[str, object]:
    """Everything that decides which bytes a unit writes and where; compared when a run is resumed."""
    grid = layout.grid
    names = ("daily", "static", "constants", "members", "chunk", "shard", "tile")
    numbers = {name: list(getattr(layout, name)) for name in names}
    cells = {"lat": grid.lat, "lon": grid.lon, "area": grid.area, "mask": grid.mask.astype(np.float64)}
    return {
        **numbers,
        "dims": list(grid.dims),
        "shape": list(grid.shape),
        "period": str(layout.period),
        "member_axis": layout.member_axis,
        "chunk_days": layout.chunk_days,
        "shard_days": layout.shard_days,
        **{f"{name}_sha256": _hashed(values) for name, values in cells.items()},
    }


def _hashed(values: FloatArray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values, "<f8").tobytes()).hexdigest()


def _planned(layout: CubeLayout) -> Iterator[_Planned]:
    yield from _coordinates(layout)
    space = layout.grid.dims
    kinds = ((layout.daily, ("time", *space)), (layout.static, space), (layout.constants, ()))
    for names, dims in kinds:
        for name in names:
            yield from _outputs(layout, variable(name), dims)


def _outputs(layout: CubeLayout, quantity: Variable, dims: tuple[str, ...]) -> Iterator[_Planned]:
    names = layout.arrays_of(quantity.name)
    attributes = _output_attributes(layout, quantity, dims)
    yield _output(layout, names[0], dims, attributes)
    for name in names[1:]:
        yield _output(layout, name, dims, _spread_attributes(attributes))


def _output(layout: CubeLayout, name: str, dims: tuple[str, ...], attributes: Mapping[str, str]) -> _Planned:
    full = ("member", *dims) if layout.member_axis else dims
    space = layout.grid.dims
    chunk = {"member": 1, "time": layout.chunk_days, **dict(zip(space, layout.chunk, strict=True))}
    # All members share a shard: a tile owns them together, and one object serves them.
    shard = {
        "member": len(layout.members),
        "time": layout.shard_days,
        **dict(zip(space, layout.shard, strict=True)),
    }
    return _Planned(
        name=name,
        dims=full,
        shape=tuple(layout.sizes[d] for d in full),
        dtype=np.dtype(np.float32),
        attributes=attributes,
        chunks=tuple(chunk[d] for d in full),
        shards=tuple(shard[d] for d in full) or None,
    )


def _output_attributes(layout: CubeLayout, quantity: Variable, dims: tuple[str, ...]) -> dict[str, str]:
    """CF attributes of the array that holds a variable, or its mean over folds."""
    attributes = quantity.cf_attributes()
    methods = [_TIME_METHODS.get(quantity.units, "")] if "time" in dims else []
    if len(layout.arrays_of(quantity.name)) > 1:
        methods.append("realization: mean")
        attributes["ancillary_variables"] = quantity.name + SPREAD
    if any(methods):
        attributes["cell_methods"] = " ".join(filter(None, methods))
    if dims:
        attributes["cell_measures"] = "area: cell_area"
    if "cell" in dims:
        attributes["coordinates"] = "lat lon"
    return attributes


def _spread_attributes(mean: Mapping[str, str]) -> dict[str, str]:
    """Attributes of a spread; without a standard name, by which readers look for the quantity itself."""
    kept = {name: value for name, value in mean.items() if name not in _ONLY_OF_THE_MEAN}
    return {
        **kept,
        "long_name": f"spread of {mean['long_name']} over folds (standard deviation; not an uncertainty)",
        "cell_methods": mean["cell_methods"].replace("realization: mean", "realization: standard_deviation"),
        "comment": "Population standard deviation over models trained on different folds. It shows how much "
        "they disagree; errors they share do not show.",
    }


def _coordinates(layout: CubeLayout) -> Iterator[_Planned]:
    yield from _time(layout.period)
    yield from _latitude_and_longitude(layout.grid)
    grid = layout.grid
    auxiliary = {"coordinates": "lat lon"} if grid.dims == ("cell",) else {}
    area = {"standard_name": "cell_area", "long_name": "area of the grid cell", "units": "m2"}
    yield _coordinate("cell_area", grid.dims, grid.area, {**area, **auxiliary})
    mask: dict[str, str | list[int]] = {
        "standard_name": "land_binary_mask",
        "long_name": "land cells the model was run for",
        "units": "1",
        "flag_values": [0, 1],
        "flag_meanings": "sea land",
    }
    yield _coordinate("land_mask", grid.dims, grid.mask.astype(np.int8), {**mask, **auxiliary})
    if layout.member_axis:
        member = {"standard_name": "realization", "long_name": "fold of the model", "units": "1"}
        yield _coordinate("member", ("member",), np.asarray(layout.members, np.int64), member)


def _time(period: Period) -> Iterator[_Planned]:
    """The first instant of each day, and the bounds [time, 2] of the day."""
    days = period.days()
    attributes = {
        "standard_name": "time",
        "long_name": "day",
        "units": "days since 1970-01-01",
        "calendar": "proleptic_gregorian",
        "axis": "T",
        "bounds": "time_bnds",
    }
    yield _coordinate("time", ("time",), days, attributes)
    yield _coordinate("time_bnds", ("time", "bnds"), np.stack([days, days + 1], axis=1), {})


def _latitude_and_longitude(grid: Grid) -> Iterator[_Planned]:
    """Coordinates in degrees; with bounds [n, 2] where they are axes."""
    axes = (("lat", "latitude", "degrees_north", "Y"), ("lon", "longitude", "degrees_east", "X"))
    for (name, long_name, units, axis), centre in zip(axes, (grid.lat, grid.lon), strict=True):
        attributes = {"standard_name": long_name, "long_name": long_name, "units": units}
        if grid.dims == ("cell",):
            yield _coordinate(name, ("cell",), centre, attributes)
            continue
        bounds = name + "_bnds"
        yield _coordinate(name, (name,), centre, {**attributes, "axis": axis, "bounds": bounds})
        limit = 90.0 if name == "lat" else np.inf
        edges = np.clip(cell_bounds(centre), -limit, limit)
        yield _coordinate(bounds, (name, "bnds"), np.stack([edges[:-1], edges[1:]], axis=1), {})


def _coordinate(
    name: str,
    dims: tuple[str, ...],
    values: NDArray[np.generic],
    attributes: Mapping[str, str | list[int]],
) -> _Planned:
    """An array of one chunk, written when the cube is created."""
    return _Planned(
        name=name,
        dims=dims,
        shape=values.shape,
        dtype=values.dtype,
        attributes=attributes,
        chunks=values.shape,
        values=values,
    )
