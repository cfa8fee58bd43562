"""Batch normalization by the statistics of several processes' batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ..checks import compute_dtype
from ..norm import Norm
from .base import Statistics
from .running import along_channels, behind

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
else:
    ProcessGroup = object


class _AcrossProcesses(torch.autograd.Function):
    """The definition over the joined batch: each process merges all moments, and adds up the sums of backward."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        sigma: Tensor | float,
        subtract_mean: bool,
        group: ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        compute = compute_dtype(x)
        dims = [0, *range(2, x.dim())]
        values = x.to(compute)
        own = x.numel() // max(x.shape[1], 1)
        mean = values.sum(dims) / max(own, 1)
        squares = (values - along_channels(mean, x)).square().sum(dims)
        count, mean, squares = _merged(own, mean, squares, group)
        if own < 2 and int(count) == 1:  # all processes see the same count, and here each has one value or none
            raise ValueError("x: got 1 value per channel in all processes, expected more than 1 when training")
        terms = count.clamp(min=1)
        square = sigma.to(compute).square() if isinstance(sigma, Tensor) else sigma * sigma
        variance = squares / terms
        rstd = (variance + square).rsqrt().masked_fill(count == 0, 0)  # gradients from nothing are zero
        centred = values - along_channels(mean, x)
        y = (centred if subtract_mean else values) * along_channels(rstd, x)
        if weight is not None:
            y = y * along_channels(weight.to(compute), x)
        if bias is not None:
            y = y + along_channels(bias.to(compute), x)
        l1 = centred.abs().sum()
        torch.distributed.all_reduce(l1, group=group)
        l1 = l1 / (terms * x.shape[1])
        ctx.save_for_backward(x, weight, mean, rstd, terms, sigma if isinstance(sigma, Tensor) else None)
        ctx.subtract_mean = subtract_mean
        ctx.group, ctx.bias_dtype = group, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(mean, variance, count)
        return y, l1, mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dl1: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd, terms, sigma = ctx.saved_tensors
        dims = [0, *range(2, x.dim())]
        values, upstream = x.to(mean.dtype), dy
        centred = values - along_channels(mean, x)
        numerator = centred if ctx.subtract_mean else values
        dbias, products, signs = upstream.sum(dims), (upstream * numerator).sum(dims), centred.sign()
        g = rstd if weight is None else rstd * weight.to(mean.dtype)
        # Every process has l1, the same number: its gradient is the sum of theirs.
        sums = torch.cat([dbias, products, signs.sum(dims), dl1.to(mean.dtype).view(1)])
        torch.distributed.all_reduce(sums, group=ctx.group)
        all_bias, all_products, all_signs = sums[:-1].view(3, -1)
        pull = sums[-1] / (terms * x.shape[1])
        slope = g * rstd.square() * all_products / terms
        shift = pull * all_signs / terms  # the sum of centred, by which x in the numerator would move it, is 0
        if ctx.subtract_mean:
            shift = shift + g * all_bias / terms
        dx = along_channels(g, x) * upstream - along_channels(slope, x) * centred - along_channels(shift, x)
        dx = dx + pull * signs
        dsigma = None
        if sigma is not None and ctx.needs_input_grad[3]:
            dsigma = (-sigma.to(mean.dtype) * (g * rstd.square() * products).sum()).to(sigma.dtype)
        return (
            dx.to(x.dtype),
            None if weight is None else (products * rstd).to(weight.dtype),
            None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype),
            dsigma,
            None,
            None,
        )


def _merged(count: int, mean: Tensor, squares: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and sum of squared deviations of all processes together (Chan et al. 1983)."""
    own = torch.cat([mean.new_tensor([count]), mean, squares])
    everyone = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(everyone, own, group=group)
    gathered = torch.stack(everyone)
    counts, (means, deviations) = gathered[:, :1], gathered[:, 1:].unflatten(1, (2, -1)).unbind(1)
    total = counts.sum()
    terms = total.clamp(min=1)
    joined = (counts * means).sum(0) / terms
    joined = joined + (counts * (means - joined)).sum(0) / terms
    return total, joined, (deviations + counts * (means - joined).square()).sum(0)


def batch_norm_across(
    group: ProcessGroup | None,
    norm: Norm,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    sigma: Tensor | float,
    threshold: Tensor | None,
) -> tuple[Tensor, Tensor, Statistics | None, Tensor]:
    """``(y, l1, statistics, count)`` of ``x`` (N, C, ...) by the statistics of every process' batch.

    The batches may differ in size, and be empty. ``count`` is the number of values of a channel in all of them; where
    there is none, there are no statistics.

    Raises:
        ValueError: in every process, where there is one value per channel in all of them together, and for p that is
            not 2.
    """
    if norm.p != 2:
        raise ValueError(f"p: got {norm.p} in a layer of convert_sync, expected 2: processes merge mean squares alone")
    y, l1, mean, variance, count = _AcrossProcesses.apply(x, weight, bias, sigma, norm.subtract_mean, group)
    empty = x.numel() == 0 and int(count) == 0
    y = behind(norm, y, residual, threshold).to(x.dtype)
    return y, l1, None if empty else (mean.unsqueeze(0), variance.unsqueeze(0)), count
