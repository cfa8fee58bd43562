"""The tensors of a call, checked against its normalization."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_activation, check_affine, check_residual, check_sigma, check_threshold, sizes_of
from .epilogue import promoted
from .fields import UNKNOWN, Geometry, geometry
from .norm import Norm


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


def _sizes(x: Tensor) -> tuple[int, ...]:
    """The shape of ``x``; while torch.jit traces, with unknown extents in place of the example's."""
    shape = sizes_of(x)
    if len(shape) < 3 or not torch.jit.is_tracing():
        return shape
    return (UNKNOWN, shape[1], *(UNKNOWN,) * (len(shape) - 2))
