"""The networks: a static encoder and a recurrent cell that also reads the physical states.

Their products, and nothing else, may be computed in a lower precision: parameters, what goes in and what
comes out keep theirs, so physics and states never see it.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from h2mv_dist.model import lstm

PRECISIONS: Final[Mapping[str, torch.dtype | None]] = MappingProxyType(
    {"float32": None, "bfloat16": torch.bfloat16}
)
"""Setting -> precision of products; None leaves that of their operands."""


class _LoweredProduct(torch.autograd.Function):
    """``weight @ values``, computed from lowered factors in both directions.

    Autograd's own casts would add up a weight's gradient over all days in the lowered precision, where small
    summands vanish; here each summand leaves in the precision of the factors.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor, lowered_weight: Tensor) -> Tensor:
        lowered_values = values.to(lowered_weight.dtype)
        ctx.save_for_backward(lowered_weight, lowered_values)
        return (lowered_weight @ lowered_values).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        lowered_weight, lowered_values = ctx.saved_tensors
        lowered = slope.to(lowered_weight.dtype)
        weight = values = None
        if ctx.needs_input_grad[0]:
            weight = (lowered @ lowered_values.T).to(slope.dtype)
        if ctx.needs_input_grad[1]:
            values = (lowered_weight.T @ lowered).to(slope.dtype)
        return weight, values, None


class Factor(NamedTuple):
    """The weight of products, and its copy in their precision, if that is another one; [output, feature]."""

    value: Tensor
    lowered: Tensor | None

    def times(self, values: Tensor) -> Tensor:
        """``value @ values``, [output, cell] of the type of ``values`` [feature, cell]."""
        if self.lowered is None:
            return self.value @ values
        product: Tensor = _LoweredProduct.apply(self.value, values, self.lowered)  # type: ignore[no-untyped-call]
        return product

    def times_plus(self, values: Tensor, summand: Tensor) -> Tensor:
        """``value @ values + summand``, [output, cell]."""
        if self.lowered is None:
            return torch.addmm(summand, self.value, values)
        return self.times(values) + summand


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
        """Apply a layer to [feature, cell]."""
        return self.factor(layer.weight).times_plus(values, layer.bias.unsqueeze(1))


def multiply_in(model: nn.Module, precision: str) -> None:
    """Set the precision of the products of all networks of a model to one of ``PRECISIONS``."""
    for module in model.modules():
        if isinstance(module, Network):
            module.precision = PRECISIONS[precision]


class Encoding(NamedTuple):
    """Condensed features [condensed, cell] and one row a head [head, cell]."""

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
        """Encode z-scored static features [feature, cell]."""
        encoded = functional.leaky_relu(self.layer(self.fc1, static))
        condensed = functional.leaky_relu(self.layer(self.fc2, encoded))
        return Encoding(condensed, self.layer(self.fc3, condensed))


class Memory(NamedTuple):
    """Hidden and cell state of an LSTM, each [hidden, cell]."""

    hidden: Tensor
    cell: Tensor


class DayWeights(NamedTuple):
    """What every day's products share.

    Attributes:
        daily: of forcing in the gates, [4 hidden, var].
        feedback: of hidden state and physical states in the gates, [4 hidden, hidden + state].
        heads: of the hidden state in the heads, [head, hidden].
        bias: of the heads, [head, 1].
        packed: of hidden state, physical states and forcing, for compiled days; None where they cannot be.
    """

    daily: Tensor
    feedback: Factor
    heads: Factor
    bias: Tensor
    packed: lstm.Packed | None


class FeedbackLSTM(Network):
    """An LSTM cell whose last inputs are yesterday's physical states; gate order i, f, g, o.

    What static features add to the gates is computed once; a day needs one product, of hidden and physical
    states. The few forcing variables are added up one by one, which costs less than a product with so few
    columns. In compiled code on a CPU a day is one operator, :mod:`h2mv_dist.model.lstm`.
    """

    def __init__(self, known: int, states: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.lstm_cell = nn.LSTMCell(known + states, hidden)
        self.fc = nn.Linear(hidden, heads)
        self.known = known

    def day_weights(self, n_forcing: int, scale: Tensor, *, compiled: bool) -> DayWeights:
        """Weights for :meth:`step` of compiled days or others; states are divided by ``scale``, [state]."""
        states = self.lstm_cell.weight_ih[:, self.known :] / scale
        feedback = torch.cat([self.lstm_cell.weight_hh, states], dim=1)
        daily = self.lstm_cell.weight_ih[:, :n_forcing]
        every = torch.cat([feedback, daily], dim=1)
        return DayWeights(
            daily,
            self.factor(feedback),
            self.factor(self.fc.weight),
            self.fc.bias.unsqueeze(1),
            lstm.packed(every, self.fc.weight) if compiled and self.precision is None else None,
        )

    def constant_gates(self, n_forcing: int, static: Tensor) -> Tensor:
        """What is the same every day: [4 hidden, cell] from static features [feature, cell]."""
        bias = self.lstm_cell.bias_ih + self.lstm_cell.bias_hh
        weight = self.lstm_cell.weight_ih[:, n_forcing : self.known]
        return self.factor(weight).times_plus(static, bias.unsqueeze(1))

    @staticmethod
    def step(
        constant: Tensor, forcing: Tensor, states: Sequence[Tensor], memory: Memory, weights: DayWeights
    ) -> tuple[Tensor, Memory]:
        """Advance one day.

        Args:
            constant: from :meth:`constant_gates`.
            forcing: of the day, z-scored, [var, cell].
            states: yesterday's physical states, each [cell].
            memory: yesterday's memory.
            weights: from :meth:`day_weights`.

        Returns:
            One row a head [head, cell], and today's memory, which they are made of.
        """
        if weights.packed is not None:
            others = torch.stack([*states, *forcing.unbind(0)])
            heads, *after = lstm.advance(weights.packed, constant, memory.hidden, others, memory.cell)
            return heads + weights.bias, Memory(*after)
        known = constant
        for weight, values in zip(weights.daily.split(1, dim=1), forcing.unbind(0), strict=True):
            known = known + weight * values
        gates = weights.feedback.times_plus(torch.cat([memory.hidden, torch.stack(list(states))]), known)
        write, keep, candidate, read = gates.chunk(4)
        cell = keep.sigmoid() * memory.cell + write.sigmoid() * tanh(candidate)
        hidden = read.sigmoid() * tanh(cell)
        return weights.heads.times_plus(hidden, weights.bias), Memory(hidden, cell)


def tanh(values: Tensor) -> Tensor:
    """Hyperbolic tangent; compiled it is made of the sigmoid, which is several times as fast on a CPU."""
    if torch.compiler.is_compiling():
        return 2.0 * torch.sigmoid(2.0 * values) - 1.0
    return values.tanh()
