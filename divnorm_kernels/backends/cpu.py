"""The native CPU backend: the compiled module's kernels for CPU tensors."""

from __future__ import annotations

import os
import sys
import warnings

from torch import Tensor

from ..fields import Geometry
from ..layout import channels_last_strides
from . import native
from .native import DTYPES, Needs, module

_OTHER_PROCESSOR = (
    "the compiled module has kernels for other processors alone: install it here, with pip's --no-cache-dir, or "
    'for all of them with CMAKE_ARGS="-DDIVNORM_INSTRUCTION_SETS=baseline;avx2;avx512"'
)
_RUNS_HERE = module is not None and bool(module.instruction_sets())
if module is not None and not _RUNS_HERE:
    warnings.warn(
        f"divnorm_kernels: CPU tensors are served by the slow reference ({_OTHER_PROCESSOR})",
        RuntimeWarning,
        stacklevel=2,
    )
if module is not None and "DIVNORM_INSTRUCTION_SET" in os.environ:
    module.use_instruction_set(os.environ["DIVNORM_INSTRUCTION_SET"])


def missing() -> str | None:
    """Why this backend is not available on this machine, or ``None``."""
    return native.missing() if module is None or _RUNS_HERE else _OTHER_PROCESSOR


def refusal(g: Geometry, x: Tensor) -> str | None:
    """Why this call cannot be served, or ``None``."""
    return unreadable(x)


def unreadable(x: Tensor) -> str | None:
    """Why no kernel of the CPU's can take such an x, whatever it computes, or ``None``."""
    if not _RUNS_HERE:
        return missing()
    if not x.is_cpu:
        return f"x is on {x.device}, this backend computes on the CPU"
    if x.dtype not in DTYPES:
        return f"x has dtype {x.dtype}"
    return None


def instruction_set() -> str | None:
    """The instruction set in use."""
    return module.instruction_set() if _RUNS_HERE else None


def description() -> str:
    """What a benchmark names this backend's kernels."""
    return f"native, {instruction_set()}"


def instruction_sets() -> list[str]:
    """The instruction sets this processor runs, best first."""
    return module.instruction_sets() if module is not None else []


def use_instruction_set(name: str) -> None:
    """Computes with the named set from here on, in the whole process."""
    module.use_instruction_set(name)


def plan_for(g: Geometry, x: Tensor, residual: bool = False) -> module.Plan:
    """The compiled module's plan for calls of ``g`` on such an x; ``residual``: whether they have one."""
    return module.Plan(g, sys.modules[__name__], calls_for(g, x, residual), x, residual)


def calls_for(g: Geometry, x: Tensor, residual: bool = False) -> module.CpuCalls:
    """The kernels of ``g`` on such an x, which has no gaps; ``residual``: whether there is one."""
    key = (x.dtype, channels_last_strides(x), residual)
    calls = g.cache.get(key)
    if calls is None:
        calls = g.cache[key] = module.CpuCalls(g, DTYPES[x.dtype], *key[1:])
    return calls


def forward(
    g: Geometry,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sigma: Tensor | float,
    with_l1: bool,
    with_variance: bool = False,
    residual: Tensor | None = None,
    threshold: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(y, maps, l1)``; maps, of ``g.kept_shape(with_variance)``, holds mean, rstd and the variance.

    ``with_variance`` is for geometries that are `whole` and divide; the variance is that of v, without sigma^2.
    """
    return native.forward(plan_for, g, x, weight, bias, sigma, with_l1, with_variance, residual, threshold)


def backward(
    g: Geometry,
    dy: Tensor | None,
    dl1: Tensor | None,
    x: Tensor,
    maps: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sigma: Tensor | float,
    needs: Needs,
    residual: Tensor | None = None,
    threshold: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients for (x, weight, bias, sigma, residual, threshold) from those of y and l1, ``None``: zero.

    ``None`` where not needed. Without an activation there is no residual here: its gradient is dy.
    """
    return native.backward(plan_for, g, dy, dl1, x, maps, weight, bias, sigma, needs, residual, threshold)
