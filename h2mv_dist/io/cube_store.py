"""The cube in its store: created once, known again when a run is resumed, replaced only when told to."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import date
from typing import Any, Final, NamedTuple

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import BloscCname, BloscCodec, BloscShuffle, Crc32cCodec, ZstdCodec
from zarr.errors import ContainsArrayError

from h2mv_dist.config import StorageOptions
from h2mv_dist.errors import ConfigError, JobError, StoreError, describe
from h2mv_dist.grid import Grid, Period
from h2mv_dist.io.cube import (
    FINGERPRINT,
    GENERAL,
    LAYOUT,
    PROGRESS,
    RECORDED,
    Compression,
    CubeLayout,
    PlannedArray,
    Progress,
    layout_of,
    lengths,
    planned_arrays,
    root_attributes,
)
from h2mv_dist.io.ledger import ledger_url, other_spelling
from h2mv_dist.io.snapshots import snapshots_url
from h2mv_dist.io.stores import (
    ZarrArray,
    delete_tree,
    displayed,
    explained,
    get_object,
    get_versioned,
    join,
    list_objects,
    open_store,
    put_object,
    swap_object,
    with_shape,
)

_STATE: Final = "h2mv_dist_state"
_UNFINISHED: Final = "metadata incomplete"
_COMPRESSORS: Final[Mapping[Compression, BytesBytesCodec]] = {
    "zstd": ZstdCodec(level=1),
    "blosc": BloscCodec(cname=BloscCname.lz4, clevel=5, shuffle=BloscShuffle.shuffle, typesize=4),
}
"""Measured on simulated fluxes and stores: levels of zstd above 1 take 1.8 times as long for no byte less."""
_AT_ONCE: Final = 8
"""Metadata objects read or written at a time."""


def create_cube(url: str, layout: CubeLayout, options: StorageOptions, overwrite: bool) -> None:
    """Write the metadata and coordinates of a cube, or find that exactly this cube is already there.

    ``overwrite`` replaces a cube that holds something else, and its receipts; never anything but a cube.

    Raises:
        StoreError: another cube, receipts without a cube, or something that is no cube is there, or a cube
            whose name differs by .zarr only.
    """
    found = _existing(url, options)
    wanted = root_attributes(layout)
    differences = _differences(found.attributes, wanted) if found else ()
    if found and not differences and found.finished:
        return
    if found is None:
        _refuse_shared_receipts(url, options)
    if (found is None or differences) and overwrite:
        _clear(url, options, found)
    elif differences:
        raise _another_cube(url, differences)
    elif found is None:
        _refuse_orphaned_receipts(url, options)
    wanted |= Progress(layout.period).attributes()
    if found is None or differences:
        begun = _root({**wanted, _STATE: _UNFINISHED})
        if swap_object(_document(url, ""), begun, None, options) is None:
            # another run has begun one at this moment: it is ours to join, or to refuse
            create_cube(url, layout, options, overwrite=False)
            return
    _write_arrays(url, layout, options)
    _finish_root(url, wanted, options)


def differences(attributes: Mapping[str, str], layout: CubeLayout) -> tuple[str, ...]:
    """What sets a cube with these root attributes apart from one of this layout, a line each.

    How long it is, where its inputs lie and with what versions it was made do not count.
    """
    return _differences(attributes, root_attributes(layout))


def find_cube(url: str, options: StorageOptions) -> Mapping[str, str] | None:
    """Root attributes of the cube at ``url`` once its metadata are written, or None where there is none yet.

    Raises:
        StoreError: something that is not a cube is there.
    """
    found = _existing(url, options)
    return found.attributes if found and found.finished else None


def require_cube(url: str, layout: CubeLayout, options: StorageOptions) -> None:
    """Make sure that there is a cube of this layout, whatever its length, with all its metadata.

    Raises:
        StoreError: there is none, or another cube, or something that is no cube.
    """
    found = _existing(url, options)
    differences = _differences(found.attributes, root_attributes(layout)) if found else ()
    if differences:
        raise _another_cube(url, differences)
    if found is None or not found.finished:
        raise _no_cube(url)


class Cube(NamedTuple):
    """A cube as its metadata describe it: as long as a reader sees it."""

    layout: CubeLayout
    progress: Progress


def read_cube(url: str, options: StorageOptions) -> Cube:
    """What the cube at ``url`` was created as, and how far it is, from its metadata and coordinates.

    Raises:
        StoreError: there is no complete cube, or its coordinates are not those it was created with.
    """
    found = _existing(url, options)
    if found is None or not found.finished:
        raise _no_cube(url)
    with explained(url, options):
        group = zarr.open_group(open_store(url, options, read_only=True), mode="r", use_consolidated=False)
        lat, lon, mask, area = (np.asarray(group[name]) for name in ("lat", "lon", "land_mask", "cell_area"))
    try:
        layout = layout_of(found.attributes, Grid(tuple(found.geometry["dims"]), lat, lon, mask != 0, area))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, ConfigError) as error:
        raise _damaged(url, error) from error
    differences = _differences(found.attributes, root_attributes(layout))
    if differences:
        raise StoreError(
            describe(
                "the coordinates of a cube were changed",
                where=displayed(url),
                expected="those it was created with",
                actual="it differs in " + ", ".join(differences),
                fix="make the cube again, with inference.overwrite",
            )
        )
    return Cube(layout, Progress.of(found.attributes))


def still_as_planned(
    url: str, layout: CubeLayout, rollbacks: tuple[date, ...], options: StorageOptions
) -> Progress:
    """How far a cube is by now, which nobody may have replaced or rolled back; costs one read of its root.

    Raises:
        JobError: somebody has.
        StoreError: there is no complete cube, or the store fails.
    """
    shown = _shown(url, options)
    if different := differences(shown.attributes, layout):
        raise JobError(
            describe(
                "the cube was replaced while it was worked on",
                where=displayed(url),
                expected="the cube as it was planned with",
                actual="it differs in " + ", ".join(different),
                fix="let one command at a time work on a cube; for both, give each a path of its own",
            )
        )
    if shown.progress.rollbacks == rollbacks:
        return shown.progress
    raise JobError(
        describe(
            "the cube was rolled back while it was worked on",
            where=displayed(url),
            expected=f"rollbacks to {', '.join(map(str, rollbacks)) or 'no day'}",
            actual=f"rollbacks to {', '.join(map(str, shown.progress.rollbacks)) or 'no day'}",
            fix="let one command at a time work on a cube: wait for the other one, then start again; days "
            "without a receipt count as not done, and h2mv-dist verify-cube finds shards of the wrong run",
        )
    )


def publish_further(url: str, layout: CubeLayout, progress: Progress, options: StorageOptions) -> None:
    """Show readers the days of ``progress``, unless another run has shown them, and more, meanwhile.

    Raises:
        JobError: the cube was replaced or rolled back meanwhile.
        StoreError: the store cannot be reached or written.
    """
    while True:
        shown = still_as_planned(url, layout, progress.rollbacks, options)
        if shown.complete and shown.period.stop > progress.period.stop:
            return
        with suppress(ChangedError):
            publish(url, layout, progress, options, before=shown)
            return


def publish(
    url: str,
    layout: CubeLayout,
    progress: Progress,
    options: StorageOptions,
    *,
    before: Progress | None = None,
) -> None:
    """Show readers the days of ``progress``: the root, with the metadata of all arrays in it, is swapped.

    The arrays' own metadata, for readers that do not look into the root's copy, follow the root when a cube
    becomes shorter and go before it when it becomes longer, so that nobody is shown days that are not there.
    So do coordinates beyond the horizon that they are stored for.

    Args:
        before: how far the cube is as far as the caller knows; left out, however far it is.

    Raises:
        ChangedError: it is further, or less far, or another cube, by now; nothing was changed.
        StoreError: the store cannot be reached or written.
    """
    root = _shown(url, options)
    if before is not None and (root.progress != before or differences(root.attributes, layout)):
        raise _changed_meanwhile(url)
    layout = replace(layout, period=progress.period)
    names = [array.name for array in planned_arrays(layout)]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        stored = list(pool.map(lambda name: json.loads(get_object(_document(url, name), options)), names))
    documents = dict(zip(names, stored, strict=True))
    shown = {name: _lasting(document, progress.period) for name, document in documents.items()}
    longer = any(shown[name]["shape"] > documents[name]["shape"] for name in names)
    if longer:
        _write_further_coordinates(url, layout, documents, options)
        _put_changed(url, documents, shown, options)
    new = _root({**root_attributes(layout), **progress.attributes()}, shown)
    if swap_object(_document(url, ""), new, root.version, options) is None:
        if longer:
            now = _shown(url, options).progress.period
            _put_changed(url, shown, {name: _lasting(one, now) for name, one in shown.items()}, options)
        raise _changed_meanwhile(url)
    if not longer:
        _put_changed(url, documents, shown, options)


class ChangedError(JobError):
    """How far a cube is was changed by another run."""


def _changed_meanwhile(url: str) -> ChangedError:
    return ChangedError(
        describe(
            "another run has changed how far the cube is",
            where=displayed(url),
            expected="the cube as it was planned with",
            actual="one that was lengthened, rolled back, repaired or replaced meanwhile",
            fix="let one command at a time work on a cube, then start again",
        )
    )


class _Shown(NamedTuple):
    """What the root of a finished cube says, and the version it says so in."""

    progress: Progress
    attributes: Mapping[str, str]
    version: str


def _shown(url: str, options: StorageOptions) -> _Shown:
    root = get_versioned(_document(url, ""), options)
    found = _parsed(root.data) if root else None
    if root is None or found is None or not found.finished:
        raise _no_cube(url)
    try:
        return _Shown(Progress.of(found.attributes), found.attributes, root.version)
    except (ValueError, TypeError, KeyError, ConfigError) as error:
        raise _damaged(url, error) from error


def _root(attributes: Mapping[str, str], arrays: Mapping[str, Any] | None = None) -> bytes:
    """Metadata of the group, with those of its arrays in it, if they are given."""
    # Readers without it fall back to the arrays' own metadata, so leaving the specification is safe.
    copy = {"kind": "inline", "must_understand": False, "metadata": arrays}
    document = {
        "attributes": dict(attributes),
        "zarr_format": 3,
        **({"consolidated_metadata": copy} if arrays is not None else {}),
        "node_type": "group",
    }
    return json.dumps(document, indent=2).encode()


def _put_changed(url: str, old: Mapping[str, Any], new: Mapping[str, Any], options: StorageOptions) -> None:
    """Write the metadata of those arrays for which they change."""

    def put(name: str) -> None:
        put_object(_document(url, name), json.dumps(new[name], indent=2).encode(), options)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(put, (name for name in new if new[name] != old[name])))


def _write_further_coordinates(
    url: str, layout: CubeLayout, documents: Mapping[str, Any], options: StorageOptions
) -> None:
    """Write whole chunks of coordinates that nobody could read so far, if the layout's days need some."""
    with explained(url, options):
        store = open_store(url, options, read_only=False)
        for array in planned_arrays(layout):
            if array.values is None:
                continue
            document = documents[array.name]
            (chunk, *_) = document["chunk_grid"]["configuration"]["chunk_shape"]
            first = max(-(-document["shape"][0] // chunk), 1) * chunk
            if first < len(array.values):
                _write_values(zarr.open_array(store, path=array.name, mode="r+"), array.values, first)


def _document(url: str, name: str) -> str:
    return join(url, name, "zarr.json")


def _lasting(array: Mapping[str, Any], period: Period) -> dict[str, Any]:
    """Metadata of an array whose growing axis is as long as the period."""
    grown = lengths(period)
    axes = zip(array.get("dimension_names", ()), array["shape"], strict=True)
    return {**array, "shape": [grown.get(axis, size) for axis, size in axes]}


def _write_arrays(url: str, layout: CubeLayout, options: StorageOptions) -> None:
    """Write the metadata of all arrays, and the values of coordinates.

    Arrays that an interrupted creation, or another run that joined it, has written stay as they are: they may
    hold shards by now.
    """
    with explained(url, options):
        store = open_store(url, options, read_only=False)
        group = zarr.open_group(store, mode="r+", use_consolidated=False)
        for array in planned_arrays(layout):
            created = _created(group, array, _COMPRESSORS[layout.compression])
            if array.values is not None:
                _write_values(created, array.values)


def _created(group: zarr.Group, array: PlannedArray, compressor: BytesBytesCodec) -> ZarrArray:
    """The array, which is created if it is not there."""
    try:
        return group.create_array(
            array.name,
            shape=array.shape,
            dtype=array.dtype,
            chunks=array.chunks,
            shards=array.shards,
            # Flipped bits of a ranged read go unseen without the checksum of each inner chunk.
            compressors=(compressor, Crc32cCodec()),
            fill_value=np.nan if array.dtype.kind == "f" else 0,
            attributes=dict(array.attributes),
            dimension_names=array.dims,
        )
    except ContainsArrayError:
        return zarr.open_array(group.store, path=array.name, mode="r+")


def _write_values(array: ZarrArray, values: NDArray[np.generic], first: int = 0) -> None:
    """Write values from the ``first`` on, also those that lie beyond the array's shape."""
    with_shape(array, values.shape)[first:] = values[first:]


def _finish_root(url: str, attributes: Mapping[str, str], options: StorageOptions) -> None:
    """Say that all metadata are there, unless another run has said so, and perhaps more, by now."""
    begun = get_versioned(_document(url, ""), options)
    found = _parsed(begun.data) if begun else None
    if begun is not None and found is not None and not found.finished:
        swap_object(_document(url, ""), _root(attributes), begun.version, options)


class _Found(NamedTuple):
    """Root attributes of a cube that is there, and whether all of its metadata were written."""

    attributes: Mapping[str, str]
    finished: bool

    @property
    def geometry(self) -> Mapping[str, Any]:
        """The parsed layout."""
        parsed: Mapping[str, Any] = json.loads(self.attributes[LAYOUT])
        return parsed


def _existing(url: str, options: StorageOptions) -> _Found | None:
    """The cube at ``url``, or None where nothing is.

    Raises:
        StoreError: something that is not a cube is there.
    """
    root = get_versioned(_document(url, ""), options)
    if root is not None:
        found = _parsed(root.data)
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
        json.loads(attributes[LAYOUT])
        finished = attributes.pop(_STATE, None) is None
        return _Found(attributes, finished) if FINGERPRINT in attributes else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _damaged(url: str, error: Exception) -> StoreError:
    return StoreError(
        describe(
            "the metadata of a cube are damaged",
            where=displayed(url),
            expected="root attributes as h2mv-dist infer wrote them",
            actual=f"{type(error).__name__}: {error}",
            fix="restore its zarr.json from a copy, or make the cube again with inference.overwrite",
        )
    )


def _differences(found: Mapping[str, str], wanted: Mapping[str, str]) -> tuple[str, ...]:
    """One line for every root attribute or part of the layout that differs and is compared."""
    there, here = _flat(found), _flat(wanted)
    names = sorted(name for name in {*there, *here} if there.get(name) != here.get(name))
    return tuple(
        f"{name} ({_short(there.get(name))} there, {_short(here.get(name))} wanted)" for name in names
    )


def _flat(attributes: Mapping[str, str]) -> dict[str, object]:
    layout = {f"layout.{name}": value for name, value in json.loads(attributes[LAYOUT]).items()}
    apart = (LAYOUT, *GENERAL, *RECORDED, *PROGRESS)
    return {n: value for n, value in attributes.items() if n not in apart} | layout


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _no_cube(url: str) -> StoreError:
    return StoreError(
        describe(
            "there is no complete cube",
            where=displayed(url),
            expected="a cube that h2mv-dist infer created",
            actual="nothing, or metadata that were not written to the end",
            fix="check the path, or run h2mv-dist infer (again)",
        )
    )


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


def _refuse_shared_receipts(url: str, options: StorageOptions) -> None:
    """Receipts and states of a cube beside this one would be taken for its own, or deleted with them."""
    other = other_spelling(url)
    root = get_versioned(_document(other, ""), options)
    if root is not None and _parsed(root.data) is not None:
        raise StoreError(
            describe(
                "a cube beside it has the same name but for .zarr, and would share its receipts; nothing was "
                "touched",
                where=displayed(url),
                expected="a name of its own",
                actual=f"{displayed(other)} has its receipts in {displayed(ledger_url(url))}",
                fix="choose another path",
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
    """Delete a cube and what lies beside it; interrupted, it is still known as an unfinished cube."""
    delete_tree(snapshots_url(url), options)
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
