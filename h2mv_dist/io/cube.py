"""The output cube: what it holds, how it is cut, and its arrays with their attributes; touches no store.

Array axes: daily variables [time, *space], static ones [*space], constants []; ``space`` is (lat, lon) or
(cell). With a member axis each of them starts with [member]; without one, NAME is the mean over folds and
NAME_spread their standard deviation. Float32, NaN over sea and where nothing was written.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from math import prod
from types import MappingProxyType
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from h2mv_dist.config import canonical_json
from h2mv_dist.errors import ConfigError, describe
from h2mv_dist.grid import FloatArray, Grid, IntArray, Period, Tile, as_date, cell_bounds
from h2mv_dist.variables import Variable, variable

FINGERPRINT: Final = "h2mv_dist_fingerprint"
"""Root attribute that says which model, data, grid and settings a cube was made with."""

LAYOUT: Final = "h2mv_dist_layout"
"""Root attribute that holds everything that decides which bytes a unit writes and where, as JSON."""

PERIOD: Final = "h2mv_dist_period"
"""Root attribute: the days a reader sees."""

COMPLETE: Final = "h2mv_dist_complete"
"""Root attribute: whether all of these days are there, "yes" or "no"."""

ROLLBACKS: Final = "h2mv_dist_rollbacks"
"""Root attribute: days from which the cube was computed anew, as JSON."""

CONSTANTS: Final = "h2mv_dist_constants_sha256"
"""Root attribute: checksum of the constants, which belong to no tile."""

COMPACTED: Final = "h2mv_dist_compacted_from"
"""Root attribute of a cube that was copied from another one: fingerprint of that one."""

UNTIL: Final = "h2mv_dist_until"
"""Root attribute of a cube that was rolled back, until it is as long again: where it is to end."""

_COVERAGE: Final = ("time_coverage_start", "time_coverage_end")
"""First and last day of a complete cube (Attribute Convention for Data Discovery)."""

PROGRESS: Final = (PERIOD, COMPLETE, ROLLBACKS, CONSTANTS, UNTIL, *_COVERAGE)
"""Root attributes that change while a cube grows."""

HORIZON_DAYS: Final = 36_525
HORIZON_MONTHS: Final = 1200
"""Growing axes are stored for a multiple of so many steps, so that no append rewrites what a reader reads."""

INPUT_VALUES: Final = "input_values"
"""Root attribute: what the data are, by their values. Cubes begun before there was one know them by their
objects; it is added when such a cube is next finished, from data whose objects are still the same."""

RECORDED: Final = ("data_url", "training_job", "settings", "versions", "source_cube", INPUT_VALUES)
"""Root attributes that are not compared: where a cube's inputs were, and what it was last worked on with."""

MembersAs = Literal["spread", "all", "both"]
Form = Literal["members", "mean", "spread"]
Compression = Literal["zstd", "blosc"]

KEPT_BITS: Final = 12
"""Bits of the mantissa of rounded values, if nothing else is said: relative errors are at most 2**-13."""

MANTISSA_BITS: Final = 23
"""Of a value that is not rounded."""

MONTHLY: Final = "_monthly"
"""Suffix of the arrays that hold means over calendar months."""

MEAN: Final = "_mean"
"""Suffix of the arrays that hold the mean over folds beside every member."""

SPREAD: Final = "_spread"
"""Suffix of the arrays that hold the standard deviation over folds."""

_LISTS: Final = ("daily", "static", "constants", "members", "chunk", "shard", "tile", "monthly")
"""What a layout has several of."""

ONE_OWNER: Final = "two writers in one shard lose data without any error"
"""Why shards are written whole, by one owner."""

_TIME_METHODS: Final = {"mm d-1": "time: mean", "mm": "time: point (comment: end of the day)"}
GENERAL: Final[Mapping[str, str]] = MappingProxyType(
    {
        "title": "Water cycle of the land surface, simulated by a hybrid model",
        "source": "h2mv_dist",
        "Conventions": "CF-1.11",
    }
)
"""Root attributes of every cube, which are not compared either: another release may word them otherwise."""

