"""Library: finds the array of each variable in the groups of its stores; nothing is decoded yet."""

import math
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

import numpy as np
import xarray as xr
import zarr
from xarray.backends import ZarrStore
from zarr.errors import ContainsArrayError

from h2mv_dist.config import DataSettings, StorageOptions, VariableSource
from h2mv_dist.errors import DataError, describe
from h2mv_dist.io.local_chunks import with_fast_reads
from h2mv_dist.io.stores import displayed, explained, open_store
from h2mv_dist.variables import nearest, variable

PUBLISHED_GROUPS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "net_radiation": "rn",
        "precipitation": "prec",
        "air_temperature": "tair",
        "terrestrial_water_storage_anomaly": "tws",
        "evapotranspiration": "et",
        "runoff": "q",
        "snow_water_equivalent": "swe",
        "fapar": "fapar",
    }
)
"""Variable -> its group in the published layout; every other name is its own group."""
LONGEST_AXIS: Final = 10**9
LARGEST_CHUNK: Final = 16 * 2**30
"""Bytes of a chunk, which is read whole."""


@dataclass(frozen=True, eq=False)
class Group:
    """One opened group of a store; ``arrays`` are lazy and not yet decoded."""

    url: str
    path: str
    arrays: Mapping[str, xr.Variable]
    attributes: Mapping[str, object]

    @property
    def where(self) -> str:
        """Store and group, for messages."""
        return f"{displayed(self.url)} {self.path or '/'}"


@dataclass(frozen=True, eq=False)
class Found:
    """An array before it is put on our axes.

    Attributes:
        name: variable, or static array.
        array: its name in the group.
        group: where it is.
        root: the root of its store, where coordinates can be too; None where that is no other place.
        variable: the array, lazy and not yet decoded.
        units: the stored ones; None for a static array or a mask.
        published: whether it is in the published layout.
        options: how its store is opened.
    """

    name: str
    array: str
    group: Group
    root: Group | None
    variable: xr.Variable
    units: str | None
    published: bool
    options: StorageOptions

    @property
    def where(self) -> str:
        """Variable, store and array, for messages."""
        return f"{self.name} ({displayed(self.group.url)} {self.path})"

    @property
    def path(self) -> str:
        """The array inside its store."""
        return posixpath.join(self.group.path, self.array)

    def neighbours(self) -> Iterator[tuple[str, xr.Variable]]:
        """Arrays that can be its coordinates: on its own axes, in its group first, then at the root."""
        for group in (self.group,) if self.root is None else (self.group, self.root):
            for name, array in group.arrays.items():
                if array is not self.variable and set(array.dims) <= set(self.variable.dims):
                    yield posixpath.join(group.path, name), array


class Library:
    """Opens each group once."""

    def __init__(self, options: StorageOptions) -> None:
        self.options = options
        self._roots: dict[str, zarr.Group] = {}
        self._groups: dict[tuple[str, str], Group] = {}

    def group(self, url: str, path: str) -> Group:
        """The group at ``path`` of a store, with its arrays.

        Raises:
            DataError: there is no such group, or its arrays have no consistent axes.
            StoreError: the store cannot be reached or read.
        """
        path = path.strip("/")
        if (url, path) not in self._groups:
            with explained(url, self.options):
                try:
                    self._groups[url, path] = _read_group(url, path, self._node(url, path))
                except (ValueError, TypeError, KeyError) as error:
                    raise _not_understood(f"{displayed(url)} {path or '/'}", error) from error
        return self._groups[url, path]

    def _node(self, url: str, path: str) -> zarr.Group:
        if url not in self._roots:
            self._roots[url] = _open_root(url, self.options)
        root = self._roots[url]
        node = root.get(path) if path else root
        if isinstance(node, zarr.Group):
            return node
        raise _missing(f"group {path!r}", displayed(url), _below(root, posixpath.dirname(path)), path)


def _open_root(url: str, options: StorageOptions) -> zarr.Group:
    try:
        return zarr.open_group(open_store(url, options, read_only=True), mode="r")
    except ContainsArrayError as error:
        raise DataError(
            describe(
                "the store is a single array",
                where=displayed(url),
                expected="a Zarr group",
                actual="a Zarr array",
                fix="give the URL of the group that holds it",
            )
        ) from error


def _below(root: zarr.Group, folder: str) -> tuple[str, ...]:
    node = root.get(folder) if folder else root
    return tuple(posixpath.join(folder, name) for name in node) if isinstance(node, zarr.Group) else ()


