"""Memory of a worker: what a tile takes above the worker's imports, against what the plan projects.

One worker fills a cube of one tile, from SeaweedFS to SeaweedFS, through the real job; its peak resident
memory, children included, is compared with what it held after its imports. The weather is noise, which is
hard to compress, so that no buffer comes out smaller than it may be.
"""

import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final
from unittest import mock

import psutil
import torch
from dask.utils import format_bytes
from distributed import Client

from benchmarks.members import write_members
from h2mv_dist.config import ClusterSettings, CodePath, Settings, validate
from h2mv_dist.jobs.cluster import connect
from h2mv_dist.jobs.cube_plan import FLOAT_BYTES, CubePlan, plan_inference
from h2mv_dist.jobs.inference import start_inference
from h2mv_dist.model.checkpoint import new_model
from h2mv_dist.model.code_folder import VARIABLE
from tests.conftest import Place
from tests.io.builders import FIRST
from tests.jobs.tiles import Sizes, write_data
from tests.model import builders
from tests.seaweed import S3Server, running_server

YEARS: Final = (2, 20)
SAMPLE_SECONDS: Final = 0.05
IMPORTS: Final = ("h2mv_dist.jobs.tiles", "h2mv_dist.io.s3", "xarray", "s3fs")
"""What a worker imports for a tile in an object store."""


@dataclass(frozen=True)
class Case:
    """A cube to measure; ``settings`` are those of inference that are not the defaults."""

    name: str
    cells: int = 20
    years: float = YEARS[0]
    members: int = 2
    hidden: int = 100
    shard_days: int = 360
    all_members: bool = False
    map_cells: int | None = None
    code_path: CodePath = "eager"

    def sizes(self) -> Sizes:
        """Of its forcing: chunked as ``prepare`` does, or one map a chunk, with sea around the tile."""
        tile, shape = (self.cells,) * 2, (self.map_cells or self.cells,) * 2
        days = 360 if self.map_cells is None else 1
        n_days = round(365.25 * self.years)
        return Sizes(shape=shape, n_days=n_days, chunk=(days, *shape), tile=tile, one_tile=True)


@dataclass(frozen=True)
class Measured:
    """Bytes: measured growth, what was projected, and what one time block's outputs take."""

    growth: int
    projected: int
    block: int


def cases(quick: bool) -> Iterator[Case]:
    for years in YEARS:
        yield Case(f"defaults, {years} years", years=years, hidden=8 if quick else 100)
    if not quick:
        yield Case("one member", members=1)
        yield Case("four members, kept apart", members=4, all_members=True)
        yield Case("large tile, short blocks", cells=40, shard_days=120)
        yield Case("wide network, short blocks", years=2, hidden=400, shard_days=30)
        yield Case("forcing of one map a chunk", years=0.2, shard_days=30, map_cells=1000)
        yield Case("compiled, for the first time", code_path="compiled")


def main(quick: bool = False) -> None:
    found: list[Measured] = []
    print("| cube | projected | measured | projected / measured |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder)) as server:
        for case in cases(quick):
            measured = _measure(case, server)
            ratio = measured.projected / measured.growth
            sizes = f"{format_bytes(measured.projected)} | {format_bytes(measured.growth)}"
            print(f"| {case.name} | {sizes} | {ratio:.2f} |", flush=True)
            found.append(measured)
    short, long = found[:2]
    print(
        f"\n{YEARS[1]} years take {format_bytes(abs(long.growth - short.growth))} "
        f"{'more' if long.growth > short.growth else 'less'} than {YEARS[0]}; "
        f"one time block is {format_bytes(short.block)} (target: less than that)"
    )
    print("target: projected / measured between 1.00 and 1.25")


def _measure(case: Case, server: S3Server) -> Measured:
    bucket = server.new_bucket()
    place = Place(f"{bucket}/data", server.options)
    write_data(place, case.sizes())
    settings = _settings(case, place.url)
    _write_models(case, settings, f"{bucket}/job", server)
    planned = plan_inference(settings, f"{bucket}/job", server.options)
    cluster = ClusterSettings(kind="local", workers=1, memory_limit="0")
    with nothing_compiled(), connect(cluster) as client:
        before = _on_the_worker(client, _baseline)
        handle = start_inference(client, planned, f"{bucket}/job", f"{bucket}/cube.zarr", server.options)
        assert handle is not None, "the bucket is new"
        handle.wait()
        growth = _on_the_worker(client, _peak) - before
    return Measured(growth, planned.tile_bytes(), _block_bytes(planned))


def _settings(case: Case, url: str) -> Settings:
    box = [case.cells, case.cells]
    inference: dict[str, Any] = {"tile": box, "shard": box, "chunk": [case.cells // 2] * 2}
    inference |= {"shard_days": case.shard_days, "chunk_days": case.shard_days // 3}
    inference |= {"code_path": case.code_path}
    inference |= {"members": "all" if case.all_members else "spread", "spinup_days": 60}
    inference |= {"baseline": f"{FIRST}..{FIRST + timedelta(days=min(case.sizes().n_days, 365))}"}
    model = {"hidden": case.hidden}
    return validate({"data": {"url": url}, "model": model, "inference": inference}, where="benchmark")


def _write_models(case: Case, settings: Settings, folder: str, server: S3Server) -> None:
    torch.manual_seed(0)
    models = [new_model(settings.model, builders.scaler()) for _ in range(case.members)]
    names = tuple(f"feature_{i}" for i in range(builders.N_STATIC))
    write_members(folder, settings, models, names, server.options)


def _block_bytes(planned: CubePlan) -> int:
    """What all members compute of one time block."""
    layout = planned.layout
    cells = max(int(layout.grid.mask[tile.slices].sum()) for tile in layout.tiles)
    days = min(layout.shard_days, layout.period.n_days)
    return FLOAT_BYTES * len(layout.members) * days * cells * len(layout.daily)


def _on_the_worker(client: Client, ask: Any) -> int:
    (answer,) = client.run(ask).values()
    return int(answer)


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """An empty folder for compiled code, for processes that are started meanwhile."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {VARIABLE: folder}):
        yield


_with_children: Final = [0]
"""Of this worker: largest resident bytes that it and its children were seen with."""


def _baseline(modules: Sequence[str] = IMPORTS) -> int:
    """Resident bytes once everything is imported; the peak is counted from here on."""
    import importlib

    for module in modules:
        importlib.import_module(module)
    Path("/proc/self/clear_refs").write_text("5")
    threading.Thread(target=_watch, daemon=True).start()
    return status_bytes("VmRSS")


def _watch() -> None:
    """The kernel keeps the peak of one process, not of several: a compiler's comes with the worker's own."""
    ours = psutil.Process().cmdline()
    while True:
        held = status_bytes("VmRSS")
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                # one that is just being forked holds nothing of its own
                held += int(child.memory_info().rss) if child.cmdline() != ours else 0
        _with_children[0] = max(_with_children[0], held)
        time.sleep(SAMPLE_SECONDS)


def _peak() -> int:
    """Largest resident bytes of this process, with its children where they were more."""
    return max(status_bytes("VmHWM"), *_with_children)


def status_bytes(name: str) -> int:
    """Of this process, as the kernel has it in ``/proc/self/status``."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
