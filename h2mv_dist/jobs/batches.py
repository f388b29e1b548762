"""From staged cells (numpy) to a Batch (torch) on a rank's device: where io and model meet.

Cells are positions among the land cells. A fold's cells stay on the GPU if they leave room there for a step;
else each batch is read from the host's memory maps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from h2mv_dist.errors import JobError
from h2mv_dist.io.cache import Series, StagedCells
from h2mv_dist.io.folds import Fold
from h2mv_dist.io.times import StepAxis
from h2mv_dist.model.base import Batch, Steps, Target, steps_between
from h2mv_dist.spec import Float32Array

Cells = NDArray[np.int64]
ReadRows = Callable[[Cells], Float32Array]

TRAINING_ROLES: Final = ("train", "validation")
RESIDENT_SHARE: Final = 0.5
"""Of the GPU's free memory: what a fold's cells may take at most, however little a step needs."""
LOADED_AT_ONCE: Final = 256
"""Cells that are copied to the GPU together."""


class Rows(Protocol):
    """One array of a fold's cells."""

    def take(self, cells: Cells) -> Tensor:
        """The rows of these cells on the device, [cell, ...]."""


@dataclass(frozen=True, slots=True, eq=False)
class HostRows:
    """Rows that are read when they are asked for."""

    read: ReadRows
    device: torch.device

    def take(self, cells: Cells) -> Tensor:
        """The rows of these cells on the device, [cell, ...]."""
        rows = torch.from_numpy(self.read(cells))
        if self.device.type == "cuda" and len(cells):
            rows = rows.pin_memory()
        return rows.to(self.device, non_blocking=True)


@dataclass(frozen=True, slots=True, eq=False)
class DeviceRows:
    """Rows that stay on the device.

    Attributes:
        cells: whose rows these are, ascending.
        table: [cell, ...].
    """

    cells: Cells
    table: Tensor

    @staticmethod
    def load(read: ReadRows, cells: Cells, device: torch.device) -> "DeviceRows":
        """Copy the rows of ``cells`` to the device."""
        shape = read(cells[:0]).shape[1:]
        table = torch.empty((len(cells), *shape), device=device)
        for first in range(0, len(cells), LOADED_AT_ONCE):
            part = slice(first, first + LOADED_AT_ONCE)
            table[part] = torch.from_numpy(read(cells[part]))
        return DeviceRows(cells, table)

    def take(self, cells: Cells) -> Tensor:
        """The rows of these cells on the device, [cell, ...]."""
        rows = np.searchsorted(self.cells, cells)
        if not np.array_equal(self.cells[rows.clip(max=len(self.cells) - 1)], cells):
            raise JobError(f"the device holds {len(self.cells)} cells, but not all that a batch needs")
        return self.table.index_select(0, torch.from_numpy(rows).to(self.table.device))


class CellBank:
    """The cells of one fold, ready to be gathered into batches on one device.

    Args:
        staged: every land cell.
        fold: says which cells and periods have which role.
        device: of the batches.
        roles: batches may be asked for these.
        resident: keep the cells on the device.
    """

    def __init__(
        self,
        staged: StagedCells,
        fold: Fold,
        device: torch.device,
        *,
        roles: Sequence[str] = TRAINING_ROLES,
        resident: bool,
    ) -> None:
        def rows(read: ReadRows, cells: Cells) -> Rows:
            return DeviceRows.load(read, cells, device) if resident else HostRows(read, device)

        self.resident = resident
        everyone = _cells_of(fold, roles)
        self.forcing = rows(partial(_chosen, staged.forcing), everyone)
        self.static = rows(partial(_chosen, staged.static), everyone)
        self.targets = {
            role: {
                name: rows(partial(_counted, fold, role, series), fold.cells(role))
                for name, series in staged.targets.items()
            }
            for role in roles
        }
        self.means = {
            name: rows(partial(_known_mean, series), everyone) for name, series in staged.targets.items()
        }
        first = staged.period.first
        self.steps = {n: model_steps(s.axis, first).to(device) for n, s in staged.targets.items()}

    @staticmethod
    def open(staged: StagedCells, fold: Fold, device: torch.device, step_bytes: int) -> "CellBank":
        """Keep the fold's cells on a GPU that has room for them beside a step, which needs ``step_bytes``."""
        resident = device.type == "cuda" and fits(
            staged, fold, torch.cuda.mem_get_info(device)[0], step_bytes
        )
        return CellBank(staged, fold, device, resident=resident)

    def gather(self, role: str, cells: Cells) -> Batch:
        """The given cells over all days; targets without this role are NaN, so they carry no weight.

        Args:
            role: "train", "validation" or "test", one the bank was opened for.
            cells: some that have the role, in any order, [cell].
        """
        rows = self.targets[role]
        targets = {
            name: Target(rows[name].take(cells), steps, self.means[name].take(cells))
            for name, steps in self.steps.items()
        }
        return Batch(self.forcing.take(cells), self.static.take(cells), targets)


def gather(staged: StagedCells, fold: Fold, role: str, cells: Cells) -> Batch:
    """One batch on the CPU; see :meth:`CellBank.gather`."""
    return CellBank(staged, fold, torch.device("cpu"), roles=(role,), resident=False).gather(role, cells)


def fits(staged: StagedCells, fold: Fold, free_bytes: int, step_bytes: int) -> bool:
    """Whether the cells a fold trains and validates on leave enough of a device's free memory for a step."""
    series = [s.values for s in staged.targets.values()]
    size = _size([staged.forcing, staged.static], len(_cells_of(fold, TRAINING_ROLES)))
    size += sum(_size(series, len(fold.cells(role))) for role in TRAINING_ROLES)
    return size <= min(RESIDENT_SHARE * free_bytes, free_bytes - step_bytes)


def model_steps(axis: StepAxis, first_day: int) -> Steps:
    """Positions of a target's steps among days that start at ``first_day`` (days since 1970-01-01)."""
    first, stop = axis.ranges()
    return steps_between(torch.from_numpy(first - first_day), torch.from_numpy(stop - first_day))


def _cells_of(fold: Fold, roles: Sequence[str]) -> Cells:
    return reduce(np.union1d, (fold.cells(role) for role in roles))


def _size(arrays: Sequence[Float32Array], n_cells: int) -> int:
    return sum(n_cells * values.nbytes // max(len(values), 1) for values in arrays)


def _chosen(values: Float32Array, cells: Cells) -> Float32Array:
    return np.asarray(values[cells])


def _counted(fold: Fold, role: str, series: Series, cells: Cells) -> Float32Array:
    counted = fold.observed(role, cells, series.axis)
    return np.where(counted, series.values[cells], np.float32(np.nan))


def _known_mean(series: Series, cells: Cells) -> Float32Array:
    """Mean of each cell's observations, whatever their role, [cell]; 0 without any."""
    values = series.values[cells]
    known = np.isfinite(values)
    total = np.where(known, values, 0.0).sum(axis=1, dtype=np.float64)
    means: Float32Array = (total / np.maximum(known.sum(axis=1), 1)).astype(np.float32)
    return means
