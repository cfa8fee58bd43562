"""Channel normalization on the CPU: the compiled module's kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.cpu import unreadable
from ..backends.native import DTYPES, module
from ..checks import compute_dtype
from ..layout import dense
from .layout import address, extents
from .pool import Pool


def refusal(x: Tensor) -> str | None:
    """Why this call cannot be served, or ``None``."""
    return unreadable(x)


def forward(pool: Pool, x: Tensor, learned: Tensor | None) -> Tensor:
    """y, of x's shape, dtype and memory format."""
    x = dense(x)
    y = torch.empty_like(x)
    if x.numel() > 0:
        given = DTYPES[x.dtype], extents(x), *pool, address(learned), torch.get_num_threads()
        module.channels_forward(address(x), address(y), *given)
    return y


def backward(
    pool: Pool, dy: Tensor, x: Tensor, learned: Tensor | None, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and ``learned``, ``None`` where not needed; zero where a number is not learned."""
    x = dense(x)
    dy = dense(dy, like=x)
    dx = torch.empty_like(x) if needs[0] else None
    dlearned = torch.zeros(4, dtype=compute_dtype(x)) if needs[1] else None
    if x.numel() > 0:
        given = DTYPES[x.dtype], extents(x), *pool, address(learned), torch.get_num_threads()
        module.channels_backward(address(dy), address(x), address(dx), address(dlearned), *given)
    return dx, dlearned