_SPREAD_COMMENT: Final = (
    "Population standard deviation over models trained on different folds. It shows how much they disagree; "
    "errors they share do not show."
)


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
        members_as: ``all``: keep every member; ``spread``: their mean and, for more than one, their spread;
            ``both``.
        monthly: daily variables whose means over calendar months are kept, too; only of whole months.
        rounded: variable -> bits of their mantissa that its values keep, so that they compress well.
        chunk: cells of a chunk along each spatial axis.
        shard: cells of a shard along each spatial axis; a multiple of the chunk.
        tile: cells of a tile along each spatial axis; a multiple of the shard.
        compression: of chunks.
        chunk_days: days of a chunk.
        shard_days: days of a shard; a multiple of the chunk's.
        attributes: provenance for the root; holds :data:`FINGERPRINT` and, but for :data:`RECORDED`, nothing
            that differs between runs.
    """

    grid: Grid
    period: Period
    daily: tuple[str, ...]
    static: tuple[str, ...]
    constants: tuple[str, ...]
    members: tuple[int, ...]
    members_as: MembersAs
    chunk: tuple[int, ...]
    shard: tuple[int, ...]
    chunk_days: int
    shard_days: int
    tile: tuple[int, ...]
    attributes: Mapping[str, str]
    rounded: Mapping[str, int] = field(default_factory=dict)
    monthly: tuple[str, ...] = ()
    compression: Compression = "zstd"

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
    def tiles(self) -> tuple[Tile, ...]:
        """Tiles with land, in order."""
        return self.grid.land_tiles(self.tile)

    @property
    def sizes(self) -> dict[str, int]:
        """Length of every dimension."""
        space = dict(zip(self.grid.dims, self.grid.shape, strict=True))
        return {"member": len(self.members), **lengths(self.period), **space}

    @property
    def member_axis(self) -> bool:
        """Whether any array has the axis ``member``."""
        return self.members_as != "spread"

    def forms_of(self, name: str) -> dict[str, Form]:
        """Arrays that hold variable ``name``, and what of its members each of them holds."""
        every: dict[str, Form] = {name: "members"} if self.member_axis else {}
        if len(self.members) == 1:
            return every or {name: "mean"}
        if self.members_as == "all":
            return every
        return {**every, (name + MEAN if every else name): "mean", name + SPREAD: "spread"}

    def arrays_of(self, name: str) -> tuple[str, ...]:
        """Names of the arrays that hold variable ``name``."""
        return tuple(self.forms_of(name))


def lengths(period: Period) -> dict[str, int]:
    """Length of the axes that grow."""
    return {"time": period.n_days, "month": len(period.months())}


def monthly_arrays(layout: CubeLayout) -> Iterator[str]:
    """Names of the arrays of monthly means."""
    for name in layout.monthly:
        yield from (array + MONTHLY for array in layout.arrays_of(name))


def projected_bytes(layout: CubeLayout) -> int:
    """Bytes of the whole cube before compression, coordinates included."""
    return sum(array.n_bytes for array in planned_arrays(layout))


def part_bytes(layout: CubeLayout, parts: Mapping[Tile, Sequence[Period]]) -> int:
    """Bytes before compression of these days of these tiles."""
    cell_days = sum(prod(tile.shape) * sum(p.n_days for p in periods) for tile, periods in parts.items())
    return projected_bytes(layout) * cell_days // (layout.grid.mask.size * layout.period.n_days)


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
    reason = ONE_OWNER if outer_name == "tile" else "a shard is stored as whole chunks"
    raise ConfigError(
        describe(
            f"{outer_name} is not a multiple of {inner_name}: {reason}",
            where=f"settings {outer_name} and {inner_name}",
            expected=f"{outer_name} sizes that are multiples of {inner}",
            actual=str(outer),
            fix=f"change inference.{outer_name} or inference.{inner_name}",
        )
    )


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a cube is.

    Attributes:
        period: days a reader sees.
        complete: whether all of them are there; once they are, always.
        rollbacks: days from which the cube was computed anew, in order.
        constants: SHA-256 of the constants, from the sink; empty until they are written.
        until: where a cube that was rolled back is to end; None once it does, and for any other one.
    """

    period: Period
    complete: bool = False
    rollbacks: tuple[date, ...] = ()
    constants: str = ""
    until: date | None = None

    @property
    def intended(self) -> Period:
        """Days a reader is to see, once those that are computed anew are there again."""
        return Period(self.period.start, self.until or self.period.stop)

    def attributes(self) -> dict[str, str]:
        """Those of the root that say so."""
        first, last = self.period.start, as_date(self.period.first + self.period.n_days - 1)
        coverage = dict(zip(_COVERAGE, (str(first), str(last)), strict=True)) if self.complete else {}
        return {
            PERIOD: str(self.period),
            COMPLETE: "yes" if self.complete else "no",
            ROLLBACKS: canonical_json([str(day) for day in self.rollbacks]),
            CONSTANTS: self.constants,
            **({UNTIL: str(self.until)} if self.until else {}),
            **coverage,
        }

    @staticmethod
    def of(attributes: Mapping[str, str]) -> "Progress":
        """Inverse of :meth:`attributes`."""
        rollbacks = tuple(map(date.fromisoformat, _list_in(attributes[ROLLBACKS])))
        until = date.fromisoformat(attributes[UNTIL]) if UNTIL in attributes else None
        period, complete = Period.parse(attributes[PERIOD]), attributes[COMPLETE] == "yes"
        return Progress(period, complete, rollbacks, attributes[CONSTANTS], until)


