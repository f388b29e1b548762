"""Tiles without a cluster: how often chunks are read, what is projected, what a finished cube needs."""

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from dask.config import get

from h2mv_dist.errors import JobError, StoreError
from h2mv_dist.grid import Period, Tile
from h2mv_dist.io import tile_forcing
from h2mv_dist.io.cube_check import verify_cube
from h2mv_dist.io.ledger import gaps
from h2mv_dist.io.source import Source
from h2mv_dist.jobs.cube_plan import FIRST_USE_BYTES
from h2mv_dist.jobs.messages import Failure, RankError
from h2mv_dist.jobs.tiles import compute_tile, finish_cube
from h2mv_dist.model.base import State
from h2mv_dist.model.ensemble import Ensemble
from h2mv_dist.spec import Float32Array
from tests.conftest import Place
from tests.io.counting import chunk_reads, counting_place, forget_reads
from tests.jobs.processes import wait_until
from tests.jobs.tiles import NO_OPTIONS, Sizes, context, plan, write_data

PASSES = 3
"""Spin-up, baseline, run."""


@pytest.fixture
def counting() -> Iterator[Place]:
    with counting_place() as place:
        yield place


@pytest.mark.parametrize(
    ("sizes", "kept_bytes", "reads"),
    [
        (Sizes(), 2**28, 1),
        (Sizes(chunk=(10, 2, 3)), 2**28, 1),
        (Sizes(), 0, 1),
        (Sizes(chunk=(40, 4, 6)), 0, 1),
        (Sizes(chunk=(10, 2, 3)), 0, PASSES),
        (Sizes(chunk=(20, 2, 3), shard_days=6), 0, PASSES),
        (Sizes(chunk=(7, 2, 3), shard_days=30), 0, PASSES),
    ],
    ids=[
        "kept, all days in a chunk",
        "kept, several chunks",
        "too large, but all days in a chunk",
        "too large, but two chunks",
        "streamed, chunks shorter than blocks",
        "streamed, chunks longer than blocks",
        "streamed, chunks across blocks",
    ],
)
def test_a_tile_reads_each_chunk_once_a_pass_at_most(
    counting: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sizes: Sizes,
    kept_bytes: int,
    reads: int,
) -> None:
    monkeypatch.setattr(tile_forcing, "KEPT_BYTES", kept_bytes)
    write_data(counting, sizes)
    planned = plan(counting.url, sizes)
    tiles = context(planned, str(tmp_path / "cube.zarr"))
    forget_reads()
    for tile in planned.layout.tiles:
        compute_tile(tiles, tile)
    days, rows, columns = sizes.chunk
    n_chunks = -(-sizes.n_days // days) * -(-4 // rows) * -(-6 // columns)
    for group in ("rn", "prec", "tair"):
        counts = chunk_reads(group)
        assert len(counts) == n_chunks
        assert set(counts.values()) == {reads}, group


def test_what_is_computed_does_not_depend_on_how_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checksums = set()
    for name, days, kept_bytes in (("a", 80, 2**28), ("b", 10, 0), ("c", 23, 0)):
        monkeypatch.setattr(tile_forcing, "KEPT_BYTES", kept_bytes)
        sizes = Sizes(chunk=(days, 2, 3))
        write_data(Place(str(tmp_path / name), NO_OPTIONS), sizes)
        planned = plan(str(tmp_path / name), sizes)
        tiles = context(planned, str(tmp_path / f"{name}.zarr"))
        compute_tile(tiles, planned.layout.tiles[0])
        ((_, covered),) = tiles.ledger.covered().items()
        checksums.add(tuple((r.static, r.blocks, r.forcing) for r in tiles.ledger.receipts(covered)))
    assert len(checksums) == 1


def test_a_cube_is_not_finished_without_all_receipts(tmp_path: Path) -> None:
    sizes = Sizes(tile=(2, 3))
    write_data(Place(str(tmp_path / "data"), NO_OPTIONS), sizes)
    planned = plan(str(tmp_path / "data"), sizes)
    tiles = context(planned, str(tmp_path / "cube.zarr"))
    first, *others = planned.layout.tiles
    for tile in others:
        compute_tile(tiles, tile)
    with pytest.raises(JobError, match=rf"no receipt(.|\n)*1 stretches(.|\n)*{first.name}(.|\n)*run h2mv"):
        finish_cube(tiles)
    compute_tile(tiles, first)
    finish_cube(tiles)
    assert verify_cube(tiles.cube.url, NO_OPTIONS).complete


@pytest.mark.parametrize("asked", [1, 2, 8, 20], ids=["first", "spin-up", "baseline", "run"])
def test_a_tile_that_is_not_wanted_any_more_stops_and_goes_on_later(tmp_path: Path, asked: int) -> None:
    sizes = Sizes(n_days=640, shard_days=320)
    write_data(Place(str(tmp_path / "data"), NO_OPTIONS), sizes)
    planned = plan(str(tmp_path / "data"), sizes)
    tiles, times = context(planned, str(tmp_path / "cube.zarr")), itertools.count(1)

    def cancelled() -> None:
        if next(times) >= asked:
            raise RankError(Failure("cancelled", "cancelled"))

    with pytest.raises(RankError, match="cancelled"):
        compute_tile(tiles, planned.layout.tiles[0], cancelled)
    assert next(times) <= asked + 3, "both threads may have asked once more"
    assert not list(tiles.ledger.covered())
    compute_tile(tiles, planned.layout.tiles[0])
    finish_cube(tiles)
    assert verify_cube(tiles.cube.url, NO_OPTIONS).complete


def test_a_write_that_fails_ends_the_block_that_is_being_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = Sizes(n_days=640, shard_days=320)
    write_data(Place(str(tmp_path / "data"), NO_OPTIONS), sizes)
    planned = plan(str(tmp_path / "data"), sizes)
    computed = 0

    def slowly(ensemble: Ensemble, *arguments: Any) -> State:
        nonlocal computed
        computed += 1
        time.sleep(0.1)
        return run(ensemble, *arguments)

    run = Ensemble.run
    monkeypatch.setattr(Ensemble, "run", slowly)
    compute_tile(context(planned, str(tmp_path / "whole.zarr")), planned.layout.tiles[0])
    whole, computed = computed, 0
    broken = context(planned, str(tmp_path / "broken.zarr"))
    (tmp_path / "broken.zarr" / "runoff" / "c").write_text("in the way of its shards")
    with pytest.raises(StoreError, match="runoff"):
        compute_tile(broken, planned.layout.tiles[0])
    assert whole == PASSES * 10, "two blocks of five parts a pass"
    assert whole - 5 < computed < whole, "the last block was begun, and not computed to its end"
    assert not list(broken.ledger.covered())


def test_a_read_ahead_that_fails_ends_the_block_that_is_being_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = Sizes(n_days=640, shard_days=320, chunk=(320, 4, 6))
    write_data(Place(str(tmp_path / "data"), NO_OPTIONS), sizes)
    planned = plan(str(tmp_path / "data"), sizes)
    run, computed, failed = Ensemble.run, 0, threading.Event()
    read = Source.read_land_forcing

    def reading(source: Source, tile: Tile, period: Period) -> Float32Array:
        if period.start == planned.layout.period.start:
            return read(source, tile, period)
        (tmp_path / "data" / "prec" / "data" / "c" / "1" / "0" / "0").write_bytes(b"not a chunk")
        try:
            return read(source, tile, period)
        finally:
            failed.set()

    def counted(ensemble: Ensemble, *arguments: Any) -> State:
        nonlocal computed
        computed += 1
        assert failed.wait(100)
        return run(ensemble, *arguments)

    monkeypatch.setattr(Source, "read_land_forcing", reading)
    monkeypatch.setattr(Ensemble, "run", counted)
    with pytest.raises(StoreError, match="prec"):
        compute_tile(context(planned, str(tmp_path / "cube.zarr")), planned.layout.tiles[0])
    assert computed < 5, "a block has five parts"


def test_a_tile_tells_how_far_it_is(tmp_path: Path) -> None:
    sizes, told = Sizes(n_days=80, shard_days=30), list[tuple[int, int]]()
    write_data(Place(str(tmp_path / "data"), NO_OPTIONS), sizes)
    planned = plan(str(tmp_path / "data"), sizes)
    tiles, (tile,) = context(planned, str(tmp_path / "cube.zarr")), planned.layout.tiles
    compute_tile(tiles, tile, tell=lambda days, of: told.append((days, of)))
    assert told == [(30, 80), (60, 80), (80, 80)]
    first, _ = tiles.ledger.covered()[tile.name]
    tiles.ledger.forget([first])
    compute_tile(tiles, tile, tell=lambda days, of: told.append((days, of)))
    assert told[3:] == [(30, 60), (60, 60)]


@pytest.mark.parametrize("broken", ["nan", "inf"])
def test_values_that_are_not_finite_are_counted_and_found(tmp_path: Path, broken: str) -> None:
    sizes = Sizes()
    write_data(Place(str(tmp_path / "data"), NO_OPTIONS), sizes)
    planned = plan(str(tmp_path / "data"), sizes)
    tiles = context(planned, str(tmp_path / "cube.zarr"))
    for weights in tiles.ensemble.models[1].parameters():
        weights.data.fill_(float(broken))
    compute_tile(tiles, planned.layout.tiles[0])
    finish_cube(tiles)
    found = verify_cube(tiles.cube.url, NO_OPTIONS, budget=planned.spec.budget)
    assert not found.damaged, found.damaged
    assert set(found.not_finite) == set(found.sound), "each as it was computed"
    assert not found.damaged
    assert not found.complete
    ((_, covered),) = tiles.ledger.covered().items()
    for receipt in tiles.ledger.receipts(covered):
        assert receipt.residual is not None
        assert receipt.residual < 1e-3, "of the member whose outputs are numbers"


def test_the_next_tile_reads_while_one_is_computed_and_is_computed_after_it(
    counting: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = Sizes(tile=(2, 3))
    write_data(counting, sizes)
    planned = plan(counting.url, sizes)
    tiles = context(planned, str(tmp_path / "cube.zarr"))
    first, second, *_ = planned.layout.tiles
    threads: list[str] = []

    def noted(ensemble: Ensemble, *arguments: Any) -> State:
        threads.append(threading.current_thread().name)
        return run(ensemble, *arguments)

    run = Ensemble.run
    monkeypatch.setattr(Ensemble, "run", noted)
    with ThreadPoolExecutor(1, thread_name_prefix="second") as pool:
        begun: list[Future[None]] = []

        def begin_second() -> None:
            forget_reads()
            begun.append(pool.submit(compute_tile, tiles, second))
            wait_until(lambda: chunk_reads("tair"), "the second tile to read")

        compute_tile(tiles, first, make_room=begin_second)
        begun[0].result()
    assert [name.startswith("second") for name, _ in itertools.groupby(threads)] == [False, True]
    assert set(tiles.ledger.covered()) == {first.name, second.name}


@pytest.mark.parametrize("made_room", [False, True], ids=["before", "after it made room"])
def test_a_tile_that_fails_lets_the_next_one_go_on(tmp_path: Path, made_room: bool) -> None:
    sizes = Sizes(tile=(2, 3))
    write_data(Place(str(tmp_path / "data"), NO_OPTIONS), sizes)
    planned = plan(str(tmp_path / "data"), sizes)
    tiles = context(planned, str(tmp_path / "cube.zarr"))
    first, second, *_ = planned.layout.tiles
    room, asked = threading.Event(), itertools.count(1)

    def cancelled() -> None:
        # twice it is asked before it has its turn
        if room.is_set() == made_room and next(asked) >= 3:
            raise RankError(Failure("cancelled", "cancelled"))

    with pytest.raises(RankError, match="cancelled"):
        compute_tile(tiles, first, cancelled, room.set)
    compute_tile(tiles, second)
    covered, period = tiles.ledger.covered(), planned.layout.period
    # the whole shards before the last block may have their receipt
    assert [gap.stop for gap in gaps(covered.get(first.name, ()), period)] == [period.stop]
    assert not list(gaps(covered[second.name], period))


def test_a_tile_that_waits_for_its_turn_can_be_cancelled(tmp_path: Path) -> None:
    sizes = Sizes()
    write_data(Place(str(tmp_path / "data"), NO_OPTIONS), sizes)
    planned = plan(str(tmp_path / "data"), sizes)
    tiles, asked = context(planned, str(tmp_path / "cube.zarr")), itertools.count(1)

    def cancelled() -> None:
        if next(asked) >= 4:
            raise RankError(Failure("cancelled", "cancelled"))

    with tiles.computing, pytest.raises(RankError, match="cancelled"):
        compute_tile(tiles, planned.layout.tiles[0], cancelled)
    compute_tile(tiles, planned.layout.tiles[0])
    assert list(tiles.ledger.covered()) == [planned.layout.tiles[0].name]


MEASURE = """
import json, sys, threading
import torch
from h2mv_dist.jobs.memory import keep_freed_memory
from h2mv_dist.jobs.tiles import compute_tile
from tests.jobs.tiles import Sizes, context, plan

def status_bytes(name):
    # not ru_maxrss: that starts at the resident memory of the process that started this one
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:"))

keep_freed_memory()
torch.set_num_threads(1)
folder, small, large = sys.argv[1], *(Sizes(**json.loads(text)) for text in sys.argv[2:])
warm = plan(f"{folder}/small", small)
compute_tile(context(warm, f"{folder}/warm.zarr"), warm.layout.tiles[0])
planned = plan(f"{folder}/large", large)
tiles = context(planned, f"{folder}/cube.zarr")
before = status_bytes("VmRSS")
first, *others = planned.layout.tiles
# a second tile begins as on a worker
threads = [threading.Thread(target=compute_tile, args=(tiles, tile)) for tile in others]
compute_tile(tiles, first, make_room=lambda: [thread.start() for thread in threads])
for thread in threads:
    thread.join()
print(json.dumps([planned.tile_bytes(), status_bytes("VmHWM") - before]))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "large",
    [
        Sizes(shape=(24, 30), n_days=150, chunk=(150, 12, 15), tile=(24, 30), shard_days=75, members=4),
        Sizes(shape=(20, 20), n_days=240, chunk=(60, 20, 20), tile=(20, 20), shard_days=120, hidden=100),
        Sizes(shape=(60, 60), n_days=730, chunk=(365, 20, 20), tile=(60, 60), shard_days=5, members=1),
        Sizes(shape=(40, 80), n_days=365, chunk=(365, 20, 20), tile=(40, 40), shard_days=73, members=1),
    ],
    ids=["many members", "a large network", "much forcing", "tiles that overlap"],
)
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_projected_memory_is_what_is_measured(tmp_path: Path, large: Sizes) -> None:
    small = Sizes(hidden=large.hidden)
    for name, sizes in (("small", small), ("large", large)):
        write_data(Place(str(tmp_path / name), NO_OPTIONS), sizes)
    command = [sys.executable, "-c", MEASURE, str(tmp_path), *(json.dumps(vars(s)) for s in (small, large))]
    # freed memory goes back to the system as it does on workers
    worker = {name: str(value) for name, value in get("distributed.nanny.pre-spawn-environ").items()}
    environment = {**os.environ, **worker}
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    projected, measured = json.loads(done.stdout)
    # what is first used was used before, and part of what follows fits into what that has left: bounds are
    # wider than those of `python -m benchmarks memory`, which measures all of it, on a worker
    assert projected - FIRST_USE_BYTES < 2 * measured, f"{projected=}, {measured=}"
    assert measured < projected, f"{projected=}, {measured=}"
