"""The native CPU backend: hands addresses to the compiled module."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import Tensor

from ..fields import Axis, Geometry
from ..layout import channels_last_strides, dense

try:
    from .. import _native
except ImportError as error:
    _native = None
    _import_error = str(error)
    warnings.warn(
        "divnorm_kernels: the compiled module is missing, so CPU tensors are served by the slow reference; "
        "`python -m divnorm_kernels` says why, an install with a C++17 compiler brings it",
        RuntimeWarning,
        stacklevel=2,
    )
else:
    if "DIVNORM_INSTRUCTION_SET" in os.environ:
        _native.use_instruction_set(os.environ["DIVNORM_INSTRUCTION_SET"])

_DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_COMPUTE = {dtype: torch.float64 if dtype is torch.float64 else torch.float32 for dtype in _DTYPES}
_UNIT_AXIS = (0, 0, 1)


def missing() -> str | None:
    """Why the compiled module is not there, or ``None``."""
    return None if _native is not None else f"the compiled module does not import ({_import_error})"


def refusal(g: Geometry, x: Tensor) -> str | None:
    """Why this call cannot be served, or ``None``."""
    if _native is None:
        return missing()
    if not x.is_cpu:
        return f"x is on {x.device}, this backend computes on the CPU"
    if x.dtype not in _DTYPES:
        return f"x has dtype {x.dtype}"
    return None


def instruction_set() -> str | None:
    """The instruction set in use."""
    return _native.instruction_set() if _native is not None else None


def description() -> str:
    """What a benchmark names this backend's kernels."""
    return f"native, {instruction_set()}"


def maps_shape(g: Geometry) -> tuple[int, ...]:
    """The shape of the maps: one number per position."""
    return g.maps_shape


def instruction_sets() -> list[str]:
    """The instruction sets this processor runs, best first."""
    return _native.instruction_sets() if _native is not None else []


def use_instruction_set(name: str) -> None:
    """Computes with the named set from here on, in the whole process."""
    _native.use_instruction_set(name)


def _three(entries: tuple[Any, ...], missing: Any) -> tuple[Any, Any, Any]:
    """Entries per spatial dimension for the kernels' three axes: they walk the first and want the last contiguous."""
    return (*entries[:-1], *(missing,) * (3 - len(entries)), entries[-1])


def _field(axes: tuple[Axis, ...] | None) -> tuple[tuple[int, int, int], ...] | None:
    return None if axes is None else _three(tuple((a.lo, a.hi, a.divisor) for a in axes), _UNIT_AXIS)


def _plan(g: Geometry, x: Tensor) -> _native.Plan:
    key = (x.dtype, channels_last_strides(x))
    plan = g.cache.get(key)
    if plan is None:
        plan = g.cache[key] = _native.Plan(
            _DTYPES[x.dtype],
            key[1],
            g.over_batch,
            g.features,
            g.batch,
            g.channels,
            g.groups,
            _three(g.spatial, 1),
            _field(g.summation),
            _field(g.suppression),
        )
    return plan


def _packed(t: Tensor | None) -> Tensor | None:
    """A parameter without gaps; the caller keeps it alive while its address is in use."""
    return t if t is None or t.is_contiguous() else t.contiguous()


def _parameter(t: Tensor | None) -> tuple[int, int]:
    """Address and dtype of a parameter without gaps; address 0 where there is none."""
    return (0, 0) if t is None else (t.data_ptr(), _DTYPES[t.dtype])


def _gradient(parameter: Tensor, needed: bool) -> Tensor | None:
    return torch.empty_like(parameter, memory_format=torch.contiguous_format) if needed else None


def forward(
    g: Geometry, x: Tensor, weight: Tensor | None, bias: Tensor | None, sigma: Tensor | float, with_l1: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(y, maps, l1)``; maps, of ``g.maps_shape``, holds mean and rstd."""
    x = dense(x)
    compute = _COMPUTE[x.dtype]
    y = torch.empty_like(x)
    maps = torch.empty(g.maps_shape, dtype=compute)
    if g.numel == 0:
        return y, maps, torch.zeros((), dtype=compute) if with_l1 else None
    value, sigma = (0.0, sigma) if isinstance(sigma, Tensor) else (sigma, None)
    weight, bias, sigma = _packed(weight), _packed(bias), _packed(sigma)
    l1 = _plan(g, x).forward(
        x.data_ptr(),
        *_parameter(weight),
        *_parameter(bias),
        *_parameter(sigma),
        0 if sigma is None else sigma.numel(),
        value,
        y.data_ptr(),
        maps.data_ptr(),
        with_l1,
        torch.get_num_threads(),
    )
    return y, maps, torch.tensor(l1, dtype=compute) if with_l1 else None


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
    x = dense(x)
    dy = torch.zeros_like(x) if dy is None else dense(dy, like=x)
    dx = torch.empty_like(x)
    dweight = _gradient(weight, needs[1])
    dbias = _gradient(bias, needs[2])
    dsigma = _gradient(sigma, needs[3])
    if g.numel == 0:
        for gradient in (dweight, dbias, dsigma):
            if gradient is not None:
                gradient.zero_()
        return dx if needs[0] else None, dweight, dbias, dsigma
    weight, sigma = _packed(weight), _packed(sigma) if isinstance(sigma, Tensor) else None
    _plan(g, x).backward(
        x.data_ptr(),
        dy.data_ptr(),
        maps.data_ptr(),
        *_parameter(weight),
        *_parameter(sigma),
        0 if sigma is None else sigma.numel(),
        0.0 if dl1 is None else dl1.item(),
        dx.data_ptr(),
        _parameter(dweight)[0],
        *_parameter(dbias),
        _parameter(dsigma)[0],
        torch.get_num_threads(),
    )
    return dx if needs[0] else None, dweight, dbias, dsigma
