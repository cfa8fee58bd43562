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


def _plan(g: Geometry, dtype: torch.dtype, channels_last: bool) -> _native.Plan:
    key = (dtype, channels_last)
    plan = g.cache.get(key)
    if plan is None:
        plan = g.cache[key] = _native.Plan(
            _DTYPES[dtype],
            channels_last,
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


def _address(t: Tensor | None) -> int:
    """Of a contiguous tensor; 0 where there is none."""
    return 0 if t is None else t.data_ptr()


def _code(t: Tensor | None) -> int:
    return 0 if t is None else _DTYPES[t.dtype]


def _packed(t: Tensor | None) -> Tensor | None:
    """A parameter without gaps; the caller keeps it alive while its address is in use."""
    return t if t is None or t.is_contiguous() else t.contiguous()


def forward(
    g: Geometry, x: Tensor, weight: Tensor | None, bias: Tensor | None, sigma: Tensor | float, with_l1: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """``(y, mean, rstd, l1)``; mean and rstd are maps of ``g.map_shape``, ``None`` where their field is absent."""
    x = dense(x)
    compute = torch.float64 if x.dtype is torch.float64 else torch.float32
    y = torch.empty_like(x)
    mean = None if g.summation is None else torch.empty(g.map_shape, dtype=compute)
    rstd = None if g.suppression is None else torch.empty(g.map_shape, dtype=compute)
    if g.numel == 0:
        return y, mean, rstd, torch.zeros((), dtype=compute) if with_l1 else None
    weight, bias = _packed(weight), _packed(bias)
    value, sigma = (0.0, _packed(sigma)) if isinstance(sigma, Tensor) else (sigma, None)
    l1 = _plan(g, x.dtype, channels_last_strides(x)).forward(
        x.data_ptr(),
        _address(weight),
        _code(weight),
        _address(bias),
        _code(bias),
        _address(sigma),
        _code(sigma),
        0 if sigma is None else sigma.numel(),
        value,
        y.data_ptr(),
        _address(mean),
        _address(rstd),
        with_l1,
        torch.get_num_threads(),
    )
    return y, mean, rstd, torch.tensor(l1, dtype=compute) if with_l1 else None


def backward(
    g: Geometry,
    dy: Tensor | None,
    dl1: Tensor | None,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    sigma: Tensor | float,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients for (x, weight, bias, sigma) from those of y and l1 (``None``: zero); ``None`` where not needed."""
    x = dense(x)
    dy = torch.zeros_like(x) if dy is None else dense(dy, like=x)
    dx = torch.empty_like(x)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs[1] else None
    dbias = torch.empty_like(bias, memory_format=torch.contiguous_format) if needs[2] else None
    dsigma = torch.empty_like(sigma, memory_format=torch.contiguous_format) if needs[3] else None
    if g.numel == 0:
        for gradient in (dweight, dbias, dsigma):
            if gradient is not None:
                gradient.zero_()
        return dx if needs[0] else None, dweight, dbias, dsigma
    weight, sigma = _packed(weight), _packed(sigma) if isinstance(sigma, Tensor) else None
    _plan(g, x.dtype, channels_last_strides(x)).backward(
        x.data_ptr(),
        dy.data_ptr(),
        _address(mean),
        _address(rstd),
        _address(weight),
        _code(weight),
        _address(sigma),
        _code(sigma),
        0 if sigma is None else sigma.numel(),
        0.0 if dl1 is None else dl1.item(),
        dx.data_ptr(),
        _address(dweight),
        _address(dbias),
        _code(dbias),
        _address(dsigma),
        torch.get_num_threads(),
    )
    return dx if needs[0] else None, dweight, dbias, dsigma
