import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from h2mv_dist.config import StorageOptions
from h2mv_dist.errors import StoreError
from h2mv_dist.grid import Period, as_date
from h2mv_dist.io.ledger import Covered, Ledger, Receipt, gaps, ledger_url
from h2mv_dist.io.stores import join, list_objects, put_object
from tests.io.cubes import receipt

YEAR = Period(date(2001, 1, 1), date(2002, 1, 1))
NEXT = Period(date(2002, 1, 1), date(2003, 1, 1))


@pytest.fixture(params=["disk", "memory", "s3"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Ledger:
    """An empty ledger."""
    if request.param == "s3":
        options = request.getfixturevalue("s3_server").options
        return Ledger(join(request.getfixturevalue("bucket"), uuid.uuid4().hex, "cube.zarr"), options)
    root = str(tmp_path) if request.param == "disk" else "memory://"
    return Ledger(join(root, uuid.uuid4().hex, "cube.zarr"), StorageOptions())


def put(ledger: Ledger, name: str, data: bytes) -> None:
    put_object(join(ledger_url(ledger.url), name), data, ledger.options)


def read(ledger: Ledger, tile: str) -> list[Receipt]:
    return list(ledger.receipts(ledger.covered()[tile]))


def test_nothing_is_done_where_nothing_was_recorded(ledger: Ledger) -> None:
    assert ledger.covered() == {}
    assert ledger.covered("0-10_0-10") == {}


def test_receipts_come_back_as_recorded(ledger: Ledger) -> None:
    tiles = [f"{i}-{i + 10}_0-10" for i in range(20)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda tile: ledger.record(tile, YEAR, receipt(static=tile)), tiles))
    assert ledger.covered() == {tile: (Covered(tile, YEAR, 0),) for tile in tiles}
    assert read(ledger, tiles[3]) == [receipt(static=tiles[3])]
    assert len(list_objects(ledger_url(ledger.url), ledger.options)) == len(tiles)


def test_one_tile_is_listed_alone_and_by_day(ledger: Ledger) -> None:
    for tile, period in (("0-1_0-1", NEXT), ("0-1_0-1", YEAR), ("0-1_0-10", YEAR)):
        ledger.record(tile, period, receipt())
    expected = (Covered("0-1_0-1", YEAR, 0), Covered("0-1_0-1", NEXT, 0))
    assert ledger.covered("0-1_0-1") == {"0-1_0-1": expected}


def test_what_is_done_twice_has_one_receipt(ledger: Ledger) -> None:
    ledger.record("0-1", YEAR, receipt())
    ledger.record("0-1", YEAR, receipt(static="other"))
    assert read(ledger, "0-1") == [receipt(static="other")]


def test_forgotten_receipts_are_gone(ledger: Ledger) -> None:
    for period in (YEAR, NEXT):
        ledger.record("0-1", period, receipt())
    ledger.forget([Covered("0-1", YEAR, 0)])
    assert ledger.covered() == {"0-1": (Covered("0-1", NEXT, 0),)}


def test_receipts_lie_beside_the_cube(ledger: Ledger) -> None:
    ledger.record("0-1", YEAR, receipt())
    assert list_objects(ledger.url, ledger.options) == ()
    assert set(Ledger(ledger.url + "/", ledger.options).covered()) == {"0-1"}


def test_a_rollback_undoes_what_reaches_beyond_it(ledger: Ledger) -> None:
    for period in (YEAR, NEXT):
        ledger.record("0-1", period, receipt())
    again = replace(ledger, rollbacks=(YEAR.stop,))
    assert again.covered() == {"0-1": (Covered("0-1", YEAR, 0),)}
    again.record("0-1", NEXT, receipt(static="new"))
    assert again.covered() == {"0-1": (Covered("0-1", YEAR, 0), Covered("0-1", NEXT, 1))}
    assert [found.static for found in again.receipts(again.covered()["0-1"])] == ["s", "new"]
    twice = replace(ledger, rollbacks=(YEAR.stop, date(2001, 6, 1)))
    assert twice.covered() == {}


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 10)), max_size=6),
    st.integers(0, 20),
    st.integers(1, 25),
)
def test_gaps_and_receipts_hold_every_wanted_day(parts: list[tuple[int, int]], first: int, n: int) -> None:
    def period(start: int, length: int) -> Period:
        return Period(as_date(start), as_date(start + length))

    covered = [Covered("t", period(*part), 0) for part in parts]
    wanted = period(first, n)
    found = gaps(covered, wanted)
    days = {day for one in covered for day in one.period.days().tolist()}
    missing = [day for gap in found for day in gap.days().tolist()]
    assert missing == sorted(set(wanted.days().tolist()) - days)
    assert all(a.stop < b.start for a, b in pairwise(found)), "stretches are whole"


@pytest.mark.parametrize(
    "name", ["0-1.json", "notes.txt", "0-1/2001.v0.json", "0-1/2001-01-01..2001-01-01.v0.json", "a/b.json"]
)
def test_what_is_not_a_receipt_is_named(ledger: Ledger, name: str) -> None:
    put(ledger, name, receipt().to_json())
    with pytest.raises(StoreError, match=rf"cannot be used[^$]*{name}[^$]*delete this object"):
        ledger.covered()


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", receipt().to_json()[:-2], b'{"static": 1}'])
def test_a_damaged_receipt_is_named(ledger: Ledger, data: bytes) -> None:
    covered = Covered("0-1", YEAR, 0)
    put(ledger, covered.key, data)
    with pytest.raises(StoreError, match=r"0-1/2001-01-01\.\.2002[^$]*not a complete receipt"):
        list(ledger.receipts([covered]))


def test_receipts_have_one_spelling() -> None:
    data = receipt().to_json()
    assert Receipt.from_json(data) == receipt()
    assert Receipt.from_json(data).to_json() == data
