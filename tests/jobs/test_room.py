"""What does not fit is refused, with the setting that would: pure functions of a plan."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from h2mv_dist.config import ClusterSettings, validate
from h2mv_dist.errors import JobError
from h2mv_dist.io.cube import Progress
from h2mv_dist.jobs.cluster import memory_limit
from h2mv_dist.jobs.cube_plan import COMPILED_BYTES, COMPILING_BYTES, CubePlan
from h2mv_dist.jobs.inference import fitting_layout, require_memory
from tests.conftest import Place
from tests.jobs.tiles import NO_OPTIONS, Sizes, plan, write_data

WHOLE = 80
"""Days of a shard as planned."""


@pytest.fixture
def planned(tmp_path: Path) -> CubePlan:
    """Shards of eight chunks of days; a tile of four chunks."""
    sizes = Sizes(shape=(24, 24), chunk=(10, 12, 12), tile=(24, 24), shard_days=WHOLE, members=8)
    write_data(Place(str(tmp_path), NO_OPTIONS), sizes)
    whole = plan(str(tmp_path), sizes)
    return replace(whole, layout=replace(whole.layout, chunk=(12, 12), chunk_days=10))


def bytes_with(planned: CubePlan, **changes: Any) -> int:
    return replace(planned, layout=replace(planned.layout, **changes)).tile_bytes()


def with_inference(planned: CubePlan, **changes: Any) -> CubePlan:
    data = {"url": planned.settings.data.url}
    return replace(planned, settings=validate({"data": data, "inference": changes}, where="test"))


@pytest.mark.parametrize("days", [10, 40, 70])
def test_the_most_days_that_fit(planned: CubePlan, days: int) -> None:
    for limit in (bytes_with(planned, shard_days=days), bytes_with(planned, shard_days=days + 10) - 1):
        assert fitting_layout(planned, limit) == replace(planned.layout, shard_days=days)


def test_days_between_kept_states_stay_whole_shards(planned: CubePlan) -> None:
    kept = with_inference(planned, shard_days=WHOLE, chunk_days=10, state_days=WHOLE)
    fitting = fitting_layout(kept, bytes_with(kept, shard_days=70))
    assert fitting == replace(kept.layout, shard_days=40)


def test_smaller_tiles_where_fewer_days_are_not_enough(planned: CubePlan) -> None:
    short = replace(planned, layout=replace(planned.layout, shard_days=10))
    limit = bytes_with(short, tile=(12, 12), shard=(12, 12))
    assert limit < short.tile_bytes()
    assert fitting_layout(short, limit) == replace(short.layout, tile=(12, 12), shard=(12, 12))
    fine = replace(short, layout=replace(short.layout, shard=(12, 12)))
    assert fitting_layout(fine, limit) == replace(fine.layout, tile=(12, 12))
    assert fitting_layout(planned, limit) == replace(short.layout, tile=(12, 12), shard=(12, 12))
    assert fitting_layout(planned, limit - 1) is None


def test_the_setting_that_would_fit_is_named(planned: CubePlan) -> None:
    require_memory(planned, planned.tile_bytes(), "the limit")
    for limit, fix in (
        (bytes_with(planned, shard_days=40), r"set inference.shard_days = 40, or start larger workers"),
        (1, "start larger workers; neither"),
    ):
        with pytest.raises(JobError, match=rf"does not fit into a worker(.|\n)*the limit(.|\n)*{fix}"):
            require_memory(planned, limit, "the limit")


def test_a_cube_that_exists_keeps_its_shards(planned: CubePlan) -> None:
    begun = replace(planned, progress=Progress(planned.layout.period, False))
    with pytest.raises(JobError, match=r"make another cube, with inference.shard_days = 40"):
        require_memory(begun, bytes_with(planned, shard_days=40), "the limit")


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({"memory_limit": "1 GB"}, 10**9),
        ({"memory_limit": "1"}, None),
        ({"memory_limit": "0"}, None),
        ({}, None),
        ({"memory_limit": "1GB", "kind": "address", "address": "tcp://somewhere:1"}, None),
    ],
)
def test_settings_may_say_what_a_worker_has(settings: dict[str, Any], limit: int | None) -> None:
    assert memory_limit(ClusterSettings(**{"kind": "local", **settings})) == limit


def test_a_compiler_takes_room_before_the_first_tile(planned: CubePlan) -> None:
    attributes = {**planned.layout.attributes, "code_path": "compiled"}
    assert bytes_with(planned, attributes=attributes) == max(
        COMPILING_BYTES, planned.tile_bytes() + COMPILED_BYTES
    )
    small = {"attributes": attributes, "shard_days": 1, "chunk_days": 1}
    assert bytes_with(planned, **small) == COMPILING_BYTES
