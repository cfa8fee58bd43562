"""Which kernels compute a generalized divisive normalization.

A backend is a module with

- ``refusal(form, x)``: why it cannot serve this call, or ``None``;
- ``keeps_result(x)``: whether backward is to be given y;
- ``forward(form, x, beta, gamma)``: y;
- ``backward(form, dy, x, y, beta, gamma, needs)``: gradients of x, beta and gamma, ``None`` where ``needs`` has it.

``x`` is in memory, (N, C, ...), of any strides; so are dy and y.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from ..backends import serving
from . import cpu, triton
from .form import Form

KERNELS: dict[str, ModuleType] = {"cpu": cpu, "triton": triton}


def select(name: str | None, form: Form, x: Tensor) -> ModuleType | None:
    """As `divnorm_kernels.backends.serving`."""
    return serving(KERNELS, name, form, x)
