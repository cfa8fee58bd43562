"""What stands behind the norm: torch's own activations and additions, their subgradients, and what is not finite."""

import math

import pytest
import torch
from torch.nn import functional as F

from divnorm_kernels import divisive_norm

ACTIVATIONS = {
    None: lambda y: y,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}
SHAPES = ((3, 4, 5, 6), (3, 4, 7), (3, 4))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "tlu"], ids=str)
def test_is_torchs_behind_the_plain_norm(activation, with_residual, shape):
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in (shape, shape, 4, 4, 4)]
    x, residual, weight, bias, threshold = tensors
    options = {"window": 3, "backend": "reference"}
    behind = {"residual": residual if with_residual else None, "threshold": threshold if activation == "tlu" else None}
    y = divisive_norm(x, weight, bias, activation=activation, **behind, **options)
    expected = divisive_norm(x, weight, bias, **options) + (residual if with_residual else 0)
    tau = threshold.view(-1, *[1] * (len(shape) - 2))
    expected = torch.maximum(expected, tau) if activation == "tlu" else ACTIVATIONS[activation](expected)
    torch.testing.assert_close(y, expected, rtol=1e-14, atol=1e-14)
    dy = torch.randn_like(y)
    got, want = (torch.autograd.grad(z, tensors, dy, allow_unused=True) for z in (y, expected))
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        if g is not None:
            torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["tlu", "silu", "gelu"])
def test_rounds_once(activation, dtype):
    """A residual and an activation come before the rounding to x's dtype."""
    x, residual = torch.randn(2, 2, 4, 9, 9).to(dtype)
    threshold = torch.randn(4) if activation == "tlu" else None
    y = divisive_norm(x, window=3, residual=residual, activation=activation, threshold=threshold)
    exact = divisive_norm(
        x.double(),
        window=3,
        residual=residual.double(),
        activation=activation,
        threshold=None if threshold is None else threshold.double(),
    )
    arithmetic = 1e-5  # of float32, on numbers up to about 10
    limit = torch.finfo(dtype).eps / 2 * exact.abs() + arithmetic
    assert ((y.double() - exact).abs() <= limit).all()
    assert y.dtype == dtype


def test_at_equality_the_threshold_has_the_gradient():
    """Not half of it each, as torch.maximum's; a ReLU's own gradient is zero there too."""
    residual = torch.tensor([[[-1.0, 0.5, 2.0]]], dtype=torch.float64, requires_grad=True)
    x = torch.zeros(1, 1, 3, dtype=torch.float64)
    threshold = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    behind = {"residual": residual, "window": 3}
    y = divisive_norm(x, activation="tlu", threshold=threshold, **behind)
    upstream = torch.tensor([[[1.0, 10.0, 100.0]]], dtype=torch.float64)
    dresidual, dthreshold = torch.autograd.grad(y, (residual, threshold), upstream)
    assert dresidual.flatten().tolist() == [0, 0, 100]
    assert dthreshold.tolist() == [11]
    (flat,) = torch.autograd.grad(divisive_norm(x, activation="relu", residual=residual * 0, window=3).sum(), residual)
    assert flat.abs().max() == 0


@pytest.mark.parametrize("activation", [*ACTIVATIONS, "tlu"], ids=str)
def test_what_is_not_finite_stays_where_it_is(activation):
    """In the residual it reaches its own element; a threshold of NaN its channel."""
    x, residual = torch.randn(2, 1, 2, 7)
    threshold = torch.zeros(2) if activation == "tlu" else None
    clean = divisive_norm(x[None, 0], window=3, residual=residual[None, 0], activation=activation, threshold=threshold)
    for bad in (math.nan, math.inf):
        spoilt = residual[None, 0].clone()
        spoilt[0, 1, 3] = bad
        y = divisive_norm(x[None, 0], window=3, residual=spoilt, activation=activation, threshold=threshold)
        touched = torch.zeros_like(y, dtype=torch.bool)
        touched[0, 1, 3] = True
        assert torch.equal(y[~touched], clean[~touched])
        assert torch.equal(y[touched], torch.tensor([bad])) or (math.isnan(bad) and y[touched].isnan().all())
    if activation == "tlu":
        y = divisive_norm(x[None, 0], window=3, activation="tlu", threshold=torch.tensor([math.nan, 0.0]))
        assert y[0, 0].isnan().all()
        assert not y[0, 1].isnan().any()


@pytest.mark.parametrize("p", [2, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("features", [False, True])
def test_thresholds_that_are_met_or_not_finite(features, dtype, p):
    """Backward gives y or the threshold the gradient where both are equal, or one is a NaN or infinite."""
    numbers = torch.tensor([-math.inf, -1.0, 0.0, 1.0, math.inf, math.nan], dtype=dtype)
    x, threshold = torch.meshgrid(numbers, numbers, indexing="ij")  # every pair
    threshold = threshold.flatten() if features else numbers
    x = (x.reshape(1, -1) if features else numbers.expand(1, 6, 6)).contiguous().requires_grad_()
    residual, threshold = torch.zeros_like(x, requires_grad=True), threshold.clone().requires_grad_()
    for added in (None, residual):
        inputs = [x, threshold] if added is None else [x, added, threshold]
        found = []
        for backend in ("cpu", "reference"):
            fields = {"window": None, "norm_window": None, "p": p}
            y = divisive_norm(x, **fields, activation="tlu", threshold=threshold, residual=added, backend=backend)
            found.append(torch.autograd.grad(y, inputs, torch.ones_like(y)))
        for got, want in zip(*found, strict=True):
            assert torch.equal(got, want)
