"""The CUDA kernels' activations and windows by their two sides; on the emulated device where there is no GPU."""

import dataclasses
import math

import pytest
import torch
from emulated import DEVICE, backend
from oracle import check, evaluate
from test_cuda import NAMES, case, on_cuda

from divnorm_kernels import Span

SMOOTH = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
}


@pytest.mark.parametrize("edges", ["valid", "zero"])
@pytest.mark.parametrize("span", [Span(3, 0), Span(0, 3), Span(5, 1), Span(40, 0), Span(6, 40)], ids=str)
@pytest.mark.parametrize("strategy", NAMES)
def test_spans(strategy, span, edges):
    """Causal and its mirror, off the centre, one side or both beyond the extents."""
    for shape, window in (
        ((2, 18, 9, 8), (span, Span(2, 0))),
        ((2, 4, 160), span),
        ((3, 4, 4, 5, 6), (2, span, "all")),
    ):
        for norm_window in ("same", Span(1, 4)):
            options = {"window": window, "norm_window": norm_window, "edges": edges, "groups": 2}
            with backend(**NAMES[strategy]):
                check(on_cuda, case(shape, options, torch.float32))


EXACT = {
    "silu": lambda z: z * z.sigmoid(),
    "gelu": lambda z: z / 2 * torch.special.erfc(-z / math.sqrt(2)),
    "gelu_tanh": lambda z: z * (math.sqrt(8 / math.pi) * z * (1 + 0.044715 * z * z)).sigmoid(),
}
"""The same to the last places: torch's own cancel below zero."""


def behind(activation: str, z: torch.Tensor, strategy: str, channels_last: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The activation of ``z``, a number a channel, and its derivative: v / s is a constant one for the kernels."""
    x = z.new_ones(2, len(z), 2, 2, device=DEVICE)
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    bias = z.to(DEVICE).requires_grad_()
    with backend(**NAMES[strategy]):
        y = on_cuda(x, z.new_zeros(len(z), device=DEVICE), bias, window=None, norm_window=None, activation=activation)
        (gradient,) = torch.autograd.grad(y, bias, torch.cat([torch.ones_like(x[:1]), torch.zeros_like(x[:1])]))
    assert torch.equal(y.nan_to_num(7), y[:1, :, :1, :1].expand_as(y).nan_to_num(7))
    return y[0, :, 0, 0].detach(), gradient / 4


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("strategy", ["single-block", "two-pass", "pipelined"])
@pytest.mark.parametrize("activation", SMOOTH)
def test_smooth_activations_to_the_last_places(activation, strategy, channels_last):
    """Two units of y in the last place; below 0 the exponent's roundings too, each by as many as it is large."""
    z = torch.linspace(-12, 12, 4000)
    exact = z.double().requires_grad_()
    expected = EXACT[activation](exact)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    expected = expected.detach()
    y, gradient = (t.cpu().double() for t in behind(activation, z, strategy, channels_last))
    units = 2 - 2 * (expected / exact).detach().clamp(min=1e-38).log()
    assert ((y - expected).abs() <= 2**-23 * units * expected.abs() + 1e-37).all()
    assert ((gradient - slope).abs() <= 2**-23 * 3).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("activation", SMOOTH)
def test_far_out_and_not_finite_as_torch_has_it(activation, channels_last, dtype):
    """The derivative of torch's gelu_tanh overflows in float32, ours as little as in float64."""
    z = torch.tensor([float("inf"), -float("inf"), float("nan"), 1e30, -1e30, 3e4, -3e4, 150, -150, 0], dtype=dtype)
    exact = z.double().requires_grad_()
    expected = SMOOTH[activation](exact)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    y, gradient = (t.cpu().double() for t in behind(activation, z, "single-block", channels_last))
    torch.testing.assert_close(y, expected.detach(), rtol=1e-6, atol=1e-37, equal_nan=True)
    torch.testing.assert_close(gradient, slope, rtol=1e-6, atol=1e-37, equal_nan=True)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("strategy", NAMES)
@pytest.mark.parametrize("activation", SMOOTH)
def test_a_nan_stays_where_it_is(activation, strategy, channels_last):
    """It reaches its windows, behind an activation as without one."""
    call = case((2, 18, 12, 10), {"window": 3}, torch.float32, channels_last)
    call.x[0, 4, 2, 3] = float("nan")
    with backend(**NAMES[strategy]):
        plain = evaluate(on_cuda, call)
        got = evaluate(on_cuda, dataclasses.replace(call, options=call.options | {"activation": activation}))
    for name in ("y", "dx"):
        assert torch.equal(got[name].isnan(), plain[name].isnan()), name
        assert not got[name].isnan().all()
