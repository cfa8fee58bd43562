"""The compiled module, and how tensors become what its plans take. Shared by its backends."""

from __future__ import annotations

import sysconfig
import warnings
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from ..checks import compute_dtype
from ..fields import Geometry
from ..layout import dense

_PACKAGE = "divnorm_kernels"


Needs = tuple[bool, bool, bool, bool, bool, bool]
"""Which gradients are needed: of x, weight, bias, sigma, residual and threshold."""


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

    module.connect()
except (ImportError, AttributeError, RuntimeError) as error:
    module = None
    if isinstance(error, ModuleNotFoundError) and error.name == f"{_PACKAGE}._native":
        _missing = _not_built()
    elif isinstance(error, ImportError):
        _missing = f"the compiled module does not load: {error}"
    else:
        _missing = f"the compiled module does not work with torch {torch.__version__}: {error}"
    warnings.warn(
        f"divnorm_kernels: CPU tensors are served by the slow reference ({_missing}); "
        "an install with a C++17 compiler brings the kernels",
        RuntimeWarning,
        stacklevel=2,
    )

DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}

PlanFor = Callable[[Geometry, Tensor, bool], Any]
"""Gives the plan (``module.Plan``) of a geometry, an x without gaps and whether there is a residual."""


def missing() -> str | None:
    """Why the compiled module is not there, or ``None``."""
    return _missing


def _packed(t: Tensor | float | None) -> Tensor | float | None:
    """A parameter, or maps that a hook has handed back, without gaps."""
    return t.contiguous() if isinstance(t, Tensor) else t


def forward(
    plan_for: PlanFor,
    g: Geometry,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sigma: Tensor | float,
    with_l1: bool,
    with_variance: bool,
    residual: Tensor | None,
    threshold: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(y, maps, l1)``, as of `divnorm_kernels.backends.cpu.forward`."""
    x = dense(x)
    residual = None if residual is None else dense(residual, like=x)
    if g.numel == 0:
        compute = compute_dtype(x)
        maps = x.new_empty(g.kept_shape(with_variance), dtype=compute)
        return torch.empty_like(x), maps, x.new_zeros((), dtype=compute) if with_l1 else None
    weight, bias, sigma, threshold = map(_packed, (weight, bias, sigma, threshold))
    plan = plan_for(g, x, residual is not None)
    return plan.forward(x, weight, bias, sigma, with_l1, with_variance, residual, threshold)


def backward(
    plan_for: PlanFor,
    g: Geometry,
    dy: Tensor | None,
    dl1: Tensor | None,
    x: Tensor,
    maps: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sigma: Tensor | float,
    needs: Needs,
    residual: Tensor | None,
    threshold: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients for what forward was given, as of `divnorm_kernels.backends.cpu.backward`."""
    x = dense(x)
    if g.numel == 0:
        inputs = (x, weight, bias, sigma, residual, threshold)
        return tuple(torch.zeros_like(t) if need else None for t, need in zip(inputs, needs, strict=True))
    dy = None if dy is None else dense(dy, like=x)
    residual = None if residual is None else dense(residual, like=x)
    maps, weight, bias, sigma, threshold = map(_packed, (maps, weight, bias, sigma, threshold))
    plan = plan_for(g, x, residual is not None)
    return plan.backward(dy, dl1, x, maps, weight, bias, sigma, needs, residual, threshold)
