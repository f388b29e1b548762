"""Several models of one kind over the same days: the members of a cube.

On a GPU their weights and scalers are stacked, and each product and each law is one call for all of them. On
a CPU they run one after the other: what they compute then stays in the core's caches, which is faster.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap

from h2mv_dist.model.base import Batch, ProcessModel, Result, State
from h2mv_dist.model.rollout import warm_up

Receive = Callable[[int, Result], None]
"""Takes what it needs of a member's result, which is gone when the next member's comes."""

_Outputs = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], State]


class Ensemble:
    """Members that read the same forcing, each with its own weights, scaler and state.

    States are stacked: one tensor [member, cell, ...] for each name in ``ModelSpec.state``.

    Attributes:
        models: the members.
        device: where they run.
        together: whether all run in the same calls; then as written, not compiled.
    """

    def __init__(
        self,
        models: Sequence[ProcessModel],
        device: torch.device,
        together: bool | None = None,
        *,
        compiled: bool = False,
    ) -> None:
        self.models = tuple(model.to(device).eval() for model in models)
        self.device = device
        self.together = device.type == "cuda" if together is None else together
        for model in self.models:
            model.compiled = compiled and not self.together
        weights, self._buffers = stack_module_state(list(self.models))
        self._weights = {name: weight.detach() for name, weight in weights.items()}

    def warm_up(self, keep: Collection[str] | None) -> None:
        """Compile what :meth:`run` will need for these outputs, or find it on disk; only if that is to be."""
        if self.models[0].compiled:
            warm_up(self.models[0], keep)

    def initial_state(self, n_cells: int) -> State:
        """Empty stores and untouched memory."""
        states = [model.initial_state(n_cells) for model in self.models]
        return tuple(torch.stack(parts) for parts in zip(*states, strict=True))

    @torch.no_grad()
    def run(self, block: Batch, state: State, receive: Receive, keep: Collection[str] | None = None) -> State:
        """Run all members over a block of days, without gradients.

        Args:
            block: forcing and static features.
            state: before its first day.
            receive: is given each member's result, on the ensemble's device.
            keep: daily outputs to compute; all if None.

        Returns:
            The state after its last day.
        """
        block = block.to(self.device)
        run = self._run_together if self.together else self._run_each
        return run(block, state, receive, keep)

    def _run_each(self, block: Batch, state: State, receive: Receive, keep: Collection[str] | None) -> State:
        def one(member: int) -> State:
            result: Result = self.models[member](block, tuple(part[member] for part in state), keep)
            receive(member, result)
            # its outputs go before the next member's come, which then find their place still in the caches
            return result.state

        after = [one(member) for member in range(len(self.models))]
        return tuple(torch.stack(parts) for parts in zip(*after, strict=True))

    def _run_together(
        self, block: Batch, state: State, receive: Receive, keep: Collection[str] | None
    ) -> State:
        def one(weights: dict[str, Tensor], buffers: dict[str, Tensor], *state: Tensor) -> _Outputs:
            result: Result = functional_call(self.models[0], (weights, buffers), (block, state, keep))
            return dict(result.daily), dict(result.static), dict(result.constants), result.state

        *outputs, after = vmap(one)(self._weights, self._buffers, *state)
        for member in range(len(self.models)):
            daily, static, constants = ({n: v[member] for n, v in group.items()} for group in outputs)
            receive(member, Result(daily, static, constants, tuple(part[member] for part in after)))
        return tuple(after)
