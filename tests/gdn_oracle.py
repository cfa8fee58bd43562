"""Generalized divisive normalization by its formula in float64, and the error that other arithmetic may make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

NAMES = ("y", "dx", "dbeta", "dgamma")
FORMS = [{"inverse": inverse, "simplified": simplified} for inverse in (False, True) for simplified in (False, True)]


@dataclass
class Call:
    """Inputs and the upstream gradient of one call; ``options`` are those of `divnorm_kernels.gdn`."""

    x: Tensor
    beta: Tensor
    gamma: Tensor
    dy: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """What there are gradients for."""
        return self.x, self.beta, self.gamma


def call_of(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    parameters: torch.dtype | None = None,
    **options: Any,
) -> Call:
    """Random numbers of a kind."""
    x, dy = (torch.randn(shape).to(dtype) for _ in range(2))
    if channels_last and len(shape) > 2:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    channels = shape[1]
    beta, gamma = torch.rand(channels) + 0.5, torch.rand(channels, channels) / channels
    return Call(x, *(t.to(parameters or dtype) for t in (beta, gamma)), dy, options)


def evaluate(function: Callable[..., Tensor], call: Call) -> dict[str, Tensor]:
    """The result y, and the gradients of sum(y * dy)."""
    inputs = [t.detach().requires_grad_() for t in call.inputs]
    y = function(*inputs, **call.options)
    return dict(zip(NAMES, (y.detach(), *torch.autograd.grad(y, inputs, call.dy)), strict=True))


def average(s: Tensor, window: int | None) -> Tensor:
    """Over the positions p - (window - 1) // 2 to p + window // 2 along each axis, as far as there are any."""
    for dim in range(2, s.dim()) if window else ():
        extent = s.shape[dim]
        rows = [
            s.narrow(dim, low, min(p + window // 2, extent - 1) - low + 1).mean(dim)
            for p in range(extent)
            for low in [max(p - (window - 1) // 2, 0)]
        ]
        s = torch.stack(rows, dim)
    return s


def formula(
    x: Tensor,
    beta: Tensor,
    gamma: Tensor,
    inverse: bool = False,
    simplified: bool = False,
    window: int | None = None,
) -> Tensor:
    """The definition."""
    return x * factor(x, beta, gamma, inverse, simplified, window)


def factor(x: Tensor, beta: Tensor, gamma: Tensor, inverse: bool, simplified: bool, window: int | None) -> Tensor:
    """What x is multiplied by."""
    pooled = average(x.abs() if simplified else x * x, window)
    d = torch.einsum("ij,nj...->ni...", gamma, pooled) + beta.reshape(-1, *[1] * (x.dim() - 2))
    size = d if simplified else d.sqrt()
    return size if inverse else 1 / size


def _slopes(call: Call) -> dict[str, Tensor]:
    """In float64 y, the gradients, and the sums of the sizes of the terms that each of them is a sum of."""
    exact = Call(*(t.double() for t in (*call.inputs, call.dy)), call.options)
    leaves = [t.requires_grad_() for t in (exact.x.abs(), exact.beta.clone(), exact.gamma.clone())]
    # of numbers of one sign terms are too, but that dy f(D) and the gradient through D differ in it unless inverse
    f = factor(*leaves, *(exact.options.get(name) for name in ("inverse", "simplified", "window")))
    sizes = torch.autograd.grad(leaves[0].detach() * f, leaves, exact.dy.abs())
    dx = exact.dy.abs() * f.detach() + sizes[0].abs()
    return evaluate(formula, exact) | {"terms": (dx, sizes[1].abs(), sizes[2].abs())}


def tolerances(call: Call) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Exact results, and by how much others may differ, number by number.

    D is a sum of ``depth`` numbers of one sign, so that its relative error is depth * epsilon at most, and that of its
    gradient three times that; the parameters' gradients then are sums over the positions. Results round in their type.
    """
    exact = _slopes(call)
    terms = dict(zip(NAMES[1:], exact.pop("terms"), strict=True)) | {"y": exact["y"].abs()}
    epsilon = torch.finfo(torch.float64 if call.x.dtype == torch.float64 else torch.float32).eps
    window = (call.options.get("window") or 0) * max(call.x.dim() - 2, 0)
    depth = call.x.shape[1] + window + 8
    positions = call.x.numel() // max(call.x.shape[1], 1)
    depths = {"y": depth, "dx": 5 * depth, "dbeta": 3 * depth + positions, "dgamma": 3 * depth + positions}
    stored = dict(zip(NAMES, (call.x, *call.inputs), strict=True))
    limits = {}
    for name, want in exact.items():
        info = torch.finfo(stored[name].dtype)
        limits[name] = epsilon * depths[name] * terms[name] + info.eps * want.abs() + info.tiny * info.eps
    return exact, limits


def check(function: Callable[..., Tensor], call: Call) -> dict[str, Tensor]:
    """Compares every result of ``function`` with the formula's, number by number; returns them."""
    got, (exact, limits) = evaluate(function, call), tolerances(call)
    for name, want in exact.items():
        have = got[name]
        stored = dict(zip(NAMES, (call.x, *call.inputs), strict=True))[name]
        assert (have.shape, have.dtype) == (stored.shape, stored.dtype), name
        excess = (have.double() - want).abs() - limits[name]
        assert have.numel() == 0 or excess.max() <= 0, f"{name}: {float(excess.max()):.3g} too far for {call.options}"
    return got
