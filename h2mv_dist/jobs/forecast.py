"""What filling a cube would take: work, reads, writes, memory and time; nothing is written."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final

import torch
from dask.utils import format_bytes, format_time

from h2mv_dist.config import StorageOptions
from h2mv_dist.grid import Period, Tile
from h2mv_dist.io.tile_forcing import TileForcing
from h2mv_dist.jobs.code_path import compiles_here
from h2mv_dist.jobs.cube_plan import FLOAT_BYTES, CubePlan
from h2mv_dist.jobs.inference import missing_days, require_cube_disk, require_memory
from h2mv_dist.jobs.room import memory_limit
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
        amplification: how often each byte of the forcing is read, passes that keep it in memory counted once.
        read: bytes of forcing that are read, before compression.
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
        if self.amplification >= PREPARE_ABOVE:
            yield "the forcing's chunks do not suit these tiles; h2mv-dist prepare rechunks it once"


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
    amplification = read_amplification(planned, missing)
    return Forecast(
        tiles=(len(missing), len(layout.grid.tiles(layout.tile))),
        land=(sizes[0], sizes[-1]),
        cell_days=len(layout.members) * sum(land[t] * _days(planned, parts) for t, parts in missing.items()),
        chunks=_mean([_n_chunks(planned, tile, parts) for tile, parts in missing.items()]),
        amplification=amplification,
        read=round(amplification * _needed_bytes(planned, missing)),
        written=planned.missing_bytes(missing),
        objects=sum(_n_objects(planned, tile, parts) for tile, parts in missing.items()),
        memory=planned.tile_bytes(),
        seconds=_seconds(planned, missing, land) if missing else 0.0,
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


def read_amplification(planned: CubePlan, tiles: Mapping[Tile, Sequence[Period]]) -> float:
    """Chunks that are read, over chunks that are needed; 1 where each is read once."""
    chunk = planned.source.chunk_shape
    read = sum(
        len(list(chunks_of(tile, chunk))) * _passes(planned, tile, parts) for tile, parts in tiles.items()
    )
    needed = {index for tile in tiles for index in chunks_of(tile, chunk)}
    return read / len(needed) if needed else 1.0


def _passes(planned: CubePlan, tile: Tile, parts: Sequence[Period]) -> float:
    """How often a tile reads its days of forcing."""
    wanted = sum(part.n_days for part in parts)
    forcing = TileForcing(planned.source, tile, planned.layout.period, planned.layout.shard_days)
    return 1.0 if forcing.keeps else _days(planned, parts) / wanted


def _days(planned: CubePlan, parts: Sequence[Period]) -> int:
    """Days a tile computes: those that are missing, and before a cube's first ones spin-up and baseline."""
    start = planned.layout.period.start
    days = sum(part.n_days for part in parts)
    if any(part.start == start for part in parts):
        days += planned.spinup.n_days if planned.spinup else 0
        if any(name in planned.layout.daily for name in planned.spec.anomalies):
            days += (planned.baseline.stop - start).days
    return days


def _needed_bytes(planned: CubePlan, tiles: Mapping[Tile, Sequence[Period]]) -> int:
    """Forcing in the chunks that hold the tiles, over the missing days."""
    chunk = planned.source.chunk_shape
    days: dict[tuple[int, ...], int] = {}
    for tile, parts in tiles.items():
        for index in chunks_of(tile, chunk):
            days[index] = max(days.get(index, 0), sum(part.n_days for part in parts))
    return sum(days.values()) * math.prod(chunk) * len(planned.source.forcing) * FLOAT_BYTES


def _n_chunks(planned: CubePlan, tile: Tile, parts: Sequence[Period]) -> int:
    """Chunks of all forcing variables over the missing days."""
    n_days = sum(part.n_days for part in parts)
    spatial = len(list(chunks_of(tile, planned.source.chunk_shape)))
    return sum(spatial * -(-n_days // handle.chunks[0]) for handle in planned.source.arrays.forcing)


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
    daily = sum(len(layout.arrays_of(name)) for name in layout.daily)
    static = sum(len(layout.arrays_of(name)) for name in layout.static)
    first = any(part.start == layout.period.start for part in parts)
    return shards * (daily * blocks + static * first)


def _seconds(planned: CubePlan, missing: Mapping[Tile, Sequence[Period]], land: Mapping[Tile, int]) -> float:
    """From a tile of middle size: one part of its forcing is read, and some of its days are computed."""
    tile = sorted(missing, key=lambda tile: land[tile])[len(missing) // 2]
    source, layout = planned.source, planned.layout
    part = next(iter(source.time_blocks(layout.period, layout.shard_days)))
    started = time.perf_counter()
    forcing = source.read_land_forcing(tile, part)[:, :SAMPLE_DAYS]
    reading = (time.perf_counter() - started) / (land[tile] * part.n_days)
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
    computed = sum(land[tile] * _days(planned, parts) for tile, parts in missing.items())
    read = sum(
        land[tile] * _passes(planned, tile, parts) * sum(part.n_days for part in parts)
        for tile, parts in missing.items()
    )
    return max(computing * computed, reading * read)


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values) if values else 0.0
