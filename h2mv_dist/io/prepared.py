"""Prepared store: daily forcing in our units, cut for tiles, with all that a data set in CF layout needs.

Arrays are forcing [time, *space], static ones [*space] or [*space, feature], float32, the mask [*space], and
coordinates. A stretch of days is written by one owner, whole shards over all space; its receipt is put last.
The mask and the static arrays come when all stretches are there, so an unfinished store cannot be opened.

A finished store grows: days are written beyond its end, then its arrays get their new length, and the root,
put last, shows them. It grows by whole stretches, so that no object that a reader of the old length reads is
written again. Only where the first end of a store lies within a stretch, that stretch is written once more,
when it has become whole: with the same values for the old days, and new ones behind them.
"""

import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.errors import ZarrUserWarning

from h2mv_dist.config import DataSettings, StorageOptions, VariableSource, canonical_json
from h2mv_dist.errors import ConfigError, StoreError, describe
from h2mv_dist.grid import Grid, Period
from h2mv_dist.io.cube import HORIZON_DAYS
from h2mv_dist.io.handles import Handle
from h2mv_dist.io.ledger import ledger_url
from h2mv_dist.io.shards import write_shards
from h2mv_dist.io.stores import (
    ZarrArray,
    delete_tree,
    displayed,
    exists,
    explained,
    get_object,
    join,
    list_objects,
    open_store,
    put_object,
    with_shape,
)
from h2mv_dist.spec import Float32Array
from h2mv_dist.variables import variable

