"""Batch normalization in forms that have no name of their own."""

from __future__ import annotations

from torch import Tensor

from ..modules import BatchNorm1d, BatchNorm2d


class AnyBatchNorm(BatchNorm2d):
    """Batch normalization of (N, C) and (N, C, *S), of one to three spatial dimensions."""

    _dims = (2, 3, 4, 5)


class LastBatchNorm(BatchNorm1d):
    """Batch normalization of (..., C): of features or tokens, whose channels lie last."""

    _dims = (2, 3, 4, 5)

    def _told_by_eps(self) -> bool:
        return False  # torch.nn has no such layer

    def _call(self, x: Tensor) -> Tensor:
        return super()._call(x.movedim(-1, 1)).movedim(1, -1)
