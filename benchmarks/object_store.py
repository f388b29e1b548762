"""Global inference from an object store into an object store, against its two parts, each alone.

A made-up world lies in SeaweedFS on loopback; members fill a cube there, through the real job, on two workers
that have imported and compiled everything. The same workers then do the two parts of it:

- compute alone: the same tiles and blocks, forcing in memory, nothing written, every tile on a free worker;
- raw reading and writing: for each tile its chunks of the forcing are read with plain zarr while the same
  values are written, by some threads, to arrays with the same chunks, shards and codecs, through zarr's own
  pipeline, which takes more processor time than :mod:`h2mv_dist.io.shards`: no lower bound.

The server counts requests and bytes itself, so counting costs nothing.
"""

import re
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
import xarray as xr
import zarr
from dask.utils import format_bytes
from distributed import Client
from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import FsspecStore, WrapperStore

from benchmarks.members import write_members
from h2mv_dist.config import ClusterSettings, Settings, StorageOptions, to_json, validate
from h2mv_dist.grid import Tile
from h2mv_dist.io.cube_store import create_cube
from h2mv_dist.io.sink import ARRAYS_AT_ONCE
from h2mv_dist.io.source import Source, open_source
from h2mv_dist.io.stores import join, list_objects, open_store
from h2mv_dist.jobs.cluster import connect, workers_of
from h2mv_dist.jobs.code_path import compiles_here
from h2mv_dist.jobs.cube_plan import CubePlan, plan_inference
from h2mv_dist.jobs.inference import in_good_order, start_inference, submit_inference
from h2mv_dist.jobs.simulation import Days, TileSimulation, kept_outputs
from h2mv_dist.jobs.worlds import make_world
from h2mv_dist.model.ensemble import Ensemble
from h2mv_dist.model.h2mv import SPEC
from h2mv_dist.model.truth import true_model
from tests.seaweed import S3Server, running_server

WORKERS: Final = 2
TILE: Final = 36
"""Cells along each edge: six chunks of the published layout, and a divisor of the globe's degrees."""
SHARD_DAYS: Final = 366
"""A year in a shard: few members make few bytes, and small objects cost as many requests as large ones."""
SERVER_MEMORY: Final = "1GiB"
_COUNTED: Final = re.compile(r'SeaweedFS_s3_(\w+)\{bucket="([^"]+)"[^}]*\} (\S+)')


class Traffic(NamedTuple):
    """What a server has done for one bucket."""

    requests: int
    sent: int
    received: int

    def since(self, before: "Traffic") -> "Traffic":
        """What came after ``before``."""
        return Traffic(*(now - then for now, then in zip(self, before, strict=True)))


@dataclass(frozen=True)
class Work:
    """What every process needs to open the same cube; small, and sent to the workers."""

    settings: dict[str, Any]
    job: str
    cube: str
    raw: str
    options: dict[str, Any]

    def plan(self) -> CubePlan:
        """As the job planned it."""
        settings = validate(self.settings, where="benchmark")
        return plan_inference(settings, self.job, StorageOptions(self.options))


class Case(NamedTuple):
    """What is measured: a world of so many degrees and years, and a cube of it."""

    resolution: float = 1.0
    years: int = 1
    members: int = 2
    tile: int = TILE
    compression: str = "zstd"
    outputs: tuple[str, ...] | None = None


def main(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder), SERVER_MEMORY) as server:
        measure(server, case)


