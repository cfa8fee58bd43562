"""The reference is the definition: against loops over it, and differentiable twice."""

import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from divnorm_kernels.reference import divisive_norm as reference

FIELDS = [
    {"window": 3},
    {"window": 2, "norm_window": (4, 1), "edges": "zero"},
    {"window": None, "norm_window": "all", "groups": 2},
    {"window": ("all", 2), "norm_window": None},
    {"window": 9, "norm_window": 3, "over_batch": True, "groups": 4},
]


def definition(x, weight, bias, *, window, norm_window="same", sigma=1.0, groups=1, edges="valid", over_batch=False):
    """The operator's page, number by number, for (N, C, H, W); returns (y, l1)."""
    batch, channels, *extent = x.shape
    norm_window = window if norm_window == "same" else norm_window
    positions = list(itertools.product(*map(range, extent)))

    def field(k, p):
        sizes = k if isinstance(k, tuple) else (k,) * 2
        covered = [
            range(e) if s == "all" else [i for i in range(q - (s - 1) // 2, q + s // 2 + 1) if 0 <= i < e]
            for s, q, e in zip(sizes, p, extent, strict=True)
        ]
        divisors = [len(c) if s == "all" or edges == "valid" else s for s, c in zip(sizes, covered, strict=True)]
        return list(itertools.product(*covered)), math.prod(divisors)

    def average(values, k, p):
        members, divisor = field(k, p)
        return sum(values[member] for member in members) / divisor

    y, l1 = torch.empty_like(x), 0.0
    samples = [range(batch)] if over_batch else [[n] for n in range(batch)]
    for ns, cs in itertools.product(samples, torch.arange(channels).chunk(groups)):
        members = list(itertools.product(ns, cs.tolist()))
        m = {p: sum(x[(n, c, *p)].item() for n, c in members) / len(members) for p in positions}
        mu = {p: 0.0 if window is None else average(m, window, p) for p in positions}
        v = {(n, c, p): x[(n, c, *p)].item() - mu[p] for n, c in members for p in positions}
        squares = {p: sum(v[n, c, p] ** 2 for n, c in members) / len(members) for p in positions}
        for p in positions:
            s = 1.0 if norm_window is None else math.sqrt(sigma**2 + average(squares, norm_window, p))
            for n, c in members:
                y[(n, c, *p)] = weight[c] * v[n, c, p] / s + bias[c]
                l1 += abs(v[n, c, p]) / x.numel()
    return y, l1


@pytest.mark.parametrize("options", FIELDS, ids=str)
def test_equals_the_definition(options):
    x = torch.randn(2, 4, 4, 5, dtype=torch.float64)
    weight, bias = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    y, l1 = reference(x, weight, bias, sigma=0.7, return_l1=True, **options)
    expected_y, expected_l1 = definition(x, weight, bias, sigma=0.7, **options)
    torch.testing.assert_close(y, expected_y, rtol=1e-12, atol=1e-12)
    assert l1.item() == pytest.approx(expected_l1, rel=1e-12)


def test_feature_form_is_one_channel():
    x, weight, bias = (torch.randn(s, dtype=torch.float64) for s in ((3, 11), 11, 11))
    y = reference(x, weight, bias, window=4)
    plain = reference(x.unsqueeze(1), window=4).squeeze(1)
    torch.testing.assert_close(y, plain * weight + bias, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("options", FIELDS, ids=str)
@pytest.mark.parametrize("sigma_shape", [(), None], ids=["scalar sigma", "sigma per group"])
def test_gradients(options, sigma_shape):
    groups = options.get("groups", 1)
    sigma = torch.rand((groups,) if sigma_shape is None else sigma_shape, dtype=torch.float64) + 0.5
    inputs = [torch.randn(2, 4, 4, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)]
    inputs = [t.requires_grad_() for t in (*inputs, torch.randn(4, dtype=torch.float64), sigma)]

    def call(x, weight, bias, sigma):
        return reference(x, weight, bias, sigma=sigma, return_l1=True, **options)

    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs)


@pytest.mark.parametrize("options", [{"window": 3}, {"window": "all", "norm_window": 5, "edges": "zero"}], ids=str)
@pytest.mark.parametrize("shape", [(3, 7), (2, 4, 7), (1, 2, 3, 4, 3)], ids=str)
def test_gradients_in_other_ranks(shape, options):
    x, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in (shape, shape[1]))
    assert gradcheck(lambda x, w: reference(x, w, return_l1=True, **options), (x, weight))
    assert gradgradcheck(lambda x, w: reference(x, w, return_l1=True, **options), (x, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_compute_in_float32(dtype):
    x = torch.randn(2, 4, 5, 5).to(dtype)
    y = reference(x, torch.ones(4), window=3)
    assert y.dtype == dtype
    assert torch.equal(y, reference(x.float(), torch.ones(4), window=3).to(dtype))
