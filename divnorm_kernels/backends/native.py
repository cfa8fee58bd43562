"""The compiled module, and how tensors become what it takes: plans, addresses, dtypes. Shared by its backends."""

from __future__ import annotations

import sysconfig
import warnings
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from ..fields import Axis, Geometry
from ..layout import channels_last_strides, dense

_PACKAGE = "divnorm_kernels"


def _not_built() -> str:
    """Why there is no compiled module: what setup.py left in its place, or that nothing was built for this Python."""
    package = files(_PACKAGE)
    note = package / "not_built.txt"
    if note.is_file():
        return f"not built: {note.read_text(encoding='utf-8').strip()}"
    return f"not built: {package} has no _native{sysconfig.get_config_var('EXT_SUFFIX')}"


_missing: str | None = None
try:
    import divnorm_kernels._native as module
except ImportError as error:
    module = None
    absent = isinstance(error, ModuleNotFoundError) and error.name == f"{_PACKAGE}._native"
    _missing = _not_built() if absent else f"the compiled module does not load: {error}"
    warnings.warn(
        f"divnorm_kernels: CPU tensors are served by the slow reference ({_missing}); "
        "an install with a C++17 compiler brings the kernels",
        RuntimeWarning,
        stacklevel=2,
    )

DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_UNIT_AXIS = (0, 0, 1)


def missing() -> str | None:
    """Why the compiled module is not there, or ``None``."""
    return _missing


def _three(entries: tuple[Any, ...], missing: Any) -> tuple[Any, Any, Any]:
    """Entries per spatial dimension for the kernels' three axes: they walk the first and want the last contiguous."""
    return (*entries[:-1], *(missing,) * (3 - len(entries)), entries[-1])


def _field(axes: tuple[Axis, ...] | None) -> tuple[tuple[int, int, int], ...] | None:
    return None if axes is None else _three(tuple((a.lo, a.hi, a.divisor) for a in axes), _UNIT_AXIS)


def plan_for(g: Geometry, x: Tensor) -> module.Plan:
    """The compiled module's plan for a call, made once per geometry, dtype and memory format."""
    key = (x.dtype, channels_last_strides(x))
    plan = g.cache.get(key)
    if plan is None:
        plan = g.cache[key] = module.Plan(
            DTYPES[x.dtype],
            key[1],
            g.over_batch,
            g.features,
            g.relu,
            g.whole,
            g.batch,
            g.channels,
            g.groups,
            _three(g.spatial, 1),
            _field(g.summation),
            _field(g.suppression),
        )
    return plan


def packed(t: Tensor | None) -> Tensor | None:
    """A parameter without gaps; the caller keeps it alive while its address is in use."""
    return t if t is None or t.is_contiguous() else t.contiguous()


def parameter(t: Tensor | None) -> tuple[int, int]:
    """Address and dtype of a parameter without gaps; address 0 where there is none."""
    return (0, 0) if t is None else (t.data_ptr(), DTYPES[t.dtype])


def backward_tensors(
    g: Geometry,
    dy: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sigma: Tensor | float,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """``(x, dy, dx, dweight, dbias, dsigma)``: inputs as the kernels take them, and room for the gradients needed.

    Those of an empty call are zero already.
    """
    x = dense(x)
    dy = torch.zeros_like(x) if dy is None else dense(dy, like=x)
    rooms = [
        torch.empty_like(t, memory_format=torch.contiguous_format) if need else None
        for t, need in zip((weight, bias, sigma), needs[1:], strict=True)
    ]
    if g.numel == 0:
        for room in rooms:
            if room is not None:
                room.zero_()
    return x, dy, torch.empty_like(x), *rooms
