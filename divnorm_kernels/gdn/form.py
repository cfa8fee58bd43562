"""Which generalized divisive normalization a call is, beside its tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_activation, check_flag, check_parameter, sizes_of
from ..fields import UNKNOWN, Axis, geometry
from ..norm import Window, norm_of, parsed


class Form(NamedTuple):
    """``y = x f(beta + gamma B[x^2])``, as the registered operators carry it.

    f is 1 / root; ``simplified``, abs(x) is in the place of x^2 and f 1 / its argument; ``inverse``: f is the root, or
    its argument. B averages over ``window``, the `divnorm_kernels.norm.Norm.text` of a norm with no other field; where
    that is empty there is no B.
    """

    inverse: bool
    simplified: bool
    window: str

    def axes(self, shape: tuple[int, ...]) -> tuple[Axis, ...] | None:
        """B on an x of ``shape``, an axis per spatial dimension, or ``None``.

        Raises:
            ValueError: where the window does not fit, naming it, what it got and what was expected.
        """
        return geometry(parsed(self.window), shape).summation if self.window else None


def form_of(x: Tensor, inverse: bool, simplified: bool, window: Window) -> Form:
    """The `Form` of what a user asks for, checked on ``x``, which is a Tensor."""
    check_flag("inverse", inverse)
    check_flag("simplified", simplified)
    check_shape(x)
    if window is None:
        return Form(inverse, simplified, "")
    norm = norm_of(window, None)
    if x.dim() == 2:
        raise ValueError(f"window: got {window!r} for x of shape {tuple(x.shape)}, expected None: it has no positions")
    geometry(norm, recorded_sizes(x))  # a compiler does not read texts
    return Form(inverse, simplified, norm.text)


def recorded_sizes(x: Tensor) -> tuple[int, ...]:
    """The shape of ``x``; while torch.jit traces, with unknown extents in place of the example's."""
    shape = sizes_of(x)
    return (UNKNOWN, shape[1], *(UNKNOWN,) * (len(shape) - 2)) if torch.jit.is_tracing() else shape


def check_shape(x: Tensor) -> None:
    """Raises unless ``x`` has channels and at most three spatial dimensions."""
    if not 2 <= x.dim() <= 5:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (N, C) and at most three spatial dimensions")


def check_tensors(x: Tensor, beta: Tensor, gamma: Tensor) -> None:
    """Raises unless ``x`` is an activation, and ``beta`` and ``gamma`` are as many numbers as its channels need."""
    check_activation(x)
    check_shape(x)
    channels = sizes_of(x)[1]
    check_parameter("beta", beta, (channels,), "one per channel of x", x)
    check_parameter("gamma", gamma, (channels, channels), "one per pair of channels of x", x)