FINISH: Final = "finish"
"""The unit that comes after all stretches of days: static arrays and mask, or the new length."""
IDENTITY: Final = "h2mv_dist_prepared"
"""Root attribute: what the store is made of, and how it is cut."""
DATA_URL: Final = "data_url"
"""Root attribute: where the forcing was when the store was begun; not compared."""
_GENERAL: Final = {"title": "Daily forcing, cut for tiles", "source": "h2mv_dist", "Conventions": "CF-1.11"}
_ATTRIBUTES: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "time": {"standard_name": "time", "units": "days since 1970-01-01", "bounds": "time_bnds"},
        "time_bnds": {},
        "lat": {"standard_name": "latitude", "units": "degrees_north"},
        "lon": {"standard_name": "longitude", "units": "degrees_east"},
        "cell_area": {"standard_name": "cell_area", "units": "m2"},
        "mask": {"standard_name": "land_binary_mask", "units": "1"},
    }
)
_KEPT: Final = ("units", "long_name", "standard_name")
"""Attributes of a static array that still hold."""
_SHARD_COPIES: Final = 2
"""Of the shards that are written at once: coded, and joined or sent; both if they do not compress."""
_GROWING: Final = ("time", "time_bnds")
"""Coordinates that get longer with the forcing."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedLayout:
    """What a prepared store holds, and how it is cut.

    Attributes:
        grid: its cells.
        period: its days.
        forcing: variables, in column order.
        static: names of the static arrays.
        shard: days and cells of a shard, [time, *space].
        chunk: days and cells of a chunk, [time, *space].
        identity: all but the values of the forcing that decides which bytes are written, JSON-able; the same
            while the store grows.
        data_url: where the forcing is.
    """

    grid: Grid
    period: Period
    forcing: tuple[str, ...]
    static: tuple[str, ...]
    shard: tuple[int, ...]
    chunk: tuple[int, ...]
    identity: Mapping[str, Any]
    data_url: str

    def __post_init__(self) -> None:
        if len(self.shard) != 1 + len(self.grid.dims):
            raise ConfigError(
                describe(
                    "shards do not fit the grid",
                    where="settings prepare.shard and prepare.chunk",
                    expected=f"a number for each of the axes {', '.join(self.grid.dims)}",
                    actual=f"{list(self.shard[1:])} and {list(self.chunk[1:])}",
                    fix="set both, such as [20, 20] for lat and lon or [400] for cells",
                )
            )
        names = (*self.forcing, *self.static, *_ATTRIBUTES)
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ConfigError(f"data.static: a prepared store cannot have {', '.join(sorted(twice))} twice")

    @property
    def blocks(self) -> tuple[Period, ...]:
        """The stretches of days that are written by one owner each."""
        return tuple(self.period.blocks(self.shard[0]))

    @property
    def fingerprint(self) -> str:
        """One word for the identity."""
        return hashlib.sha256(canonical_json(self.identity).encode()).hexdigest()[:16]

    def block_bytes(self) -> int:
        """Bytes of one variable in the longest stretch of days."""
        return 4 * self.blocks[0].n_days * prod(self.grid.shape)

    def write_bytes(self) -> int:
        """Most bytes that writing it takes besides: a row of shards at once."""
        rows = self.grid.shape[0]
        return _SHARD_COPIES * self.block_bytes() * min(self.shard[1], rows) // rows

    def data(self, url: str) -> DataSettings:
        """How to open the store at ``url`` as a data set."""
        return DataSettings(url=url, layout="cf", static=self.static, mask=VariableSource(name="mask"))


class _Root(NamedTuple):
    """What the root of a prepared store says; it shows no days until the store is finished."""

    identity: Mapping[str, Any]
    data_url: str
    n_days: int


@dataclass(frozen=True, eq=False)
class PreparedStore:
    """The store at ``url`` and the receipts beside it."""

    url: str
    layout: PreparedLayout
    options: StorageOptions

    def create(self, *, overwrite: bool) -> None:
        """Write what is missing of metadata and coordinates; what is there already must be this store.

        Its length does not count: :meth:`finish` decides it.

        ``overwrite`` replaces a prepared store that is another one, and its receipts; never anything else.

        Raises:
            StoreError: something else is there, or receipts without a store.
        """
        there, wanted = self._root(), json.loads(canonical_json(self.layout.identity))
        found = there.identity if there else None
        if there and found == wanted and there.data_url != self.layout.data_url:
            _log.warning(
                "%s was begun with forcing from %s and goes on with that from %s; nothing checks that this "
                "is the same product",
                *(displayed(self.url), there.data_url, self.layout.data_url),
            )
        if self.shown_days():
            return
        if found != wanted:
            if not overwrite:
                self._refuse(found, wanted)
            self._clear()
        with explained(self.url, self.options):
            group = self._group({**_GENERAL, DATA_URL: self.layout.data_url, IDENTITY: wanted})
            for name in self.layout.forcing:
                self._require_forcing(group, name)
            self._write_coordinates(group)

    def shown_days(self) -> int:
        """How many days readers are shown: none before the store is finished, nor where another one is.

        Raises:
            StoreError: something that is no prepared store is there.
        """
        there = self._root()
        same = there and there.identity == json.loads(canonical_json(self.layout.identity))
        return there.n_days if there and same else 0

    def done(self) -> frozenset[str]:
        """Stretches of days that have a receipt; costs one listing.

        Raises:
            StoreError: the store cannot be reached.
        """
        return frozenset(n.removesuffix(".json") for n in list_objects(self._receipts, self.options))

    def forget_others(self) -> None:
        """Delete receipts of other stretches than the layout's: some may overlap with what is written next.

        Raises:
            StoreError: the store cannot be reached.
        """
        for unit in sorted(self.done().difference(map(str, self.layout.blocks))):
            delete_tree(join(self._receipts, f"{unit}.json"), self.options)

    def record(self, unit: str, checksum: str, seconds: float) -> None:
        """Put the receipt of a stretch of days, the last thing done for it.

        Raises:
            StoreError: the store cannot be written.
        """
        receipt = {"unit": unit, "checksum": checksum, "seconds": seconds}
        put_object(join(self._receipts, f"{unit}.json"), canonical_json(receipt).encode(), self.options)

    def write(
        self,
        name: str,
        block: Period,
        values: Float32Array,
        require_wanted: Callable[[], None] = lambda: None,
    ) -> str:
        """Write a forcing variable over one of the layout's blocks, and return the SHA-256 of its values.

        Args:
            name: the variable.
            block: its days.
            values: [day, *space].
            require_wanted: raises what ends the work early; called before each row of shards.

        Raises:
            StoreError: the store cannot be written.
        """
        first, rows = block.first - self.layout.period.first, self.layout.shard[1]
        store = open_store(self.url, self.options, read_only=False)
        with explained(self.url, self.options):
            stored = zarr.open_array(store, path=name, mode="r+", zarr_format=3)
            # its days may lie beyond those that readers are shown
            array = with_shape(stored, (self.layout.period.n_days, *values.shape[1:]))
            for row in range(0, values.shape[1], rows):
                require_wanted()
                where = slice(first, first + block.n_days), slice(row, row + rows)
                write_shards(array, where, values[:, row : row + rows])
        return hashlib.sha256(values.data).hexdigest()

    def finish(self, static: Sequence[Handle]) -> None:
        """Show readers all days of the layout: one put of the root, with the metadata of all arrays in it.

        Before that, arrays get their new length, and a new store its static arrays and mask. A store that has
        grown further meanwhile stays as it is.

        Raises:
            StoreError: a store cannot be read or written.
        """
        shown = self.shown_days()
        if shown >= self.layout.period.n_days:
            return
        for name in (*self.layout.forcing, *_GROWING):
            self._lengthen(name)
        with explained(self.url, self.options):
            group = self._group()
            for handle in () if shown else static:
                self._write_static(group, handle, handle.read())
            if not shown:
                _write(group, "mask", self.layout.grid.dims, self.layout.grid.mask.astype(np.int8))
            with warnings.catch_warnings():
                # not in the specification yet; readers that do not know it use the arrays' own metadata
                warnings.filterwarnings("ignore", "Consolidated metadata is currently not", ZarrUserWarning)
                zarr.consolidate_metadata(group.store, zarr_format=3)

    @property
    def _receipts(self) -> str:
        return join(ledger_url(self.url), self.layout.fingerprint)

    def _group(self, attributes: dict[str, Any] | None = None) -> zarr.Group:
        store = open_store(self.url, self.options, read_only=False)
        return zarr.open_group(store, mode="a", zarr_format=3, attributes=attributes, use_consolidated=False)

    def _lengthen(self, name: str) -> None:
        place = join(self.url, name, "zarr.json")
        metadata = json.loads(get_object(place, self.options))
        metadata["shape"][0] = self.layout.period.n_days
        put_object(place, json.dumps(metadata, indent=2).encode(), self.options)

    def _require_forcing(self, group: zarr.Group, name: str) -> None:
        layout, dims = self.layout, self.layout.grid.dims
        cells = {"coordinates": "lat lon"} if dims == ("cell",) else {}
        _require(
            group,
            name,
            shape=(layout.period.n_days, *layout.grid.shape),
            dtype=np.float32,
            chunks=layout.chunk,
            shards=layout.shard,
            dimension_names=("time", *dims),
            attributes={**variable(name).cf_attributes(), "cell_methods": "time: mean", **cells},
        )

    def _write_coordinates(self, group: zarr.Group) -> None:
        grid, period = self.layout.grid, self.layout.period
        # stored far beyond the end, so that no growth writes an object again that a reader reads
        n_stored = (-(-period.n_days // HORIZON_DAYS) + 1) * HORIZON_DAYS
        days = np.arange(period.first, period.first + n_stored, dtype=np.int64)
        for name, values in zip(_GROWING, (days, np.stack([days, days + 1], axis=1)), strict=True):
            further = values.shape[1:]
            array = _require(
                group,
                name,
                shape=(period.n_days, *further),
                dtype=values.dtype,
                chunks=(HORIZON_DAYS, *further),
                dimension_names=("time", "bnds")[: values.ndim],
                attributes=dict(_ATTRIBUTES[name]),
            )
            with_shape(array, values.shape)[...] = values
        for name, degrees in (("lat", grid.lat), ("lon", grid.lon)):
            _write(group, name, (name,) if name in grid.dims else grid.dims, degrees)
        _write(group, "cell_area", grid.dims, grid.area)

    def _write_static(self, group: zarr.Group, handle: Handle, values: Float32Array) -> None:
        dims, chunks = self.layout.grid.dims, self.layout.shard[1:]
        attributes = {key: value for key, value in handle.variable.attrs.items() if key in _KEPT}
        if handle.has_features:
            dims, chunks = (*dims, f"{handle.name}_feature"), (*chunks, values.shape[-1])
            attributes["names"] = list(handle.columns)
        made = {"shape": values.shape, "dtype": values.dtype, "chunks": chunks, "dimension_names": dims}
        _require(group, handle.name, attributes=attributes, **made)[...] = values

    def _root(self) -> _Root | None:
        """What the root of the prepared store at ``url`` says, or None where nothing is.

        Raises:
            StoreError: something that is no prepared store is there.
        """
        root = join(self.url, "zarr.json")
        if exists(root, self.options):
            try:
                return _parsed(json.loads(get_object(root, self.options)))
            except (ValueError, TypeError, KeyError, AttributeError, IndexError):
                pass
        elif not list_objects(self.url, self.options):
            return None
        raise StoreError(
            describe(
                "what is there is not a prepared store; nothing was touched",
                where=displayed(self.url),
                expected="nothing, or what an earlier h2mv-dist prepare began",
                actual=f"objects without the root attribute {IDENTITY}",
                fix="choose another path, or move or delete it yourself (prepare.overwrite does not)",
            )
        )

    def _refuse(self, found: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> None:
        """Refuse another store, or receipts without one: they would count as done what is not there."""
        if found is None and not list_objects(ledger_url(self.url), self.options):
            return
        there = found or {}
        differing = sorted(key for key in {*there, *wanted} if there.get(key) != wanted.get(key))
        raise StoreError(
            describe(
                f"{'another' if found else 'no'} prepared store is beside its receipts; nothing was touched",
                where=f"{displayed(self.url)} and {displayed(ledger_url(self.url))}",
                expected="nothing, or a store of the same data and settings and its receipts",
                actual=f"it differs in {', '.join(differing)}" if found else "receipts alone",
                fix="choose another path, or set prepare.overwrite to replace it",
            )
        )

    def _clear(self) -> None:
        """Delete receipts, what the root shows, arrays and root, in this order.

        Interrupted at any point, it can be done again.
        """
        delete_tree(ledger_url(self.url), self.options)
        if exists(join(self.url, "zarr.json"), self.options):
            group = self._group()
            # written without the arrays' metadata, which say that the store is finished
            group.attrs.put(dict(group.attrs))
            for name in sorted(group):
                delete_tree(join(self.url, name), self.options)
            delete_tree(self.url, self.options)


def _parsed(root: Mapping[str, Any]) -> _Root:
    attributes = root["attributes"]
    arrays = (root.get("consolidated_metadata") or {}).get("metadata", {})
    n_days = arrays["time"]["shape"][0] if "time" in arrays else 0
    return _Root(dict(attributes[IDENTITY]), str(attributes.get(DATA_URL, "")), int(n_days))


def _write(group: zarr.Group, name: str, dims: tuple[str, ...], values: NDArray[np.generic]) -> None:
    """Write a coordinate or the mask, over what an earlier attempt may have left."""
    made = {"shape": values.shape, "dtype": values.dtype, "chunks": values.shape, "dimension_names": dims}
    _require(group, name, attributes=dict(_ATTRIBUTES[name]), **made)[...] = values


def _require(group: zarr.Group, name: str, **made: Any) -> ZarrArray:
    """The array of this name, made if it is not there yet."""
    if name in group:
        found = group[name]
        assert isinstance(found, zarr.Array), "a prepared store has arrays only"
        return found
    return group.create_array(
        name,
        # flipped bits of a ranged read go unseen without the checksum of each inner chunk
        compressors=(ZstdCodec(level=3), Crc32cCodec()),
        fill_value=np.nan if np.dtype(made["dtype"]).kind == "f" else 0,
        **made,
    )
