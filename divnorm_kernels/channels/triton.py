"""Channel normalization by Triton: one kernel per direction, compiled for the GPU at hand on first use."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.triton import unreadable
from ..layout import dense
from .layout import extents
from .pool import Pool

MOST_CHANNELS = 4096
"""Of more the kernels would spill registers."""
_TILE, _MOST = 2048, MOST_CHANNELS
"""The numbers that a program holds; at most, where channels are many."""
_SEGMENT = 32
"""Bytes that a program reads side by side where it can: what memory hands out."""
_WARP = 16 * 32
"""The numbers that a warp holds."""
_LEAST_CHANNELS = 4
"""Of a tile, which the kernels take apart into four."""
_EXACT = (0.5, 0.75, 1.0)
"""Values of beta that take roots alone."""
_ALIGNMENT = 16
_INT32 = 2**31


class Tile(NamedTuple):
    """What a program holds: all channels, as many as a power of two, of some positions; and its warps."""

    channels: int
    positions: int
    warps: int


def refusal(x: Tensor) -> str | None:
    """Why this call cannot be served, or ``None``."""
    reason = unreadable(x)
    if reason is None and x.shape[1] > MOST_CHANNELS:
        reason = f"x has {x.shape[1]} channels, a program holds at most {MOST_CHANNELS}"
    return reason


def forward(pool: Pool, x: Tensor, learned: Tensor | None) -> Tensor:
    """y, of x's shape, dtype and memory format."""
    from .triton_kernel import forward_kernel  # brings triton, which takes a second

    x = dense(x)
    y = torch.empty_like(x)
    _launch(forward_kernel, pool, x, tile_of(x), (x, y), learned)
    return y


def backward(
    pool: Pool, dy: Tensor, x: Tensor, learned: Tensor | None, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and ``learned``, ``None`` where not needed; zero where a number is not learned."""
    from .triton_kernel import backward_kernel

    x = dense(x)
    dy = dense(dy, like=x)
    tile = tile_of(x)
    dx = torch.empty_like(x) if needs[0] else None
    partials = x.new_empty((_programs(x, tile), 4), dtype=torch.float32) if needs[1] else None
    _launch(backward_kernel, pool, x, tile, (x, dy, dx, partials), learned)
    return dx, None if partials is None else partials.sum(0, dtype=torch.float64).float()


def tile_of(x: Tensor) -> Tile:
    """How a dense x is cut."""
    _, channels, inner = extents(x)
    channels = max(1 << (channels - 1).bit_length(), _LEAST_CHANNELS)
    positions = max(_TILE // channels, 1)
    if inner > 1:
        positions = max(positions, min(_SEGMENT // x.element_size(), _MOST // channels))
    return Tile(channels, positions, max(channels * positions // _WARP, 1))


def _programs(x: Tensor, tile: Tile) -> int:
    """How many tiles x has."""
    outer, _, inner = extents(x)
    return -(-outer * inner // tile.positions) if x.numel() else 0


def _launch(
    kernel: Any, pool: Pool, x: Tensor, tile: Tile, tensors: tuple[Tensor | None, ...], learned: Tensor | None
) -> None:
    """Runs a kernel, whose first arguments are ``tensors``, on every tile of a dense x."""
    programs = _programs(x, tile)
    if programs == 0:
        return
    from triton.language import int32, int64

    outer, channels, inner = extents(x)
    last = inner == 1
    row = channels if last else inner
    unit = min(row & -row, _ALIGNMENT)  # the largest power of two that divides it
    before, after = pool.box or (None, None)
    beta = pool.scalars[2]
    constants = {
        "UNIT": unit,
        "CHANNELS": channels,
        "LAST": last,
        # the last tile ends behind x
        "INDEX": int64 if x.numel() + tile.channels * tile.positions >= _INT32 else int32,
        "BEFORE": before,
        "AFTER": after,
        "SQUARED": pool.squared,
        "EXACT": beta if beta in _EXACT else None,
        "LEARNS": sum(1 << i for i, learns in enumerate(pool.learns) if learns),
        "BLOCK_C": tile.channels,
        "BLOCK_P": tile.positions,
    }
    with torch.cuda.device_of(x):
        arguments = (*tensors, learned, *pool.scalars, outer, 1 if last else inner // unit, *constants.values())
        kernel[(programs,)](*arguments, num_warps=tile.warps, enable_fp_fusion=True)
