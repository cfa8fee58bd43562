"""What the registered operators cost, for `torch.utils.flop_counter.FlopCounterMode`.

Counted are additions, multiplications, divisions and roots, at each number of x and each position of a map, and an
activation's exp, erf or tanh as one; signs and comparisons, a ReLU's among them, are free. A window's sum is one
addition and one subtraction per dimension at each position, however long the window is; a whole field's is in the sum
over the numbers of its row. What is spent once per row, channel or call is left out.
"""

from __future__ import annotations

import sys
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .constant import constant
from .fields import Geometry, geometry
from .norm import parsed

# What a smooth activation costs at a number, and its slope.
_VALUE = {
    "silu": 3,  # z / (1 + exp(-z))
    "gelu": 5,  # z / 2 (1 + erf(z / c))
    "gelu_tanh": 9,  # z / 2 (1 + tanh(c z (1 + k z^2)))
}
_SLOPE = {
    "silu": 6,  # s (1 + z (1 - s)) for s = 1 / (1 + exp(-z)), which is 2
    "gelu": 10,  # (1 + erf(z / c)) / 2 + k z exp(-z^2 / 2)
    "gelu_tanh": 16,  # (1 + t) / 2 + z / 2 (1 - t^2) (c + 3 c k z^2) for the tanh t, which is 6
}


@constant
def register() -> None:
    """Tells torch's counter the formulas, where one is imported: those to be made, and those that count this call.

    At a call, because its import takes longer than this package's, and is left to those who count.
    """
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is None:
        return
    operators = torch.ops.divnorm_kernels
    at_work = [m.counter for m in _get_current_dispatch_mode_stack() if isinstance(m, counter._FlopCounterMode)]
    for registry in (counter.flop_registry, *(c.flop_registry for c in at_work)):
        registry.setdefault(operators.forward, forward_flops)
        registry.setdefault(operators.backward, backward_flops)
        registry.setdefault(operators.gdn_forward, gdn_forward_flops)
        registry.setdefault(operators.gdn_backward, gdn_backward_flops)
        registry.setdefault(operators.channel_forward, channel_forward_flops)
        registry.setdefault(operators.channel_backward, channel_backward_flops)
        registry.setdefault(operators.row_statistics, row_statistics_flops)
        registry.setdefault(operators.row_norm, row_norm_flops)
        registry.setdefault(operators.row_sums, row_sums_flops)
        registry.setdefault(operators.row_gradient, row_gradient_flops)


def forward_flops(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sigma: Tensor | None,
    sigma_value: float,
    norm: str,
    with_l1: bool,
    with_variance: bool,
    backend: str | None,
    residual: Tensor | None = None,
    threshold: Tensor | None = None,
    out_val: Any = None,
) -> int:
    """What a call of the operator costs.

    At a number of x, and behind the semicolon at a position of a map:

    - the mean: 2 (its sum, its subtraction); the window's sum and 1;
    - the deviation: 3 (the square, its sum, the scaling); the window's sum and 4 (the average, sigma, 1 / root); for
      p = 1 there is neither square nor root;
    - weight, bias, residual and l1: 1 each;
    - a smooth activation: 3 to 9.
    """
    g = geometry(parsed(norm), tuple(x.shape))
    number = sum(t is not None for t in (weight, bias, residual)) + with_l1 + _VALUE.get(g.norm.activation, 0)
    position = 0
    if g.summation is not None:
        number += 2
        position += _window(g) + 1
    if g.suppression is not None:
        number += 1 + g.norm.p
        position += _window(g) + 2 + g.norm.p
    return g.numel * number + _positions(g) * position


