"""The definition in plain PyTorch: differentiable to any order, on any device and dtype, and the oracle of the tests.

Source: Ren, Liao, Urtasun, Sinz, Zemel, "Normalizing the Normalizers", ICLR 2017, equations 1 to 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import compute_dtype
from .epilogue import applied
from .fields import Axis, Geometry, geometry
from .norm import Window, norm_of

Rows = tuple[Tensor, Tensor]
"""Mean and variance of rows, a number each."""
OnStatistics = Callable[[Tensor, Tensor], Rows]
"""What stands between the statistics of rows and their use."""


def field_average(m: Tensor, axes: tuple[Axis, ...], extents: tuple[int, ...]) -> Tensor:
    """The average of ``m``, (N, G, *S), over the field around each position; same shape. ``extents`` are S."""
    for dim, (axis, extent) in enumerate(zip(axes, extents, strict=True), start=2):
        if axis.whole and not axis.divisor:
            m = _mean(m, dim, keepdim=True).expand_as(m)
        else:
            m = _axis_sum(m, dim, axis) / _divisors(axis, extent, dim, m)
    return m


def field_adjoint(d: Tensor, axes: tuple[Axis, ...], extents: tuple[int, ...]) -> Tensor:
    """The gradient of ``m`` in `field_average` from that of its result; same shape."""
    for dim, (axis, extent) in enumerate(zip(axes, extents, strict=True), start=2):
        mirrored = replace(axis, lo=axis.hi, hi=axis.lo)
        d = _axis_sum(d / _divisors(axis, extent, dim, d), dim, mirrored)
    return d


def _mean(t: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    """The mean along ``dim``; zero where there is nothing."""
    if not torch.jit.is_tracing() and t.numel() == 0:
        return t.sum(dim, keepdim=keepdim)
    return t.mean(dim, keepdim=keepdim)


def _axis_sum(m: Tensor, dim: int, axis: Axis) -> Tensor:
    if axis.whole:
        return m.sum(dim, keepdim=True).expand_as(m)
    if torch.jit.is_tracing():
        return sum(_shifted(m, dim, axis))
    return _windows(m, dim, axis).sum(-1)


def _windows(m: Tensor, dim: int, axis: Axis) -> Tensor:
    """Every position's window along ``dim``, in a last dimension; what lies outside is zero."""
    if torch.jit.is_tracing():
        return torch.stack(_shifted(m, dim, axis), -1)
    return _padded(m, dim, axis).unfold(dim, axis.lo + axis.hi + 1, 1)


def _shifted(m: Tensor, dim: int, axis: Axis) -> list[Tensor]:
    """`_windows` for the exporter to ONNX behind torch.jit, which knows unfold for sizes that are constants alone."""
    padded, reach = _padded(m, dim, axis), axis.lo + axis.hi
    return [padded[(slice(None),) * dim + (slice(i, i - reach or None),)] for i in range(reach + 1)]


def _padded(m: Tensor, dim: int, axis: Axis) -> Tensor:
    return F.pad(m, [0, 0] * (m.dim() - 1 - dim) + [axis.lo, axis.hi])


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


def _powers(g: Geometry, x: Tensor, v: Tensor) -> Tensor:
    """The suppression field's average of what the channels have of (c_p abs(v))^p; for p = inf the largest abs(v)."""
    p = g.norm.p
    if p == math.inf:
        return _largest(g, v.abs())
    return _row_average(g, x, v.square() if p == 2 else power(_scale(p) * v.abs(), p), g.suppression)


def _scale(p: float) -> float:
    """c_p, by which s without sigma is the standard deviation of a normal v: 1 for p = 2."""
    if p > 1e15:  # its limit, where the gamma function is too large a number
        return math.sqrt(math.e / p)
    moment = p / 2 * math.log(2) + math.lgamma((p + 1) / 2) - math.log(math.pi) / 2  # log of the mean of abs(z)^p
    return math.exp(-moment / p)


def power(t: Tensor, p: float) -> Tensor:
    """``t`` to the power p, for t of at least 0, flat to any order where t is 0: there abs(v) has no derivative."""
    if p == 1:
        return t
    zero = t == 0
    return t.masked_fill(zero, 1).pow(float(p)).masked_fill(zero, 0)


def _largest(g: Geometry, size: Tensor) -> Tensor:
    """The largest ``size`` in the suppression field; of equal ones the first in memory's order has the gradient.

    Last dimensions first, so that among equal ones the earlier sample decides, then the channel, then the position.
    """
    for dim in range(len(g.spatial) + 2, 2, -1):
        axis = g.suppression[dim - 3]
        size = _max(size, dim).expand_as(size) if axis.whole else _max(_windows(size, dim, axis), -1).squeeze(-1)
    size = _max(size, 2).squeeze(2)
    return _max(size, 0) if g.over_batch else size


def _max(t: Tensor, dim: int) -> Tensor:
    """The maximum along ``dim``, which stays as one; zero where there is nothing. Its gradient goes to the first."""
    if not torch.jit.is_tracing() and t.numel() == 0:
        return t.sum(dim, keepdim=True)
    return t.max(dim, keepdim=True).values