def measure(server: S3Server, case: Case) -> None:
    data, output = server.new_bucket(), server.new_bucket()
    world = f"{data}/world.zarr"
    made = make_world(world, resolution=case.resolution, years=case.years, seed=0, options=server.options)
    settings, job, cube = _settings(world, case), f"{output}/job", f"{output}/cube.zarr"
    _write_members(case.members, settings, job, server.options)
    work = Work(to_json(settings), job, cube, f"{output}/raw.zarr", server.options.reveal())
    planned = work.plan()
    print(f"{made.n_land} land cells, {made.period.n_days} days, {case.members} members, ", end="")
    print(f"{len(case.outputs) if case.outputs else 'all'} outputs, ", end="")
    print(
        f"{len(planned.layout.tiles)} tiles of {case.tile} x {case.tile} cells, {WORKERS} workers\n",
        flush=True,
    )
    with connect(ClusterSettings(kind="local", workers=WORKERS, memory_limit="0")) as client:
        client.run(_warm_up, work)
        before = _traffic(server, data), _traffic(server, output)
        with _timed() as whole:
            handle = start_inference(client, planned, job, cube, server.options)
            assert handle is not None, "the bucket is new"
            handle.wait()
        reads, writes = (_traffic(server, b).since(t) for b, t in zip((data, output), before, strict=True))
        with _timed() as again:
            rerun = submit_inference(client, settings, job, cube, server.options)
        order = in_good_order(planned, dict.fromkeys(planned.layout.tiles, ()))
        alone = _compute_alone(client, work, order)
        create_cube(work.raw, planned.layout, server.options, overwrite=False)
        raw = _raw(client, work, order)
    limit, needed = max(alone, raw), _needed_bytes(planned.source, world, server.options)
    print("| what | seconds |\n|---|---|")
    print(f"| end to end | {whole.seconds:.1f} |\n| (a) compute alone | {alone:.1f} |")
    print(f"| (b) raw reading and writing | {raw:.1f} |\n")
    print(f"end to end / max(a, b): {whole.seconds / limit:.2f} (target: at most 1.25)")
    print(f"end to end / (a + b): {whole.seconds / (alone + raw):.2f} (1: as one after the other)")
    print(f"read amplification: {reads.sent / needed:.3f} (target: at most 1.05), ", end="")
    print(f"{format_bytes(reads.sent)} served of {format_bytes(needed)} in the chunks that hold the cells")
    print(f"requests: {reads.requests} to the forcing, {writes.requests} to the cube and its job; ", end="")
    print(f"{format_bytes(writes.received)} written")
    print(f"a rerun finds {'nothing to do' if rerun is None else 'SOMETHING TO DO'} in {again.seconds:.1f} s")
    print(_read_by_others(cube, server, planned))


class _Clock:
    seconds = 0.0


@contextmanager
def _timed() -> Iterator[_Clock]:
    clock, started = _Clock(), time.perf_counter()
    yield clock
    clock.seconds = time.perf_counter() - started


