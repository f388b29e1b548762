"""The networks: a static encoder and a recurrent cell that also reads the physical states.

Their products, and nothing else, may be computed in a lower precision: parameters, what goes in and what
comes out keep theirs, so physics and states never see it.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

PRECISIONS: Final[Mapping[str, torch.dtype | None]] = MappingProxyType(
    {"float32": None, "bfloat16": torch.bfloat16}
)
"""Setting -> precision of products; None leaves that of their operands."""


class _LoweredProduct(torch.autograd.Function):
    """``left @ right``, computed from lowered factors in both directions.

    Autograd's own casts would add up a weight's gradient over all days in the lowered precision, where small
    summands vanish; here each summand leaves in the precision of the factors.
    """

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, lowered_right: Tensor) -> Tensor:
        lowered_left = left.to(lowered_right.dtype)
        ctx.save_for_backward(lowered_left, lowered_right)
        return (lowered_left @ lowered_right).to(left.dtype)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        lowered_left, lowered_right = ctx.saved_tensors
        lowered = slope.to(lowered_right.dtype)
        left = right = None
        if ctx.needs_input_grad[0]:
            left = (lowered @ lowered_right.T).to(slope.dtype)
        if ctx.needs_input_grad[1]:
            right = (lowered_left.flatten(0, -2).T @ lowered.flatten(0, -2)).to(slope.dtype)
        return left, right, None


class Factor(NamedTuple):
    """The right factor of products, and its copy in their precision; None where that is its own."""

    value: Tensor
    lowered: Tensor | None

    def times(self, left: Tensor) -> Tensor:
        """``left @ value``, of the type of ``left``, [..., column]."""
        if self.lowered is None:
            return left @ self.value
        product: Tensor = _LoweredProduct.apply(left, self.value, self.lowered)  # type: ignore[no-untyped-call]
        return product

    def times_plus(self, left: Tensor, summand: Tensor) -> Tensor:
        """``left @ value + summand``, of the type of ``left``, [row, column]."""
        if self.lowered is None:
            return torch.addmm(summand, left, self.value)
        return self.times(left) + summand


class Network(nn.Module):
    """A network whose products may be computed in a lower precision than their factors have.

    Attributes:
        precision: of products; None for that of their factors.
    """

    precision: torch.dtype | None = None

    def factor(self, weight: Tensor) -> Factor:
        """A weight, ready for products in the network's precision."""
        return Factor(weight, None if self.precision is None else weight.detach().to(self.precision))

    def layer(self, layer: nn.Linear, values: Tensor) -> Tensor:
        """Apply a layer to [row, feature]."""
        return self.factor(layer.weight.T).times_plus(values, layer.bias)


def multiply_in(model: nn.Module, precision: str) -> None:
    """Set the precision of the products of all networks of a model to one of ``PRECISIONS``."""
    for module in model.modules():
        if isinstance(module, Network):
            module.precision = PRECISIONS[precision]


class Encoding(NamedTuple):
    """Condensed features [cell, condensed] and one column a head [cell, head]."""

    condensed: Tensor
    heads: Tensor


class StaticEncoder(Network):
    """Linear -> leaky ReLU -> Linear -> leaky ReLU (condensed) -> Linear (heads)."""

    def __init__(self, features: int, encoder: int, condensed: int, heads: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, encoder)
        self.fc2 = nn.Linear(encoder, condensed)
        self.fc3 = nn.Linear(condensed, heads)

    def forward(self, static: Tensor) -> Encoding:
        """Encode z-scored static features [cell, feature]."""
        encoded = functional.leaky_relu(self.layer(self.fc1, static))
        condensed = functional.leaky_relu(self.layer(self.fc2, encoded))
        return Encoding(condensed, self.layer(self.fc3, condensed))


class Memory(NamedTuple):
    """Hidden and cell state of an LSTM, each [cell, hidden]."""

    hidden: Tensor
    cell: Tensor


class DayWeights(NamedTuple):
    """What every day's products share.

    Attributes:
        feedback: of [hidden, states / scale] in the gates, [hidden + state, 4 hidden].
        heads: of the hidden state in the heads, [hidden, head].
        bias: of the heads, [head].
    """

    feedback: Factor
    heads: Factor
    bias: Tensor


class FeedbackLSTM(Network):
    """An LSTM cell whose last inputs are yesterday's physical states.

    The part of the gates that is known before the first day (``known_gates``) is computed for all days in
    one product; a day then needs one product only, of hidden and physical states.
    """

    def __init__(self, known: int, states: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.lstm_cell = nn.LSTMCell(known + states, hidden)
        self.fc = nn.Linear(hidden, heads)
        self.known = known

    def known_gates(self, forcing: Tensor, static: Tensor) -> Tensor:
        """Gates [time, cell, 4 hidden] from z-scored forcing [cell, time, var] and static [cell, feature]."""
        weight = self.lstm_cell.weight_ih[:, : self.known]
        daily, constant = weight.split([forcing.shape[2], static.shape[1]], dim=1)
        bias = self.lstm_cell.bias_ih + self.lstm_cell.bias_hh
        constant_part = self.factor(constant.T).times(static) + bias
        return self.factor(daily.T).times(forcing.transpose(0, 1)) + constant_part

    def day_weights(self, scale: Tensor) -> DayWeights:
        """Weights for :meth:`step` and :meth:`heads`; physical states are divided by ``scale``, [state]."""
        states = self.lstm_cell.weight_ih[:, self.known :] / scale
        feedback = torch.cat([self.lstm_cell.weight_hh, states], dim=1).T
        return DayWeights(self.factor(feedback), self.factor(self.fc.weight.T), self.fc.bias)

    @staticmethod
    def step(known_gates: Tensor, states: tuple[Tensor, ...], memory: Memory, weights: DayWeights) -> Memory:
        """Advance one day.

        Args:
            known_gates: [cell, 4 hidden], gate order i, f, g, o.
            states: yesterday's physical states, each [cell, 1].
            memory: yesterday's memory.
            weights: from :meth:`day_weights`.
        """
        feedback = torch.cat([memory.hidden, *states], dim=1)
        gates = weights.feedback.times_plus(feedback, known_gates)
        write, keep, candidate, read = gates.chunk(4, dim=1)
        cell = keep.sigmoid() * memory.cell + write.sigmoid() * candidate.tanh()
        return Memory(read.sigmoid() * cell.tanh(), cell)

    @staticmethod
    def heads(hidden: Tensor, weights: DayWeights) -> Tensor:
        """One column a head [cell, head] from today's hidden state [cell, hidden]."""
        return weights.heads.times_plus(hidden, weights.bias)
