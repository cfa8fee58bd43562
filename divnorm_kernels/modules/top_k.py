"""Batch normalization by the largest deviations of each channel."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..addresses import check_held
from ..checks import check_per_channel, check_size, compute_dtype
from .base import Options, Statistics
from .batch import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .running import along_channels, behind


class _TopKBatchNorm:
    """Plain PyTorch in place of the operator; what else a batch normalization does stays."""

    _settled: ClassVar = {"p": math.inf}  # as for this p, eps is added to the deviation

    def __init__(
        self,
        num_features: int,
        k: int = 10,
        eps: float | None = None,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        **options: Unpack[Options],
    ) -> None:
        check_size("k", k)
        every = num_features, eps, momentum, affine, track_running_stats, device, dtype
        super().__init__(*every, bias=bias, **options)
        self.k = k

    def check_merges(self) -> None:
        """Raises a ValueError: the largest of several batches are not merged."""
        raise ValueError("k: got a layer of convert_sync, expected one by this process' batch alone")

    def _normalized(
        self, x: Tensor, residual: Tensor | None, with_statistics: bool, count: int
    ) -> tuple[Tensor, Statistics | None, Tensor | int]:
        if self._across_processes():
            self.check_merges()
        if self.backend not in (None, "reference"):
            raise RuntimeError(f"backend: got {self.backend!r}, which cannot serve this call: it is plain PyTorch")
        if not torch.compiler.is_compiling():
            check_held(x=x, weight=self.weight, bias=self.bias, sigma=self.sigma, threshold=self.threshold)
        check_per_channel(x, weight=self.weight, bias=self.bias, threshold=self.threshold)
        compute = compute_dtype(x)
        rows = x.to(compute).transpose(0, 1).flatten(1)
        mean = rows.mean(1)
        size = (rows - mean.unsqueeze(1)).abs()
        deviation = _scale(max(count, 2)) * size.topk(min(self.k, count), 1).values.mean(1)
        sigma = self.sigma * self.sigma.detach().sign() if self.learn_sigma else abs(self.sigma)
        numerator = x.to(compute)
        if self.subtract_mean:
            numerator = numerator - along_channels(mean, x)
        y = numerator / along_channels(sigma + deviation, x)
        if self.weight is not None:
            y = y * along_channels(self.weight.to(compute), x)
        if self.bias is not None:
            y = y + along_channels(self.bias.to(compute), x)
        y = behind(self.norm, y, residual, self.threshold).to(x.dtype)
        self._keep(y, size.sum() / max(x.numel(), 1) if self.l1_weight > 0 and self.training else None)
        row = (1, -1, 1)
        return y, (mean.detach().view(row), deviation.detach().square().view(row)) if with_statistics else None, count

    def _on_shards(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if self._takes_own_statistics():
            raise ValueError("x: got a DTensor, expected a Tensor: the largest values are those of one process")
        return super()._on_shards(x, residual)

    def extra_repr(self) -> str:
        """The options, with defaults left out."""
        shown = super().extra_repr()
        return shown if self.k == 10 else shown.replace(f"{self.num_features}", f"{self.num_features}, k={self.k}", 1)


def _scale(n: int) -> float:
    """C(n), about by what the largest of n normals has to be multiplied to be their deviation."""
    return (1 + math.sqrt(math.pi * math.log(4))) / (2 * math.sqrt(2 * math.log(n)))


class TopKBatchNorm1d(_TopKBatchNorm, BatchNorm1d):
    """Top-k batch normalization of (N, C) or (N, C, L). Arguments as for `TopKBatchNorm2d`."""


class TopKBatchNorm2d(_TopKBatchNorm, BatchNorm2d):
    """Batch normalization of (N, C, H, W) by the mean of a channel's k largest ``abs(v)``; k = 1: L-infinity.

    ``weight * v / (C(n) * mean(k largest abs(v)) + eps) + bias``, ``C(n) = (1 + sqrt(pi ln 4)) / (2 sqrt(2 ln n))``,
    n = N*H*W. C(n) does not make it a standard deviation: on normal numbers it is 1.0 to 1.5 of one. The running
    variance is the average of its square without eps, so that checkpoints are batch normalization's, and so is all
    else. Plain PyTorch: no kernel of this package. Source: Hoffer et al., "Norm matters", NeurIPS 2018.

    Args:
        num_features: the number of channels, C.
        k: how many; all, where a channel has fewer values.
        eps: sigma itself; 1e-5 where neither is given.
        others: as for `BatchNorm2d`; p has no place here.
    """


class TopKBatchNorm3d(_TopKBatchNorm, BatchNorm3d):
    """Top-k batch normalization of (N, C, D, H, W). Arguments as for `TopKBatchNorm2d`."""