def _list_in(text: str) -> list[str]:
    found = json.loads(text)
    if not isinstance(found, list):
        raise ValueError(f"a list was expected, not {text[:60]}")
    return found


def root_attributes(layout: CubeLayout) -> dict[str, str]:
    """What never changes in a cube's root; but for RECORDED equal only for cubes made in the same way."""
    return {**GENERAL, **layout.attributes, LAYOUT: canonical_json(_geometry(layout))}


def layout_of(attributes: Mapping[str, str], grid: Grid) -> CubeLayout:
    """Inverse of :func:`root_attributes`; ``grid`` is from the cube's coordinates, and not compared here."""
    geometry, unseen = json.loads(attributes[LAYOUT]), {*GENERAL, LAYOUT, *PROGRESS}
    return CubeLayout(
        grid=grid,
        period=Progress.of(attributes).period,
        members_as=geometry["members_as"],
        compression=geometry["compression"],
        chunk_days=geometry["chunk_days"],
        shard_days=geometry["shard_days"],
        rounded=_rounding_of(geometry["rounded"]),
        attributes={name: text for name, text in attributes.items() if name not in unseen},
        **{name: tuple(geometry[name]) for name in _LISTS},
    )


def _geometry(layout: CubeLayout) -> dict[str, object]:
    """Everything that decides which bytes a unit writes and where; compared when a run is resumed."""
    grid = layout.grid
    numbers = {name: list(getattr(layout, name)) for name in _LISTS}
    cells = {"lat": grid.lat, "lon": grid.lon, "area": grid.area, "mask": grid.mask.astype(np.float64)}
    return {
        **numbers,
        "dims": list(grid.dims),
        "shape": list(grid.shape),
        "start": str(layout.period.start),
        "members_as": layout.members_as,
        "compression": layout.compression,
        "chunk_days": layout.chunk_days,
        "shard_days": layout.shard_days,
        "rounded": _recorded_rounding(layout.rounded),
        **{f"{name}_sha256": _hashed(values) for name, values in cells.items()},
    }


def _recorded_rounding(rounded: Mapping[str, int]) -> list[str] | dict[str, int]:
    """Only names where all keep :data:`KEPT_BITS`, as cubes were recorded when there was no other choice."""
    return list(rounded) if set(rounded.values()) <= {KEPT_BITS} else dict(rounded)


def _rounding_of(recorded: list[str] | Mapping[str, int]) -> dict[str, int]:
    """Inverse of :func:`_recorded_rounding`."""
    return dict(recorded) if isinstance(recorded, Mapping) else dict.fromkeys(recorded, KEPT_BITS)


def _hashed(values: FloatArray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values, "<f8").tobytes()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedArray:
    """One array of a cube.

    Attributes:
        name: its name.
        dims: names of its axes.
        shape: length of each axis.
        dtype: type of its values.
        attributes: CF attributes.
        chunks: cells of a chunk along each axis.
        shards: cells of a shard along each axis; None for an array without.
        values: those of a coordinate, which may go on beyond ``shape``: a later one shows them; None for an
            output, which is written tile by tile.
    """

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
        """Bytes before compression."""
        return prod(self.shape) * self.dtype.itemsize


def planned_arrays(layout: CubeLayout) -> Iterator[PlannedArray]:
    """Every array of a cube, coordinates first."""
    yield from _coordinates(layout)
    space = layout.grid.dims
    kinds = ((layout.daily, ("time", *space)), (layout.static, space), (layout.constants, ()))
    for names, dims in kinds:
        for name in names:
            yield from _outputs(layout, variable(name), dims)
    for name in layout.monthly:
        yield from _outputs(layout, variable(name), ("month", *space), MONTHLY)


def _outputs(
    layout: CubeLayout, quantity: Variable, dims: tuple[str, ...], suffix: str = ""
) -> Iterator[PlannedArray]:
    for name, form in layout.forms_of(quantity.name).items():
        axes = ("member", *dims) if form == "members" else dims
        attributes = _output_attributes(layout, quantity, dims, form)
        yield _output(layout, name + suffix, axes, attributes)