def _read_group(url: str, path: str, node: zarr.Group) -> Group:
    # Format 2 has one fill value for "never written" and "missing"; format 3 has an attribute for the latter.
    one_for_both = node.metadata.zarr_format == 2
    store = ZarrStore(node, mode="r", use_zarr_fill_value_as_mask=one_for_both)
    dataset = xr.open_dataset(store, decode_cf=False, chunks=None, cache=False, create_default_indexes=False)
    arrays = {str(name): array for name, array in dataset.variables.items()}
    for name, array in arrays.items():
        _require_bounded(array, f"{displayed(url)} {posixpath.join(path, name)}")
        if one_for_both:
            _drop_default_fill(array)
    coordinates = {*arrays} & {*dataset.sizes}
    for name in coordinates:
        arrays[name].load()  # once, for all arrays that it is a coordinate of
    arrays |= {n: with_fast_reads(arrays[n], node[n]) for n in arrays if n not in coordinates}
    return Group(url, path, arrays, {str(k): v for k, v in dataset.attrs.items()})


def _drop_default_fill(array: xr.Variable) -> None:
    """Zarr's own default is 0, which taken for "missing" would delete every true zero.

    Whoever packs values chooses a fill value, and stays with it.
    """
    packed = "scale_factor" in array.attrs or "add_offset" in array.attrs
    fill = array.attrs.get("_FillValue")
    if not packed and isinstance(fill, int | float | np.number) and fill == 0:
        del array.attrs["_FillValue"]


def _not_understood(where: str, error: Exception) -> DataError:
    return DataError(
        describe(
            "the arrays of a group have no consistent axes, or are no arrays of numbers",
            where=where,
            expected="a group inside its store, and named dimensions, each of one length",
            actual=str(error),
            fix="write them with xarray, or add dimension_names (format 2: _ARRAY_DIMENSIONS)",
        )
    )


def _require_bounded(array: xr.Variable, where: str) -> None:
    """Refuse what no data set has, before memory is asked for."""
    chunk = math.prod(array.encoding.get("chunks") or (1,)) * array.dtype.itemsize
    if max(array.shape, default=0) > LONGEST_AXIS or chunk > LARGEST_CHUNK:
        raise DataError(
            describe(
                "an array is beyond all measure",
                where=where,
                expected=f"axes of up to {LONGEST_AXIS} steps in chunks of up to {LARGEST_CHUNK} bytes",
                actual=f"shape {array.shape}, in chunks of {chunk} bytes",
                fix="check its metadata, which may be damaged, or write it in smaller chunks",
            )
        )


def _missing(what: str, where: str, present: Sequence[str], asked: str) -> DataError:
    hint = nearest(asked, tuple(present)) if present else "it is empty"
    return DataError(
        describe(
            f"{what} is missing",
            where=where,
            expected=asked,
            actual=", ".join(sorted(present)[:30]) or "nothing",
            fix=f"{hint}; say where it is with data.variables.NAME.name (and .group, .url)",
        )
    )


def find_variable(data: DataSettings, name: str, library: Library) -> Found:
    """A forcing or target variable and the units it is stored in.

    Raises:
        DataError: it is missing, or nothing says its units.
        StoreError: its store cannot be reached or read.
    """
    found = find_array(data, name, data.variables.get(name), library)
    given = data.variables.get(name, VariableSource()).units
    units = given or attribute(found.variable, "units")
    if not units and data.layout == "published":
        units = variable(name).units
    if not units:
        raise DataError(
            describe(
                "an array does not say its units",
                where=found.where,
                expected=f"an attribute units that can be converted to {variable(name).units}",
                actual="none",
                fix=f"set data.variables.{name}.units",
            )
        )
    return replace(found, units=units)


def find_array(data: DataSettings, name: str, source: VariableSource | None, library: Library) -> Found:
    """Any array; without a ``source`` it is where the layout has an array of this name.

    Raises:
        DataError: it is missing.
        StoreError: its store cannot be reached or read.
    """
    source = source or VariableSource()
    url = source.url or data.url
    published = data.layout == "published"
    stored = source.name or (PUBLISHED_GROUPS.get(name, name) if published else name)
    path = posixpath.join(source.group or "", stored) if published else source.group or ""
    array = "data" if published else stored
    group = library.group(url, path)
    if array not in group.arrays:
        raise _missing(f"variable {name}", group.where, tuple(group.arrays), array)
    root = library.group(url, "") if group.path and not published else None
    return Found(name, array, group, root, group.arrays[array], None, published, library.options)


def attribute(array: xr.Variable, name: str, default: str = "") -> str:
    """An attribute as text, without surrounding blanks."""
    value = array.attrs.get(name, default)
    return "" if value is None else str(value).strip()
