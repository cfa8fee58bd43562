"""Batch normalization by the statistics of several processes' batches: what stands in its seam."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ..norm import Norm
from ..seam import normalize
from .base import Statistics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
else:
    ProcessGroup = object


class _Merged(torch.autograd.Function):
    """Mean and variance of rows over all processes, and how many numbers of a row there are (Chan et al. 1983)."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, mean: Tensor, variance: Tensor, own: int, group: ProcessGroup | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        mine = torch.cat([mean.new_full((1,), own), mean.flatten(), variance.flatten()])
        everyone = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size(group))]
        torch.distributed.all_gather(everyone, mine, group=group)
        gathered = torch.stack(everyone)
        counts, (means, variances) = gathered[:, :1], gathered[:, 1:].unflatten(1, (2, -1)).unbind(1)
        total = counts.sum()
        if own < 2 and int(total) == 1:  # all processes see the same count, and here each has one value or none
            raise ValueError("x: got 1 value per channel in all processes, expected more than 1 when training")
        terms = total.clamp(min=1)
        joined = (counts * means).sum(0) / terms
        joined = joined + (counts * (means - joined)).sum(0) / terms
        spread = (counts * (variances + (means - joined).square())).sum(0) / terms
        joined, spread = joined.view_as(mean), spread.view_as(variance)
        ctx.save_for_backward(mean - joined, own / terms)
        ctx.group = group
        ctx.mark_non_differentiable(total)
        return joined, spread, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dmean: Tensor, dvariance: Tensor, dtotal: None) -> tuple[Tensor | None, ...]:
        step, share = ctx.saved_tensors
        sums = torch.stack([dmean, dvariance])
        torch.distributed.all_reduce(sums, group=ctx.group)
        dmean, dvariance = sums
        return share * (dmean + 2 * step * dvariance), share * dvariance, None, None


class _Averaged(torch.autograd.Function):
    """The average over all processes of one that has a ``share`` of the numbers; every process has the same result."""

    @staticmethod
    def forward(ctx: FunctionCtx, average: Tensor, share: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.save_for_backward(share)
        ctx.group = group
        total = average * share
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor, None, None]:
        (share,) = ctx.saved_tensors
        dtotal = dtotal.clone()
        torch.distributed.all_reduce(dtotal, group=ctx.group)
        return dtotal * share, None, None


def merged(mean: Tensor, variance: Tensor, own: int, group: ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of rows over the batches of all processes, of which this one's has ``own`` numbers a row.

    Beside them how many numbers of a row there are in all. One collective, and one backward.

    Raises:
        ValueError: in every process, where there is one number a row in all of them together.
    """
    return _Merged.apply(mean, variance, own, group)


def check_merges(norm: Norm) -> None:
    """Raises a ValueError unless the statistics of several batches can be merged."""
    if norm.p != 2:
        raise ValueError(f"p: got {norm.p} in a layer of convert_sync, expected 2: processes merge mean squares alone")


def batch_norm_across(
    group: ProcessGroup | None,
    norm: Norm,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    sigma: Tensor | float,
    threshold: Tensor | None,
    with_l1: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor | None, Statistics | None, Tensor]:
    """``(y, l1, statistics, count)`` of ``x`` (N, C, ...) by the statistics of every process' batch.

    The batches may differ in size, and be empty. ``count`` is the number of values of a channel in all of them; where
    there is none, there are no statistics. One collective each way, of a batch's statistics and their gradients, and
    one more each way for l1.

    Raises:
        ValueError: in every process, where there is one value per channel in all of them together, and for p that is
            not 2.
    """
    check_merges(norm)
    own = x.numel() // max(x.shape[1], 1)
    found = []

    def merge(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance, count = merged(mean, variance, own, group)
        found.extend((mean.detach(), variance.detach(), count))
        return mean, variance

    y, l1 = normalize(norm, x, weight, bias, sigma, residual, threshold, merge, with_l1, backend)
    mean, variance, count = found
    if with_l1:
        l1 = _Averaged.apply(l1, own / count.clamp(min=1), group)
    empty = own == 0 and int(count) == 0
    return y, l1, None if empty else (mean, variance), count
