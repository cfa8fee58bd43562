"""What stands behind the norm, in plain PyTorch: a residual that is added, and an activation."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from .addresses import check_held
from .states import under_autocast

_HALVES = (torch.bfloat16, torch.float16)


def promoted(x: Tensor, residual: object, parameters: Iterable[object]) -> tuple[Tensor, object]:
    """``x`` and ``residual``; under torch.autocast both in float32 where they differ, as torch adds them there.

    Float64 is left alone, as autocast leaves it, and so is an ``x`` whose parameters float32 would not do beside: those
    of a half type.
    """
    if not isinstance(residual, Tensor) or residual.dtype == x.dtype or not under_autocast(x):
        return x, residual
    known = {x.dtype, residual.dtype} <= {torch.float32, *_HALVES}
    if not known or any(isinstance(t, Tensor) and t.dtype in _HALVES for t in parameters):
        return x, residual
    if not torch.compiler.is_compiling():
        check_held(x=x, residual=residual)
    return x.float(), residual.float()


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
