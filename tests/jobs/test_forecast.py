"""The plan of a cube: reads in whole chunks, objects, memory, and when ``prepare`` is offered."""

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

from h2mv_dist.grid import Period, as_date
from h2mv_dist.io import tile_forcing
from h2mv_dist.io.cube import Progress
from h2mv_dist.io.ledger import Ledger
from h2mv_dist.io.tile_forcing import TileForcing
from h2mv_dist.jobs.cube_plan import FLOAT_BYTES, CubePlan
from h2mv_dist.jobs.forecast import Forecast, forecast
from h2mv_dist.model.checkpoint import Checkpoint, model_tensors, new_model
from tests.conftest import Place
from tests.io.counting import chunk_reads, counting_place, forget_reads
from tests.io.cubes import receipt
from tests.jobs.tiles import NO_OPTIONS, Sizes, plan, write_data
from tests.model import builders

VALUE = FLOAT_BYTES * 3
"""Bytes of a cell and day: three variables of forcing."""
OFFER = "h2mv-dist prepare"


@pytest.fixture
def counting() -> Iterator[Place]:
    with counting_place() as place:
        yield place


def planned(place: Place, sizes: Sizes, **changes: Any) -> CubePlan:
    """A plan with an untrained model."""
    write_data(place, sizes)
    whole = plan(place.url, sizes)
    model = new_model(whole.settings.model, builders.scaler())
    checkpoint = Checkpoint(
        model=whole.settings.model,
        scaler=model.scaler,
        static_names=whole.source.static,
        fold=0,
        settings={},
        progress={},
        tensors=model_tensors(model),
        versions={},
    )
    return replace(whole, checkpoints=(checkpoint,), layout=replace(whole.layout, **changes))


def last(period: Period, days: int) -> Period:
    return Period(as_date(period.first + period.n_days - days), period.stop)


def appended(whole: CubePlan, cube: str, days: int) -> CubePlan:
    """The same plan where all but the last days have receipts."""
    before = Period(whole.layout.period.start, last(whole.layout.period, days).start)
    for tile in whole.layout.tiles:
        Ledger(cube, NO_OPTIONS).record(tile.name, before, receipt(whole.layout.fingerprint))
    return replace(whole, progress=Progress(before, True))


def said(found: Forecast) -> str:
    return "\n".join(found.lines())


def test_a_day_from_chunks_of_all_days_costs_all_days(tmp_path: Path) -> None:
    sizes = Sizes(n_days=90, chunk=(90, 2, 3), tile=(2, 3), shard_days=1)
    whole = planned(Place(str(tmp_path / "data"), NO_OPTIONS), sizes)
    cube = str(tmp_path / "cube.zarr")
    found = forecast(appended(whole, cube, 1), cube, NO_OPTIONS)
    assert found.read == VALUE * 4 * 6 * 90
    assert found.amplification == found.excess == 90
    assert found.chunks == 3
    assert "each byte 90.00 times" in said(found)
    assert OFFER in said(found)


def test_a_day_from_chunks_of_a_day_costs_a_day(tmp_path: Path) -> None:
    sizes = Sizes(n_days=90, chunk=(1, 2, 3), tile=(2, 3), shard_days=1)
    whole = planned(Place(str(tmp_path / "data"), NO_OPTIONS), sizes)
    cube = str(tmp_path / "cube.zarr")
    found = forecast(appended(whole, cube, 1), cube, NO_OPTIONS)
    assert (found.read, found.amplification) == (VALUE * 4 * 6, 1)
    assert OFFER not in said(found)


def test_a_map_a_chunk_is_read_by_every_tile(tmp_path: Path) -> None:
    sizes = Sizes(chunk=(1, 4, 6), tile=(2, 3))
    whole = planned(Place(str(tmp_path / "data"), NO_OPTIONS), sizes)
    found = forecast(whole, str(tmp_path / "cube.zarr"), NO_OPTIONS)
    assert found.read == 4 * VALUE * 4 * 6 * 80
    assert found.amplification == found.excess == 4
    assert found.chunks == 3 * 80
    assert OFFER in said(found)


@pytest.mark.parametrize(
    ("sizes", "passes"),
    [
        (Sizes(chunk=(7, 2, 3), tile=(2, 3)), 1),
        (Sizes(chunk=(10, 2, 3), shard_days=5), 3),
        (Sizes(shape=(5, 7), chunk=(10, 2, 3), tile=(4, 6), shard_days=10), 3),
    ],
    ids=["ragged in time, kept", "three passes", "ragged in space"],
)
def test_chunks_that_fit_cost_nothing_beside_the_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: Sizes, passes: int
) -> None:
    monkeypatch.setattr(tile_forcing, "KEPT_BYTES", 2**28 if passes == 1 else 0)
    whole = planned(Place(str(tmp_path / "data"), NO_OPTIONS), sizes)
    found = forecast(whole, str(tmp_path / "cube.zarr"), NO_OPTIONS)
    assert found.amplification == passes
    assert found.excess == 1
    assert OFFER not in said(found), "no other chunks would save a pass"


@pytest.mark.parametrize("days", [13, 7, 1])
def test_what_is_counted_is_what_a_tile_reads(counting: Place, tmp_path: Path, days: int) -> None:
    sizes = Sizes(chunk=(7, 3, 4), tile=(2, 3), shard_days=1)
    whole, cube = planned(counting, sizes), str(tmp_path / "cube.zarr")
    found = forecast(appended(whole, cube, days), cube, NO_OPTIONS)
    part, n_reads = last(whole.layout.period, days), 0
    for tile in whole.layout.tiles:
        forget_reads()
        assert len(list(TileForcing(whole.source, tile, part, 1).blocks(days))) == days
        n_reads += sum(sum(chunk_reads(group).values()) for group in ("rn", "prec", "tair"))
    assert n_reads == found.chunks * len(whole.layout.tiles)


def test_months_are_objects_too(tmp_path: Path) -> None:
    sizes = Sizes(n_days=80, tile=(2, 3), shard_days=10)
    whole = planned(
        Place(str(tmp_path / "data"), NO_OPTIONS), sizes, daily=("runoff",), static=(), constants=()
    )
    monthly = replace(whole, layout=replace(whole.layout, monthly=("runoff",)))
    assert [str(month) for month in monthly.layout.period.months()] == [
        "2004-02-01..2004-03-01",
        "2004-03-01..2004-04-01",
    ]
    cube, arrays = str(tmp_path / "cube.zarr"), len(whole.layout.arrays_of("runoff"))
    n_tiles = len(whole.layout.tiles)
    for one, objects in ((whole, 8), (monthly, 8 + 2)):
        assert forecast(one, cube, NO_OPTIONS).objects == n_tiles * arrays * objects
    # the last ten days begin on the 25th of March
    assert forecast(appended(monthly, cube, 10), cube, NO_OPTIONS).objects == n_tiles * arrays * (1 + 1)


def test_maps_on_their_way_take_memory(counting: Place) -> None:
    sizes = Sizes(shape=(40, 60), tile=(4, 6), n_days=20, shard_days=10, members=1)
    fitting, maps = (
        planned(Place(f"{counting.url}-{name}", NO_OPTIONS), replace(sizes, chunk=chunk))
        for name, chunk in (("fitting", (10, 4, 6)), ("maps", (1, 40, 60)))
    )
    beyond = 2 * 3 * 10 * (prod(sizes.shape) - prod(sizes.tile)) * FLOAT_BYTES
    assert maps.tile_bytes() - fitting.tile_bytes() == beyond
    assert forecast(maps, "memory://cube", NO_OPTIONS).memory == maps.tile_bytes()
