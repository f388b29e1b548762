"""Some cells without a cluster: checkpoints and data in, an xarray Dataset out."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
import xarray as xr

from h2mv_dist.config import DataSettings, StorageOptions, validate
from h2mv_dist.errors import CheckpointError, ConfigError, describe
from h2mv_dist.grid import EARTH_RADIUS_M, UNKNOWN_AREA, FloatArray, Grid, Period, Tile
from h2mv_dist.io.source import Source, open_source
from h2mv_dist.io.stores import get_object
from h2mv_dist.jobs.cluster import known_options
from h2mv_dist.jobs.cube_plan import spinup_of
from h2mv_dist.jobs.records import JobFolder
from h2mv_dist.jobs.simulation import Days, TileSimulation, Values, constants_of
from h2mv_dist.model.checkpoint import Checkpoint
from h2mv_dist.model.ensemble import Ensemble
from h2mv_dist.model.registry import model_kind
from h2mv_dist.spec import Float32Array, ModelSpec
from h2mv_dist.variables import by_name_or_group, variable

BLOCK_DAYS = 360
_LONE_CELL: Final = 1.0
"""How large a cell is taken to be, degrees, where neither an area nor another cell says it."""


def run(
    checkpoint: str | Sequence[str],
    data: str | Mapping[str, Any],
    *,
    box: tuple[float, float, float, float] | None = None,
    cells: Sequence[tuple[float, float]] | None = None,
    period: str | None = None,
    baseline: str | None = None,
    spinup_days: int | None = None,
    outputs: Sequence[str] | None = None,
    storage_options: Mapping[str, Mapping[str, object]] | None = None,
) -> xr.Dataset:
    """Run trained models over a box or some cells, in this process; the same code as a cube's tile.

    Args:
        checkpoint: path or URL of a training job, whose best models of all folds are run, or of one fold's
            checkpoint (``*.safetensors``), or several of them.
        data: path or URL of a data set in the published layout, or what a settings file says in ``[data]``.
        box: (south, north, west, east), degrees as the data have them: cells whose centres lie inside.
        cells: (latitude, longitude) of each cell, degrees: the cells with the nearest centres, which are not
            further away than a cell is large, or where the data say no areas, than its next neighbour.
        period: days, as ``2001-01-01..2003-01-01`` without its end; all days of the forcing if left out.
        baseline: days whose mean anomalies refer to; the whole period if left out.
        spinup_days: days run first to fill the stores; the whole period if left out.
        outputs: names of variables, or of groups of them; all of the model's if left out.
        storage_options: of the stores, by protocol, as in a settings file.

    Returns:
        Outputs with CF attributes, [member, time, lat, lon] for a box and [member, time, cell] for cells, NaN
        over sea; without the member axis for a single checkpoint.

    Raises:
        ConfigError: neither or both of ``box`` and ``cells``, no cell inside, or a wrong setting.
        CheckpointError: a checkpoint cannot be used, or the checkpoints are of different models.
        DataError: the data lack something.
        StoreError: a store cannot be read.
    """
    options = known_options(StorageOptions(storage_options or {}))
    settings = validate({"data": {"url": data} if isinstance(data, str) else dict(data)}, where="data")
    members = _members([checkpoint] if isinstance(checkpoint, str) else list(checkpoint), options)
    spec = model_kind(members[0].model.name).spec
    source = _source(settings.data, spec, members, options)
    chosen = _outputs(outputs, spec)
    days = _days(source.period, period, baseline, spinup_days)
    tiles = _tiles(source.grid, box, cells)
    ensemble = Ensemble([member.build_model() for member in members], torch.device("cpu"))
    parts = [_run_tile(source, spec, ensemble, tile, days, chosen) for tile in tiles]
    whole = parts[0] if cells is None else _as_cells(parts, source.grid.dims)
    constants = [name for name in spec.constants if name in chosen]
    for name, values in constants_of(ensemble, source, constants).items():
        whole[name] = ("member", values, variable(name).cf_attributes())
    whole = whole.assign_coords(
        member=("member", [m.fold for m in members], {"long_name": "fold of the model"})
    )
    return whole if len(members) > 1 else whole.isel(member=0)


def _members(urls: Sequence[str], options: StorageOptions) -> list[Checkpoint]:
    members = [member for url in urls for member in _read(url, options)]
    if len({(m.model.model_dump_json(), m.static_names) for m in members}) != 1:
        raise CheckpointError(
            describe(
                "the checkpoints cannot be run together",
                where=", ".join(urls) or "checkpoint",
                expected="at least one, all of the same model, sizes and static features",
                actual="; ".join(f"{m.model} with {', '.join(m.static_names)}" for m in members) or "none",
                fix="run them one by one",
            )
        )
    return members


def _read(url: str, options: StorageOptions) -> list[Checkpoint]:
    if url.endswith(".safetensors"):
        return [Checkpoint.from_bytes(get_object(url, options), url)]
    job = JobFolder(url, options)
    return [job.fold(fold).read_checkpoint("best") for fold in job.trained_folds()]


def _source(
    data: DataSettings, spec: ModelSpec, members: Sequence[Checkpoint], options: StorageOptions
) -> Source:
    source = open_source(data, forcing=spec.forcing, targets=(), options=options)
    source.tell_uneven_days()
    if source.static != members[0].static_names:
        raise CheckpointError(
            describe(
                "the data set has other static features than the model was trained on",
                where=data.url,
                expected=", ".join(members[0].static_names),
                actual=", ".join(source.static),
                fix="list the same features in the same order in static",
            )
        )
    return source


def _outputs(names: Sequence[str] | None, spec: ModelSpec) -> tuple[str, ...]:
    return spec.outputs if names is None else by_name_or_group(names, spec.outputs, "outputs")


def _days(available: Period, period: str | None, baseline: str | None, spinup_days: int | None) -> Days:
    chosen = available if period is None else Period.parse(period)
    reference = chosen if baseline is None else Period.parse(baseline)
    for what, inner, outer in (("period", chosen, available), ("baseline", reference, chosen)):
        if not outer.contains(inner):
            raise ConfigError(f"{what} {inner} is not part of {outer}, the days there are")
    spinup = spinup_of(chosen, spinup_days, available, "spinup_days")
    return Days(period=chosen, block=BLOCK_DAYS, baseline=reference, spinup=spinup)


def _tiles(
    grid: Grid,
    box: tuple[float, float, float, float] | None,
    cells: Sequence[tuple[float, float]] | None,
) -> list[Tile]:
    """One tile for a box, one for each of some cells."""
    if (box is None) == (cells is None):
        raise ConfigError("run needs either box=(south, north, west, east) or cells=[(lat, lon), ...]")
    if cells is not None:
        return [_land_cell(grid, lat, lon) for lat, lon in cells]
    assert box is not None, "one of both is given"
    return [_box_tile(grid, box)]


def _box_tile(grid: Grid, box: tuple[float, float, float, float]) -> Tile:
    if grid.dims != ("lat", "lon"):
        raise ConfigError("box needs a grid of lat and lon, and these are single cells: choose cells instead")
    south, north, west, east = box
    rows = np.flatnonzero((grid.lat >= south) & (grid.lat <= north))
    columns = np.flatnonzero((grid.lon >= west) & (grid.lon <= east))
    if not grid.mask[np.ix_(rows, columns)].any():
        raise ConfigError(
            describe(
                "no land cell lies in the box",
                where=f"box={box}",
                expected=f"latitudes in {grid.lat.min():g}..{grid.lat.max():g}, longitudes in "
                f"{grid.lon.min():g}..{grid.lon.max():g}, and some land",
                actual="no centre of a land cell",
                fix="check the order (south, north, west, east) and the longitudes' convention",
            )
        )
    return Tile((int(rows[0]), int(columns[0])), (int(rows[-1]) + 1, int(columns[-1]) + 1))


def _land_cell(grid: Grid, lat: float, lon: float) -> Tile:
    """The cell with the nearest centre; it must be land, and not further away than a cell is large."""
    distance = _degrees_between(grid, lat, lon)
    nearest_one = int(np.argmin(distance))
    reach = _size(grid, nearest_one)
    if distance[nearest_one] > reach:
        raise ConfigError(
            describe(
                "no land cell is there",
                where=f"lat {lat:g}, lon {lon:g}",
                expected="a place on land, inside the grid",
                actual=f"the nearest centre of a land cell is {distance[nearest_one]:.2g} degrees away",
                fix="choose another place",
            )
        )
    index = np.unravel_index(grid.land_index()[nearest_one], grid.shape)
    return Tile(tuple(int(i) for i in index), tuple(int(i) + 1 for i in index))


def _degrees_between(grid: Grid, lat: float, lon: float) -> FloatArray:
    """Distance of every land cell's centre from a place, [cell]."""
    lats, lons = grid.cell_coordinates()
    around = (lons - lon + 180) % 360 - 180
    return np.asarray(np.hypot(lats - lat, around * np.cos(np.deg2rad(lat))))