def _settings(world: str, case: Case) -> Settings:
    box = [case.tile, case.tile]
    inference: dict[str, Any] = {"tile": box, "shard": box, "chunk": [case.tile // 2] * 2}
    inference |= {"shard_days": SHARD_DAYS, "chunk_days": SHARD_DAYS // 3, "compression": case.compression}
    inference |= {"outputs": case.outputs} if case.outputs else {}
    return validate({"data": {"url": world}, "inference": inference}, where="benchmark")


def _write_members(count: int, settings: Settings, job: str, options: StorageOptions) -> None:
    """The world's hidden model, and the same with other weights here and there."""
    source = open_source(settings.data, forcing=SPEC.forcing, targets=(), options=options)
    scaler = source.published_scaler()
    models = [true_model(scaler, source.static) for _ in range(count)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in (w for model in models[1:] for w in model.lstm_fc.parameters()):
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator))
    write_members(job, settings, models, source.static, options)


def _warm_up(work: Work) -> None:
    """Import and compile what a tile needs, as on a worker that has been there for a while."""
    import h2mv_dist.io.s3
    import h2mv_dist.jobs.tiles  # noqa: F401
    from h2mv_dist.jobs.memory import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(1)
    _ensemble(work.plan())


def _ensemble(planned: CubePlan) -> Ensemble:
    compiled, members = compiles_here(planned.code_path), [c.build_model() for c in planned.checkpoints]
    ensemble = Ensemble(members, torch.device("cpu"), compiled=compiled)
    ensemble.warm_up(kept_outputs(planned.spec, planned.layout.daily))
    return ensemble


# -------------------- (a) compute alone


_simulations: dict[str, TileSimulation] = {}
"""On a worker: tiles with their forcing in memory."""


def _compute_alone(client: Client, work: Work, order: Sequence[Tile]) -> float:
    """Seconds for all tiles; each worker has read those it computes before."""
    shares = _shares(client, order)
    _on_workers(client, {worker: (_hold, work, tiles) for worker, tiles in shares.items()})
    with _timed() as clock:
        _on_workers(client, {worker: (_compute, work, tiles) for worker, tiles in shares.items()})
    return clock.seconds


def _hold(work: Work, tiles: Sequence[Tile]) -> None:
    planned = work.plan()
    layout = planned.layout
    days = Days(
        period=layout.period, block=layout.shard_days, baseline=planned.baseline, spinup=planned.spinup
    )
    ensemble = _ensemble(planned)
    names = (*layout.daily, *layout.static)
    for tile in tiles:
        simulation = TileSimulation(planned.source, planned.spec, ensemble, tile, days, names)
        for _ in simulation.blocks(layout.period):
            pass
        assert simulation.forcing is not None
        assert simulation.forcing.keeps, "all passes must find the forcing in memory: take fewer years"
        _simulations[tile.name] = simulation


def _compute(work: Work, tiles: Sequence[Tile]) -> None:
    torch.set_num_threads(1)
    for tile in tiles:
        simulation = _simulations.pop(tile.name)
        carried = simulation.start()
        for block, batch in simulation.blocks(simulation.days.period):
            carried, _ = simulation.step(block, batch, carried)


# -------------------- (b) raw reading and writing


def _raw(client: Client, work: Work, order: Sequence[Tile]) -> float:
    """Seconds for all tiles, some at a time: their values are fetched first, which does not count."""
    seconds, rounds = 0.0, zip(*_shares(client, order).items(), strict=True)
    workers, shares = rounds
    for number in range(max(map(len, shares))):
        now = {w: tiles[number] for w, tiles in zip(workers, shares, strict=True) if number < len(tiles)}
        _on_workers(client, {worker: (_fetch, work, tile) for worker, tile in now.items()})
        with _timed() as clock:
            _on_workers(client, {worker: (_read_and_write, work, tile) for worker, tile in now.items()})
        seconds += clock.seconds
    return seconds


class _Raw(NamedTuple):
    inputs: list[Any]
    outputs: dict[str, Any]


_raw_arrays: dict[str, _Raw] = {}
_values: dict[str, Any] = {}
"""On a worker: the values of its next tile, by array."""


def _fetch(work: Work, tile: Tile) -> None:
    options = StorageOptions(work.options)
    if work.raw not in _raw_arrays:
        _raw_arrays[work.raw] = _opened(work, options)
    found = zarr.open_group(open_store(work.cube, options, read_only=True), mode="r")
    _values.clear()
    for name in _raw_arrays[work.raw].outputs:
        _values[name] = np.asarray(found[name][(slice(None), *tile.slices)])  # type: ignore[index]


def _opened(work: Work, options: StorageOptions) -> _Raw:
    planned = work.plan()
    handles, layout = planned.source.arrays.forcing, planned.layout
    source = open_store(handles[0].url, options, read_only=True)
    target = WithoutReadBack(open_store(work.raw, options, read_only=False))
    names = [array for name in layout.daily for array in layout.arrays_of(name)]
    return _Raw(
        [zarr.open_array(source, path=f"{handle.paths[0]}/data", mode="r") for handle in handles],
        {name: zarr.open_array(target, path=name, mode="r+") for name in names},
    )


def _read_and_write(work: Work, tile: Tile) -> None:
    raw, shard_days = _raw_arrays[work.raw], work.settings["inference"]["shard_days"]
    with ThreadPoolExecutor(len(raw.inputs)) as readers, ThreadPoolExecutor(ARRAYS_AT_ONCE) as writers:
        reading = [readers.submit(_get, array, tile) for array in raw.inputs]
        writing = [
            writers.submit(_put, array, first, shard_days, tile, _values[name])
            for first in range(0, len(next(iter(_values.values()))), shard_days)
            for name, array in raw.outputs.items()
        ]
        for done in (*reading, *writing):
            done.result()


def _get(array: Any, tile: Tile) -> None:
    array[(slice(None), *tile.slices)]


def _put(array: Any, first: int, n_days: int, tile: Tile, values: Any) -> None:
    days = slice(first, min(first + n_days, len(values)))
    array[(days, *tile.slices)] = values[days]


class WithoutReadBack(WrapperStore[Store]):
    """A store in which array data seem not to be there: zarr 3.1 reads each shard before it replaces it."""

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        return await super().get(key, prototype, byte_range) if key.endswith("zarr.json") else None


# -------------------- workers, counts and readers


def _shares(client: Client, order: Sequence[Tile]) -> dict[str, list[Tile]]:
    """Worker -> tiles, dealt out from the largest on, there and back so that all get as much land."""
    workers = sorted(workers_of(client))
    turns = [*workers, *reversed(workers)]
    shares: dict[str, list[Tile]] = {worker: [] for worker in workers}
    for number, tile in enumerate(order):
        shares[turns[number % len(turns)]].append(tile)
    return shares


def _on_workers(client: Client, calls: dict[str, tuple[Callable[..., None], Work, Any]]) -> None:
    """Call each function with its arguments on its own worker, all at the same time."""
    futures = [client.submit(*call, workers=[worker], pure=False) for worker, call in calls.items()]
    client.gather(futures)


def _traffic(server: S3Server, bucket: str) -> Traffic:
    """As the server counts it; its counts follow a moment later."""
    time.sleep(1.0)
    with urllib.request.urlopen(server.metrics) as reply:
        counted = _COUNTED.findall(reply.read().decode())

    def total(name: str) -> int:
        return round(sum(float(n) for kind, b, n in counted if kind == name and f"s3://{b}" == bucket))

    names = ("request_total", "bucket_traffic_sent_bytes_total", "bucket_traffic_received_bytes_total")
    return Traffic(*map(total, names))


def _needed_bytes(source: Source, world: str, options: StorageOptions) -> int:
    """Stored bytes of the chunks of the forcing that hold land."""
    filesystem = _plain(options)
    needed = 0
    for handle in source.arrays.forcing:
        _, *sizes = handle.chunks
        folder = join(world, handle.paths[0], "data")
        for name in list_objects(folder, options):
            if name.startswith("."):
                continue
            _, *index = map(int, re.split(r"[./]", name))
            box = tuple(slice(i * n, (i + 1) * n) for i, n in zip(index, sizes, strict=True))
            needed += filesystem.size(join(folder, name)) if source.grid.mask[box].any() else 0
    return needed


def _plain(options: StorageOptions) -> Any:
    import s3fs

    return s3fs.S3FileSystem(**options["s3"])


def _read_by_others(cube: str, server: S3Server, planned: CubePlan) -> str:
    """Open the cube as anybody would, and compare what xarray and zarr find."""
    plain = dict(server.options["s3"])
    land = planned.layout.grid.mask
    with xr.open_zarr(cube, storage_options=plain) as found:
        runoff = found["runoff"].isel(time=-1).values
        sizes = dict(found.sizes)
    store = FsspecStore.from_url(cube, storage_options=plain, read_only=True)
    array = zarr.open_group(store, mode="r")["runoff"]
    assert isinstance(array, zarr.Array)
    assert np.isfinite(runoff[land]).all()
    assert np.isnan(runoff[~land]).all()
    np.testing.assert_array_equal(runoff, np.asarray(array[-1]))
    return f"plain xarray.open_zarr and zarr open it: {sizes}, runoff finite on all land cells"


if __name__ == "__main__":
    main(Case(resolution=5.0))
