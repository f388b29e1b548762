"""Folds: the published blocks to the bit, roles per cell and period, statistics of the training part only."""

from datetime import date
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h2mv_dist.config import Assignment, FoldSettings
from h2mv_dist.errors import ConfigError, DataError
from h2mv_dist.grid import FloatArray, Grid, Period
from h2mv_dist.io import folds as folds_module
from h2mv_dist.io.cache import Series, StagedCells
from h2mv_dist.io.folds import (
    SEA,
    TEST,
    TRAINING,
    VALIDATION,
    Fold,
    RoleBlock,
    fit_scaler,
    make_folds,
    require_observations,
    spatial_block_roles,
)
from h2mv_dist.io.times import StepAxis

YEAR_1 = Period(date(2003, 1, 1), date(2004, 1, 1))
YEAR_2 = Period(date(2004, 1, 1), date(2005, 1, 1))
BOTH = Period(YEAR_1.start, YEAR_2.stop)


def test_published_blocks_are_reproduced_exactly(shared: Path) -> None:
    golden = np.load(shared / "golden" / "folds.npz", allow_pickle=False)
    roles = spatial_block_roles(golden["mask"])
    assert roles.dtype == golden["role"].dtype
    np.testing.assert_array_equal(roles, golden["role"])


shapes = st.tuples(st.integers(1, 23), st.integers(1, 23))


@given(shapes, st.integers(1, 12), st.integers(1, 7), st.integers(0, 5))
def test_blocks_are_whole_and_validate_once(
    shape: tuple[int, int], n_folds: int, block: int, seed: int
) -> None:
    mask = np.random.default_rng(seed).random(shape) > 0.4
    roles = spatial_block_roles(mask, n_folds, block, seed)
    assert roles.shape == (n_folds, *shape)
    np.testing.assert_array_equal(roles == SEA, np.broadcast_to(~mask, roles.shape))
    tested = (roles == TEST).any(0)
    np.testing.assert_array_equal(roles == TEST, np.broadcast_to(tested, roles.shape))
    np.testing.assert_array_equal((roles == VALIDATION).sum(0), (mask & ~tested).astype(int))
    for row in range(0, shape[0], block):
        for column in range(0, shape[1], block):
            box = roles[:, row : row + block, column : column + block].reshape(n_folds, -1)
            assert all(len(set(fold[fold != SEA].tolist())) <= 1 for fold in box)


def test_ragged_edge_blocks_are_kept() -> None:
    roles = spatial_block_roles(np.ones((7, 11), bool), n_folds=2, block=5)
    assert not (roles == SEA).any()
    np.testing.assert_array_equal(roles[:, 5:, 10], np.repeat(roles[:, 5:6, 10], 2, 1))


def lat_lon_grid(n_lat: int = 20, n_lon: int = 30) -> Grid:
    mask = np.random.default_rng(0).random((n_lat, n_lon)) > 0.3
    return Grid.lat_lon(np.arange(float(n_lat)), np.arange(float(n_lon)), mask)


def cell_grid(n: int) -> Grid:
    return Grid(("cell",), np.arange(float(n)), np.arange(float(n)), np.ones(n, bool), np.ones(n))


def test_block_folds_number_land_cells_row_major() -> None:
    grid = lat_lon_grid()
    chosen = FoldSettings(n_folds=4, block=3)
    roles = spatial_block_roles(grid.mask, 4, 3, 1)
    for k, fold in enumerate(make_folds(grid, chosen)):
        assert fold.index == k
        on_land = roles[k].ravel()[grid.land_index()]
        for role, number in (("train", TRAINING), ("validation", VALIDATION), ("test", TEST)):
            np.testing.assert_array_equal(fold.cells(role), np.flatnonzero(on_land == number))


def explicit(*assignments: Assignment) -> FoldSettings:
    return FoldSettings(explicit=(assignments,))


TRAIN_TWO = Assignment(role="train", cells=(0, 1))


def test_basins_without_explicit_folds_are_told_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"need a lat x lon grid(.|\n)*folds\.explicit(.|\n)*explicit = "):
        make_folds(cell_grid(5), FoldSettings())


@pytest.mark.parametrize("cell", [5, -1])
def test_a_cell_that_is_not_there_is_named(cell: int) -> None:
    chosen = explicit(TRAIN_TWO, Assignment(role="validation", cells=(2, cell)))
    with pytest.raises(ConfigError, match=rf"not there(.|\n)*0 to 4(.|\n)*actual: +{cell}\n"):
        make_folds(cell_grid(5), chosen)


