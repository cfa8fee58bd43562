"""The seam's halves by Triton: a kernel for each pass over x, whose sums a second small launch of it merges.

Passes are cut into tiles like those of `divnorm_kernels.backends.triton`, which refuses what this refuses.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..backends.triton import aligned, kind, packed, refusal, run
from ..fields import Geometry
from ..layout import channels_last_strides, dense

__all__ = ["gradient", "normalize", "refusal", "statistics", "sums"]


def statistics(g: Geometry, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the rows."""
    x = dense(x)
    mean, variance = (x.new_empty(g.maps_shape[1:], dtype=torch.float32) for _ in range(2))
    if g.numel == 0:
        return mean.zero_(), variance.zero_()
    _run("statistics", g, x, (), lambda scratch, _: (x, mean, variance, scratch), aligned(x))
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
    """``(y, l1)``."""
    x = dense(x)
    residual = None if residual is None else dense(residual, like=x)
    y, l1 = torch.empty_like(x), x.new_empty((), dtype=torch.float32) if with_l1 else None
    if g.numel == 0:
        return y, l1.zero_() if with_l1 else None
    weight, bias, threshold = map(packed, (weight, bias, threshold))
    _run(
        "normalize",
        g,
        x,
        (*map(kind, (weight, bias, threshold)), residual is None, with_l1),
        lambda scratch, _: (x, y, weight, bias, residual, threshold, rows, l1, float(g.numel), scratch),
        aligned(x, weight, bias, residual, threshold, rows),
        with_l1,
    )
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
    """The sums of the rows, and the gradients of weight, bias and threshold, ``None`` where not needed."""
    x = dense(x)
    dy = dense(dy, like=x)
    found = x.new_empty((3, *g.maps_shape[1:]), dtype=torch.float32)
    dweight, dbias, dthreshold = gradients = tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if need else None
        for t, need in zip((weight, bias, threshold), needs, strict=True)
    )
    if g.numel == 0:
        return found.zero_(), *(None if t is None else t.zero_() for t in gradients)
    weight, bias, residual, threshold = _in_front(g, x, weight, bias, residual, threshold)
    _run(
        "sums",
        g,
        x,
        (*map(kind, (weight, bias, threshold, *gradients)), residual is None, l1_scale is None),
        lambda scratch, _: (
            *(x, dy, weight, bias, residual, threshold, rows, dweight, dbias, dthreshold, found, scratch),
            l1_scale is not None,
        ),
        aligned(x, dy, weight, bias, residual, threshold, rows),
        any(needs),
    )
    return found, *gradients


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
    """The gradients of x and of a residual in front of an activation, ``None`` where not needed."""
    x = dense(x)
    dy = dense(dy, like=x)
    dx, dresidual = (torch.empty_like(x) if need else None for need in needs)
    if g.numel == 0:
        return dx, dresidual
    weight, bias, residual, threshold = _in_front(g, x, weight, bias, residual, threshold)
    _run(
        "gradient",
        g,
        x,
        (*map(kind, (weight, bias, threshold)), residual is None, l1_scale is None, *needs),
        lambda *_: (x, dy, dx, dresidual, weight, bias, residual, threshold, rows, slopes, l1_scale),
        aligned(x, dy, weight, bias, residual, threshold, rows, slopes, l1_scale),
        residual is not None,
    )
    return dx, dresidual


def _in_front(
    g: Geometry,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    threshold: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """What backward reads of them: what only shifts y is of use to an activation alone."""
    if not g.norm.activation:
        return packed(weight), None, None, None
    return packed(weight), packed(bias), None if residual is None else dense(residual, like=x), packed(threshold)


def _run(name: str, g: Geometry, x: Tensor, key: tuple[Any, ...], arguments: Any, aligned: bool, *wanted: bool) -> None:
    """Launches the plan of that name in `divnorm_kernels.seam.triton_plans`, which takes ``wanted``."""

    def plans() -> Iterable[Any]:
        from . import triton_plans  # brings triton, which takes a second

        return getattr(triton_plans, name)(g, x, *wanted)

    run(g, (name, x.dtype, x.device, channels_last_strides(x), *key), x, arguments, aligned, plans)
