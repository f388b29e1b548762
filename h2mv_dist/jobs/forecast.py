"""What filling a cube would take: work, reads, writes, memory and time; nothing is written."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final

import torch
from dask.utils import format_bytes, format_time

from h2mv_dist.config import StorageOptions
from h2mv_dist.grid import Period, Tile
from h2mv_dist.io.cube import monthly_arrays
from h2mv_dist.io.tile_forcing import TileForcing
from h2mv_dist.jobs.cluster import memory_limit
from h2mv_dist.jobs.code_path import compiles_here
from h2mv_dist.jobs.cube_plan import FLOAT_BYTES, CubePlan
from h2mv_dist.jobs.inference import missing_days, require_cube_disk, require_memory
from h2mv_dist.jobs.simulation import kept_outputs
from h2mv_dist.model.base import Batch
from h2mv_dist.model.ensemble import Ensemble

SAMPLE_DAYS: Final = 60
PREPARE_ABOVE: Final = 2.0
"""From this amplification on, rechunking the forcing once is worth its while."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What filling a cube would take.

    Attributes:
        tiles: tiles with days to compute, of all that the grid has.
        land: smallest and largest number of land cells of these tiles.
        cell_days: of all members and passes (spin-up, baseline, output).
        chunks: mean number of chunks of the forcing that a tile and pass reads.
        amplification: bytes of forcing that are read, for each one that tiles have on their missing days.
        excess: the same, but on the days of all passes that read: what chunks that stick out bring along.
        read: bytes of forcing that are read, in whole chunks, before compression.
        written: bytes of the cube that are written, before compression.
        objects: shards that are written.
        memory: of a worker, bytes.
        seconds: on one worker, from a measured sample: the larger of reading and computing.
    """

    tiles: tuple[int, int]
    land: tuple[int, int]
    cell_days: int
    chunks: float
    amplification: float
    excess: float
    read: int
    written: int
    objects: int
    memory: int
    seconds: float

    def lines(self) -> Iterator[str]:
        """The forecast in words."""
        yield f"tiles: {self.tiles[0]} of {self.tiles[1]}, {self.land[0]} to {self.land[1]} land cells each"
        yield f"reads: {format_bytes(self.read)}, {self.chunks:.0f} chunks a tile and pass, "
        yield f"       each byte {self.amplification:.2f} times"
        yield f"writes: {format_bytes(self.written)} before compression, in {self.objects} objects"
        yield f"memory: {format_bytes(self.memory)} a worker"
        yield f"time: about {format_time(self.seconds)} on one worker ({self.cell_days:.2g} cell-days)"
        if self.excess >= PREPARE_ABOVE:
            yield "the forcing's chunks do not suit these tiles and days; h2mv-dist prepare rechunks it once"


def forecast(planned: CubePlan, cube: str, options: StorageOptions) -> Forecast:
    """Count, and measure a sample tile.

    Args:
        planned: the cube.
        cube: its URL; what has a receipt there is not counted.
        options: storage options.

    Raises:
        H2mvError: the forcing cannot be read.
    """
    layout = planned.layout
    missing = missing_days(planned, cube, options)
    mask = layout.grid.mask
    land = {tile: int(mask[tile.slices].sum()) for tile in missing}
    sizes = sorted(land.values()) or [0]
    reads = {tile: _reads(planned, tile, parts) for tile, parts in missing.items()}
    touched = [planned.source.touched(tile, days) for tile, passes in reads.items() for days in passes]
    read = _bytes(sum(each.cells for one in touched for each in one))
    needed = _needed_bytes(planned, missing)
    return Forecast(
        tiles=(len(missing), len(layout.grid.tiles(layout.tile))),
        land=(sizes[0], sizes[-1]),
        cell_days=len(layout.members) * _cell_days(planned, missing, land),
        chunks=_mean([sum(each.n_chunks for each in one) for one in touched]),
        amplification=read / needed if needed else 1.0,
        excess=read / _needed_bytes(planned, reads) if needed else 1.0,
        read=read,
        written=planned.missing_bytes(missing),
        objects=sum(_n_objects(planned, tile, parts) for tile, parts in missing.items()),
        memory=planned.tile_bytes(),
        seconds=_seconds(planned, missing, land, read) if missing else 0.0,
    )


def require_room(planned: CubePlan, cube: str, options: StorageOptions) -> None:
    """Refuse what cannot fit, as far as settings and this machine's disk tell.

    Raises:
        JobError: a tile takes more than ``cluster.memory_limit``.
        StoreError: the cube cannot fit on the disk, or a store fails.
    """
    if (limit := memory_limit(planned.settings.cluster)) is not None:
        require_memory(planned, limit, "cluster.memory_limit")
    require_cube_disk(planned, missing_days(planned, cube, options), cube)


def chunks_of(tile: Tile, chunk: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Indices of the chunks that hold cells of a tile.

    >>> list(chunks_of(Tile((0, 5), (4, 9)), (4, 6)))
    [(0, 0), (0, 1)]
    """
    ranges = (range(a // c, -(-b // c)) for a, b, c in zip(tile.start, tile.stop, chunk, strict=True))
    return product(*ranges)


def _passes(planned: CubePlan, parts: Sequence[Period]) -> list[Period]:
    """Days a tile computes: those that are missing; before a cube's first ones spin-up and baseline."""
    start, passes = planned.layout.period.start, list(parts)
    if any(part.start == start for part in parts):
        passes += [planned.spinup] if planned.spinup else []
        if any(name in planned.layout.daily for name in planned.spec.anomalies):
            passes.append(Period(start, planned.baseline.stop))
    return passes


def _reads(planned: CubePlan, tile: Tile, parts: Sequence[Period]) -> list[Period]:
    """Days a tile reads: as it computes them, but once where they stay in memory."""
    passes = _passes(planned, parts)
    if not TileForcing(planned.source, tile, planned.layout.period, planned.layout.shard_days).keeps:
        return passes
    longest = {days.start: days for days in sorted(passes, key=lambda days: days.n_days)}
    return list(longest.values())


def _cell_days(planned: CubePlan, missing: Mapping[Tile, Sequence[Period]], land: Mapping[Tile, int]) -> int:
    """Of one member, all passes."""
    return sum(land[tile] * _n_days(_passes(planned, parts)) for tile, parts in missing.items())


def _needed_bytes(planned: CubePlan, days: Mapping[Tile, Sequence[Period]]) -> int:
    """Forcing of these tiles, over these days of theirs."""
    cell_days = sum(math.prod(tile.shape) * _n_days(periods) for tile, periods in days.items())
    return _bytes(cell_days * len(planned.source.forcing))


def _bytes(values: int) -> int:
    return values * FLOAT_BYTES


def _n_days(periods: Iterable[Period]) -> int:
    return sum(period.n_days for period in periods)


def _n_objects(planned: CubePlan, tile: Tile, parts: Sequence[Period]) -> int:
    layout = planned.layout
    shards = sum(
        bool(layout.grid.mask[box].any())
        for box in (
            tuple(slice(i * s, (i + 1) * s) for i, s in zip(index, layout.shard, strict=True))
            for index in chunks_of(tile, layout.shard)
        )
    )
    blocks = sum(-(-part.n_days // layout.shard_days) for part in parts)
    months = sum(part.start < month.stop <= part.stop for part in parts for month in layout.period.months())
    daily = sum(len(layout.arrays_of(name)) for name in layout.daily)
    static = sum(len(layout.arrays_of(name)) for name in layout.static)
    first = any(part.start == layout.period.start for part in parts)
    return shards * (daily * blocks + len(list(monthly_arrays(layout))) * months + static * first)


def _seconds(
    planned: CubePlan, missing: Mapping[Tile, Sequence[Period]], land: Mapping[Tile, int], read: int
) -> float:
    """From a tile of middle size: one part of its forcing is read, and some of its days are computed."""
    tile = sorted(missing, key=lambda tile: land[tile])[len(missing) // 2]
    source, layout = planned.source, planned.layout
    part = next(iter(source.time_blocks(layout.period, layout.shard_days)))
    started = time.perf_counter()
    forcing = source.read_land_forcing(tile, part)[:, :SAMPLE_DAYS]
    sample = _bytes(sum(each.cells for each in source.touched(tile, part)))
    reading = (time.perf_counter() - started) / sample
    static = torch.from_numpy(source.read_static(tile)[layout.grid.mask[tile.slices]])
    built = [checkpoint.build_model() for checkpoint in planned.checkpoints]
    members = Ensemble(built, torch.device("cpu"), compiled=compiles_here(planned.code_path))
    kept = kept_outputs(planned.spec, layout.daily)
    members.warm_up(kept)
    state, batch = members.initial_state(land[tile]), Batch(torch.from_numpy(forcing), static, {})
    members.run(batch.days(0, 1), state, lambda _member, _result: None, kept)
    started = time.perf_counter()
    members.run(batch, state, lambda _member, _result: None, kept)
    computing = (time.perf_counter() - started) / forcing[..., 0].size
    return max(computing * _cell_days(planned, missing, land), reading * read)


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values) if values else 0.0