@pytest.mark.parametrize(
    ("role", "missing"), [("train", "validation"), ("validation", "train"), ("test", "train")]
)
def test_a_fold_needs_training_and_validation_cells(role: str, missing: str) -> None:
    with pytest.raises(ConfigError, match=f"fold 0 has no {missing} cell"):
        make_folds(cell_grid(5), FoldSettings.model_validate({"explicit": [[{"role": role}]]}))


def test_one_block_fold_has_nothing_left_to_train_on() -> None:
    with pytest.raises(ConfigError, match="fold 0 has no train cell"):
        make_folds(lat_lon_grid(), FoldSettings(n_folds=1))


def test_a_cell_cannot_train_and_validate_on_one_day() -> None:
    late = Period(date(2003, 12, 31), date(2005, 1, 1))
    chosen = explicit(
        Assignment(role="train", periods=(YEAR_1,)),
        Assignment(role="validation", cells=(3,), periods=(late,)),
    )
    with pytest.raises(ConfigError, match=r"two roles on one day(.|\n)*train and validation"):
        make_folds(cell_grid(5), chosen)


def test_roles_by_time_count_only_steps_inside_one_period() -> None:
    chosen = explicit(
        Assignment(role="train", periods=(YEAR_1,)),
        Assignment(role="validation", cells=(1, 3), periods=(Period(date(2004, 1, 1), date(2004, 2, 29)),)),
    )
    (fold,) = make_folds(cell_grid(5), chosen)
    months = np.arange("2003-11", "2004-04", dtype="datetime64[M]").astype("datetime64[D]").astype(np.int64)
    axis = StepAxis(months, "monthly")
    cells = np.array([3, 0])
    assert fold.observed("train", cells, axis).tolist() == [[True, True, False, False, False]] * 2
    # February 2004 has a 29th day, which lies outside
    validated = fold.observed("validation", cells, axis)
    assert validated.tolist() == [[False, False, True, False, False], [False] * 5]
    assert not fold.observed("test", cells, axis).any()
    np.testing.assert_array_equal(fold.cells("validation"), [1, 3])


@given(st.data())
def test_a_step_is_observed_when_all_its_days_are(data: st.DataObject) -> None:
    """Against a table of one role a cell and day."""
    n_cells, first = 4, BOTH.first
    lengths = data.draw(st.lists(st.integers(1, 600), min_size=1, max_size=3))
    periods = tuple(next(BOTH.blocks(n)) for n in lengths)
    blocks = tuple(
        RoleBlock(
            "train", np.array(data.draw(st.lists(st.booleans(), min_size=n_cells, max_size=n_cells))), (p,)
        )
        for p in periods
    )
    fold = Fold(0, blocks)
    axis = StepAxis(np.arange(first, first + BOTH.n_days, dtype=np.int64), "daily")
    table = np.zeros((n_cells, BOTH.n_days), bool)
    for block, period in zip(blocks, periods, strict=True):
        table[np.ix_(block.cells, np.arange(period.n_days) + period.first - first)] = True
    cells = np.arange(n_cells)
    np.testing.assert_array_equal(fold.observed("train", cells, axis), table)
    np.testing.assert_array_equal(fold.cells("train"), np.flatnonzero(table.any(1)))


# -------------------- statistics


def staged_cells(seed: int = 0, n_cells: int = 9, scale: float = 1.0) -> StagedCells:
    """Cells with daily forcing and a monthly target with gaps."""
    rng = np.random.default_rng(seed)
    months = np.arange("2003-01", "2005-01", dtype="datetime64[M]").astype("datetime64[D]").astype(np.int64)
    runoff = rng.normal(3, 2, (n_cells, months.size)).astype(np.float32)
    runoff[rng.random(runoff.shape) < 0.3] = np.nan
    return StagedCells(
        path=Path(),
        grid=cell_grid(n_cells),
        period=BOTH,
        forcing_names=("net_radiation", "precipitation"),
        static_names=("clay", "sand", "slope"),
        forcing=(rng.normal([300, 1], [10 * scale, 2], (n_cells, BOTH.n_days, 2))).astype(np.float32),
        static=rng.normal(5, 3, (n_cells, 3)).astype(np.float32),
        targets=MappingProxyType({"runoff": Series(StepAxis(months, "monthly"), runoff)}),
    )