def _magnitude(sigma: Tensor | float) -> Tensor | float:
    """abs(sigma); not abs() of a tensor, which has no second derivative on distributed ones."""
    return sigma * sigma.detach().sign() if isinstance(sigma, Tensor) else abs(sigma)


def deviation(sigma: Tensor | float, q: Tensor, p: float) -> Tensor:
    """(abs(sigma)^p + q)^(1/p), for p = inf their sum; where sigma is alone it is abs(sigma).

    For its power may be too small a number.
    """
    if p in (1, math.inf):
        return _magnitude(sigma) + q
    tiny = torch.finfo(q.dtype).tiny
    if p == 2:
        raised = sigma * sigma
        if not isinstance(sigma, Tensor) and (sigma == 0 or raised >= tiny):
            return (raised + q).sqrt()
    else:
        sigma = sigma if isinstance(sigma, Tensor) else q.new_full((), sigma)
        raised = power(_magnitude(sigma), p)
    alone = (raised < tiny) & (q == 0)
    rest = (raised + q).masked_fill(alone, 1)
    return torch.where(alone, _magnitude(sigma), rest.sqrt() if p == 2 else rest.pow(1 / p))


def evaluate(
    g: Geometry,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sigma: Tensor | float,
    residual: Tensor | None = None,
    threshold: Tensor | None = None,
    given: Rows | None = None,
) -> tuple[Tensor, Tensor]:
    """The operator on ``x`` of the geometry's input shape: ``(y, l1)``. Half types compute in float32.

    Only the channels are taken from the geometry, other sizes from x: a recording of this holds for any. ``given``, for
    whole fields: mean and variance of the rows, as of `row_statistics`, in place of x's own.
    """
    norm = g.norm
    numerator = v = _in_groups(g, x)
    compute = v.dtype
    if g.summation is not None:
        v = v - (_row_average(g, x, v, g.summation) if given is None else given[0]).unsqueeze(2)

    y = v if norm.subtract_mean else numerator
    if g.suppression is not None:
        if isinstance(sigma, Tensor):
            sigma = sigma.to(compute).reshape(-1, *[1] * len(g.spatial))
        y = y / deviation(sigma, _powers(g, x, v) if given is None else given[1], norm.p).unsqueeze(2)

    y = y[:, 0, 0] if g.features else y.flatten(1, 2)
    affine = (-1,) if g.features else (-1, *[1] * len(g.spatial))
    if weight is not None:
        y = y * weight.to(compute).reshape(affine)
    if bias is not None:
        y = y + bias.to(compute).reshape(affine)
    y = applied(y, residual, norm.activation, None if threshold is None else threshold.reshape(affine))
    return y.to(x.dtype), v.abs().sum() / max(x.numel(), 1)


@torch.no_grad()
def statistics(g: Geometry, x: Tensor) -> Rows:
    """As `row_statistics`, without gradients."""
    return row_statistics(g, x)


def row_statistics(g: Geometry, x: Tensor) -> Rows:
    """Mean and biased variance of ``x`` for whole fields, a number a row: (N, groups, 1, ...), over the batch N is 1.

    The variance is the square of what s is without sigma. In the dtype of the computation.
    """
    first = (slice(None), slice(None), *(slice(1),) * len(g.spatial))
    v = _in_groups(g, x)
    mean = _row_average(g, x, v, g.summation)
    raised = _powers(g, x, v - mean.unsqueeze(2))[first]
    return mean[first], raised if g.norm.p == 2 else raised.pow(2 / g.norm.root)


def gradients(
    g: Geometry,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sigma: Tensor | float,
    dy: Tensor | None,
    dl1: Tensor | None,
    needs: tuple[bool, ...],
    create_graph: bool = False,
    residual: Tensor | None = None,
    threshold: Tensor | None = None,
    given: Rows = (),
) -> tuple[Tensor | None, ...]:
    """Gradients for what `evaluate` takes where needed, else ``None``; differentiable with ``create_graph``.

    Of x, weight, bias, sigma, residual and threshold, and of mean and variance where they are ``given``.
    """
    inputs = (x, weight, bias, sigma, residual, threshold, *given)
    with torch.enable_grad():
        # tensors of their own: where one was made from another, the way through that is not this operator's
        inputs = tuple(
            t if not isinstance(t, Tensor) else t.view_as(t) if create_graph else t.detach().requires_grad_(need)
            for t, need in zip(inputs, needs, strict=True)
        )
        y, l1 = evaluate(g, *inputs[:6], inputs[6:] or None)
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
    p: float = 2,
    subtract_mean: bool = True,
    residual: Tensor | None = None,
    activation: str | None = None,
    threshold: Tensor | None = None,
    on_statistics: OnStatistics | None = None,
    return_l1: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`divnorm_kernels.divisive_norm`, from its definition. Same arguments (but ``backend``), same results."""
    g = geometry(norm_of(window, norm_window, groups, edges, over_batch, activation, p, subtract_mean), tuple(x.shape))
    given = None if on_statistics is None else on_statistics(*row_statistics(g, x))
    y, l1 = evaluate(g, x, weight, bias, sigma, residual, threshold, given)
    return (y, l1) if return_l1 else y
