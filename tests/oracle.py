"""A call of the operator, its results from any implementation, and the error its arithmetic may make.

The oracle is the reference in float64 on the very numbers the implementation received.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from divnorm_kernels.fields import geometry
from divnorm_kernels.norm import Norm
from divnorm_kernels.reference import divisive_norm as reference

NAMES = ("y", "l1", "dx", "dweight", "dbias", "dsigma", "dresidual", "dthreshold")


@dataclass
class Call:
    """Inputs and upstream gradients of one call; ``options`` are those of a `Norm`."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    sigma: Tensor | float
    dy: Tensor
    dl1: float
    options: dict[str, Any]
    residual: Tensor | None = None
    threshold: Tensor | None = None

    @property
    def inputs(self) -> tuple[Tensor | float | None, ...]:
        """What the results have gradients for, in the order of ``NAMES``."""
        return self.x, self.weight, self.bias, self.sigma, self.residual, self.threshold

    @property
    def keywords(self) -> dict[str, Any]:
        """The options and the tensors that a call takes by keyword, but for sigma."""
        return {**self.options, "residual": self.residual, "threshold": self.threshold}

    def bare(self) -> Call:
        """Without the activation."""
        return replace(self, options=self.options | {"activation": None}, threshold=None)

    def to(self, device: str) -> Call:
        """The same call on a device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Call(**{name: t.to(device) if isinstance(t, Tensor) else t for name, t in moved.items()})

    def in_double(self) -> Call:
        """The same numbers in float64."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Call(**{name: t.double() if isinstance(t, Tensor) else t for name, t in moved.items()})


def evaluate(function: Callable[..., Any], call: Call) -> dict[str, Tensor]:
    """y, l1 and the gradients of sum(y * dy) + dl1 * l1 for every input that is a tensor."""
    inputs = [t.detach().requires_grad_() if isinstance(t, Tensor) else t for t in call.inputs]
    x, weight, bias, sigma, residual, threshold = inputs
    keywords = call.options | {"residual": residual, "threshold": threshold}
    y, l1 = function(x, weight, bias, sigma=sigma, return_l1=True, **keywords)
    wanted = [t for t in inputs if isinstance(t, Tensor)]
    upstream = [call.dy, l1.new_tensor(call.dl1)]
    found = iter(torch.autograd.grad([y, l1], wanted, upstream, materialize_grads=True))
    results = {"y": y.detach(), "l1": l1.detach()}
    return results | {name: next(found) for name, t in zip(NAMES[2:], inputs, strict=True) if isinstance(t, Tensor)}


def tolerances(call: Call, expected: dict[str, Tensor]) -> dict[str, float]:
    """The largest error of each result: epsilon times the depth of its sums times the size of their terms.

    A channel or field sum of k terms rounds k times at most. v = x - mu keeps the absolute error of mu, and 1/s
    raises it by |x|/s (y) and once more in each further power of 1/s (gradients). Outputs round once in their dtype.
    An activation adds the few roundings that `depth` has room for.
    """
    exact = call.in_double()
    g = geometry(Norm(**call.options), tuple(call.x.shape))
    accumulate = torch.finfo(torch.float64 if call.x.dtype == torch.float64 else torch.float32).eps
    samples = g.batch if g.over_batch else 1
    window = sum(min(a.lo + a.hi + 1, 2 * a.extent) for axes in (g.summation, g.suppression) for a in axes or ())
    depth = g.channels // g.groups * samples + window + 8
    largest_x = float(exact.x.abs().max())
    sigma = exact.sigma.abs().min().item() if isinstance(exact.sigma, Tensor) else abs(exact.sigma)
    steepness = 1.0 if g.suppression is None else max(1.0, largest_x / sigma)
    weight = 1.0 if exact.weight is None else max(1.0, float(exact.weight.abs().max()))
    grad = max(1.0, float(exact.dy.abs().max()))
    shift = sum(float(t.abs().max()) for t in (exact.bias, exact.residual, exact.threshold) if t is not None)
    positions = call.x.numel() // max(1, g.batch * g.channels)
    terms = call.x.numel() // g.affine_size
    per_term = accumulate * (depth + min(positions, 1024))
    value = weight * steepness + shift
    slope = weight * grad * steepness / (1.0 if g.suppression is None else sigma)
    sizes = {
        "y": accumulate * depth * value,
        "l1": accumulate * depth * max(1.0, largest_x),
        "dx": accumulate * depth * slope * steepness + accumulate * depth * abs(call.dl1) * steepness,
        "dweight": per_term * grad * steepness * terms,
        "dbias": per_term * grad * terms,
        "dsigma": per_term * slope * steepness * terms * g.affine_size,
        "dresidual": accumulate * grad,
        "dthreshold": per_term * grad * terms,
    }
    if call.options.get("activation") not in (None, "relu", "tlu"):
        # smooth ones: |act'| is below 1.2, and |act''|, which raises the error of what stands before them, below 1
        bend = accumulate * depth * value
        sizes = {name: 1.2 * size for name, size in sizes.items()}
        sizes["dx"] += bend * slope * steepness
        sizes["dweight"] += bend * grad * steepness * terms
        sizes["dbias"] += bend * grad * terms
        sizes["dsigma"] += bend * slope * steepness * terms * g.affine_size
        sizes["dresidual"] += (8 * accumulate + bend) * grad
    stored = {"y": call.x, "l1": exact.x if call.x.dtype == torch.float64 else torch.empty(0), "dx": call.x}
    stored |= dict(zip(NAMES[3:], call.inputs[1:], strict=True))
    return {
        name: sizes[name] + (torch.finfo(stored[name].dtype).eps * float(t.abs().max()) if t.numel() else 0.0)
        for name, t in expected.items()
    }