def _output(
    layout: CubeLayout, name: str, dims: tuple[str, ...], attributes: Mapping[str, str]
) -> PlannedArray:
    space = layout.grid.dims
    chunk = {
        "member": 1,
        "month": 1,
        "time": layout.chunk_days,
        **dict(zip(space, layout.chunk, strict=True)),
    }
    # All members share a shard: a tile owns them together, and one object serves them.
    shard = {
        "member": len(layout.members),
        "time": layout.shard_days,
        # one month a shard: none is written again when the next one comes
        "month": 1,
        **dict(zip(space, layout.shard, strict=True)),
    }
    return PlannedArray(
        name=name,
        dims=dims,
        shape=tuple(layout.sizes[d] for d in dims),
        dtype=np.dtype(np.float32),
        attributes=attributes,
        chunks=tuple(chunk[d] for d in dims),
        shards=tuple(shard[d] for d in dims) or None,
    )


def _output_attributes(
    layout: CubeLayout, quantity: Variable, dims: tuple[str, ...], form: Form
) -> dict[str, str]:
    """CF attributes of one array of a variable."""
    attributes = quantity.cf_attributes()
    methods = [_TIME_METHODS.get(quantity.units, "")] if "time" in dims else []
    if "month" in dims:
        methods, attributes["long_name"] = ["month: mean"], f"monthly mean of {attributes['long_name']}"
    comments = []
    if form == "mean" and len(layout.members) > 1:
        methods.append("realization: mean")
        attributes["ancillary_variables"] = quantity.name + SPREAD
    if form == "spread":
        # readers look for the quantity itself by its standard name
        attributes.pop("standard_name", None)
        long_name = attributes["long_name"]
        attributes["long_name"] = f"spread of {long_name} over folds (standard deviation; not an uncertainty)"
        methods.append("realization: standard_deviation")
        comments.append(_SPREAD_COMMENT)
    if (bits := layout.rounded.get(quantity.name)) is not None:
        comments.append(f"Rounded to {bits} bits of the mantissa: relative errors up to 2**-{bits + 1}.")
    if any(methods):
        attributes["cell_methods"] = " ".join(filter(None, methods))
    if comments:
        attributes["comment"] = " ".join(comments)
    if dims:
        attributes["cell_measures"] = "area: cell_area"
    if "cell" in dims:
        attributes["coordinates"] = "lat lon"
    return attributes


def _coordinates(layout: CubeLayout) -> Iterator[PlannedArray]:
    yield from _time(layout.period)
    yield from _months(layout.period) if layout.monthly else ()
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


def _time(period: Period) -> Iterator[PlannedArray]:
    """The first instant of each day, and the bounds [time, 2] of the day; stored up to the horizon."""
    n_stored = -(-period.n_days // HORIZON_DAYS) * HORIZON_DAYS
    days = np.arange(period.first, period.first + n_stored + 1, dtype=np.int64)
    yield from _growing("time", "day", days, period.n_days, HORIZON_DAYS)


def _months(period: Period) -> Iterator[PlannedArray]:
    """The first instant of each whole month, and its bounds [month, 2]; stored up to the horizon."""
    n_months = len(period.months())
    n_stored = max(-(-n_months // HORIZON_MONTHS), 1) * HORIZON_MONTHS
    first = period.start.year * 12 + period.start.month - (period.start.day == 1)
    starts = [date(month // 12, month % 12 + 1, 1) for month in range(first, first + n_stored + 1)]
    days = np.asarray(starts, "datetime64[D]").astype(np.int64)
    yield from _growing("month", "month", days, n_months, HORIZON_MONTHS)


def _growing(name: str, long_name: str, edges: IntArray, length: int, horizon: int) -> Iterator[PlannedArray]:
    """A time axis and its bounds from the edges of its steps, days since 1970-01-01."""
    attributes = {
        "standard_name": "time",
        "long_name": long_name,
        "units": "days since 1970-01-01",
        "calendar": "proleptic_gregorian",
        "bounds": f"{name}_bnds",
        **({"axis": "T"} if name == "time" else {}),
    }
    bounds = np.stack([edges[:-1], edges[1:]], axis=1)
    for array, values, described in ((name, edges[:-1], attributes), (f"{name}_bnds", bounds, {})):
        whole = _coordinate(array, (name, "bnds")[: values.ndim], values, described)
        further = values.shape[1:]
        yield replace(whole, shape=(length, *further), chunks=(horizon, *further))


def _latitude_and_longitude(grid: Grid) -> Iterator[PlannedArray]:
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
) -> PlannedArray:
    """An array of one chunk, written when the cube is created."""
    return PlannedArray(
        name=name,
        dims=dims,
        shape=values.shape,
        dtype=values.dtype,
        attributes=attributes,
        chunks=values.shape,
        values=values,
    )
