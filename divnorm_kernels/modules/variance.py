"""Variance normalization: batch normalization that subtracts no mean."""

from __future__ import annotations

import torch
from typing_extensions import Unpack

from .base import Options
from .batch import BatchNorm1d, BatchNorm2d, BatchNorm3d


class _VarianceNorm:
    """What a batch normalization is made with to be one of variances alone."""

    _settled = frozenset({"subtract_mean"})

    def __init__(
        self,
        num_features: int,
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
        if "subtract_mean" in options:
            raise TypeError(f"subtract_mean: got {options['subtract_mean']!r}, expected none: it subtracts no mean")
        every = num_features, eps, momentum, affine, track_running_stats, device, dtype
        super().__init__(*every, bias=bias, subtract_mean=False, **options)

    def extra_repr(self) -> str:
        """The options, with defaults left out."""
        return super().extra_repr().replace(", subtract_mean=False", "")


class VarianceNorm1d(_VarianceNorm, BatchNorm1d):
    """Variance normalization of (N, C) or (N, C, L). Arguments as for `VarianceNorm2d`."""


class VarianceNorm2d(_VarianceNorm, BatchNorm2d):
    """Variance normalization of (N, C, H, W): ``weight * x / sqrt(var + eps) + bias``, `BatchNorm2d` without its mean.

    The variance is that about the mean of each channel over the batch, in eval mode the running one; checkpoints are
    batch normalization's. Source: Lubana et al., "Beyond BatchNorm", NeurIPS 2021.

    Args:
        others: as for `BatchNorm2d`.
    """


class VarianceNorm3d(_VarianceNorm, BatchNorm3d):
    """Variance normalization of (N, C, D, H, W). Arguments as for `VarianceNorm2d`."""
