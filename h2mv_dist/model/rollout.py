"""Running a model over time without gradients."""

import torch

from h2mv_dist.model.base import Batch, ProcessModel, State, detach


@torch.no_grad()
def spin_up(model: ProcessModel, batch: Batch, n_days: int | None) -> State:
    """State after running the first ``n_days`` days once from empty stores, without gradients.

    Args:
        model: the bare model, not its distributed wrapper.
        batch: at least as long as asked for; its targets are ignored.
        n_days: length of the spin-up; None for all days of the batch, as published.
    """
    state = model.initial_state(batch.n_cells)
    length = batch.n_days if n_days is None else min(n_days, batch.n_days)
    if length == 0:
        return state
    return detach(model(batch.days(0, length), state).state)
