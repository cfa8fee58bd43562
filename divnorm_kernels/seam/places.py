"""Tensors as the compiled module takes them: where they lie."""

from __future__ import annotations

from torch import Tensor

from ..backends.native import DTYPES
from ..channels.layout import address

Numbers = tuple[int, int, int]


def each(rows: Tensor) -> tuple[int, int]:
    """Where the two tensors of rows in one lie, which has no gaps."""
    return address(rows[0]), address(rows[1])


def numbers(*parameters: Tensor | None) -> tuple[Numbers, ...]:
    """Of each where it lies, its dtype and how many numbers it has; without gaps."""
    return tuple((0, 0, 0) if t is None else (t.data_ptr(), DTYPES[t.dtype], t.numel()) for t in parameters)
