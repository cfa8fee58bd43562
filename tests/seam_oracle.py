"""What the seam's kernels are to find, in float64 from the formulas of `divnorm_kernels.seam.backends`; and how far off
float32 may be: epsilon for every rounding, and for a sum as often as it has terms, times the sizes of the terms.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from divnorm_kernels.fields import Geometry, geometry
from divnorm_kernels.norm import Norm

EPS = torch.finfo(torch.float32).eps
_SMOOTH = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh")}


@dataclass(frozen=True)
class Call:
    """What all four functions of a backend take; ``rows`` and ``slopes`` as if of any statistics."""

    options: dict[str, Any]
    x: Tensor
    dy: Tensor
    rows: Tensor
    slopes: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    threshold: Tensor | None
    l1_scale: Tensor | None

    @property
    def geometry(self) -> Geometry:
        return geometry(Norm(**self.options), tuple(self.x.shape))

    def to(self, device: str) -> Call:
        return replace(self, **{k: t.to(device) for k, t in vars(self).items() if isinstance(t, Tensor)})


def call_of(
    shape: tuple[int, ...],
    options: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    affine: bool = True,
    residual: bool = False,
    l1: bool = False,
) -> Call:
    """Random numbers; no gradient where rounding decides on which side of a threshold y is."""
    g = geometry(Norm(**options), shape)
    x, dy, beside = (torch.randn(shape).to(dtype) for _ in range(3))
    mean, slope, shift = torch.randn(3, *g.maps_shape[1:])
    rows = torch.stack((mean, torch.rand_like(mean) + 0.5))
    weight, bias, threshold = torch.randn(3, g.affine_size)
    call = Call(
        options,
        x,
        dy,
        rows,
        torch.stack((slope, shift)),
        weight if affine else None,
        bias.to(dtype) if affine else None,
        beside if residual else None,
        threshold if g.norm.activation == "tlu" else None,
        torch.tensor(0.7) if l1 else None,
    )
    if g.norm.activation not in ("relu", "tlu"):
        return call
    _, _, _, z, near, tau = _in_front(call)
    return replace(call, dy=dy.masked_fill((z - tau).abs() <= near, 0))


def evaluate(backend: ModuleType, call: Call) -> dict[str, Tensor | None]:
    """All that a backend finds."""
    g, behind = call.geometry, (call.residual, call.threshold)
    parameters = call.weight, call.bias
    needs = tuple(t is not None for t in (*parameters, call.threshold))
    y, l1 = backend.normalize(g, call.x, call.rows, *parameters, call.l1_scale is not None, *behind)
    upstream = g, call.dy, call.l1_scale, call.x, call.rows
    sums, dweight, dbias, dthreshold = backend.sums(*upstream, *parameters, needs, *behind)
    in_front = call.residual is not None and g.norm.activation is not None
    dx, dresidual = backend.gradient(*upstream, call.slopes, *parameters, *behind, (True, in_front))
    found = {"y": y, "l1": l1, "pull": sums[0], "product": sums[1], "signs": sums[2]}
    return found | {"dweight": dweight, "dbias": dbias, "dthreshold": dthreshold, "dx": dx, "dresidual": dresidual}


def check(backend: ModuleType, call: Call) -> dict[str, Tensor | None]:
    """Compares all that a backend finds with `exact`, number by number; returns it."""
    got = evaluate(backend, call)
    like = {"y": call.x, "dx": call.x, "dresidual": call.x, "dweight": call.weight, "dbias": call.bias}
    for name, (want, limit) in exact(call).items():
        dtype = like[name].dtype if like.get(name) is not None else torch.float32
        assert (got[name].dtype, got[name].shape) == (dtype, want.shape), name
        info = torch.finfo(dtype)
        limit = limit + info.eps * want.abs() + info.smallest_normal * info.eps
        over = ((got[name].double() - want).abs() / limit).nan_to_num(torch.inf).max().item()
        assert over <= 1, (
            f"{name}: {over:.3g} of what {call.options} may be off on {tuple(call.x.shape)}, {call.x.dtype}"
        )
    return got


def exact(call: Call) -> dict[str, tuple[Tensor, Tensor]]:
    """Every result that the call has, and how far off it may be."""
    g = call.geometry
    centred, numerator, normalized, z, near, tau = _in_front(call)
    dy, rstd = call.dy.double(), _spread(g, call.rows[1])
    weight = _per_channel(g, call.weight, 1.0)
    y, slope = _activated(call, z, tau)
    off_y = near * 1.2
    off = torch.zeros_like(dy)
    if g.norm.activation in _SMOOTH:
        # derivatives are below 1.2 and second ones below 1; the tanh form's u is rounded before it is an exponent
        off_y = off_y + EPS * y.abs() * (8 + 2 * z.abs() * (1.6 + 0.0714 * z * z))
        off = dy.abs() * (near + 4 * EPS)
    behind = dy * slope
    off = off + EPS * behind.abs()
    gradient = weight * behind
    off_gradient = weight.abs() * off + EPS * gradient.abs()

    def summed(sum_of, terms: Tensor, each: Tensor) -> tuple[Tensor, Tensor]:
        total = sum_of(g, terms)
        return total, sum_of(g, each) + EPS * terms.numel() / total.numel() * sum_of(g, terms.abs())

    product = gradient * numerator
    scaled = behind * normalized
    found = {
        "y": (y, off_y),
        "pull": summed(_row_sum, gradient, off_gradient),
        "product": summed(_row_sum, product, off_gradient * numerator.abs() + 2 * EPS * product.abs()),
        "dx": (
            (gradient - _spread(g, call.slopes[0]) * centred) * rstd - _spread(g, call.slopes[1]),
            off_gradient * rstd
            + 4 * EPS * (gradient.abs() + (_spread(g, call.slopes[0]) * centred).abs()) * rstd
            + 4 * EPS * _spread(g, call.slopes[1]).abs(),
        ),
    }
    if call.l1_scale is not None:
        found["l1"] = centred.abs().mean(), EPS * centred.numel() * centred.abs().mean()
        found["signs"] = _row_sum(g, centred.sign()), torch.zeros(())
        scale = call.l1_scale.double()
        found["dx"] = found["dx"][0] + scale * centred.sign(), found["dx"][1] + 4 * EPS * scale
    if call.weight is not None:
        found["dweight"] = summed(_channel_sum, scaled, off * normalized.abs() + 4 * EPS * scaled.abs())
        found["dbias"] = summed(_channel_sum, behind, off)
    if call.threshold is not None:
        stopped = torch.where(z > tau, 0, dy)
        found["dthreshold"] = summed(_channel_sum, stopped, torch.zeros_like(dy))
    if call.residual is not None and g.norm.activation is not None:
        found["dresidual"] = behind, off
    return found


def _in_front(call: Call) -> tuple[Tensor, ...]:
    """Of x: minus the mean, the numerator, that over s, what the activation gets and how far off; and the threshold."""
    g, x = call.geometry, call.x.double()
    centred = x - _spread(g, call.rows[0])
    numerator = centred if g.norm.subtract_mean else x
    normalized = numerator * _spread(g, call.rows[1])
    scaled = normalized * _per_channel(g, call.weight, 1.0)
    lift = _per_channel(g, call.bias, 0.0)
    residual = torch.zeros_like(x) if call.residual is None else call.residual.double()
    near = 4 * EPS * (scaled.abs() + lift.abs() + residual.abs())
    return centred, numerator, normalized, scaled + lift + residual, near, _per_channel(g, call.threshold, 0.0)


def _activated(call: Call, z: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """The value behind the activation and its slope."""
    name = call.geometry.norm.activation
    if name is None:
        return z, torch.ones_like(z)
    if name in _SMOOTH:
        z = z.detach().requires_grad_()
        y = _SMOOTH[name](z)
        return y.detach(), torch.autograd.grad(y.sum(), z)[0]
    return torch.maximum(z, tau), (z > tau).double()


def _spread(g: Geometry, rows: Tensor) -> Tensor:
    """A number a row, (N or 1, groups, 1, ...), at every number of x."""
    if g.features:
        return rows.double().reshape(-1, 1).expand(g.input_shape)
    return rows.double().repeat_interleave(g.channels // g.groups, 1).expand(g.input_shape)


def _per_channel(g: Geometry, t: Tensor | None, absent: float) -> Tensor:
    t = torch.full((g.affine_size,), absent) if t is None else t
    return t.double().view(1, -1, *[1] * (len(g.input_shape) - 2))


def _row_sum(g: Geometry, t: Tensor) -> Tensor:
    t = t.reshape(g.batch, g.groups, -1).sum(2)
    return (t.sum(0) if g.over_batch else t).reshape(g.maps_shape[1:])


def _channel_sum(g: Geometry, t: Tensor) -> Tensor:
    return t.transpose(0, 1).flatten(1).sum(1)
