"""The two halves on a GPU: the compiled module's CUDA kernels, each direction's two passes as launches of their own.

Not measured on any device yet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import cuda
from ..backends.cuda import refusal
from ..channels.layout import address
from ..checks import compute_dtype
from ..fields import Geometry
from ..layout import dense
from .places import each, numbers

__all__ = ["gradient", "normalize", "refusal", "statistics", "sums"]

_HALVES = ("statistics", "normalize", "sums", "gradient")


def _empty(x: Tensor) -> Any:
    """`torch.empty` where a launch writes all of it; zeros where there is nothing to launch."""
    return torch.empty if x.numel() > 0 else torch.zeros


def _launch(half: str, g: Geometry, x: Tensor, residual: Tensor | None, *given: Any) -> None:
    """Launches a half for a dense x that is not empty: how it is cut is found once for the geometry."""
    seam = cuda.kept("CudaSeam", g, x, residual is not None)
    scratch, stream = cuda.place(x, seam.scratch_bytes[_HALVES.index(half)])
    getattr(seam, half)(*given, (x.device.index or 0, stream, address(scratch)))


def statistics(g: Geometry, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the rows; zero where there is nothing."""
    x = dense(x)
    mean, variance = (_empty(x)(g.maps_shape[1:], dtype=compute_dtype(x), device=x.device) for _ in range(2))
    if x.numel() > 0:
        _launch("statistics", g, x, None, address(x), (address(mean), address(variance)))
    return mean, variance


def normalize(
    g: Geometry,
    x: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    with_l1: bool,
    residual: Tensor | None,
    threshold: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """``(y, l1)`` by mean and 1/s of the rows."""
    x = dense(x)
    residual = None if residual is None else dense(residual, like=x)
    y, l1 = torch.empty_like(x), _empty(x)((), dtype=rows.dtype, device=x.device) if with_l1 else None
    if x.numel() > 0:
        given = [None if t is None else t.contiguous() for t in (weight, bias, threshold)]
        results = address(y), address(l1)
        _launch("normalize", g, x, residual, address(x), each(rows), numbers(*given), address(residual), *results)
    return y, l1


def sums(
    g: Geometry,
    dy: Tensor,
    l1_scale: Tensor | None,
    x: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    needs: tuple[bool, bool, bool],
    residual: Tensor | None,
    threshold: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The rows' sums of backward, (3, rows), and the gradients of weight, bias and threshold."""
    x = dense(x)
    dy, residual = (None if t is None else dense(t, like=x) for t in (dy, residual))
    given = [None if t is None else t.contiguous() for t in (weight, bias, threshold)]
    found = [
        _empty(x)(t.shape, dtype=t.dtype, device=x.device) if need else None
        for t, need in zip(given, needs, strict=True)
    ]
    out = _empty(x)((3, *rows.shape[1:]), dtype=rows.dtype, device=x.device)
    if x.numel() > 0:
        read = address(dy), address(l1_scale), address(x), each(rows), numbers(*given), address(residual)
        _launch("sums", g, x, residual, *read, address(out), numbers(*found))
    return out, *found


def gradient(
    g: Geometry,
    dy: Tensor,
    l1_scale: Tensor | None,
    x: Tensor,
    rows: Tensor,
    slopes: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    threshold: Tensor | None,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and of a residual in front of an activation."""
    x = dense(x)
    dy, residual = (None if t is None else dense(t, like=x) for t in (dy, residual))
    dx = torch.empty_like(x)
    dresidual = torch.empty_like(x) if needs[1] else None
    if x.numel() > 0:
        given = [None if t is None else t.contiguous() for t in (weight, bias, threshold)]
        read = address(dy), address(l1_scale), address(x), each(rows), address(slopes), numbers(*given)
        _launch("gradient", g, x, residual, *read, address(residual), address(dx), address(dresidual))
    return dx if needs[0] else None, dresidual
