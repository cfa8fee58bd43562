"""Which kernels compute a channel normalization.

A backend is a module with

- ``refusal(x)``: why it cannot serve this call, or ``None``;
- ``forward(pool, x, learned)``: y;
- ``backward(pool, dy, x, learned, needs)``: gradients of x and ``learned``, ``None`` where ``needs`` has it.

``x`` is in memory, (N, C, ...), of any strides; so is dy.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from ..backends import serving
from . import cpu, cuda, triton

KERNELS: dict[str, ModuleType] = {"cpu": cpu, "cuda": cuda, "triton": triton}
"""In the order in which they are tried."""


def select(name: str | None, x: Tensor) -> ModuleType | None:
    """As `divnorm_kernels.backends.serving`."""
    return serving(KERNELS, name, x)
