"""Tiles to compute without a cluster: a small data set, untrained models, and a plan."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from h2mv_dist.config import DataSettings, StorageOptions, validate
from h2mv_dist.io.cube import FINGERPRINT, CubeLayout
from h2mv_dist.io.cube_store import create_cube
from h2mv_dist.io.ledger import Ledger
from h2mv_dist.io.sink import Sink
from h2mv_dist.io.snapshots import Snapshots
from h2mv_dist.io.source import open_source
from h2mv_dist.jobs.cube_plan import CubePlan
from h2mv_dist.jobs.tiles import TileContext
from h2mv_dist.model.ensemble import Ensemble
from h2mv_dist.model.h2mv import SPEC
from tests.conftest import Place
from tests.io.builders import FIRST, Arrays, Stored, write
from tests.model import builders

NO_OPTIONS = StorageOptions()


@dataclass(frozen=True)
class Sizes:
    """Of a data set, its chunks and a cube of it."""

    shape: tuple[int, int] = (4, 6)
    n_days: int = 80
    chunk: tuple[int, int, int] = (80, 2, 3)
    tile: tuple[int, int] = (4, 6)
    shard_days: int = 15
    members: int = 2
    member_axis: bool = False
    hidden: int = 4
    one_tile: bool = False


def write_data(place: Place, sizes: Sizes) -> None:
    """Weather of a few cells in the published layout; a fifth of them are sea, or all beyond one tile."""
    rng = np.random.default_rng(5)
    land = rng.random(sizes.shape) > 0.2
    if sizes.one_tile:
        land[sizes.tile[0] :], land[:, sizes.tile[1] :] = False, False
    lat, lon = (np.arange(n) + 0.5 for n in sizes.shape)
    coordinates = {"lat": Stored(lat, ("lat",)), "lon": Stored(lon, ("lon",))}
    days = Stored(
        np.arange(sizes.n_days), ("time",), {"units": f"days since {FIRST}", "calendar": "standard"}
    )
    arrays: Arrays = {}
    for group, low, high in (("rn", -20, 150), ("prec", 0, 10), ("tair", 250, 300)):
        values = rng.uniform(low, high, (sizes.n_days, *sizes.shape)).astype(np.float32)
        arrays[f"{group}/data"] = Stored(values, ("time", "lat", "lon"), chunks=sizes.chunk)
        arrays |= {f"{group}/{name}": stored for name, stored in (coordinates | {"time": days}).items()}
    arrays["mask/data"] = Stored(land.astype(np.int8), ("lat", "lon"))
    static = rng.normal(size=(*sizes.shape, builders.N_STATIC)).astype(np.float32)
    arrays["static/data"] = Stored(static, ("lat", "lon", "feature"))
    for group in ("mask", "static"):
        arrays |= {f"{group}/{name}": stored for name, stored in coordinates.items()}
    write(place, arrays)


def plan(url: str, sizes: Sizes, **changes: Any) -> CubePlan:
    """A spin-up over all days, all outputs."""
    source = open_source(DataSettings(url=url), forcing=SPEC.forcing, targets=(), options=NO_OPTIONS)
    settings = validate({"data": {"url": url}, "model": {"hidden": sizes.hidden}}, where="test")
    layout = CubeLayout(
        grid=source.grid,
        period=source.period,
        daily=(*SPEC.daily, *SPEC.anomalies),
        static=SPEC.static,
        constants=SPEC.constants,
        members=tuple(range(sizes.members)),
        members_as="all" if sizes.member_axis else "spread",
        chunk=sizes.tile,
        shard=sizes.tile,
        tile=sizes.tile,
        chunk_days=sizes.shard_days,
        shard_days=sizes.shard_days,
        attributes={FINGERPRINT: "test", "code_path": "eager"},
    )
    planned = CubePlan(settings, source, SPEC, (), layout, source.period, source.period, None)
    return replace(planned, **changes)


def context(planned: CubePlan, cube: str) -> TileContext:
    """An empty cube, and untrained models to fill it with."""
    create_cube(cube, planned.layout, NO_OPTIONS, overwrite=False)
    models = [builders.model(seed, hidden=planned.settings.model.hidden) for seed in planned.layout.members]
    sink = Sink.open(cube, planned.layout, NO_OPTIONS)
    snapshots = Snapshots(cube, NO_OPTIONS, planned.layout.fingerprint)
    return TileContext(
        planned, Ensemble(models, torch.device("cpu")), sink, Ledger(cube, NO_OPTIONS), snapshots
    )
