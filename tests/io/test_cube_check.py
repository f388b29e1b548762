"""Checking a cube against its receipts."""

from dataclasses import replace

import numpy as np
import pytest

from h2mv_dist.errors import StoreError
from h2mv_dist.io.cube import KEPT_BITS, Progress
from h2mv_dist.io.cube_check import verify_cube
from h2mv_dist.io.cube_store import publish
from h2mv_dist.io.ledger import Covered, Ledger, ledger_url
from h2mv_dist.io.sink import Sink
from h2mv_dist.io.stores import delete_tree, get_object, join, list_objects, put_object
from h2mv_dist.spec import Budget
from tests.io.cubes import PERIOD, Case, CubePlace, block, fill_with_receipts, map_layout, receipt, truth

BUDGET = Budget("snow_water_equivalent", ("runoff",), (), ())


def test_a_cube_that_was_not_touched_is_sound(case: Case) -> None:
    place, layout = case.new_place(), case.layout
    fill_with_receipts(place, layout)
    found = verify_cube(place.url, place.options)
    assert found.complete
    assert found.sound == tuple(Covered(tile.name, layout.period, 0) for tile in layout.tiles)


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
    delete_tree(join(ledger_url(on_disk.url), unknown.name), on_disk.options)
    Ledger(on_disk.url, on_disk.options).record(foreign.name, PERIOD, receipt("another"))
    found = verify_cube(on_disk.url, on_disk.options)
    assert not found.complete
    assert found.missing == (f"{unknown.name}/{PERIOD}",)
    assert [one.tile for one in found.sound] == [tile.name for tile in others]
    problems = {one.tile: text for one, text in found.damaged.items()}
    assert set(problems) == {changed.name, flipped.name, lost.name, foreign.name}
    assert f"values of {period} are not those" in problems[changed.name]
    assert "stored values are damaged" in problems[flipped.name]
    assert f"values of {period} are not those" in problems[lost.name]
    assert "another cube" in problems[foreign.name]


def test_changed_constants_are_found(on_disk: CubePlace) -> None:
    layout = map_layout()
    fill_with_receipts(on_disk, layout)
    values = truth(layout)["baseflow_recession"] + 1
    Sink.open(on_disk.url, layout, on_disk.options).write_constants({"baseflow_recession": values})
    found = verify_cube(on_disk.url, on_disk.options)
    assert not found.damaged
    assert "constants are not those" in found.constants
    assert not found.complete


def test_a_share_is_checked_at_random(on_disk: CubePlace) -> None:
    layout = map_layout(shard=(4, 4), tile=(4, 4))
    fill_with_receipts(on_disk, layout)
    checked = {verify_cube(on_disk.url, on_disk.options, share=0.3, seed=seed).sound for seed in range(6)}
    assert {len(sound) for sound in checked} == {round(0.3 * len(layout.tiles))}
    assert len(checked) > 1


def test_days_that_were_rolled_back_are_not_checked(on_disk: CubePlace) -> None:
    layout = map_layout()
    fill_with_receipts(on_disk, layout)
    shorter = next(PERIOD.blocks(4))
    publish(on_disk.url, layout, Progress(shorter, True, (shorter.stop,)), on_disk.options)
    found = verify_cube(on_disk.url, on_disk.options)
    assert not found.sound
    assert found.missing == tuple(f"{tile.name}/{shorter}" for tile in layout.tiles)


def test_the_budget_is_worked_out_from_what_is_stored(on_disk: CubePlace) -> None:
    layout = map_layout(members=(5,))
    fill_with_receipts(on_disk, layout)
    values = {name: array[0][:, layout.grid.mask] for name, array in truth(layout).items() if array.ndim == 4}
    change = np.diff(values["snow_water_equivalent"].astype(np.float64), axis=0)
    expected = np.abs(change - values["runoff"][1:]).max()
    found = verify_cube(on_disk.url, on_disk.options, budget=BUDGET)
    assert found.residual == pytest.approx(expected)
    assert found.unbalanced == found.sound, "each as it was written"
    assert not found.complete
    other = replace(BUDGET, losses=("fapar",))
    assert np.isnan(verify_cube(on_disk.url, on_disk.options, budget=other).residual)


@pytest.mark.parametrize("rounded", [(), ("runoff",), ("runoff", "snow_water_equivalent")])
@pytest.mark.parametrize("off", [0.0, 10.0])
def test_a_budget_closes_within_what_storing_explains(
    on_disk: CubePlace, rounded: tuple[str, ...], off: float
) -> None:
    """Snow of metres, from millimetres of what the budget counts as runoff; one day is ``off`` by some mm."""
    layout = map_layout(members=(5,), tile=(8, 12), rounded=dict.fromkeys(rounded, KEPT_BITS))
    fill_with_receipts(on_disk, layout)
    (tile,) = layout.tiles
    shape = (layout.period.n_days, int(layout.grid.mask.sum()))
    gain = np.random.default_rng(3).uniform(0, 50, shape).astype(np.float32)
    snow = np.float32(2000) + np.cumsum(gain, axis=0, dtype=np.float32)
    gain[5, 2] += off
    sink, checksums = Sink.open(on_disk.url, layout, on_disk.options), []
    for period in layout.period.blocks(4):
        days = slice(period.first - PERIOD.first, period.first - PERIOD.first + period.n_days)
        values = block(layout, tile, period)
        values |= {"runoff": gain[None, days], "snow_water_equivalent": snow[None, days]}
        checksums.append(sink.write(tile, period, values))
    ledger = Ledger(on_disk.url, on_disk.options)
    (one,) = ledger.covered()[tile.name]
    (before,) = ledger.receipts([one])
    ledger.record(tile.name, PERIOD, replace(before, blocks=tuple(checksums)))
    found = verify_cube(on_disk.url, on_disk.options, budget=BUDGET)
    assert found.sound
    assert found.complete == (off == 0)
    assert (found.residual > 1e-3) == bool(rounded or off)


def test_nothing_is_written_and_no_cube_is_no_cube(on_disk: CubePlace) -> None:
    with pytest.raises(StoreError, match="no complete cube"):
        verify_cube(on_disk.url, on_disk.options)
    assert not list_objects(on_disk.url, on_disk.options)
    fill_with_receipts(on_disk, map_layout())
    before = on_disk.versions()
    verify_cube(on_disk.url, on_disk.options)
    assert on_disk.versions() == before
