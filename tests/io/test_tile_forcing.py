"""A tile's forcing in blocks: the same values however it is chunked, one block ahead, projected memory."""

import threading
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import numpy as np
import pytest

from h2mv_dist.config import StorageOptions
from h2mv_dist.errors import DataError
from h2mv_dist.grid import Period, Tile
from h2mv_dist.io import tile_forcing
from h2mv_dist.io.source import Source
from h2mv_dist.io.tile_forcing import TileForcing, one_ahead
from tests.conftest import Place
from tests.io.builders import LAND, cf, open_cf, open_published, published, write
from tests.io.counting import chunk_reads, forget_reads

TILE = Tile((0, 0), (4, 3))
N_LAND = int(LAND[TILE.slices].sum())
PART = Period(date(2004, 1, 20), date(2004, 3, 20))


def source_of(place: Place, chunk_days: tuple[int, int, int]) -> Source:
    arrays, _ = published()
    for group, days in zip(("rn", "prec", "tair"), chunk_days, strict=True):
        arrays[f"{group}/data"].chunks = (days, 2, 3)
    write(place, arrays)
    return open_published(place, targets=())


@pytest.mark.parametrize("chunk_days", [(80, 80, 80), (10, 10, 10), (10, 15, 6), (7, 9, 80)], ids=str)
@pytest.mark.parametrize("kept_bytes", [0, 2**28])
def test_blocks_are_what_the_source_holds(
    counting: Place, monkeypatch: pytest.MonkeyPatch, chunk_days: tuple[int, int, int], kept_bytes: int
) -> None:
    monkeypatch.setattr(tile_forcing, "KEPT_BYTES", kept_bytes)
    source = source_of(counting, chunk_days)
    forcing = TileForcing(source, TILE, PART, 13)
    expected = source.read_land_forcing(TILE, PART)
    forget_reads()
    for _ in range(2):
        blocks = list(forcing.blocks(PART.n_days))
        assert [block.shape for block in blocks] == [*[(N_LAND, 13, 3)] * 4, (N_LAND, 8, 3)]
        np.testing.assert_array_equal(np.concatenate(blocks, axis=1), expected)
    reads = 1 if forcing.keeps else 2
    for group in ("rn", "prec", "tair"):
        assert set(chunk_reads(group).values()) == {reads}, group


def test_a_pass_over_the_first_days_reads_no_more_than_it_needs(
    counting: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tile_forcing, "KEPT_BYTES", 0)
    forcing = TileForcing(source_of(counting, (10, 10, 10)), TILE, PART, 5)
    forget_reads()
    blocks = list(forcing.blocks(12))
    assert [block.shape[1] for block in blocks] == [5, 5, 2]
    assert {path.split("/c/")[1].split("/")[0] for path in chunk_reads("rn")} == {"0", "1"}


@pytest.mark.parametrize(("days", "keeps"), [(40, True), (10, False)])
def test_what_streaming_would_hold_anyway_is_kept(
    counting: Place, monkeypatch: pytest.MonkeyPatch, days: int, keeps: bool
) -> None:
    monkeypatch.setattr(tile_forcing, "KEPT_BYTES", 0)
    assert TileForcing(source_of(counting, (days, days, days)), TILE, PART, 5).keeps is keeps


def test_memory_follows_the_chunks_not_the_period(counting: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_forcing, "KEPT_BYTES", 0)
    source = source_of(counting, (10, 10, 10))
    longer = Period(PART.start, date(2004, 4, 4))
    sizes = [TileForcing(source, TILE, period, 10).n_bytes for period in (PART, longer)]
    assert sizes[0] == sizes[1] == 4 * 3 * 10 * (4 * N_LAND + 2 * 12)


def test_the_next_item_is_made_while_one_is_used() -> None:
    made = [threading.Event() for _ in range(3)]

    def items() -> Iterator[int]:
        for item, event in enumerate(made):
            event.set()
            yield item

    for item in one_ahead(items(), lambda _: None):
        if item < 2:
            assert made[item + 1].wait(100)


def test_a_gap_in_the_forcing_reaches_the_reader(tmp_path: Path) -> None:
    arrays = cf()
    arrays["precipitation"].values[30, LAND] = np.nan
    source = open_cf(Place(str(tmp_path), StorageOptions()), arrays)
    with pytest.raises(DataError, match="precipitation is not finite"):
        list(TileForcing(source, TILE, source.period, 10).blocks(source.period.n_days))
