"""The CUDA backend: hands addresses and the current stream to the compiled module's kernels."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...checks import compute_dtype
from ...constant import constant
from ...fields import Geometry
from ...layout import channels_last_strides, dense
from ..native import DTYPES, backward_tensors, module, packed, parameter, plan_for
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


def refusal(g: Geometry, x: Tensor) -> str | None:
    """Why this call cannot be served, or ``None``."""
    if x.device.type != DEVICE_TYPE:
        return missing() or f"x is on {x.device}, this backend computes on {DEVICE_TYPE} devices"
    reason, most_positions = _serves(x.device.index)
    if reason is not None:
        return reason
    if x.dtype not in DTYPES:
        return f"x has dtype {x.dtype}"
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
    return reason, library.cuda_most_positions


def description() -> str:
    """What a benchmark names this backend's kernels."""
    return "CUDA"


def device_of(index: int | None) -> Device:
    """What the strategies depend on of a device."""
    return device(index)


def calls_for(g: Geometry, x: Tensor) -> Any:
    """The compiled calls for a geometry, made once per dtype, memory format and device."""
    key = ("cuda", x.dtype, channels_last_strides(x), x.device.index)
    calls = g.cache.get(key)
    if calls is None:
        found = device_of(x.device.index)
        rows = (row_for(found, direction, x.element_size()) for direction in ("forward", "backward"))
        calls = g.cache[key] = library.CudaCalls(plan_for(g, x), x.device.index or 0, found.facts(), *rows)
    return calls


def strategies(g: Geometry, x: Tensor) -> tuple[str, str]:
    """The names of the strategies that forward and backward of a call take."""
    return calls_for(g, x).strategies


def _stream(x: Tensor) -> tuple[int, int]:
    """Device and current stream."""
    if not x.is_cuda:
        return 0, 0
    index = x.device.index
    return index, torch._C._cuda_getCurrentRawStream(index)


def _sigma(sigma: Tensor | float | None) -> tuple[Any, ...]:
    """Address, dtype, count and value."""
    if isinstance(sigma, Tensor):
        return *parameter(sigma), sigma.numel(), 0.0
    return 0, 0, 0, float(sigma)


def forward(
    g: Geometry,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sigma: Tensor | float,
    with_l1: bool,
    with_variance: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(y, maps, l1)``, as of `divnorm_kernels.backends.cpu.forward`."""
    x = dense(x)
    compute = compute_dtype(x)
    y = torch.empty_like(x)
    maps = x.new_empty(g.kept_shape(with_variance), dtype=compute)
    if g.numel == 0:
        return y, maps, x.new_zeros((), dtype=compute) if with_l1 else None
    l1 = x.new_empty((), dtype=compute) if with_l1 else None
    calls = calls_for(g, x)
    scratch = x.new_empty(calls.scratch_bytes[0], dtype=torch.uint8)
    weight, bias = packed(weight), packed(bias)
    sigma = packed(sigma) if isinstance(sigma, Tensor) else sigma
    calls.forward(
        *_stream(x),
        x.data_ptr(),
        *parameter(weight),
        *parameter(bias),
        *_sigma(sigma),
        y.data_ptr(),
        maps.data_ptr(),
        with_variance,
        0 if l1 is None else l1.data_ptr(),
        scratch.data_ptr(),
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
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients for (x, weight, bias, sigma) from those of y and l1 (``None``: zero); ``None`` where not needed."""
    x, dy, dx, dweight, dbias, dsigma = backward_tensors(g, dy, x, weight, bias, sigma, needs)
    if dsigma is not None and g.suppression is None:
        dsigma.zero_()  # sigma is not used
    if g.numel > 0:
        calls = calls_for(g, x)
        scratch = x.new_empty(calls.scratch_bytes[1], dtype=torch.uint8)
        weight, bias = packed(weight), packed(bias)
        sigma = packed(sigma) if isinstance(sigma, Tensor) else sigma
        calls.backward(
            *_stream(x),
            x.data_ptr(),
            dy.data_ptr(),
            maps.data_ptr(),
            *parameter(weight),
            *parameter(bias),
            *_sigma(sigma),
            0 if dl1 is None else dl1.data_ptr(),
            dx.data_ptr(),
            parameter(dweight)[0],
            parameter(dbias)[0],
            parameter(dsigma)[0],
            scratch.data_ptr(),
        )
    return dx if needs[0] else None, dweight, dbias, dsigma