def backward_flops(
    dy: Tensor | None,
    dl1: Tensor | None,
    x: Tensor,
    maps: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    bias_dtype: torch.dtype | None,
    sigma: Tensor | None,
    sigma_value: float,
    norm: str,
    needs: list[bool],
    backend: str | None,
    residual: Tensor | None = None,
    threshold: Tensor | None = None,
    out_val: Any = None,
) -> int:
    """What a call of the operator costs, as far as its results need it.

    At a number of x, and behind the semicolon at a position of a map:

    - x without its mean and scaled once more: 1 each, and with an activation 1 for each of weight, bias and residual;
    - dy times a smooth activation's slope: 7 to 17;
    - dbias, dthreshold: 1 (a sum of dy), dweight: 2 (the sum of dy times scaled x), dy times weight: 1;
    - through the deviation, for dx and dsigma: 2 (a sum of products); 4 (times the cube of 1 / root and a constant),
      for p = 1 3;
    - dsigma: 0; 1 (its sum);
    - dx by the deviation: 3 (two products and their sum), for p = 1 2; the window's sum and 1;
    - dx by the mean: 2 (a sum, its subtraction); the window's sum and 1;
    - dx by l1: 1.
    """
    dx, dweight, dbias, dsigma, _, dthreshold = needs
    g = geometry(parsed(norm), tuple(x.shape))
    mean, deviation, activation = g.summation is not None, g.suppression is not None, g.norm.activation
    if dy is None:  # the gradient of l1 alone
        dweight = dbias = dsigma = dthreshold = deviation = False
        activation = None
    through = deviation and (dx or dsigma)
    scaled = dweight or activation is not None
    number = mean * (scaled or through or (dx and dl1 is not None)) + deviation * scaled
    if activation is not None:
        number += sum(t is not None for t in (weight, bias, residual))
    if activation in _SLOPE:
        number += _SLOPE[activation] + 1
    number += dbias + dthreshold + 2 * dweight
    number += (dy is not None and weight is not None) * (dx or dsigma) + 2 * through
    number += dx * ((1 + g.norm.p) * deviation + 2 * mean + (dl1 is not None))
    position = (2 + g.norm.p) * through + dsigma + dx * (_window(g) + 1) * (deviation + mean)
    return g.numel * number + _positions(g) * position


def gdn_forward_flops(
    x: Tensor,
    beta: Tensor,
    gamma: Tensor,
    inverse: bool,
    simplified: bool,
    window: str,
    backend: str | None,
    out_val: Any = None,
) -> int:
    """What a call of the operator costs at a number of x, of C channels.

    - x^2: 1, simplified 0; its window's sum and 1 (the average), over a whole field 1;
    - the product with gamma, and beta: 2 C;
    - the root: 1, simplified 0; x times or over it: 1.
    """
    square = root = not simplified
    return x.numel() * (square + _averaged(x, window) + 2 * x.shape[1] + root + 1)


def gdn_backward_flops(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    beta: Tensor,
    gamma: Tensor,
    needs: list[bool],
    inverse: bool,
    simplified: bool,
    window: str,
    backend: str | None,
    out_val: Any = None,
) -> int:
    """What a call of the operator costs at a number of x, of C channels, as far as its results need it.

    - f(D): with y, 1 (y / x); else D and the root again as forward has them, and unless inverse 1 (its reciprocal);
    - what gamma multiplies, for D and dgamma: as forward has it;
    - the gradient of D: 5 (five products of 1/2, dy, x, f, f and f), simplified 3; inverse 3, both 1;
    - dbeta: 1 (a sum), dgamma: 2 C;
    - dx: 2 C (the product with gamma); its window as forward has it; 4 (dy f, two products with x, their sum),
      simplified 2.
    """
    dx, dbeta, dgamma = needs
    if not any(needs):
        return 0
    product, square = 2 * x.shape[1], not simplified
    number = 1 if y is not None else product + square + (not inverse)
    if y is None or dgamma:
        number += square + _averaged(x, window)
    number += 1 + 2 * (not inverse) + 2 * square
    number += dbeta + product * dgamma + dx * (product + _averaged(x, window) + 2 + 2 * square)
    return x.numel() * number


def _averaged(x: Tensor, window: str) -> int:
    """What the average over a form's window costs at a number of x."""
    if not window:
        return 0
    return _window(geometry(parsed(window), tuple(x.shape))) + 1


def _positions(g: Geometry) -> int:
    return prod(g.maps_shape[1:])


def _window(g: Geometry) -> int:
    """What a window's sum costs at a position."""
    return 0 if g.whole else 2 * len(g.spatial)


_POWER = 3
"""D^-beta by roots, or by a logarithm, a product and an exponential."""


