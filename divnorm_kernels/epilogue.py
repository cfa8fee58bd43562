"""What stands behind the norm, in plain PyTorch: a residual that is added, and an activation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def applied(y: Tensor, residual: Tensor | None, activation: str | None, threshold: Tensor | None) -> Tensor:
    """``activation(y + residual)`` in the dtype of y; ``threshold``, of "tlu" alone, broadcasts against y."""
    if residual is not None:
        y = y + residual.to(y.dtype)
    if activation is None:
        return y
    if activation == "tlu":
        tau = threshold.to(y.dtype)
        # not torch.maximum, which halves the gradient where both are equal; a NaN stays one on either side
        return torch.where((y > tau) | y.isnan(), y, tau)
    return _FUNCTIONS[activation](y)


_FUNCTIONS = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}
