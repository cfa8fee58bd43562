"""What Kalman normalization hands from layer to layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class KalmanState(NamedTuple):
    """An estimate of the moments of an activation: mean and biased variance, each of shape (C,), a number a channel."""

    mean: Tensor
    variance: Tensor


def add_states(first: KalmanState, second: KalmanState) -> KalmanState:
    """The state of the sum of two activations that are taken to be independent: means and variances add up.

    Raises:
        TypeError, ValueError: on what is no state, or on states that differ in shape, dtype or device.
    """
    check_state("first", first)
    check_state("second", second, kind_of(first[0]))
    return KalmanState(first[0] + second[0], first[1] + second[1])


Kind = tuple[torch.Size, torch.dtype, torch.device]
"""What tensors of a state are alike in."""


def kind_of(t: Tensor) -> Kind:
    """The `Kind` of one of them."""
    return t.shape, t.dtype, t.device


def check_state(name: str, state: object, kind: Kind | None = None) -> None:
    """Raises unless ``state`` is mean and variance, floating, a number a channel each, both of a ``kind``."""
    if not isinstance(state, tuple | list) or len(state) != 2:
        raise TypeError(f"{name}: got {type(state).__name__}, expected a pair of mean and variance")
    for part, t in zip(KalmanState._fields, state, strict=True):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: got {type(t).__name__} for the {part}, expected a Tensor")
        if not t.is_floating_point():
            raise TypeError(f"{name}: got a {part} of {t.dtype}, expected a floating one")
        if t.dim() != 1:
            raise ValueError(f"{name}: got a {part} of shape {tuple(t.shape)}, expected (C,), a number a channel")
        kind = kind or kind_of(t)
        shape, dtype, device = kind
        if t.shape != shape:
            raise ValueError(f"{name}: got a {part} of shape {tuple(t.shape)}, expected {tuple(shape)}")
        if t.dtype != dtype:
            raise TypeError(f"{name}: got a {part} of {t.dtype}, expected {dtype}")
        if t.device != device:
            raise ValueError(f"{name}: got a {part} on {t.device}, expected one on {device}")


def along(t: Tensor, dims: int) -> Tensor:
    """A number a channel, of shape (1, C, 1, ...) in ``dims`` dimensions."""
    return t.view(1, -1, *[1] * (dims - 2))


def moments(y: Tensor, dtype: torch.dtype) -> KalmanState:
    """Mean and biased variance of the channels of ``y`` (N, C, ...), in ``dtype``."""
    variance, mean = torch.var_mean(y.to(dtype), [0, *range(2, y.dim())], correction=0)
    return KalmanState(mean, variance)
