"""Generalized divisive normalization on the CPU: torch's matrix products, and the compiled module's passes around them.

A part of x at a time is squared into scratch memory, multiplied by gamma and used while a cache holds it. Backward has
two products, one for dx and one for dgamma, because f(D) is y / x: exact to a rounding where both are normal numbers of
the type that is computed in. From the first part on that has any other number, parts make the third product, D.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.cpu import unreadable
from ..backends.native import DTYPES, module
from ..channels.layout import extents
from ..checks import compute_dtype
from ..layout import dense
from ..reference import field_adjoint, field_average
from .form import Form

_NUMBERS = 1 << 18
"""Of a part at most; backward has three in scratch memory, of 3 MB in float32. With a window a part is a sample."""
_LINE = 32
"""Of which number of positions a part is where it can be: rows of it are whole lines of a cache."""


def refusal(form: Form, x: Tensor) -> str | None:
    """Why this call cannot be served, or ``None``."""
    return unreadable(x)


def keeps_result(x: Tensor) -> bool:
    """Whether backward is to be given y: a half type's is rounded too coarsely to tell f(D)."""
    return x.dtype == compute_dtype(x)


class _Part(NamedTuple):
    """Some positions of x, all channels of each."""

    offset: int
    """Of their first number."""
    places: tuple[int, ...]
    """As ``csrc/gdn.h`` has a part."""
    positions: int


def _even(count: int, most: int, unit: int = 1) -> int:
    """The size of pieces that ``count`` is cut into, which differ little and are ``most`` at most.

    A multiple of ``unit`` where that is no more.
    """
    unit = unit if unit <= most else 1
    pieces = -(-count // (most // unit * unit))
    return -(-count // (pieces * unit)) * unit


def _parts(x: Tensor, samples: bool) -> Iterator[_Part]:
    """Those that a dense x is cut into, by its sizes alone; ``samples``: one for each sample."""
    outer, channels, inner = extents(x)
    most = max(_NUMBERS // channels, 1)
    if inner == 1:  # the channels of a position lie side by side, and so do all numbers of a part
        size = math.prod(x.shape[2:]) if samples else _even(outer, most, _LINE)
        for first in range(0, outer, size):
            count = min(size, outer - first)
            numbers = count * channels
            yield _Part(first * channels, (1, 1, numbers, numbers, numbers, numbers, numbers), count)
    elif inner > most and not samples:
        size = _even(inner, most, _LINE)
        for sample in range(outer):
            for first in range(0, inner, size):
                count = min(size, inner - first)
                places = (1, channels, count, 0, inner, 0, count)
                yield _Part(sample * channels * inner + first, places, count)
    else:
        size = 1 if samples else _even(outer, most // inner)
        for first in range(0, outer, size):
            count = min(size, outer - first)
            positions = count * inner
            places = (count, channels, inner, channels * inner, inner, inner, positions)
            yield _Part(first * channels * inner, places, positions)


class _Work:
    """The kernels on the parts of one x, and the scratch memory between them."""

    def __init__(self, form: Form, x: Tensor, matrices: int) -> None:
        """``matrices``: how many of scratch memory a part needs."""
        self._axes = form.axes(tuple(x.shape))
        self.parts = list(_parts(x, self._axes is not None))
        self._kind = (DTYPES[x.dtype], int(form.inverse), int(form.simplified), x.numel())
        self._threads = torch.get_num_threads()
        self._spatial, self._channels, self._side_by_side = x.shape[2:], x.shape[1], extents(x)[2] == 1
        most = max(part.positions for part in self.parts)
        self._scratch = x.new_empty((matrices, most * self._channels), dtype=compute_dtype(x))

    def matrices(self, part: _Part) -> tuple[Tensor, ...]:
        """Scratch memory as matrices (C, positions) which lie as the part does."""
        found = self._scratch.narrow(1, 0, part.positions * self._channels)
        if self._side_by_side:
            return found.unflatten(1, (part.positions, self._channels)).transpose(1, 2).unbind()
        return found.unflatten(1, (self._channels, part.positions)).unbind()

    def run(self, kernel: Callable[..., Any], part: _Part, like_x: Iterable[Tensor], *matrices: Tensor) -> Any:
        """A kernel on the part of tensors that are ``like_x``, and on matrices."""
        own = (t.data_ptr() + part.offset * t.element_size() for t in like_x)
        return kernel(self._kind, part.places, self._threads, *own, *(m.data_ptr() for m in matrices))

    def average(self, s: Tensor) -> None:
        """B in the place of a sample's numbers, where the form has one."""
        if self._axes is not None:
            sample = s.unflatten(1, self._spatial).unsqueeze(0)
            sample.copy_(field_average(sample, self._axes, self._spatial))

    def spread(self, ds: Tensor) -> None:
        """The gradient of what B averages in the place of its own."""
        if self._axes is not None:
            sample = ds.unflatten(1, self._spatial).unsqueeze(0)
            sample.copy_(field_adjoint(sample, self._axes, self._spatial))


def _computed(parameter: Tensor, compute: torch.dtype) -> Tensor:
    """In the type that is computed in, and without a NaN's payload, which would not round to bfloat16 as one."""
    numbers = parameter.to(compute)
    return numbers.masked_fill(numbers.isnan(), math.nan)


@torch.no_grad()
def forward(form: Form, x: Tensor, beta: Tensor, gamma: Tensor) -> Tensor:
    """y, of x's shape, dtype and memory format."""
    x = dense(x)
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    compute = compute_dtype(x)
    column, weights = _computed(beta, compute).unsqueeze(1), _computed(gamma, compute)
    work = _Work(form, x, 2)
    for part in work.parts:
        s, d = work.matrices(part)
        work.run(module.gdn_pool, part, [x], s)
        work.average(s)
        torch.addmm(column, weights, s, out=d)
        work.run(module.gdn_forward, part, [x, y], d)
    return y


@torch.no_grad()
def backward(
    form: Form, dy: Tensor, x: Tensor, y: Tensor | None, beta: Tensor, gamma: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of x, beta and gamma, ``None`` where not needed."""
    x = dense(x)
    dy, y = (None if t is None else dense(t, like=x) for t in (dy, y))
    compute = compute_dtype(x)
    dx = torch.empty_like(x) if needs[0] else None
    dbeta, dgamma = (
        t.new_zeros(t.shape, dtype=compute) if need else None for t, need in zip((beta, gamma), needs[1:], strict=True)
    )
    if x.numel() > 0:
        column, weights = _computed(beta, compute).unsqueeze(1), _computed(gamma, compute)
        work = _Work(form, x, 3)
        told = y is not None
        for part in work.parts:
            s, e, dd = work.matrices(part)
            told = told and work.run(module.gdn_slope_of_result, part, [dy, x, y], s, e, dd)
            if not told:
                work.run(module.gdn_pool, part, [x], s)
            work.average(s)
            if not told:
                torch.addmm(column, weights, s, out=e)
                work.run(module.gdn_slope, part, [dy, x], e, e, dd)
            if dbeta is not None:
                dbeta.add_(dd.sum(1))
            if dgamma is not None:
                dgamma.addmm_(dd, s.t())
            if dx is not None:
                ds = torch.mm(weights.t(), dd, out=s)
                work.spread(ds)
                work.run(module.gdn_backward, part, [x, dx], e, ds)
    return dx, dbeta if dbeta is None else dbeta.to(beta.dtype), dgamma if dgamma is None else dgamma.to(gamma.dtype)