def channel_forward_flops(
    x: Tensor,
    learned: Tensor | None,
    box: list[int],
    squared: bool,
    scalars: list[float],
    backend: str | None,
    out_val: Any = None,
) -> int:
    """What a call of the operator costs at a number of x.

    - x^2: 1; its pool; D: 2 (a times it, and k); D^-beta: 3; the numerator times it: 1.
    """
    return x.numel() * (1 + _pooled(box) + 2 + _POWER + 1)


def channel_backward_flops(
    dy: Tensor,
    x: Tensor,
    learned: Tensor | None,
    needs: list[bool],
    box: list[int],
    squared: bool,
    scalars: list[float],
    backend: str | None,
    out_val: Any = None,
) -> int:
    """What a call of the operator costs at a number of x, as far as its results need it.

    - D^-beta as forward has it; 1 / D: 1; u = dy n D^-(beta + 1): 3;
    - dx: its pool, and 3 (x, a factor, a sum), 1 more for a squared numerator;
    - dlearned: k 1 (a sum of u), a, beta and rho 2 (sums of products) each, and the pool's slope by rho as the pool.
    """
    if not any(needs):
        return 0
    number = 1 + _pooled(box) + 2 + _POWER + 1 + 3
    number += needs[0] * (_pooled(box) + 3 + squared)
    if needs[1]:
        k, a, beta, rho = (value != value for value in scalars)
        number += k + 2 * (a + beta + rho) + rho * (not box) * _pooled(box)
    return x.numel() * number


def _pooled(box: list[int]) -> int:
    """What a sum over channels costs at a number: of a box by blocks, or with decaying weights by two recursions."""
    return 3 if box else 5


def row_statistics_flops(
    x: Tensor, residual: Tensor | None, norm: str, backend: str | None, out_val: Any = None
) -> int:
    """What the first half of a forward costs at a number of x: 4, the sum of x and that of (x - mean)^2."""
    return 4 * x.numel()


def row_norm_flops(
    handed: list[Tensor],
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    sigma: Tensor | None,
    sigma_value: float,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    threshold: Tensor | None,
    norm: str,
    with_l1: bool,
    backend: str | None,
    out_val: Any = None,
) -> int:
    """What the second half costs at a number of x: 2 (x - mean, 1 / root), and what `forward_flops` has behind it."""
    number = 2 + sum(t is not None for t in (weight, bias, residual)) + with_l1
    return x.numel() * (number + _VALUE.get(parsed(norm).activation, 0))


def row_sums_flops(
    dy: Tensor,
    l1_scale: Tensor | None,
    x: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    threshold: Tensor | None,
    norm: str,
    needs: list[bool],
    backend: str | None,
    out_val: Any = None,
) -> int:
    """What the first half of a backward costs at a number of x.

    - x - mean: 1; dy in front of the activation (`_in_front`);
    - the sums of g and of g times the numerator, dweight's and dbias' among them: 3; of a threshold and of l1: 1 each.
    """
    given = sum(t is not None for t in (weight, bias, residual))
    return x.numel() * (4 + _in_front(norm, given) + needs[2] + (l1_scale is not None))


def row_gradient_flops(
    dy: Tensor,
    l1_scale: Tensor | None,
    x: Tensor,
    rows: Tensor,
    slopes: Tensor,
    parameters: Tensor | None,
    residual: Tensor | None,
    norm: str,
    needs: list[bool],
    backend: str | None,
    out_val: Any = None,
) -> int:
    """What the second half costs at a number of x.

    - x - mean: 1; dy in front of the activation (`_in_front`);
    - dx: 4 (a slope times x, its subtraction, 1 / root, a shift), and 1 each with a weight and with l1.
    """
    weighed = parameters is not None
    number = 1 + _in_front(norm, 2 * weighed + (residual is not None))
    return x.numel() * (number + needs[0] * (4 + weighed + (l1_scale is not None)))


def _in_front(norm: str, given: int) -> int:
    """What the way back through an activation costs at a number, with ``given`` of weight, bias and residual."""
    activation = parsed(norm).activation
    if activation is None:
        return 0
    return 1 + given + (_SLOPE[activation] + 1 if activation in _SLOPE else 0)
