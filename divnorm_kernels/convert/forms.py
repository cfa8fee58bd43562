"""Layers in forms that have no name of their own."""

from __future__ import annotations

from torch import Tensor

from ..modules import BatchNorm1d, BatchNorm2d, DivisiveNorm1d, FilterResponseNorm2d, InstanceNorm1d


class AnyBatchNorm(BatchNorm2d):
    """Batch normalization of (N, C) and (N, C, *S), of one to three spatial dimensions."""

    _dims = (2, 3, 4, 5)


class AnyFilterResponseNorm(FilterResponseNorm2d):
    """Filter response normalization of (N, C, *S), of one to three spatial dimensions."""

    _dims = (3, 4, 5)


class LastBatchNorm(BatchNorm1d):
    """Batch normalization of (..., C): of features or tokens, whose channels lie last."""

    _dims = (2, 3, 4, 5)

    def _told_by_eps(self) -> bool:
        return False  # torch.nn has no such layer

    def _call(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        added = None if residual is None else residual.movedim(-1, 1)
        return super()._call(x.movedim(-1, 1), added).movedim(1, -1)


class DenseDivisiveNorm(DivisiveNorm1d):
    """Divisive normalization in a BatchNorm1d's place: of (N, C) over windows of C, of (N, C, L) over those of L."""

    _dims = (2, 3)


class DenseChannelNorm(DenseDivisiveNorm):
    """Divisive normalization of every channel by itself, in a BatchNorm1d's place: (N, C) is one position to it."""

    def _call(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if x.dim() > 2:
            return super()._call(x, residual)
        added = None if residual is None else residual.unsqueeze(-1)
        return super()._call(x.unsqueeze(-1), added).squeeze(-1)


class BatchedInstanceNorm(InstanceNorm1d):
    """Instance normalization of (N, C, L) alone: a BatchNorm1d's (N, C) is no (C, L) without a batch."""

    def _call(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if x.dim() == 2:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected (N, C, L): a feature alone has no deviation")
        return super()._call(x, residual)
