"""Prepared calls: one object for each normalization, which goes from tensors to tensors in the compiled module.

They serve what is usual and answer everything else with NotImplemented; `divnorm_kernels.functional` then knows what to
do, or says what is wrong. See ``csrc/call.cpp``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol

from torch import Tensor

from .backends import select, without_kernels
from .backends.native import module
from .fields import geometry
from .norm import Norm


class Form(Protocol):
    """What shapes a layer takes; hashable."""

    shapes_parameters: bool
    """Whether weight and bias have as many dimensions as the layer likes."""

    def __call__(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The operator's form of an x of ``shape``; a ValueError says why there is none."""


@lru_cache(maxsize=256)
def prepared(norm: Norm, backend: str | None, form: Form | None = None) -> Callable[..., Any]:
    """``call(x, weight, bias, sigma, with_l1=False, with_statistics=False, residual=None, threshold=None)``.

    Gives y, or where one of the latter is true ``(y, l1, maps)``, as `divnorm_kernels.functional.normalize` does but
    with the statistics in one tensor; or NotImplemented. ``form``: of a layer whose x has other shapes than the
    operator's; sigma may have shape (1,) then.
    """
    return nothing if module is None or without_kernels(norm) is not None else module.Call(norm, backend, form, _plan)


def nothing(*arguments: object) -> Any:
    """A call that serves none."""
    return NotImplemented


def _plan(norm: Norm, backend: str | None, form: Form | None, x: Tensor, residual: bool) -> Any:
    """The plan for an ``x`` without gaps, or ``None`` where the compiled module does not serve it."""
    shape = tuple(x.shape)
    try:
        own = shape if form is None else form(shape)
        if own != shape and not x.is_contiguous():
            return None
        x, g = x.detach().view(own), geometry(norm, own)
        kernels = select(backend, g, x)
    except (TypeError, ValueError, RuntimeError):  # said again where the call goes on
        return None
    plan = None if kernels is None or g.numel == 0 else kernels.plan_for(g, x, residual)
    return plan if own == shape or plan is None or plan.native else None
