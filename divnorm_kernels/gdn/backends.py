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

from ..backends import check_name
from . import cpu, triton
from .form import Form

KERNELS: dict[str, ModuleType] = {"cpu": cpu, "triton": triton}


def select(name: str | None, form: Form, x: Tensor) -> ModuleType | None:
    """The named backend, or for ``None`` the first that serves the call; ``None`` stands for the reference.

    Raises:
        TypeError, ValueError: on a name that is none.
        RuntimeError: where the named backend is missing here or cannot serve the call; the message says why.
    """
    if name is None:
        return next((kernels for kernels in KERNELS.values() if kernels.refusal(form, x) is None), None)
    check_name(name)
    if name == "reference":
        return None
    reason = KERNELS[name].refusal(form, x) if name in KERNELS else "it has no kernels for this normalization"
    if reason is not None:
        raise RuntimeError(f"backend: got {name!r}, which cannot serve this call: {reason}")
    return KERNELS[name]
