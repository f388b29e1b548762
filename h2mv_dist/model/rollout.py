"""Running a model over time without gradients."""

from collections.abc import Collection
from typing import Final

import torch

from h2mv_dist.model.base import Batch, ProcessModel, State, detach
from h2mv_dist.model.days import BLOCK_DAYS, one_compiles
from h2mv_dist.version import __version__

USUAL_CELLS: Final = 256
"""What code for an open number of cells is made for."""


@torch.no_grad()
def spin_up(model: ProcessModel, batch: Batch, n_days: int | None, keep: Collection[str] = ()) -> State:
    """State after running the first ``n_days`` days once from empty stores, without gradients.

    Args:
        model: the bare model, not its distributed wrapper.
        batch: at least as long as asked for; its targets are ignored.
        n_days: length of the spin-up; None for all days of the batch, as published.
        keep: outputs that are computed and dropped: compiled for what follows, the same code serves here.
    """
    state = model.initial_state(batch.n_cells)
    length = batch.n_days if n_days is None else min(n_days, batch.n_days)
    if length == 0:
        return state
    return detach(model(batch.days(0, length), state, keep).state)


def warm_up(model: ProcessModel, keep: Collection[str] | None, *, gradient: bool = False) -> None:
    """Have a compiled model's blocks compiled, by one process of a machine, or loaded.

    Args:
        model: compiled.
        keep: daily outputs it will be asked for.
        gradient: whether it will be trained, in batches of ``model.width`` cells.
    """
    weight = next(model.parameters())
    n_cells = model.width or USUAL_CELLS
    days = BLOCK_DAYS + 1
    batch = Batch(
        weight.new_zeros(n_cells, days, len(model.scaler.forcing.mean)),
        weight.new_zeros(n_cells, len(model.scaler.static.mean)),
        {},
    )
    names = keep if keep is not None else model.spec.daily
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    made_for = (type(model).__qualname__, shapes, weight.dtype, n_cells, sorted(names), gradient)
    here = (torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())
    made_by = (__version__, torch.__version__, BLOCK_DAYS, here)
    with one_compiles(repr((made_for, made_by))):
        spin_up(model, batch, None, names)
        if gradient:
            outputs = model(batch, model.initial_state(n_cells), keep).daily.values()
            torch.autograd.grad(sum(values.sum() for values in outputs), weight, allow_unused=True)