def by_space_and_time() -> Fold:
    """Cells 0-5 train in 2003, cells 4-5 also in 2004; the others validate."""
    chosen = explicit(
        Assignment(role="train", cells=(0, 1, 2, 3, 4, 5), periods=(YEAR_1,)),
        Assignment(role="train", cells=(4, 5), periods=(YEAR_2,)),
        Assignment(role="validation", cells=(6, 7, 8)),
    )
    return make_folds(cell_grid(9), chosen)[0]


def expected_values(staged: StagedCells) -> tuple[FloatArray, FloatArray]:
    """Forcing [value, var] and runoff [value] of the training part, put together by hand."""
    year_1, year_2 = slice(0, 365), slice(365, None)
    parts = [staged.forcing[:6, year_1].reshape(-1, 2), staged.forcing[4:6, year_2].reshape(-1, 2)]
    runoff = staged.targets["runoff"].values
    observed = np.concatenate([runoff[:6, :12].ravel(), runoff[4:6, 12:].ravel()])
    return np.concatenate(parts).astype(np.float64), observed[~np.isnan(observed)].astype(np.float64)


@pytest.mark.parametrize("block_bytes", [1, 20_000, 2**25])
def test_statistics_are_those_of_the_training_part(block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folds_module, "_BLOCK_BYTES", block_bytes)
    staged = staged_cells()
    scaler = fit_scaler(staged, by_space_and_time())
    forcing, runoff = expected_values(staged)
    np.testing.assert_allclose(scaler.forcing.mean, forcing.mean(0), rtol=1e-7)
    np.testing.assert_allclose(scaler.forcing.std, forcing.std(0), rtol=1e-7)
    np.testing.assert_allclose(scaler.static.mean, staged.static[:6].mean(0, dtype=np.float64), rtol=1e-7)
    np.testing.assert_allclose(scaler.static.std, staged.static[:6].std(0, dtype=np.float64), rtol=1e-7)
    np.testing.assert_allclose(scaler.targets["runoff"].mean, runoff.mean(), rtol=1e-7)
    np.testing.assert_allclose(scaler.targets["runoff"].std, runoff.std(), rtol=1e-7)


@settings(max_examples=10)
@given(st.floats(1e-3, 1e3))
def test_statistics_keep_their_digits_far_from_zero(scale: float) -> None:
    """A spread that is small against the mean (kelvin) loses everything in sums of squares of float32."""
    staged = staged_cells(scale=scale)
    forcing, _ = expected_values(staged)
    std = fit_scaler(staged, by_space_and_time()).forcing.std[0]
    np.testing.assert_allclose(std, forcing[:, 0].std(), rtol=1e-6)


def test_what_is_not_training_does_not_matter() -> None:
    staged, fold = staged_cells(), by_space_and_time()
    before = fit_scaler(staged, fold)
    staged.forcing[6:] = np.inf
    staged.forcing[:4, 365:] = np.nan
    staged.static[6:] = np.nan
    staged.targets["runoff"].values[:4, 12:] = 1e9
    assert fit_scaler(staged, fold) == before


def test_a_constant_feature_is_scaled_by_one() -> None:
    staged = staged_cells()
    staged.static[:, 1] = 7.0
    with pytest.warns(UserWarning, match="no spread in sand"):
        scaler = fit_scaler(staged, by_space_and_time())
    assert (scaler.static.mean[1], scaler.static.std[1]) == (7.0, 1.0)


def test_a_target_without_training_values_is_named() -> None:
    staged = staged_cells()
    staged.targets["runoff"].values[:6] = np.nan
    with pytest.raises(DataError, match=r"fold 0 trains without any value of runoff"):
        fit_scaler(staged, by_space_and_time())


def test_a_role_in_which_nothing_was_observed_is_refused() -> None:
    staged = staged_cells()
    short = [
        Assignment(role="train", cells=(0, 1)),
        Assignment(role="validation", cells=(2, 3), periods=(Period(date(2003, 12, 5), date(2003, 12, 30)),)),
    ]
    (fold,) = make_folds(staged.grid, FoldSettings(explicit=(tuple(short),)))
    require_observations(staged, fold, "train")
    with pytest.raises(DataError, match=r"nothing was observed for validation(.|\n)*fold 0(.|\n)*runoff"):
        require_observations(staged, fold, "validation")
