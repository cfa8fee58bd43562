"""The activations of the Triton kernels by themselves: how near, how far, and what is no number."""

import pytest
import torch
import triton
import triton.language as tl
from interpreted import DEVICE
from torch import Tensor
from torch.nn import functional as F

from divnorm_kernels.backends.triton.epilogue import activated, passed
from divnorm_kernels.backends.triton.schema import Activation
from divnorm_kernels.norm import ACTIVATIONS

EPSILON, BLOCK = torch.finfo(torch.float32).eps, 4096
SMOOTH = {
    "silu": F.silu,
    # torch's own cancels below zero, in float64 too
    "gelu": lambda z: z * torch.special.erfc(-z / 2**0.5) / 2,
    "gelu_tanh": lambda z: z * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)),
}


@triton.jit
def both(z, y, dz, numel, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """The activation and its derivative of ``numel`` numbers."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < numel
    values = tl.load(z + at, mask=mask, other=0.0)
    tl.store(y + at, activated(values, 0.0, ACTIVATION), mask=mask)
    tl.store(dz + at, passed(tl.full([BLOCK], 1.0, tl.float32), values, 0.0, mask, ACTIVATION), mask=mask)


def of_kernel(name: str, z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.to(DEVICE)
    y, dz = torch.empty_like(z), torch.empty_like(z)
    both[(triton.cdiv(z.numel(), BLOCK),)](z, y, dz, z.numel(), int(Activation[name.upper()]), BLOCK)
    return y.cpu(), dz.cpu()


def of_torch(function, z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.double().requires_grad_()
    y = function(z)
    return y.detach(), torch.autograd.grad(y.sum(), z)[0]


def test_names():
    assert {name or "none" for name in ACTIVATIONS} == {a.name.lower() for a in Activation}


@pytest.mark.parametrize("name", SMOOTH)
def test_errors(name):
    """In units of the value, but for the tanh form far below zero, where u is rounded before it is an exponent."""
    z = torch.cat([torch.linspace(-80, 80, 30001), torch.linspace(-13, 13, 30001)])
    y, dz = of_kernel(name, z)
    expected, slope = of_torch(SMOOTH[name], z)
    there = expected.abs() > 1e-36  # nearer to zero, e^z ends as zero
    allowed = 8 + 2 * (z.double() * (1.6 + 0.0714 * z.double() ** 2)).abs() if name == "gelu_tanh" else 8
    assert ((y - expected).abs() <= allowed * EPSILON * expected.abs())[there].all()
    assert (y[~there].abs() <= 1e-36).all()
    assert (dz - slope).abs().max() <= 4 * EPSILON


@pytest.mark.parametrize("name", SMOOTH)
def test_ends(name):
    """As torch in float64; its float32 makes the derivative of the tanh form NaN at 1e20."""
    z = torch.tensor([float("inf"), -float("inf"), float("nan"), 1e20, -1e20, 3e38, -3e38, 0.0, -0.0, 1e-40, -1e-40])
    plain = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh")}[name]
    for got, want in zip(of_kernel(name, z), of_torch(plain, z), strict=True):
        torch.testing.assert_close(got, want.float(), rtol=EPSILON, atol=0, equal_nan=True)
