"""torch's FlopCounterMode: the counts of layers are the arithmetic of the definition, worked out by hand."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from divnorm_kernels import (
    GDN,
    DivisiveNorm2d,
    Exponential,
    GroupNorm,
    LayerNorm,
    RMSNorm,
    channel_norm,
    divisive_norm,
    gdn,
)

X = (2, 4, 5, 6)
NUMBERS, POSITIONS = 2 * 4 * 5 * 6, 2 * 5 * 6
WINDOWED = {"affine": False, "sigma": 0.5}
CASES = {
    # forward: mean 2, deviation 3, at a position 2 windows of 4, 1 and 4; backward: v 1, through 2, dx 3 + 2,
    # at a position 4 and two windows of 4 + 1
    "window": (lambda: DivisiveNorm2d(4, 3, **WINDOWED), (5, 13), (8, 14)),
    "longer window": (lambda: DivisiveNorm2d(4, 5, **WINDOWED), (5, 13), (8, 14)),
    "mean alone": (lambda: DivisiveNorm2d(4, 3, None, **WINDOWED), (2, 5), (2, 5)),
    "deviation alone": (lambda: DivisiveNorm2d(4, None, 3, **WINDOWED), (3, 8), (7 - 2, 9)),
    # forward: 1 more; backward: v scaled 1, dweight 2, weight times dy 1
    "weight": (lambda: DivisiveNorm2d(4, 3, bias=False, sigma=0.5), (6, 13), (12, 14)),
    "weight and bias": (lambda: DivisiveNorm2d(4, 3, sigma=0.5), (7, 13), (13, 14)),
    # backward: y again, times weight and plus bias
    "relu": (lambda: DivisiveNorm2d(4, 3, sigma=0.5, activation="relu"), (7, 13), (15, 14)),
    # forward: exp, the sum and a division; backward: as a ReLU's, the slope 6 and the product with dy
    "silu": (lambda: DivisiveNorm2d(4, 3, sigma=0.5, activation="silu"), (10, 13), (22, 14)),
    # forward: the quotient, erf, the sum and two products; backward: the slope 10
    "gelu": (lambda: DivisiveNorm2d(4, 3, sigma=0.5, activation="gelu"), (12, 13), (26, 14)),
    "gelu_tanh": (lambda: DivisiveNorm2d(4, 3, sigma=0.5, activation="gelu_tanh"), (16, 13), (32, 14)),
    # forward: neither square nor root; backward: a product less at a number, and at a position
    "p = 1": (lambda: DivisiveNorm2d(4, 3, p=1, **WINDOWED), (4, 12), (7, 13)),
    # backward: a ReLU's, and the sum that the threshold has of dy
    "tlu": (lambda: DivisiveNorm2d(4, 3, sigma=0.5, activation="tlu"), (7, 13), (16, 14)),
    "learned sigma": (lambda: DivisiveNorm2d(4, 3, learn_sigma=True), (7, 13), (13, 15)),
}
WHOLE = {
    # a map has a position for each group of each sample, and no windows to sum
    "groups": (lambda: GroupNorm(2, 4), X, 4, (7, 5), (13, 6)),
    "rows": (lambda: LayerNorm(6), X, 40, (7, 5), (13, 6)),
    "rows without a mean": (lambda: RMSNorm(6), X, 40, (4, 4), (9, 5)),
}


def counted(function):
    with FlopCounterMode(display=False) as mode:
        result = function()
    return mode.get_total_flops(), result


@pytest.mark.parametrize("name", [*CASES, *WHOLE])
def test_forward_and_backward_of_a_layer(name):
    make, shape, positions, *expected = (
        WHOLE[name] if name in WHOLE else (CASES[name][0], X, POSITIONS, *CASES[name][1:])
    )
    layer, x = make(), torch.randn(shape, requires_grad=True)
    forward, y = counted(lambda: layer(x))
    backward, _ = counted(y.sum().backward)
    assert [forward, backward] == [NUMBERS * number + positions * position for number, position in expected]


def test_the_penalty():
    x = torch.randn(X, requires_grad=True)
    forward, (y, l1) = counted(lambda: divisive_norm(x, window=3, return_l1=True))
    assert forward == NUMBERS * 6 + POSITIONS * 13
    assert counted(lambda: torch.autograd.grad(y.sum() + l1, x, retain_graph=True))[0] == NUMBERS * 9 + POSITIONS * 14
    assert counted(lambda: torch.autograd.grad(l1, x))[0] == NUMBERS * 4 + POSITIONS * 5


@pytest.mark.parametrize(("activation", "backward"), [(None, 8), ("relu", 8 + 1 + 1)])
def test_a_residual(activation, backward):
    """Forward an addition; backward v scaled 1 and the addition 1 where an activation has to know what it was given."""
    x, residual = (torch.randn(X, requires_grad=True) for _ in range(2))
    forward, y = counted(lambda: divisive_norm(x, window=3, residual=residual, activation=activation))
    assert forward == NUMBERS * 6 + POSITIONS * 13
    assert counted(y.sum().backward)[0] == NUMBERS * backward + POSITIONS * 14


OF_GDN = {
    # forward: x^2, a product with gamma of 2 for each of 4 channels, the root and the division; backward: f from y,
    # x^2 again, the gradient of D 5, dbeta 1, two products, dx 4
    "plain": ({}, 1 + 8 + 2, 1 + 1 + 5 + 1 + 16 + 4),
    "inverse": ({"inverse": True}, 1 + 8 + 2, 1 + 1 + 3 + 1 + 16 + 4),
    # abs(x) and its sign are free, and there is no root
    "simplified": ({"simplified": True}, 8 + 1, 1 + 3 + 1 + 16 + 2),
    "both": ({"inverse": True, "simplified": True}, 8 + 1, 1 + 1 + 1 + 16 + 2),
    # x^2's average in both directions, and the gradient's: a sum along each of two dimensions and 1
    "window": ({"window": 3}, 11 + 5, 28 + 2 * 5),
    "whole": ({"window": "all"}, 11 + 1, 28 + 2),
}


@pytest.mark.parametrize("name", OF_GDN)
def test_gdn(name):
    options, *expected = OF_GDN[name]
    x = torch.randn(X, requires_grad=True)
    beta, gamma = (torch.ones(shape, requires_grad=True) for shape in ((4,), (4, 4)))
    forward, y = counted(lambda: gdn(x, beta, gamma, **options, backend="cpu"))
    backward, _ = counted(y.sum().backward)
    assert [forward, backward] == [NUMBERS * number for number in expected]


def test_gdn_of_a_half_type_makes_all_of_forward_again():
    x = torch.randn(X).bfloat16().requires_grad_()
    _, y = counted(lambda: gdn(x, torch.ones(4), torch.eye(4), backend="cpu"))
    # x^2, D, the root and its reciprocal, the gradient of D 5, a product, dx 4
    assert counted(y.sum().backward)[0] == NUMBERS * (1 + 8 + 2 + 5 + 8 + 4)


def test_the_layer_of_gdn():
    """Whose parametrization is not counted."""
    assert counted(lambda: GDN(4)(torch.randn(X)))[0] == NUMBERS * 11


def test_what_needs_no_gradient_costs_none():
    layer, x = DivisiveNorm2d(4, 3, sigma=0.5), torch.randn(X)
    _, y = counted(lambda: layer(x))
    # v 1, scaled 1, dweight 2, dbias 1
    assert counted(y.sum().backward)[0] == NUMBERS * 5


def test_backward_alone():
    """Of a forward that nobody counted, nor any before it."""
    script = (
        "import torch, divnorm_kernels\n"
        "from torch.utils.flop_counter import FlopCounterMode\n"
        f"x = torch.randn({X}, requires_grad=True)\n"
        "y = divnorm_kernels.divisive_norm(x, window=3)\n"
        "with FlopCounterMode(display=False) as mode:\n"
        "    y.sum().backward()\n"
        "print(mode.get_total_flops())\n"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert int(out) == NUMBERS * 8 + POSITIONS * 14


def test_a_mapping_of_ones_own_is_kept():
    mapping = {torch.ops.divnorm_kernels.forward: lambda *arguments, out_shape: 7}
    with FlopCounterMode(display=False, custom_mapping=mapping) as mode:
        divisive_norm(torch.randn(X), window=3)
    assert mode.get_total_flops() == 7


@pytest.mark.parametrize(
    ("window", "learns", "expected"),
    [
        (3, False, (10, 19)),  # 1 + 3 + 2 + 3 + 1, and 13 + 3 + 3
        (Exponential(2.0), False, (12, 23)),
        (3, True, (10, 19 + 2)),  # a learns
    ],
)
def test_channel_norm(window, learns, expected):
    x = torch.randn(2, 6, 4, requires_grad=True)
    alpha = torch.tensor(0.5, requires_grad=True) if learns else 0.5
    forward, y = counted(lambda: channel_norm(x, window, alpha=alpha, backend="cpu"))
    backward, _ = counted(lambda: y.sum().backward())
    assert (forward, backward) == tuple(number * x.numel() for number in expected)


@pytest.mark.parametrize(
    ("options", "forward", "backward"),
    [
        # forward: two sums 4, x normalized 2, weight and bias; backward: x - mean, three sums; x - mean, dx 4, weight 1
        ({}, 8, 10),
        # forward: 3; backward: in either half z again 3, the slope 6 and the product with dy
        ({"activation": "silu"}, 11, 30),
        # forward: a sum; backward: a sum, and its share of dx
        ({"return_l1": True}, 9, 12),
    ],
)
def test_something_between_statistics_and_their_use(options, forward, backward):
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in (X, 4, 4))
    options = {"window": "all", "over_batch": True, "groups": 2, "on_statistics": lambda *rows: rows, **options}
    count, found = counted(lambda: divisive_norm(x, weight, bias, **options))
    assert count == forward * NUMBERS
    loss = sum(t.sum() for t in found) if isinstance(found, tuple) else found.sum()
    assert counted(loss.backward)[0] == backward * NUMBERS
