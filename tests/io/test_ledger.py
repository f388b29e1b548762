import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from h2mv_dist.config import StorageOptions
from h2mv_dist.errors import StoreError
from h2mv_dist.io.ledger import Ledger, Receipt, ledger_url
from h2mv_dist.io.stores import join, list_objects, put_object


@pytest.fixture(params=["disk", "memory", "s3"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Ledger:
    """An empty ledger."""
    if request.param == "s3":
        options = request.getfixturevalue("s3_server").options
        return Ledger(join(request.getfixturevalue("bucket"), uuid.uuid4().hex, "cube.zarr"), options)
    root = str(tmp_path) if request.param == "disk" else "memory://"
    return Ledger(join(root, uuid.uuid4().hex, "cube.zarr"), StorageOptions())


def receipt(unit: str, fingerprint: str = "abc") -> Receipt:
    return Receipt(unit, fingerprint, f"checksum of {unit}", 1.25)


def put(ledger: Ledger, name: str, data: bytes) -> None:
    put_object(join(ledger_url(ledger.url), name), data, ledger.options)


def test_nothing_is_done_where_nothing_was_recorded(ledger: Ledger) -> None:
    assert ledger.receipts() == {}
    assert ledger.missing(("b", "a"), "abc") == ("b", "a")


def test_receipts_come_back_as_recorded(ledger: Ledger) -> None:
    units = [f"{i}-{i + 10}_0-10" for i in range(20)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda unit: ledger.record(receipt(unit)), units))
    assert ledger.receipts() == {unit: receipt(unit) for unit in units}
    assert len(list_objects(ledger_url(ledger.url), ledger.options)) == len(units)


def test_missing_units_keep_their_order(ledger: Ledger) -> None:
    for unit in ("b", "d"):
        ledger.record(receipt(unit))
    assert ledger.missing(("e", "d", "a", "b", "c"), "abc") == ("e", "a", "c")


def test_a_unit_done_twice_has_one_receipt(ledger: Ledger) -> None:
    ledger.record(receipt("a"))
    again = Receipt("a", "abc", "other checksum", 2.0)
    ledger.record(again)
    assert ledger.receipts() == {"a": again}


def test_receipts_lie_beside_the_cube(ledger: Ledger) -> None:
    ledger.record(receipt("a"))
    assert list_objects(ledger.url, ledger.options) == ()
    assert Ledger(ledger.url + "/", ledger.options).receipts() == {"a": receipt("a")}


def test_a_foreign_fingerprint_is_refused(ledger: Ledger) -> None:
    ledger.record(receipt("a"))
    ledger.record(receipt("b", fingerprint="xyz"))
    with pytest.raises(StoreError, match=r"b\.json[^$]*abc[^$]*xyz[^$]*inference\.overwrite"):
        ledger.missing(("a", "b", "c"), "abc")


def test_a_foreign_receipt_of_an_unknown_unit_is_refused_too(ledger: Ledger) -> None:
    ledger.record(receipt("elsewhere", fingerprint="xyz"))
    with pytest.raises(StoreError, match=r"elsewhere\.json"):
        ledger.missing(("a",), "abc")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.json", b""),
        ("a.json", b"[]"),
        ("a.json", b'"abc"'),
        ("a.json", b"\xff\xfe"),
        ("a.json", b"{}"),
        ("a.json", b'{"checksum":"c","fingerprint":"abc","seconds":1,"unit":"a","more":1}'),
        ("a.json", b'{"checksum":"","fingerprint":"abc","seconds":1,"unit":"a"}'),
        ("a.json", b'{"checksum":"c","fingerprint":"abc","seconds":"1","unit":"a"}'),
        ("a.json", b'{"checksum":"c","fingerprint":"abc","seconds":NaN,"unit":"a"}'),
        ("a.json", receipt("b").to_json()),
        ("a.txt", receipt("a").to_json()),
        ("sub/a.json", receipt("a").to_json()),
    ],
)
def test_what_is_not_a_receipt_is_named(ledger: Ledger, name: str, data: bytes) -> None:
    ledger.record(receipt("good"))
    put(ledger, name, data)
    with pytest.raises(StoreError, match=rf"cannot be used[^$]*{name}"):
        ledger.missing(("a", "good"), "abc")


def test_no_beginning_of_a_receipt_passes_for_one() -> None:
    data = receipt("a").to_json()
    assert Receipt.from_json(data) == receipt("a")
    for length in range(len(data)):
        with pytest.raises(StoreError, match="not a complete receipt"):
            Receipt.from_json(data[:length])


@pytest.mark.parametrize("unit", ["", "a/b", "../a", "a b", "é"])
def test_a_unit_must_be_a_plain_name(unit: str) -> None:
    with pytest.raises(StoreError, match="plain unit name"):
        receipt(unit)


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0])
def test_seconds_must_be_a_duration(seconds: float) -> None:
    with pytest.raises(StoreError, match="seconds"):
        Receipt("a", "abc", "checksum", seconds)


@pytest.mark.parametrize(
    ("cube", "beside"),
    [
        ("s3://bucket/run/cube.zarr", "s3://bucket/run/cube.ledger"),
        ("memory://cube", "memory://cube.ledger"),
        ("/data/cube.zarr//", "/data/cube.ledger"),
    ],
)
def test_the_place_of_a_ledger(cube: str, beside: str) -> None:
    assert ledger_url(cube) == beside