def _size(grid: Grid, land_cell: int) -> float:
    """How large a land cell is, degrees: from its area, or where the data say none, how far the next is."""
    if (grid.area != UNKNOWN_AREA).any():
        return float(np.rad2deg(np.sqrt(grid.area[grid.mask][land_cell]) / EARTH_RADIUS_M))
    lats, lons = grid.cell_coordinates()
    others = _degrees_between(grid, lats[land_cell], lons[land_cell])
    return float(others[others > 0].min()) if others.any() else _LONE_CELL


def _run_tile(
    source: Source, spec: ModelSpec, ensemble: Ensemble, tile: Tile, days: Days, outputs: Sequence[str]
) -> xr.Dataset:
    simulation = TileSimulation(source, spec, ensemble, tile, days, outputs)
    carried, found = simulation.start(), list[Values]()
    for block, batch in simulation.blocks(days.period):
        carried, values = simulation.step(block, batch, carried)
        found.append(values)
    land = source.grid.mask[tile.slices]
    variables = {}
    for name, axes, packed in _joined(found):
        full = np.full((*packed.shape[:-1], *land.shape), np.nan, np.float32)
        full[..., land] = packed
        variables[name] = ((*axes, *source.grid.dims), full, variable(name).cf_attributes())
    return xr.Dataset(variables, _coordinates(source.grid, tile, days.period), {"Conventions": "CF-1.11"})


def _as_cells(parts: Sequence[xr.Dataset], space: tuple[str, ...]) -> xr.Dataset:
    """Tiles of one cell each, side by side."""
    single = [part.isel(dict.fromkeys(space, 0)) for part in parts]
    return xr.concat(single, "cell").transpose(..., "cell")


def _joined(found: Sequence[Values]) -> Iterator[tuple[str, tuple[str, ...], Float32Array]]:
    for name in found[0].daily:
        yield name, ("member", "time"), np.concatenate([values.daily[name] for values in found], axis=1)
    for name, once in found[0].static.items():
        yield name, ("member",), once


def _coordinates(grid: Grid, tile: Tile, period: Period) -> dict[str, Any]:
    time = ("time", period.days().astype("datetime64[D]").astype("datetime64[ns]"))
    lat, lon = grid.lat[tile.slices[0]], grid.lon[tile.slices[-1]]
    return {"time": time, "lat": (grid.dims[0], lat), "lon": (grid.dims[-1], lon)}
