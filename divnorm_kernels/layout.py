"""Memory formats: the kernels read contiguous and channels_last tensors as they lie."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _is_channels_last(x: Tensor) -> bool:
    dims = x.dim()
    return dims > 2 and x.permute(0, *range(2, dims), 1).is_contiguous()


def channels_last_strides(x: Tensor) -> bool:
    """Whether the channels of the dense ``x`` lie side by side; with one position per channel they always do."""
    if x.dim() == 2:
        return False
    return not x.is_contiguous() or math.prod(x.shape[2:]) == 1


def dense(x: Tensor, like: Tensor | None = None) -> Tensor:
    """``x`` itself where it is contiguous or channels_last, else a copy in the nearest of the two.

    With ``like``, the result has the format of that dense tensor.
    """
    if like is not None:
        if x.stride() == like.stride():
            return x
        if x.shape[2:].numel() == 1 and x.is_contiguous():
            return x
        return torch.empty_like(like, dtype=x.dtype).copy_(x)
    if x.is_contiguous() or _is_channels_last(x):
        return x
    copy = torch.empty_like(x).copy_(x)
    return copy if copy.is_contiguous() or _is_channels_last(copy) else copy.contiguous()
