"""Which channels a channel normalization looks at, and what a call of one is told beside its tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_number, check_scalar
from ..norm import Span
from ..states import recorded

_RECORDED = 4096
"""The largest window that is written down as it is, whatever the channels; its sums are over as many more of them."""


@dataclass(frozen=True, eq=False)  # tensors have no truth
class Exponential:
    """A window over all channels whose weights decay with the distance: ``exp(-abs(j) / scale)`` of the channel j away.

    Source: Miller et al., "Divisive feature normalization improves image recognition performance in AlexNet", ICLR
    2022, without the cut that it makes at four times the scale.

    Args:
        scale: in channels; a float above 0, or a tensor of one number, which learns.

    Raises:
        TypeError, ValueError: on any other, naming the argument, what it got and what was expected.
    """

    scale: Tensor | float

    def __post_init__(self) -> None:
        if isinstance(self.scale, Tensor):
            if self.scale.shape not in ((), (1,)):
                raise ValueError(f"scale: got shape {tuple(self.scale.shape)}, expected () or (1,)")
            if not self.scale.is_floating_point():
                raise TypeError(f"scale: got dtype {self.scale.dtype}, expected a floating one")
            return
        check_number("scale", self.scale, "a finite number above 0 or a Tensor")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale: got {self.scale}, expected a finite number above 0 or a Tensor")


Box = tuple[int, int]
"""A window by its two sides: channel c sees ``c - before`` to ``c + after``, as far as there are any."""


class Pool(NamedTuple):
    """A channel normalization: ``y = n / (k + a * S)^beta``, where S of channel c weighs the squares around it.

    n is x, or its square where ``squared``. S is the sum over ``box``, and where that is ``None`` the sum over all
    channels j of ``rho^abs(c - j) x_j^2``. The numbers k, a, beta and rho are of two sources: ``scalars``, in this
    order, and where one of these is NaN the tensor beside x that has all four, ``learned``.
    """

    box: Box | None
    squared: bool
    scalars: tuple[float, float, float, float]

    @property
    def learns(self) -> tuple[bool, ...]:
        """Which of k, a, beta and rho are ``learned``."""
        return tuple(value != value for value in self.scalars)


def pool_of(
    x: Tensor,
    window: int | Span | Exponential,
    alpha: Tensor | float,
    beta: Tensor | float,
    k: Tensor | float,
    squared: bool,
    compute: torch.dtype,
) -> tuple[Pool, Tensor | None]:
    """The `Pool` of what a user asks for, checked, and ``learned``, of shape (4,), where there is a tensor among it."""
    for name, value in (("alpha", alpha), ("beta", beta), ("k", k)):
        check_scalar(name, value, x)
        if name != "beta" and not isinstance(value, Tensor) and value < 0:
            raise ValueError(f"{name}: got {value}, expected at least 0: else the divisor may reach zero")
    alpha, beta, k = (_number(value, compute) for value in (alpha, beta, k))
    if isinstance(window, Exponential):
        check_scalar("window.scale", window.scale, x)
        scale = _number(window.scale, compute)
        box, a = None, k * alpha / scale
        rho = (-1 / scale).exp() if isinstance(scale, Tensor) else math.exp(-1 / scale)
    else:
        box = _box(window)
        a, rho = alpha / (sum(box) + 1), 0.0
        if not recorded() or sum(box) > _RECORDED:  # a graph serves any number of channels
            most = max(x.shape[1] - 1, 0)  # further away there is no channel
            box = min(box[0], most), min(box[1], most)
    numbers = (k, a, beta, rho)
    scalars = tuple(math.nan if isinstance(number, Tensor) else float(number) for number in numbers)
    if not any(isinstance(number, Tensor) for number in numbers):
        return Pool(box, squared, scalars), None
    zero = torch.zeros((), dtype=compute, device=x.device)
    return Pool(box, squared, scalars), torch.stack([n if isinstance(n, Tensor) else zero for n in numbers])


def _number(value: Tensor | float, compute: torch.dtype) -> Tensor | float:
    return value.to(compute).reshape(()) if isinstance(value, Tensor) else float(value)


def _box(window: int | Span) -> Box:
    """The sides of a window of channels; an even size reaches one further down, as `torch.nn.LocalResponseNorm`'s."""
    if isinstance(window, Span):
        return window.before, window.after
    if isinstance(window, bool) or not isinstance(window, int):
        got = f"{window!r} of type {type(window).__name__}"
        raise TypeError(f"window: got {got}, expected a positive int, a Span or an Exponential")
    if window < 1:
        raise ValueError(f"window: got {window}, expected a positive int, a Span or an Exponential")
    return window // 2, (window - 1) // 2
