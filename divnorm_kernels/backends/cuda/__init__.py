"""The CUDA backend: the compiled module's kernels for GPU tensors."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...constant import constant
from ...fields import Geometry
from ...layout import channels_last_strides
from .. import native
from ..native import DTYPES, Needs, module
from ..native import missing as module_missing
from .table import Device, device, row_for

library: Any = module
"""The compiled module whose kernels are called; tests put the emulated device's in its place."""
DEVICE_TYPE = "cuda"
OLDEST = (8, 0)
"""The least compute capability."""


@cache
def _unusable(library: Any) -> str | None:
    """Why no GPU of this machine can run the module's kernels, or ``None``; asked for once, an install does not change.

    A runtime works with every driver of its major version and later ones ("CUDA compatibility", NVIDIA).
    """
    if library is None:
        return module_missing()
    if not hasattr(library, "CudaCalls"):
        return f"the compiled module has no CUDA kernels: {library.without_cuda}"
    if torch.version.hip is not None:
        return "there is no NVIDIA GPU"
    driver, runtime = (divmod(version, 1000) for version in library.cuda_versions())
    if driver[0] and driver[0] < runtime[0]:  # 0 is no driver
        (d, d_minor), (r, r_minor) = driver, runtime
        return f"the driver supports CUDA {d}.{d_minor // 10}, the kernels were built with {r}.{r_minor // 10}"
    return None


def missing() -> str | None:
    """Why the backend cannot run here, or ``None``."""
    reason = _unusable(library)
    if reason is None and DEVICE_TYPE == "cuda" and not torch.cuda.is_available():
        return "there is no NVIDIA GPU"
    return reason


def refusal_of(x: Tensor) -> str | None:
    """Why no kernel takes such an x, or ``None``."""
    if x.device.type != DEVICE_TYPE:
        return missing() or f"x is on {x.device}, this backend computes on {DEVICE_TYPE} devices"
    reason, _ = _serves(x.device.index)
    if reason is None and x.dtype not in DTYPES:
        return f"x has dtype {x.dtype}"
    return reason


def refusal(g: Geometry, x: Tensor) -> str | None:
    """Why this call cannot be served, or ``None``."""
    reason = refusal_of(x)
    if reason is not None:
        return reason
    _, most_positions = _serves(x.device.index)
    if max(g.batch, g.channels, g.numel // max(1, g.batch * g.channels)) >= most_positions:
        return f"x has {most_positions} or more samples, channels or positions"
    return None


@constant
def _serves(index: int | None) -> tuple[str | None, int]:
    """Why a device cannot run the kernels, or ``None``; and how many samples, channels or positions are too many."""
    reason = _unusable(library)
    if reason is not None:
        return reason, 0
    capability = device_of(index).capability
    if capability < OLDEST:
        reason = f"the device has compute capability {capability}, these kernels need {OLDEST}"
    elif not has_code(library.cuda_archs, capability):
        reason = (
            f"the device has compute capability {capability}, the compiled module has code for {library.cuda_archs}: "
            "install it here, or for more GPUs with CMAKE_ARGS=-DDIVNORM_CUDA_ARCHS"
        )
    return reason, library.cuda_most_positions


def has_code(archs: str, capability: tuple[int, int]) -> bool:
    """Whether a device runs some of what was compiled ("CUDA C++ Programming Guide", binary and PTX compatibility).

    That is what was compiled for its major version and no later minor one, and PTX of no later version.
    """
    for arch in archs.split():
        kind, _, number = arch.partition("_")
        compiled = divmod(int(number), 10)
        if compiled <= capability and (kind == "compute" or compiled[0] == capability[0]):
            return True
    return False


def description() -> str:
    """What a benchmark names this backend's kernels."""
    return "CUDA"


def device_of(index: int | None) -> Device:
    """What the strategies depend on of a device."""
    return device(index)


def calls_for(g: Geometry, x: Tensor, residual: bool = False) -> Any:
    """The compiled calls for a geometry."""
    return kept("CudaCalls", g, x, residual)


def kept(name: str, g: Geometry, x: Tensor, residual: bool) -> Any:
    """One of `library`'s classes for a geometry, made once per dtype, memory format, device and whether there is a
    residual.
    """
    key = (name, x.dtype, channels_last_strides(x), x.device.index, residual)
    calls = g.cache.get(key)
    if calls is None:
        found = device_of(x.device.index)
        rows = (row_for(found, direction, x.element_size()) for direction in ("forward", "backward"))
        made = getattr(library, name)(g, DTYPES[x.dtype], key[2], residual, x.device.index or 0, found.facts(), *rows)
        calls = g.cache[key] = made
    return calls


def place(x: Tensor, scratch_bytes: int) -> tuple[Tensor, int]:
    """Scratch memory beside ``x``, and the stream that has it first."""
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    return torch.empty(scratch_bytes, dtype=torch.uint8, device=x.device), stream


def plan_for(g: Geometry, x: Tensor, residual: bool = False) -> Any:
    """The compiled module's plan for calls of ``g`` on such an x; ``residual``: whether they have one."""
    return module.Plan(g, sys.modules[__name__], calls_for(g, x, residual), x, residual)


def strategies(g: Geometry, x: Tensor) -> tuple[str, str]:
    """The names of the strategies that forward and backward of a call take."""
    return calls_for(g, x).strategies


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