def _without_underflow(
    function: Callable[..., Any], call: Call, got: dict[str, Tensor]
) -> tuple[Call, dict[str, Tensor]]:
    """The call and its results with no gradient where y next to zero became zero in float16.

    Its sign, which decides whether the ReLU passes, cannot be read from such a y.
    """
    exact_y = evaluate(reference, call.in_double().bare())["y"]
    near = tolerances(replace(call, x=call.x.float()), {"y": exact_y})["y"]
    hidden = (got["y"] == 0) & (exact_y != 0) & (exact_y.abs() <= near)
    if not hidden.any():
        return call, got
    call = replace(call, dy=call.dy.masked_fill(hidden, 0))
    return call, evaluate(function, call)


def _away_from_thresholds(call: Call) -> Call:
    """The call with no gradient where rounding decides on which side of its threshold y is."""
    exact_y = evaluate(reference, call.in_double().bare())["y"]
    near = tolerances(call, {"y": exact_y})["y"]
    threshold = call.threshold.double()
    if len(call.x.shape) > 2:
        threshold = threshold.view(-1, *[1] * (call.x.dim() - 2))
    return replace(call, dy=call.dy.masked_fill((exact_y - threshold).abs() <= near, 0))


def _doubt(call: Call, nearest: float) -> Tensor:
    """What dx may be off where rounding decides the sign of an x - mu as small as ``nearest``.

    The gradients of l1 and of a deviation with p = 1 show that sign at the element itself, and through the mean in the
    elements of its field.
    """
    exact = call.in_double()
    x = exact.x.detach().requires_grad_()
    plain = {"norm_window": None, "activation": None, "p": 2, "subtract_mean": True}
    v = reference(x, **call.options | plain)
    near = (v.abs() <= nearest).double()
    (through,) = torch.autograd.grad(v, x, near)
    slope = abs(call.dl1) / x.numel()
    if call.options.get("p") == 1:
        # a = B'[c P2 / s^2] / n; a position at an edge has up to twice its share of a window, along each axis
        weight = 1.0 if exact.weight is None else float(exact.weight.abs().max())
        sigma = float(torch.as_tensor(exact.sigma).abs().min())
        size = float(x.abs().max()) * (1.0 if call.options.get("subtract_mean") is False else 2.0)
        slope += 2 ** max(1, x.dim() - 2) * 1.26 * 1.2 * weight * float(exact.dy.abs().max()) * size / sigma**2
    return 2 * slope * (2 * near - through)


def check(function: Callable[..., Any], call: Call) -> dict[str, Tensor]:
    """Compares every result of ``function`` with the oracle's, value by value; returns them.

    A ReLU passes the gradient where ``function``'s own y is above zero: next to zero rounding decides which side it is.
    The same holds for the signs of x - mu in the gradients of l1 and of a deviation with p = 1.
    """
    got = evaluate(function, call)
    if call.options.get("activation") == "relu" and call.x.dtype == torch.float16 and call.x.numel():
        call, got = _without_underflow(function, call, got)
    if call.options.get("activation") == "tlu" and call.x.numel():
        call = _away_from_thresholds(call)
        got = evaluate(function, call)
    exact = call.in_double()
    if call.options.get("activation") == "relu":
        exact = replace(exact.bare(), dy=exact.dy * (got["y"] > 0))
    expected = evaluate(reference, exact)
    if exact.options != call.options:
        expected["y"] = expected["y"].relu()
    limits = tolerances(call, expected)
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        have = got[name]
        assert have.shape == want.shape, f"{name}: shape {tuple(have.shape)}, expected {tuple(want.shape)}"
        if want.numel() == 0:
            continue
        errors = (have.double() - want).abs()
        signs = call.dl1 or call.options.get("p") == 1
        if name == "dx" and signs and not errors.max() <= limits[name]:
            errors = errors - _doubt(call, limits["l1"])
        error = errors.max().item()
        assert error <= limits[name], f"{name}: error {error:.3g}, limit {limits[name]:.3g} for {call.options}"
    return got
