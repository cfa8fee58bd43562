"""The layers that are special cases of the operator equal torch's own, with sigma^2 in place of eps."""

import pytest
import torch
from torch import nn

from divnorm_kernels import divisive_norm

EPS = 1e-3
SIGMA = EPS**0.5
SHAPES = [(4, 6, 9), (4, 6, 5, 7), (2, 6, 3, 4, 5)]
BACKENDS = ["cpu", "reference"]


def batch_norm(x):
    return getattr(nn, f"BatchNorm{x.dim() - 2}d")(6, eps=EPS).double()(x)


def instance_norm(x):
    return getattr(nn, f"InstanceNorm{x.dim() - 2}d")(6, eps=EPS).double()(x)


def rms_norm(x):
    return nn.functional.rms_norm(x, x.shape[1:], eps=EPS)


def filter_response_norm(x):
    return x / (x.square().mean(tuple(range(2, x.dim())), keepdim=True) + EPS).sqrt()


def positional_norm(x):
    mean = x.mean(1, keepdim=True)
    return (x - mean) / (x.var(1, keepdim=True, unbiased=False) + EPS).sqrt()


CASES = {
    "BatchNorm": (batch_norm, {"window": "all", "groups": 6, "over_batch": True}),
    "LayerNorm": (lambda x: nn.functional.layer_norm(x, x.shape[1:], eps=EPS), {"window": "all"}),
    "GroupNorm": (lambda x: nn.functional.group_norm(x, 3, eps=EPS), {"window": "all", "groups": 3}),
    "InstanceNorm": (instance_norm, {"window": "all", "groups": 6}),
    "RMSNorm": (rms_norm, {"window": None, "norm_window": "all"}),
    "filter response": (filter_response_norm, {"window": None, "norm_window": "all", "groups": 6}),
    "positional": (positional_norm, {"window": 1}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equals_torch(name, shape, backend):
    torchs, options = CASES[name]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(x)
    expected = torchs(x)
    y = divisive_norm(x, sigma=SIGMA, backend=backend, **options)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    gradients = (torch.autograd.grad(out, x, dy)[0] for out in (y, expected))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_feature_form_equals_layer_norm(backend):
    x, weight, bias = (torch.randn(s, dtype=torch.float64) for s in ((5, 13), 13, 13))
    y = divisive_norm(x, weight, bias, window="all", sigma=SIGMA, backend=backend)
    torch.testing.assert_close(y, nn.functional.layer_norm(x, (13,), weight, bias, EPS), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_local_contrast_by_convolution(backend):
    """edges="zero" is what a convolution with a box kernel and zero padding computes (the released code's SAME)."""
    x = torch.randn(2, 3, 8, 9, dtype=torch.float64)
    box = torch.full((3, 1, 5, 5), 1 / 25, dtype=torch.float64)

    def average(t):
        return nn.functional.conv2d(t, box, padding=2, groups=3)

    v = x - average(x)
    expected = v / (1 + average(v.square())).sqrt()
    y = divisive_norm(x, window=5, groups=3, edges="zero", backend=backend)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
