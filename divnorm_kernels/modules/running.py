"""Normalization by statistics of earlier batches, as layers in eval mode do it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import check_per_channel, compute_dtype
from ..epilogue import applied
from ..norm import Norm
from ..reference import deviation


def along_channels(t: Tensor, x: Tensor) -> Tensor:
    """A number per channel, to broadcast against ``x``."""
    return t.view(-1, *[1] * (x.dim() - 2))


def behind(norm: Norm, y: Tensor, residual: Tensor | None, threshold: Tensor | None) -> Tensor:
    """What a norm has behind it, on y (N, C, ...), with a threshold of shape (C,)."""
    return applied(y, residual, norm.activation, None if threshold is None else along_channels(threshold, y))


def scaled(
    norm: Norm,
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sigma: Tensor | float,
    threshold: Tensor | None,
) -> Tensor:
    """``x`` (N, C, ...) by given statistics: the variance is the square of what the deviation is without sigma."""
    check_per_channel(x, weight=weight, bias=bias, threshold=threshold)
    compute = compute_dtype(x)
    alike = mean.dtype == variance.dtype and all(t is None or t.dtype == mean.dtype for t in (weight, bias))
    # what torch's function takes, and where it is the last to round
    by_torch = norm.p == 2 and not isinstance(sigma, Tensor) and alike and mean.dtype in (x.dtype, torch.float32)
    if by_torch and (x.dtype == compute or (residual is None and norm.activation in (None, "relu"))):
        centre = mean if norm.subtract_mean else torch.zeros_like(mean)
        return behind(
            norm, F.batch_norm(x, centre, variance, weight, bias, False, 0.0, sigma * sigma), residual, threshold
        )
    variance = variance.to(compute)
    if norm.p == 2:
        square = sigma.to(compute).square() if isinstance(sigma, Tensor) else sigma * sigma
        scale = (variance + square).rsqrt()
    else:
        sigma = sigma.to(compute) if isinstance(sigma, Tensor) else sigma
        scale = deviation(sigma, variance.pow(norm.root / 2), norm.p).reciprocal()
    scale = scale if weight is None else scale * weight.to(compute)
    numerator = x.to(compute)
    if norm.subtract_mean:
        numerator = numerator - along_channels(mean.to(compute), x)
    y = numerator * along_channels(scale, x)
    y = y if bias is None else y + along_channels(bias.to(compute), x)
    return behind(norm, y, residual, threshold).to(x.dtype)
