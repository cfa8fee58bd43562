"""Channel normalization in plain PyTorch: what kernels are measured by, and what computes where none can."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import compute_dtype
from ..states import without_autocast
from .pool import Box, Pool


def evaluate(pool: Pool, x: Tensor, learned: Tensor | None) -> Tensor:
    """The y of an x (N, C, ...), differentiable by autograd as often as one likes."""
    v = x.to(compute_dtype(x))
    k, a, beta, rho = (
        learned[i] if learns else value for i, (value, learns) in enumerate(zip(pool.scalars, pool.learns, strict=True))
    )
    square = v * v
    total = decayed(square, rho) if pool.box is None else boxed(square, pool.box)
    y = (square if pool.squared else v) * (k + a * total).pow(-beta)
    return y.to(x.dtype)


def gradients(
    pool: Pool, dy: Tensor, x: Tensor, learned: Tensor | None, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Those of x and ``learned``, as ``needs`` says, as `torch.autograd.grad` has them with create_graph."""
    with torch.enable_grad():
        # views, in which these may be the same tensor
        x, learned = x.view_as(x), None if learned is None else learned.view_as(learned)
        wanted = [t for t, need in zip((x, learned), needs, strict=True) if need]
        y = evaluate(pool, x, learned)
        found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True, materialize_grads=True))
    return tuple(next(found) if need else None for need in needs)


def boxed(square: Tensor, box: Box) -> Tensor:
    """Sums over windows of channels, which are cut at the ends: additions alone, of sums of two, four and so on."""
    before, after = box
    channels, size = square.shape[1], before + after + 1
    power = F.pad(square, (0, 0) * (square.dim() - 2) + (before, after))  # sums over `width` channels
    total, first, width = None, 0, 1
    while True:
        if size & width:
            part = power.narrow(1, first, channels)
            total = part if total is None else total + part
            first += width
        if first == size:
            return total
        rest = power.shape[1] - width
        power = power.narrow(1, 0, rest) + power.narrow(1, width, rest)
        width *= 2


def decayed(square: Tensor, rho: Tensor | float) -> Tensor:
    """Sums over all channels, of weights rho to the power of the distance."""
    place = torch.arange(square.shape[1], device=square.device)
    distance = (place.unsqueeze(1) - place).abs().to(square.dtype)
    weights = torch.pow(rho, distance)
    with without_autocast(square):
        return torch.einsum("cd,nd...->nc...", weights, square)
