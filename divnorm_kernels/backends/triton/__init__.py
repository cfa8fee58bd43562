"""The Triton backend: one kernel per direction, compiled for the GPU at hand on first use.

``TRITON_INTERPRET=1`` runs the kernels on CPU tensors, to be read and checked, not to be fast.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ...fields import Geometry
from ...layout import channels_last_strides, dense
from ..native import Needs, module

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
_INSTALLED = find_spec("triton") is not None
_ALIGNED = 16 - 1


def missing() -> str | None:
    """Why the backend cannot run here, or ``None``."""
    if not _INSTALLED:
        return "the package triton is not installed"
    if not INTERPRETED and not torch.cuda.is_available():
        return "there is no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    return None


def refusal(g: Geometry, x: Tensor) -> str | None:
    """Why this call cannot be served, or ``None``."""
    return unreadable(x)


def unreadable(x: Tensor) -> str | None:
    """Why no kernel in Triton can read x here, or ``None``."""
    if not _INSTALLED:
        return "the package triton is not installed"
    if not (x.is_cpu if INTERPRETED else x.is_cuda):
        where = "the CPU (TRITON_INTERPRET is set)" if INTERPRETED else "a GPU"
        return f"x is on {x.device}, this backend computes on {where}"
    if x.dtype not in _DTYPES:
        return f"x has dtype {x.dtype}, this backend computes in float32"
    return None


def description() -> str:
    """What a benchmark names this backend's kernels."""
    import triton

    return f"Triton {triton.__version__}" + (", interpreted" if INTERPRETED else "")


def plan_for(g: Geometry, x: Tensor, residual: bool = False) -> Any:
    """What a prepared call keeps for calls on such an x: the functions below are what it runs."""
    return module.Plan(g, sys.modules[__name__], None, x, residual)


def kind(t: Tensor | float | None) -> torch.dtype | tuple[torch.dtype, int] | None:
    """What a plan depends on of a parameter."""
    return (t.dtype, t.numel()) if isinstance(t, Tensor) else None


def packed(t: Tensor | float | None) -> Any:
    """A parameter as kernels read it."""
    return t.contiguous() if isinstance(t, Tensor) else None


def aligned(*tensors: Tensor | None) -> bool:
    """Whether every address is a multiple of 16."""
    together = 0
    for t in tensors:
        if t is not None:
            together |= t.data_ptr()
    return not together & _ALIGNED


def _elsewhere(x: Tensor) -> bool:
    """Whether x is on a GPU that is not the current one."""
    return x.is_cuda and x.device.index != torch.cuda.current_device()


def run(
    g: Geometry, key: tuple[Any, ...], x: Tensor, arguments: Any, aligned: bool, plans: Callable[[], Iterable[Any]]
) -> None:
    """Launches the plan of ``key`` on x's device, on its first use the fastest of ``plans``."""
    if _elsewhere(x):
        with torch.cuda.device(x.device):
            _run_here(g, key, x, arguments, aligned, plans)
    else:
        _run_here(g, key, x, arguments, aligned, plans)


def _run_here(
    g: Geometry, key: tuple[Any, ...], x: Tensor, arguments: Any, aligned: bool, plans: Callable[[], Iterable[Any]]
) -> None:
    plan = g.cache.get(key)
    if plan is None:
        from . import launch  # brings triton, which takes a second

        if launch.captures(x):
            raise RuntimeError(
                f"the first {key[0]} call of this kind on x of shape {tuple(x.shape)} is inside the capture of a CUDA "
                "graph; make one before the capture, which compiles the kernel and copies its table to the GPU"
            )
        plan = g.cache[key] = launch.fastest(plans(), lambda plan: plan.run(arguments, x, aligned))
    plan.run(arguments, x, aligned)


def _plans(g: Geometry, x: Tensor, **kinds: Any) -> Iterable[Any]:
    from .launch import plans

    return plans(g, x, channels_last_strides(x), **kinds)


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
    """``(y, maps, l1)``, as of `divnorm_kernels.backends.cpu.forward`."""
    x = dense(x)
    residual = None if residual is None else dense(residual, like=x)
    y = torch.empty_like(x)
    maps = x.new_empty(g.kept_shape(with_variance), dtype=torch.float32)
    if g.numel == 0:
        return y, maps, x.new_zeros((), dtype=torch.float32) if with_l1 else None
    l1 = x.new_empty((), dtype=torch.float32) if with_l1 else None
    value = 0.0 if isinstance(sigma, Tensor) else float(sigma)
    weight, bias, sigma, threshold = map(packed, (weight, bias, sigma, threshold))
    key = ("forward", x.dtype, x.device, channels_last_strides(x), *map(kind, (weight, bias, sigma, threshold)))
    key += (residual is None, with_l1, with_variance)
    sigmas = 0 if sigma is None else sigma.numel()
    run(
        g,
        key,
        x,
        lambda scratch, counters: (
            *(x, y, weight, bias, sigma, value, residual, threshold, maps, l1, float(g.numel)),
            *(scratch, counters),
        ),
        aligned(x, weight, bias, sigma, residual, threshold),
        lambda: _plans(
            g,
            x,
            backward=False,
            residual=residual is not None,
            affine=False,
            sigmas=sigmas,
            l1=with_l1,
            variance=with_variance,
        ),
    )
    return y, maps, l1


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
    x = dense(x)
    dy = torch.zeros_like(x) if dy is None else dense(dy, like=x)
    residual = None if residual is None else dense(residual, like=x)
    dx, dresidual = torch.empty_like(x), torch.empty_like(x) if needs[4] else None
    nothing = g.numel == 0
    # the kernel writes every number of these; without a suppression field sigma is not used, its gradient zero
    dweight, dbias, dsigma, dthreshold = (
        (torch.zeros_like if zero else torch.empty_like)(t, memory_format=torch.contiguous_format) if need else None
        for t, need, zero in (
            (weight, needs[1], nothing),
            (bias, needs[2], nothing),
            (sigma, needs[3], nothing or g.suppression is None),
            (threshold, needs[5], nothing),
        )
    )
    results = (dx if needs[0] else None, dweight, dbias, dsigma, dresidual, dthreshold)
    if nothing:
        return results
    weight, sigma, threshold = map(packed, (weight, sigma, threshold))
    bias = packed(bias) if g.norm.activation else None  # of no other use
    if g.suppression is None:
        dsigma = None
    key = ("backward", x.dtype, x.device, channels_last_strides(x), *map(kind, (weight, bias, sigma, threshold)))
    key += (residual is None, dl1 is None, dresidual is None, *map(kind, (dweight, dbias, dsigma, dthreshold)))
    run(
        g,
        key,
        x,
        lambda scratch, counters: (
            *(x, dy, dx, dresidual, weight, bias, sigma, residual, threshold, maps, dl1, float(g.numel)),
            *(dweight, dbias, dsigma, dthreshold, scratch, counters),
        ),
        aligned(x, dy, weight, bias, sigma, residual, threshold, maps, dl1),
        lambda: _plans(
            g,
            x,
            backward=True,
            residual=residual is not None,
            affine=any(t is not None for t in (dweight, dbias, dthreshold)),
            sigmas=0 if dsigma is None else dsigma.numel(),
            l1=False,
            variance=False,
        ),
    )
    return results
