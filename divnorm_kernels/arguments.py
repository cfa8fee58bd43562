"""The tensors of a call, checked against its normalization, and computed with where no kernel takes them."""

from __future__ import annotations

import torch
from torch import Tensor

from .addresses import check_held
from .checks import check_activation, check_affine, check_residual, check_sigma, check_threshold, sizes_of
from .epilogue import promoted
from .fields import UNKNOWN, Geometry, geometry
from .norm import Norm
from .reference import Rows, evaluate
from .states import recorded, transformed


def checked(
    norm: Norm,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sigma: Tensor | float,
    residual: Tensor | None,
    threshold: Tensor | None,
) -> tuple[Geometry, Tensor, Tensor | None]:
    """The geometry, and ``x`` and ``residual`` as they are computed with (`divnorm_kernels.epilogue.promoted`).

    Raises:
        TypeError, ValueError: on a tensor that does not fit; the message names it, what it got and what was expected.
    """
    check_activation(x)
    x, residual = promoted(x, residual, (weight, bias, sigma, threshold))
    g = geometry(norm, _sizes(x))
    check_affine("weight", weight, g, x)
    check_affine("bias", bias, g, x)
    check_sigma(sigma, g, x)
    check_threshold(threshold, g, x)
    check_residual(residual, x)
    return g, x, residual


def eager() -> bool:
    """Whether a call is just computed, and its tensors may be looked at."""
    return not (torch.compiler.is_compiling() or recorded() or transformed())


def by_reference(
    g: Geometry, x: Tensor, with_l1: bool, rows: Rows | None = None, **tensors: Tensor | float | None
) -> tuple[Tensor, Tensor]:
    """`divnorm_kernels.reference.evaluate`, with a look for freed storages, which torch itself would read."""
    looks = eager()
    if looks:
        mean, variance = (None, None) if rows is None else rows
        check_held(x=x, mean=mean, variance=variance, **tensors)
    y, l1 = evaluate(g, x, **tensors, given=rows)
    for result in (y, l1) if with_l1 else (y,):
        if looks and result.requires_grad:
            result.register_hook(_check_gradient)
    return y, l1


def _check_gradient(dy: Tensor) -> None:
    """On its way to torch's own nodes, which do not look."""
    check_held(dy=dy)


def _sizes(x: Tensor) -> tuple[int, ...]:
    """The shape of ``x``; while torch.jit traces, with unknown extents in place of the example's."""
    shape = sizes_of(x)
    if len(shape) < 3 or not torch.jit.is_tracing():
        return shape
    return (UNKNOWN, shape[1], *(UNKNOWN,) * (len(shape) - 2))
