"""Recurrent layers with a norm in every step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .norms import OverTime

State = tuple[Tensor, ...]


class Plain(nn.Module):
    """h = f(norm(W x + U h + b)) over a sequence.

    Args:
        inputs, units: sizes of x and h.
        norm: makes the `OverTime` of (units, parts).
        function: f.
    """

    STATES = 1

    def __init__(
        self, inputs: int, units: int, norm: Callable[[int, int], OverTime], function: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.input, self.hidden = nn.Linear(inputs, units), nn.Linear(units, units, bias=False)
        self.norm, self.function = norm(units, 1), function

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """``(h, state)``: (T, N, units) of ``x`` (T, N, inputs), and what the next sequence starts from."""
        (h,), outputs, weight = state, [], self.hidden.weight.t()
        self.norm.begin(len(x))
        for step in self.input(x).unbind():
            h = self.function(self.norm(torch.addmm(step, h, weight)))
            outputs.append(h)
        return torch.stack(outputs), (h,)


class LSTM(nn.Module):
    """An LSTM with each gate's pre-activation normalized by itself, and the cell where the output reads it."""

    STATES = 2

    def __init__(self, inputs: int, units: int, norm: Callable[[int, int], OverTime]) -> None:
        super().__init__()
        self.units = units
        self.input, self.hidden = nn.Linear(inputs, 4 * units), nn.Linear(units, 4 * units, bias=False)
        self.gates, self.cell = norm(units, 4), norm(units, 1)

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """As `Plain.forward`, with h and c in the state."""
        (h, c), outputs, weight = state, [], self.hidden.weight.t()
        self.gates.begin(len(x))
        self.cell.begin(len(x))
        for step in self.input(x).unbind():
            normalized = self.gates(torch.addmm(step, h, weight))
            opened, new = normalized[:, : 3 * self.units].sigmoid(), normalized[:, 3 * self.units :].tanh()
            take, forget, give = opened.chunk(3, 1)
            c = torch.addcmul(forget * c, take, new)
            h = give * self.cell(c).tanh()
            outputs.append(h)
        return torch.stack(outputs), (h, c)


def make(kind: str, inputs: int, units: int, norm: Callable[[int, int], OverTime]) -> Plain | LSTM:
    """A layer by name: "tanh", "relu" or "lstm"."""
    if kind == "lstm":
        return LSTM(inputs, units, norm)
    return Plain(inputs, units, norm, torch.tanh if kind == "tanh" else torch.relu)
