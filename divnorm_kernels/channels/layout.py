"""An x (N, C, ...) as kernels see it: ``outer`` blocks of C rows with ``inner`` numbers each, without gaps."""

from __future__ import annotations

from math import prod

from torch import Tensor

from ..layout import channels_last_strides


def extents(x: Tensor) -> tuple[int, int, int]:
    """``(outer, channels, inner)`` of a dense x; where inner is 1 the channels of a position lie side by side."""
    if x.dim() == 2 or channels_last_strides(x):
        return prod(x.shape) // max(x.shape[1], 1), x.shape[1], 1
    return x.shape[0], x.shape[1], prod(x.shape[2:])


def address(t: Tensor | None) -> int:
    """Where a tensor lies; 0 for ``None``."""
    return 0 if t is None else t.data_ptr()
