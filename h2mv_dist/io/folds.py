"""Folds: which cells and periods train, validate and test a model; statistics of the training part.

Role maps are [fold, *space]. Cells are numbered 0 .. n_land - 1, row-major over land.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Final

import numpy as np
from numpy.typing import NDArray

from h2mv_dist.config import Assignment, FoldSettings, Settings
from h2mv_dist.errors import ConfigError, DataError, describe
from h2mv_dist.grid import BoolArray, FloatArray, Grid, IntArray, Period
from h2mv_dist.io.cache import Series, StagedCells
from h2mv_dist.io.times import StepAxis
from h2mv_dist.spec import Float32Array, Moments, Scaler, moments

SEA: Final = 0
TRAINING: Final = 1
VALIDATION: Final = 2
TEST: Final = 3

_ROLES: Final = {TRAINING: "train", VALIDATION: "validation", TEST: "test"}
_TEST_SETS: Final = 13
"""Blocks are split into this many sets, of which the first one tests (published)."""

_BLOCK_BYTES: Final = 2**25
"""What one block of cells may take in memory while statistics are computed."""


@dataclass(frozen=True, slots=True, eq=False)
class RoleBlock:
    """Cells that have a role in some periods.

    Attributes:
        role: "train", "validation" or "test".
        cells: True for the cells it holds, [cell].
        periods: when; None for always.
    """

    role: str
    cells: BoolArray
    periods: tuple[Period, ...] | None

    def covers(self, axis: StepAxis) -> BoolArray:
        """Whether each step lies wholly inside one of the periods, [step]."""
        if self.periods is None:
            return np.ones(len(axis), bool)
        first, stop = axis.ranges()
        inside = [(first >= p.first) & (stop <= p.first + p.n_days) for p in self.periods]
        return np.asarray(np.logical_or.reduce(inside))

    def overlaps(self, other: "RoleBlock") -> bool:
        """Whether both hold a common cell on a common day."""
        if not (self.cells & other.cells).any():
            return False
        if self.periods is None or other.periods is None:
            return True
        return any(a.start < b.stop and b.start < a.stop for a in self.periods for b in other.periods)


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """A role for each cell and period; what no assignment holds has no role."""

    index: int
    assignments: tuple[RoleBlock, ...]

    def cells(self, role: str) -> IntArray:
        """Positions of the cells that have the role in any period, ascending, [cell]."""
        blocks = [block.cells for block in self.assignments if block.role == role]
        return np.flatnonzero(np.logical_or.reduce(blocks)) if blocks else np.empty(0, np.int64)

    def observed(self, role: str, cells: IntArray, axis: StepAxis) -> BoolArray:
        """Where a step (all its days) lies in a period with this role for this cell, [cell, step].

        Args:
            role: "train", "validation" or "test".
            cells: positions among the land cells, [cell].
            axis: the steps.
        """
        counted = np.zeros((len(cells), len(axis)), bool)
        for block in self.assignments:
            if block.role == role:
                counted |= block.cells[cells][:, None] & block.covers(axis)[None, :]
        return counted


def spatial_block_roles(
    mask: BoolArray, n_folds: int = 10, block: int = 5, seed: int = 1
) -> NDArray[np.int8]:
    """Roles of spatial block cross-validation, [fold, lat, lon]: SEA, TRAINING, VALIDATION or TEST.

    The ids of all blocks, sea and ragged edges included, are shuffled and split into 13 sets, the first of
    which tests every fold; a fresh list of all ids, shuffled by the same generator, is split into ``n_folds``
    sets, and fold k validates on set k. Test blocks stay test.

    Args:
        mask: True on land, [lat, lon], from the first stored row.
        n_folds: number of folds.
        block: edge of a block, in cells.
        seed: of the generator.
    """
    ids = _block_ids(mask.shape, block)
    n_blocks = int(ids.max()) + 1
    # domain.md, section 5, is defined by the legacy generator
    rng = np.random.RandomState(seed)
    test = _shuffled_sets(rng, n_blocks, _TEST_SETS)[0]
    validation = _shuffled_sets(rng, n_blocks, n_folds)
    roles = np.full((n_folds, *mask.shape), TRAINING, np.int8)
    for k, blocks in enumerate(validation):
        roles[k][np.isin(ids, blocks)] = VALIDATION
    roles[:, np.isin(ids, test)] = TEST
    roles[:, ~mask] = SEA
    return roles


def _block_ids(shape: tuple[int, ...], block: int) -> IntArray:
    """Row-major number of the block each cell lies in, [lat, lon]."""
    rows, columns = (np.arange(n) // block for n in shape)
    ids: IntArray = rows[:, None] * (columns[-1] + 1) + columns[None, :]
    return ids


def _shuffled_sets(rng: np.random.RandomState, n_blocks: int, n_sets: int) -> list[IntArray]:
    ids = np.arange(n_blocks)
    rng.shuffle(ids)
    return np.array_split(ids, n_sets)


def chosen_folds(settings: Settings) -> tuple[int, ...]:
    """The folds to train.

    Raises:
        ConfigError: a fold that the settings do not define.
    """
    count = settings.folds.count
    folds = settings.training.folds if settings.training.folds is not None else tuple(range(count))
    unknown = [fold for fold in folds if not 0 <= fold < count]
    if unknown or not folds:
        raise ConfigError(
            f"training.folds = {list(folds)}: expected fold numbers from 0 to {count - 1}, at least one"
        )
    return folds


def make_folds(grid: Grid, settings: FoldSettings) -> tuple[Fold, ...]:
    """The folds of a grid: as settings list them, else spatial blocks.

    Raises:
        ConfigError: a cell grid without explicit folds, a cell that is not there, a cell with two roles on
            one day, or a fold without training or validation cells.
    """
    if settings.explicit is not None:
        folds = tuple(_explicit_fold(k, a, grid.n_land) for k, a in enumerate(settings.explicit))
    else:
        folds = _block_folds(grid, settings)
    for fold in folds:
        _check(fold)
    return folds


def _block_folds(grid: Grid, settings: FoldSettings) -> tuple[Fold, ...]:
    if grid.dims != ("lat", "lon"):
        raise ConfigError(
            describe(
                "spatial blocks need a lat x lon grid",
                where="folds",
                expected="folds.explicit: one list of assignments a fold",
                actual=f"a grid of {grid.n_land} cells without rows and columns",
                fix='list them, such as explicit = [[{role = "train", cells = [0, 1]}, ...], ...]',
            )
        )
    roles = spatial_block_roles(grid.mask, settings.n_folds, settings.block, settings.seed)
    return tuple(
        Fold(k, tuple(RoleBlock(name, on_land == role, None) for role, name in _ROLES.items()))
        for k, on_land in enumerate(roles[:, grid.mask])
    )


def _explicit_fold(index: int, assignments: tuple[Assignment, ...], n_cells: int) -> Fold:
    return Fold(index, tuple(_role_block(index, a, n_cells) for a in assignments))


def _role_block(index: int, assignment: Assignment, n_cells: int) -> RoleBlock:
    cells = np.ones(n_cells, bool)
    if assignment.cells is not None:
        chosen = np.asarray(assignment.cells, np.int64)
        wrong = chosen[(chosen < 0) | (chosen >= n_cells)]
        if wrong.size:
            raise ConfigError(
                describe(
                    "a fold names a cell that is not there",
                    where=f"folds.explicit[{index}], role {assignment.role}",
                    expected=f"positions among the land cells, 0 to {n_cells - 1}",
                    actual=", ".join(map(str, wrong[:10])),
                    fix="count land cells row-major, from 0",
                )
            )
        cells = np.isin(np.arange(n_cells), chosen)
    return RoleBlock(assignment.role, cells, assignment.periods)


def _check(fold: Fold) -> None:
    for role in ("train", "validation"):
        if not fold.cells(role).size:
            raise ConfigError(
                describe(
                    f"fold {fold.index} has no {role} cell",
                    where="folds",
                    expected="at least one training and one validation cell in every fold",
                    actual="none",
                    fix="use fewer folds or smaller blocks, or list the cells in folds.explicit",
                )
            )
    for a, b in combinations(fold.assignments, 2):
        if a.role != b.role and a.overlaps(b):
            raise ConfigError(
                describe(
                    f"fold {fold.index} gives a cell two roles on one day",
                    where="folds.explicit",
                    expected="at most one role for each cell and day",
                    actual=f"{a.role} and {b.role}",
                    fix="separate their cells or their periods",
                )
            )


# -------------------- statistics


@dataclass(frozen=True, slots=True, eq=False)
class _Sums:
    """Count, mean and sum of squared deviations of each column, float64, [column]."""

    count: FloatArray
    mean: FloatArray
    squares: FloatArray

    def plus(self, other: "_Sums") -> "_Sums":
        """Statistics of both parts together (Chan et al., 1979)."""
        count = self.count + other.count
        share = other.count / np.maximum(count, 1.0)
        gap = other.mean - self.mean
        squares = self.squares + other.squares + gap**2 * self.count * share
        return _Sums(count, self.mean + gap * share, squares)

    @staticmethod
    def of(values: Float32Array, counted: BoolArray) -> "_Sums":
        """Statistics over all axes but the last.

        Args:
            values: [..., column].
            counted: which of them count, [..., column].
        """
        axes = tuple(range(values.ndim - 1))
        count = counted.sum(axis=axes, dtype=np.float64)
        safe = np.maximum(count, 1.0)
        mean = np.where(counted, values, 0).sum(axis=axes, dtype=np.float64) / safe
        gaps = np.where(counted, values - mean, 0.0)
        return _Sums(count, mean, (gaps**2).sum(axis=axes))


def fit_scaler(staged: StagedCells, fold: Fold) -> Scaler:
    """Mean and standard deviation over training cells and periods; of targets, over what training observes.

    Raises:
        DataError: a target has no observation in the training part of the fold.
    """
    cells = fold.cells("train")
    static = np.asarray(staged.static[cells])
    return Scaler(
        _moments(_forcing_sums(staged, fold, cells), staged.forcing_names, fold),
        _moments(_Sums.of(static, np.ones(static.shape, bool)), staged.static_names, fold),
        {name: _moments(_target_sums(s, fold, cells), (name,), fold) for name, s in staged.targets.items()},
    )


def require_observations(staged: StagedCells, fold: Fold, role: str) -> None:
    """Check that anything at all was observed in a role: a loss over nothing would be 0, the best there is.

    Raises:
        DataError: every target is missing for all cells and periods of the role.
    """
    cells = fold.cells(role)
    if not any(_is_observed(series, fold, role, cells) for series in staged.targets.values()):
        raise DataError(
            describe(
                f"nothing was observed for {role}",
                where=f"fold {fold.index}",
                expected=f"observations of {', '.join(staged.targets)} for some of {len(cells)} cells",
                actual="none in the periods with this role",
                fix="choose longer periods or more cells in folds.explicit; a month counts only as a whole",
            )
        )


def _is_observed(series: Series, fold: Fold, role: str, cells: IntArray) -> bool:
    parts = _parts(cells, series.values[:1].nbytes)
    return any(
        bool((np.isfinite(series.values[part]) & fold.observed(role, part, series.axis)).any())
        for part in parts
    )


def _forcing_sums(staged: StagedCells, fold: Fold, cells: IntArray) -> _Sums:
    days = StepAxis(staged.period.days(), "daily")
    n_columns = staged.forcing.shape[2]
    total = _nothing(n_columns)
    for part in _parts(cells, 8 * len(days) * n_columns):
        values = np.asarray(staged.forcing[part])
        counted = fold.observed("train", part, days)[..., None]
        total = total.plus(_Sums.of(values, np.broadcast_to(counted, values.shape)))
    return total


def _target_sums(series: Series, fold: Fold, cells: IntArray) -> _Sums:
    total = _nothing(1)
    for part in _parts(cells, 8 * len(series.axis)):
        values = np.asarray(series.values[part])
        counted = fold.observed("train", part, series.axis) & ~np.isnan(values)
        total = total.plus(_Sums.of(values[..., None], counted[..., None]))
    return total


def _nothing(n_columns: int) -> _Sums:
    return _Sums(*(np.zeros(n_columns) for _ in range(3)))


def _parts(cells: IntArray, bytes_a_cell: int) -> Iterator[IntArray]:
    """Cut cells into parts that fit into memory."""
    size = max(_BLOCK_BYTES // bytes_a_cell, 1)
    for start in range(0, len(cells), size):
        yield cells[start : start + size]


def _moments(sums: _Sums, names: tuple[str, ...], fold: Fold) -> Moments:
    empty = [name for name, count in zip(names, sums.count, strict=True) if count == 0]
    if empty:
        raise DataError(
            describe(
                f"fold {fold.index} trains without any value of {', '.join(empty)}",
                where="folds",
                expected="at least one value among training cells and periods",
                actual="none",
                fix="choose other folds or another data.period",
            )
        )
    return moments(sums.mean, np.sqrt(sums.squares / sums.count), names)
