"""Checking a cube against its receipts."""

import pytest

from h2mv_dist.errors import StoreError
from h2mv_dist.io.cube import CubeLayout
from h2mv_dist.io.cube_check import verify_cube
from h2mv_dist.io.ledger import FINISH_UNIT, Ledger, Receipt, ledger_url
from h2mv_dist.io.sink import Sink, unit_checksum
from h2mv_dist.io.stores import delete_tree, get_object, join, list_objects, put_object
from tests.io.cubes import Case, CubePlace, block, fill, map_layout


def fill_with_receipts(place: CubePlace, layout: CubeLayout) -> None:
    checksums = fill(place, layout)
    units = {FINISH_UNIT: [checksums["constants"]] if layout.constants else []}
    for tile in layout.tiles:
        blocks = [f"{tile.name} {period}" for period in layout.period.blocks(layout.shard_days)]
        units[tile.name] = [checksums[name] for name in (tile.name, *blocks)]
    ledger = Ledger(place.url, place.options)
    for name, parts in units.items():
        ledger.record(Receipt(name, layout.fingerprint, unit_checksum(parts), 1.0))


def test_a_cube_that_was_not_touched_is_sound(case: Case) -> None:
    place, layout = case.new_place(), case.layout
    fill_with_receipts(place, layout)
    found = verify_cube(place.url, place.options)
    assert found.complete
    assert found.sound == (*(tile.name for tile in layout.tiles), FINISH_UNIT)


def test_a_cube_without_constants_is_sound(on_disk: CubePlace) -> None:
    fill_with_receipts(on_disk, map_layout(constants=()))
    assert verify_cube(on_disk.url, on_disk.options).complete


def test_each_kind_of_damage_is_found(on_disk: CubePlace) -> None:
    layout = map_layout(shard=(4, 4), tile=(4, 4))
    fill_with_receipts(on_disk, layout)
    changed, flipped, lost, unknown, foreign, *others = layout.tiles
    period = next(layout.period.blocks(4))
    values = block(layout, changed, period)
    values["runoff"][0, 0, 0] += 1
    Sink.open(on_disk.url, layout, on_disk.options).write(changed, period, values)
    row, column = (start // 4 for start in flipped.start)
    shard = join(on_disk.url, "runoff", "c", "0", str(row), str(column))
    data = bytearray(get_object(shard, on_disk.options))
    data[10] ^= 1
    put_object(shard, bytes(data), on_disk.options)
    row, column = (start // 4 for start in lost.start)
    delete_tree(join(on_disk.url, "runoff", "c", "0", str(row), str(column)), on_disk.options)
    delete_tree(join(ledger_url(on_disk.url), f"{unknown.name}.json"), on_disk.options)
    Ledger(on_disk.url, on_disk.options).record(Receipt(foreign.name, "another", "checksum", 1.0))
    found = verify_cube(on_disk.url, on_disk.options)
    assert not found.complete
    assert found.missing == (unknown.name,)
    assert found.sound == (*(tile.name for tile in others), FINISH_UNIT)
    assert list(found.damaged) == [changed.name, flipped.name, lost.name, foreign.name]
    assert "what is stored gives" in found.damaged[changed.name]
    assert "stored values are damaged" in found.damaged[flipped.name]
    assert "what is stored gives" in found.damaged[lost.name]
    assert "another cube" in found.damaged[foreign.name]


def test_nothing_is_written_and_no_cube_is_no_cube(on_disk: CubePlace) -> None:
    with pytest.raises(StoreError, match="no complete cube"):
        verify_cube(on_disk.url, on_disk.options)
    assert not list_objects(on_disk.url, on_disk.options)
    fill_with_receipts(on_disk, map_layout())
    before = on_disk.versions()
    verify_cube(on_disk.url, on_disk.options)
    assert on_disk.versions() == before
