"""Nothing wrong is timed: results against the reference in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from divnorm_kernels.fields import geometry
from divnorm_kernels.norm import Norm
from divnorm_kernels.reference import divisive_norm as reference


@dataclass
class Error:
    """The largest differences of y and dx from float64, and what the arithmetic may make of them."""

    y: float
    dx: float
    limit_y: float
    limit_dx: float

    @property
    def wrong(self) -> bool:
        """Whether a difference, or a NaN, is more than rounding."""
        return not (self.y <= self.limit_y and self.dx <= self.limit_dx)


def exact(x: Tensor, dy: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """The y and dx of the reference in float64, for the numbers of ``x`` and ``dy`` as they are."""
    wide = x.detach().double().requires_grad_()
    y = reference(wide, window=window)
    (dx,) = torch.autograd.grad(y, wide, dy.double())
    return y.detach(), dx


def compare(y: Tensor, dx: Tensor, expected: tuple[Tensor, Tensor], window: int) -> Error:
    """The error of y and dx. The limit is epsilon times the depth of the sums, plus one rounding of the output."""
    g = geometry(Norm(window), tuple(y.shape))
    depth = g.channels + 2 * window * len(g.spatial) + 8
    accumulate = torch.finfo(torch.float64 if y.dtype == torch.float64 else torch.float32).eps
    relative = torch.finfo(y.dtype).eps + depth * accumulate
    errors = [(got.double() - want).abs().max().item() for got, want in zip((y, dx), expected, strict=True)]
    limits = [relative * max(1.0, want.abs().max().item()) for want in expected]
    return Error(*errors, *limits)
