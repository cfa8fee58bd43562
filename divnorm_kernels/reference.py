"""The definition in plain PyTorch: differentiable to any order, on any device and dtype, and the oracle of the tests.

Source: Ren, Liao, Urtasun, Sinz, Zemel, "Normalizing the Normalizers", ICLR 2017, equations 1 to 4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .fields import Axis, Geometry, Window, geometry


def field_average(m: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """The average of ``m``, (N, G, *S), over the field around each position; same shape."""
    for dim, axis in enumerate(axes, start=2):
        m = _axis_sum(m, dim, axis) / _divisors(axis, dim, m)
    return m


def _mean(t: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    """The mean along ``dim``; zero where there is nothing."""
    return t.sum(dim, keepdim=keepdim) / max(t.shape[dim], 1)


def _axis_sum(m: Tensor, dim: int, axis: Axis) -> Tensor:
    if axis.whole:
        return m.sum(dim, keepdim=True).expand_as(m)
    margins = [0, 0] * (m.dim() - 1 - dim) + [axis.lo, axis.hi]
    return F.pad(m, margins).unfold(dim, axis.lo + axis.hi + 1, 1).sum(-1)


def _divisors(axis: Axis, dim: int, like: Tensor) -> Tensor:
    """What the average divides by at each position, shaped to broadcast along ``dim``."""
    p = torch.arange(axis.extent, device=like.device)
    inside = (p + axis.hi).clamp(max=axis.extent - 1) - (p - axis.lo).clamp(min=0) + 1
    divisors = torch.full_like(inside, axis.divisor) if axis.divisor else inside
    return divisors.to(like.dtype).view([-1 if d == dim else 1 for d in range(like.dim())])


def evaluate(
    g: Geometry, x: Tensor, weight: Tensor | None, bias: Tensor | None, sigma: Tensor | float
) -> tuple[Tensor, Tensor]:
    """The operator on ``x`` of the geometry's input shape: ``(y, l1)``. Half types compute in float32."""
    compute = x.dtype if x.dtype == torch.float64 else torch.float32
    xg = x.to(compute).reshape(g.batch, g.groups, g.channels // g.groups, *g.spatial)

    v = xg
    if g.summation is not None:
        m = _mean(xg, 2)
        if g.over_batch:
            m = _mean(m, 0, keepdim=True)
        v = xg - field_average(m, g.summation).unsqueeze(2)

    y = v
    if g.suppression is not None:
        q = _mean(v.square(), 2)
        if g.over_batch:
            q = _mean(q, 0, keepdim=True)
        q = field_average(q, g.suppression)
        if isinstance(sigma, Tensor):
            sigma = sigma.to(compute).reshape(-1, *[1] * len(g.spatial))
        y = v / (sigma * sigma + q).sqrt().unsqueeze(2)

    y = y.reshape(x.shape)
    affine = (-1,) if g.features else (-1, *[1] * len(g.spatial))
    if weight is not None:
        y = y * weight.to(compute).reshape(affine)
    if bias is not None:
        y = y + bias.to(compute).reshape(affine)
    if g.relu:
        y = y.relu()
    return y.to(x.dtype), v.abs().sum() / max(v.numel(), 1)


@torch.no_grad()
def statistics(g: Geometry, x: Tensor, sigma: Tensor | float) -> Tensor:
    """Mean and 1/s of ``x``, those that there are, in the geometry's ``maps_shape``; without gradients."""
    compute = x.dtype if x.dtype == torch.float64 else torch.float32
    xg = x.to(compute).reshape(g.batch, g.groups, g.channels // g.groups, *g.spatial)
    maps = []

    def averaged(values: Tensor, axes: tuple[Axis, ...]) -> Tensor:
        m = _mean(values, 2)
        return field_average(_mean(m, 0, keepdim=True) if g.over_batch else m, axes)

    if g.summation is not None:
        mean = averaged(xg, g.summation)
        xg = xg - mean.unsqueeze(2)
        maps.append(mean)
    if g.suppression is not None:
        if isinstance(sigma, Tensor):
            sigma = sigma.to(compute).reshape(-1, *[1] * len(g.spatial))
        maps.append((sigma * sigma + averaged(xg.square(), g.suppression)).rsqrt())
    if not maps:
        return x.new_empty(g.maps_shape, dtype=compute)
    stacked = torch.stack(maps)
    return stacked.flatten(3)[..., :1].reshape(g.maps_shape) if g.whole else stacked


def gradients(
    g: Geometry,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sigma: Tensor | float,
    dy: Tensor | None,
    dl1: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """Gradients for (x, weight, bias, sigma) where needed, else ``None``; differentiable with ``create_graph``."""
    inputs = (x, weight, bias, sigma)
    with torch.enable_grad():
        if not create_graph:
            inputs = tuple(
                t.detach().requires_grad_(need) if isinstance(t, Tensor) else t
                for t, need in zip(inputs, needs, strict=True)
            )
        y, l1 = evaluate(g, *inputs)
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
        outputs = [(out, d) for out, d in ((y, dy), (l1, dl1)) if d is not None and out.requires_grad]
        if not outputs:
            found = iter([None] * len(wanted))
        else:
            found = iter(
                torch.autograd.grad(
                    [out for out, _ in outputs],
                    wanted,
                    [d for _, d in outputs],
                    create_graph=create_graph,
                    allow_unused=True,
                    materialize_grads=True,
                )
            )
    return tuple(next(found) if need else None for need in needs)


def divisive_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    window: Window,
    norm_window: Window = "same",
    sigma: Tensor | float = 1.0,
    groups: int = 1,
    edges: str = "valid",
    over_batch: bool = False,
    activation: str | None = None,
    return_l1: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`divnorm_kernels.divisive_norm`, from its definition. Same arguments (but ``backend``), same results."""
    g = geometry(tuple(x.shape), window, norm_window, groups, edges, over_batch, activation)
    y, l1 = evaluate(g, x, weight, bias, sigma)
    return (y, l1) if return_l1 else y
