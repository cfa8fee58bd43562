"""Generalized divisive normalization in plain PyTorch: what kernels are measured by, and what computes where none can.

Source: Balle, Laparra & Simoncelli, "Density Modeling of Images Using a Generalized Normalization Transformation", ICLR
2016, with the exponents of "End-to-end Optimized Image Compression", ICLR 2017.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import compute_dtype
from ..reference import field_average
from ..states import without_autocast
from .form import Form, recorded_sizes


def evaluate(form: Form, x: Tensor, beta: Tensor, gamma: Tensor) -> Tensor:
    """The y of an x (N, C, ...), differentiable by autograd as often as one likes."""
    compute = compute_dtype(x)
    v = x.to(compute)
    pooled = v.abs() if form.simplified else v * v
    axes = form.axes(recorded_sizes(x))
    if axes is not None:
        pooled = field_average(pooled, axes, x.shape[2:])
    with without_autocast(x):
        weighed = torch.einsum("ij,nj...->ni...", gamma.to(compute), pooled)
    d = weighed + beta.to(compute).reshape(-1, *[1] * (x.dim() - 2))
    size = d if form.simplified else d.sqrt()
    return (v * size if form.inverse else v / size).to(x.dtype)


def gradients(
    form: Form, dy: Tensor, x: Tensor, beta: Tensor, gamma: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    """Those of x, beta and gamma, as ``needs`` says, as `torch.autograd.grad` has them with create_graph."""
    with torch.enable_grad():
        inputs = tuple(t.view_as(t) for t in (x, beta, gamma))  # views, in which these may be the same tensor
        y = evaluate(form, *inputs)
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
        found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return tuple(next(found) if need else None for need in needs)
