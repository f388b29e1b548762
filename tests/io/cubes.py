"""Cubes to try things on: where they are, what they hold, and how they are written whole."""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from h2mv_dist.grid import Grid, Period, Tile
from h2mv_dist.io.cube import FINGERPRINT, CubeLayout, Progress
from h2mv_dist.io.cube_store import create_cube, publish
from h2mv_dist.io.ledger import Ledger, Receipt
from h2mv_dist.io.sink import Sink
from h2mv_dist.io.stores import content_fingerprint, get_object, join, list_objects
from h2mv_dist.spec import Float32Array
from tests.conftest import Place

DAILY = ("runoff", "snow_water_equivalent", "terrestrial_water_storage_anomaly")
STATIC = ("soil_moisture_capacity",)
CONSTANTS = ("baseflow_recession",)
PERIOD = Period(date(2000, 2, 27), date(2000, 3, 8))


@dataclass(frozen=True)
class CubePlace(Place):
    """Where a cube is tried."""

    def open(self) -> xr.Dataset:
        cube: xr.Dataset = xr.open_zarr(self.url, storage_options=dict(self.options.get("s3", {})) or None)
        return cube

    def hashes(self) -> dict[str, str]:
        names = list_objects(self.url, self.options)
        return {
            name: hashlib.sha256(get_object(join(self.url, name), self.options)).hexdigest() for name in names
        }

    def versions(self) -> str:
        """Changes when any object is written again, even with the same bytes."""
        return content_fingerprint(self.url, self.options, ("",))


@dataclass(frozen=True)
class Case:
    """A layout and where it is tried."""

    new_place: Callable[[], CubePlace]
    layout: CubeLayout


def map_grid() -> Grid:
    """7 x 11 cells from the pole southwards, ragged in both directions; the north-western tile is all sea."""
    mask = np.random.default_rng(1).random((7, 11)) < 0.6
    mask[:4, :4] = False
    return Grid.lat_lon(np.linspace(90.0, 84.0, 7), np.arange(0.5, 11), mask)


def basin_grid() -> Grid:
    mask = np.array([True, True, False, True, True])
    lat, lon = np.array([50.0, -3.0, 7.5, 60.0, 1.0]), np.array([8.0, 120.0, -60.0, 25.0, 3.0])
    return Grid(("cell",), lat, lon, mask, np.linspace(1e8, 5e9, 5))


def map_layout(**changes: Any) -> CubeLayout:
    layout = CubeLayout(
        grid=map_grid(),
        period=PERIOD,
        daily=DAILY,
        static=STATIC,
        constants=CONSTANTS,
        members=(0, 3, 7),
        members_as="spread",
        chunk=(2, 2),
        shard=(4, 4),
        chunk_days=2,
        shard_days=4,
        tile=(4, 8),
        attributes={FINGERPRINT: "abc", "h2mv_dist_model": "h2mv"},
    )
    return replace(layout, **changes)


def basin_layout(**changes: Any) -> CubeLayout:
    return map_layout(grid=basin_grid(), chunk=(1,), shard=(2,), tile=(4,), **changes)


LAYOUTS = {
    "spread": map_layout(),
    "both": map_layout(members_as="both", rounded={"runoff": 12}, compression="blosc"),
    "members": map_layout(members_as="all", rounded={"runoff": 7, STATIC[0]: 12}),
    "one member": map_layout(members=(5,)),
    "one shard": map_layout(chunk=(10, 10), shard=(20, 20), tile=(20, 20), chunk_days=30, shard_days=30),
    "basins": basin_layout(),
    "basin members": basin_layout(members_as="all"),
}


def truth(layout: CubeLayout) -> dict[str, Float32Array]:
    """What every member says everywhere: [member, (time,) *space], NaN over sea."""
    generator = np.random.default_rng(7)
    shape, members, days = layout.grid.shape, len(layout.members), layout.period.n_days
    shapes: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(layout.daily, (members, days, *shape)),
        **dict.fromkeys(layout.static, (members, *shape)),
        **dict.fromkeys(layout.constants, (members,)),
    }
    values = {
        name: generator.normal(1e3, 50, shape).astype(np.float32) for name, shape in sorted(shapes.items())
    }
    for name in (*layout.daily, *layout.static):
        values[name][..., ~layout.grid.mask] = np.nan
    return values


def packed(layout: CubeLayout, name: str, tile: Tile, days: slice | None = None) -> Float32Array:
    """The tile's land cells of one variable."""
    values = truth(layout)[name]
    part = values[(slice(None), *([days] if days else []), *tile.slices)]
    return part[..., layout.grid.mask[tile.slices]]


def block(layout: CubeLayout, tile: Tile, period: Period) -> dict[str, Float32Array]:
    first = period.first - layout.period.first
    return {name: packed(layout, name, tile, slice(first, first + period.n_days)) for name in layout.daily}


def fill(place: CubePlace, layout: CubeLayout, *, backwards: bool = False) -> dict[str, str]:
    """Create and write a whole cube, tiles at the same time; checksum of every unit."""
    create_cube(place.url, layout, place.options, overwrite=False)
    sink = Sink.open(place.url, layout, place.options)
    units: dict[str, Callable[[], str]] = {}
    for tile in layout.grid.land_tiles(layout.tile):
        static = {name: packed(layout, name, tile) for name in layout.static}
        units[tile.name] = partial(sink.write_static, tile, static)
        for period in layout.period.blocks(layout.shard_days):
            values = block(layout, tile, period)
            units[f"{tile.name} {period}"] = partial(sink.write, tile, period, values)
    names = list(units)[:: -1 if backwards else 1]
    with ThreadPoolExecutor(3) as pool:
        checksums = dict(zip(names, pool.map(lambda name: units[name](), names), strict=True))
    constants = {name: truth(layout)[name] for name in layout.constants}
    checksums["constants"] = sink.write_constants(constants)
    progress = Progress(layout.period, True, (), checksums["constants"] if layout.constants else "")
    publish(place.url, layout, progress, place.options)
    return checksums


def fill_with_receipts(place: CubePlace, layout: CubeLayout) -> None:
    """A whole cube, with one receipt a tile."""
    checksums = fill(place, layout)
    for tile in layout.tiles:
        blocks = [f"{tile.name} {period}" for period in layout.period.blocks(layout.shard_days)]
        written = receipt(
            layout.fingerprint, static=checksums[tile.name], blocks=tuple(checksums[n] for n in blocks)
        )
        Ledger(place.url, place.options).record(tile.name, layout.period, written)


def receipt(fingerprint: str = "abc", static: str = "s", blocks: tuple[str, ...] = ("b",)) -> Receipt:
    return Receipt(
        fingerprint=fingerprint,
        static=static,
        blocks=blocks,
        months=(),
        forcing="f",
        missing=0,
        residual=1e-5,
        seconds=1.25,
    )
