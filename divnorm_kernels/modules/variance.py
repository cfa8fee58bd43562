"""Variance normalization: batch normalization that subtracts no mean."""

from __future__ import annotations

from typing import ClassVar

from .batch import BatchNorm1d, BatchNorm2d, BatchNorm3d


class _VarianceNorm:
    """What makes a batch normalization one of variances alone."""

    _settled: ClassVar = {"subtract_mean": False}


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
