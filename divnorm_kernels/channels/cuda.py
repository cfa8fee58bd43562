"""Channel normalization on a GPU: the compiled module's CUDA kernels. Not measured on any device yet."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..backends import cuda
from ..backends.cuda.table import Device
from ..backends.native import DTYPES
from ..checks import compute_dtype
from ..layout import dense
from .layout import address, extents
from .pool import Pool


def refusal(x: Tensor) -> str | None:
    """Why this call cannot be served, or ``None``."""
    reason = cuda.refusal_of(x)
    if reason is None and x.dim() > 1 and x.shape[1] >= cuda.library.cuda_most_channels:
        return f"x has {cuda.library.cuda_most_channels} or more channels"
    return reason


@lru_cache(maxsize=256)
def _channels(
    library: Any, index: int, facts: Device, dtype: torch.dtype, sizes: tuple[int, int, int], pool: tuple[Any, bool]
) -> Any:
    return library.CudaChannels(DTYPES[dtype], sizes, *pool, index, facts.facts())


def channels_for(pool: Pool, x: Tensor) -> Any:
    """The compiled call for a dense x that is not empty: how it is cut, made once while it is among the last ones."""
    facts = cuda.device_of(x.device.index)
    return _channels(cuda.library, x.device.index or 0, facts, x.dtype, extents(x), pool[:2])


def forward(pool: Pool, x: Tensor, learned: Tensor | None) -> Tensor:
    """y, of x's shape, dtype and memory format."""
    x = dense(x)
    y = torch.empty_like(x)
    if x.numel() > 0:
        channels = channels_for(pool, x)
        scratch, stream = cuda.place(x, channels.scratch_bytes[0])
        channels.forward(address(x), address(y), pool.scalars, address(learned), address(scratch), stream)
    return y


def backward(
    pool: Pool, dy: Tensor, x: Tensor, learned: Tensor | None, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and ``learned``, ``None`` where not needed; zero where a number is not learned."""
    x = dense(x)
    dy = dense(dy, like=x)
    dx = torch.empty_like(x) if needs[0] else None
    dlearned = torch.zeros(4, dtype=compute_dtype(x), device=x.device) if needs[1] else None
    if x.numel() > 0 and any(needs):
        channels = channels_for(pool, x)
        scratch, stream = cuda.place(x, channels.scratch_bytes[1])
        results = address(dx), address(dlearned)
        channels.backward(address(dy), address(x), *results, pool.scalars, address(learned), address(scratch), stream)
    return dx, dlearned
