"""The definition in plain PyTorch: differentiable to any order, on any device and dtype, and the oracle of the tests.

Source: Ren, Liao, Urtasun, Sinz, Zemel, "Normalizing the Normalizers", ICLR 2017, equations 1 to 4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import compute_dtype
from .fields import Axis, Geometry, geometry
from .norm import Window, norm_of


def field_average(m: Tensor, axes: tuple[Axis, ...], extents: tuple[int, ...]) -> Tensor:
    """The average of ``m``, (N, G, *S), over the field around each position; same shape. ``extents`` are S."""
    for dim, (axis, extent) in enumerate(zip(axes, extents, strict=True), start=2):
        if axis.whole and not axis.divisor:
            m = _mean(m, dim, keepdim=True).expand_as(m)
        else:
            m = _axis_sum(m, dim, axis) / _divisors(axis, extent, dim, m)
    return m


def _mean(t: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    """The mean along ``dim``; zero where there is nothing."""
    if not torch.jit.is_tracing() and t.numel() == 0:
        return t.sum(dim, keepdim=keepdim)
    return t.mean(dim, keepdim=keepdim)


def _axis_sum(m: Tensor, dim: int, axis: Axis) -> Tensor:
    if axis.whole:
        return m.sum(dim, keepdim=True).expand_as(m)
    padded, reach = F.pad(m, [0, 0] * (m.dim() - 1 - dim) + [axis.lo, axis.hi]), axis.lo + axis.hi
    if torch.jit.is_tracing():  # the exporter to ONNX behind it knows unfold for sizes that are constants alone
        return sum(padded[(slice(None),) * dim + (slice(i, i - reach or None),)] for i in range(reach + 1))
    return padded.unfold(dim, reach + 1, 1).sum(-1)


def _divisors(axis: Axis, extent: int, dim: int, like: Tensor) -> Tensor | int:
    """What the average divides by at each position, shaped to broadcast along ``dim``."""
    if axis.divisor:
        return axis.divisor
    p = torch.arange(extent, device=like.device)
    inside = (p + axis.hi).clamp(max=extent - 1) - (p - axis.lo).clamp(min=0) + 1
    return inside.to(like.dtype).view([-1 if d == dim else 1 for d in range(like.dim())])


def _in_groups(g: Geometry, x: Tensor) -> Tensor:
    """``x`` as (N, groups, channels of a group, *S), in the dtype of the computation."""
    x = x.to(compute_dtype(x))
    return x[:, None, None] if g.features else x.unflatten(1, (g.groups, g.channels // g.groups))


def _row_average(g: Geometry, x: Tensor, values: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """The field average, per group, of what the channels (and over the batch the samples) of x have on average."""
    m = _mean(values, 2)
    # extents of x itself: those of what comes from it are constants to some recorders
    return field_average(_mean(m, 0, keepdim=True) if g.over_batch else m, axes, x.shape[1 if g.features else 2 :])


def evaluate(
    g: Geometry, x: Tensor, weight: Tensor | None, bias: Tensor | None, sigma: Tensor | float
) -> tuple[Tensor, Tensor]:
    """The operator on ``x`` of the geometry's input shape: ``(y, l1)``. Half types compute in float32.

    Only the channels are taken from the geometry, other sizes from x: a recording of this holds for any.
    """
    v = _in_groups(g, x)
    compute = v.dtype
    if g.summation is not None:
        v = v - _row_average(g, x, v, g.summation).unsqueeze(2)

    y = v
    if g.suppression is not None:
        q = _row_average(g, x, v.square(), g.suppression)
        if isinstance(sigma, Tensor):
            sigma = sigma.to(compute).reshape(-1, *[1] * len(g.spatial))
        y = v / _deviation(sigma, q).unsqueeze(2)

    y = y[:, 0, 0] if g.features else y.flatten(1, 2)
    affine = (-1,) if g.features else (-1, *[1] * len(g.spatial))
    if weight is not None:
        y = y * weight.to(compute).reshape(affine)
    if bias is not None:
        y = y + bias.to(compute).reshape(affine)
    if g.relu:
        y = y.relu()
    return y.to(x.dtype), v.abs().sum() / max(x.numel(), 1)


def _deviation(sigma: Tensor | float, q: Tensor) -> Tensor:
    """sqrt(sigma^2 + q); where sigma is alone it is abs(sigma), for its square may be too small a number."""
    square, tiny = sigma * sigma, torch.finfo(q.dtype).tiny
    if not isinstance(sigma, Tensor) and (sigma == 0 or square >= tiny):
        return (square + q).sqrt()
    alone = (square < tiny) & (q == 0)
    # not abs() of a tensor, which has no second derivative on distributed ones
    size = sigma * sigma.detach().sign() if isinstance(sigma, Tensor) else abs(sigma)
    return torch.where(alone, size, (square + q).masked_fill(alone, 1).sqrt())


@torch.no_grad()
def statistics(g: Geometry, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of ``x`` for whole fields, a number a row, (N, groups, 1, ...); without gradients."""
    first = (slice(None), slice(None), *(slice(1),) * len(g.spatial))
    v = _in_groups(g, x)
    mean = _row_average(g, x, v, g.summation)
    return mean[first], _row_average(g, x, (v - mean.unsqueeze(2)).square(), g.suppression)[first]


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
    g = geometry(norm_of(window, norm_window, groups, edges, over_batch, activation), tuple(x.shape))
    y, l1 = evaluate(g, x, weight, bias, sigma)
    return (y, l1) if return_l1 else y
