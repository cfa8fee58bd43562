"""The two halves on the CPU: the compiled module's kernels for whole fields, each up to its middle or from it on."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.cpu import calls_for, refusal
from ..backends.native import module
from ..channels.layout import address
from ..checks import compute_dtype
from ..fields import Geometry
from ..layout import dense
from .places import each, numbers

__all__ = ["gradient", "normalize", "refusal", "statistics", "sums"]


def statistics(g: Geometry, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the rows; zero where there is nothing."""
    x = dense(x)
    rows = [x.new_zeros(g.maps_shape[1:], dtype=compute_dtype(x)) for _ in range(2)]
    if x.numel() > 0:
        module.seam_statistics(calls_for(g, x), address(x), each(rows), torch.get_num_threads())
    return tuple(rows)


def normalize(
    g: Geometry,
    x: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    with_l1: bool,
    residual: Tensor | None,
    threshold: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``(y, l1)`` by mean and 1/s of the rows."""
    x = dense(x)
    residual = None if residual is None else dense(residual, like=x)
    y, l1 = torch.empty_like(x), 0.0
    if x.numel() > 0:
        given = [None if t is None else t.contiguous() for t in (weight, bias, threshold)]
        l1 = module.seam_normalize(
            calls_for(g, x, residual is not None),
            address(x),
            each(rows),
            numbers(*given),
            address(residual),
            address(y),
            with_l1,
            torch.get_num_threads(),
        )
    return y, rows.new_full((), l1)


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
    found = [torch.zeros_like(t) if need else None for t, need in zip(given, needs, strict=True)]
    out = rows.new_zeros((3, *rows.shape[1:]))
    if x.numel() > 0:
        module.seam_sums(
            calls_for(g, x, residual is not None),
            address(dy),
            0.0 if l1_scale is None else l1_scale.item(),
            address(x),
            each(rows),
            numbers(*given),
            address(residual),
            address(out),
            numbers(*found),
            torch.get_num_threads(),
        )
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
        module.seam_gradient(
            calls_for(g, x, residual is not None),
            address(dy),
            0.0 if l1_scale is None else l1_scale.item(),
            address(x),
            each(rows),
            address(slopes),
            numbers(*given),
            address(residual),
            address(dx),
            address(dresidual),
            torch.get_num_threads(),
        )
    return dx if needs[0] else None, dresidual
