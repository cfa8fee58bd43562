"""What tests of windows over channels share: backends, layers that learn, and comparison in float64."""

import torch

import divnorm_kernels as dk

BACKENDS = ("reference", "cpu")
LEARNING = (lambda: dk.LocalResponseNorm(3, 0.5, learnable=True), dk.ExponentialNorm)


def double(*shape):
    """Random numbers."""
    return torch.randn(shape, dtype=torch.float64)


def close(a, b):
    """Raises unless float64 alone tells them apart."""
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
