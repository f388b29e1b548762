"""The networks: a static encoder and a recurrent cell that also reads the physical states."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Encoding(NamedTuple):
    """Condensed features [cell, condensed] and one column a head [cell, head]."""

    condensed: Tensor
    heads: Tensor


class StaticEncoder(nn.Module):
    """Linear -> leaky ReLU -> Linear -> leaky ReLU (condensed) -> Linear (heads)."""

    def __init__(self, features: int, encoder: int, condensed: int, heads: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, encoder)
        self.fc2 = nn.Linear(encoder, condensed)
        self.fc3 = nn.Linear(condensed, heads)

    def forward(self, static: Tensor) -> Encoding:
        """Encode z-scored static features [cell, feature]."""
        condensed = functional.leaky_relu(self.fc2(functional.leaky_relu(self.fc1(static))))
        return Encoding(condensed, self.fc3(condensed))


class Memory(NamedTuple):
    """Hidden and cell state of an LSTM, each [cell, hidden]."""

    hidden: Tensor
    cell: Tensor


class FeedbackLSTM(nn.Module):
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
        gates: Tensor = forcing.transpose(0, 1) @ daily.T + (static @ constant.T + bias)
        return gates

    def feedback_weight(self, scale: Tensor) -> Tensor:
        """Weight of [hidden, states / scale] in the gates, [hidden + state, 4 hidden]."""
        states = self.lstm_cell.weight_ih[:, self.known :] / scale
        return torch.cat([self.lstm_cell.weight_hh, states], dim=1).T

    @staticmethod
    def step(known_gates: Tensor, states: tuple[Tensor, ...], memory: Memory, weight: Tensor) -> Memory:
        """Advance one day.

        Args:
            known_gates: [cell, 4 hidden], gate order i, f, g, o.
            states: yesterday's physical states, each [cell, 1].
            memory: yesterday's memory.
            weight: from :meth:`feedback_weight`.
        """
        feedback = torch.cat([memory.hidden, *states], dim=1)
        write, keep, candidate, read = torch.addmm(known_gates, feedback, weight).chunk(4, dim=1)
        cell = keep.sigmoid() * memory.cell + write.sigmoid() * candidate.tanh()
        return Memory(read.sigmoid() * cell.tanh(), cell)
