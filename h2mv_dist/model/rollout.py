"""Running models over time: spin-up, and long periods in blocks of days."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from h2mv_dist.model.base import Batch, ProcessModel, Result, State, detach


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


@torch.no_grad()
def run_block(
    models: Sequence[ProcessModel],
    block: Batch,
    states: Sequence[State],
    receive: Callable[[int, Result], None],
) -> list[State]:
    """Run several models over the same block of days, without gradients; returns their states after it.

    Args:
        models: the members.
        block: forcing and static features.
        states: of each member before the block.
        receive: takes what it needs of each member's result, which is gone when the next member runs.
    """
    members = enumerate(zip(models, states, strict=True))
    return [_run(model, block, state, partial(receive, k)) for k, (model, state) in members]


def _run(model: ProcessModel, block: Batch, state: State, receive: Callable[[Result], None]) -> State:
    result: Result = model(block, state)
    receive(result)
    return result.state
