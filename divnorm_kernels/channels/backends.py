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

from ..backends import check_name
from . import cpu, cuda, triton

KERNELS: dict[str, ModuleType] = {"cpu": cpu, "cuda": cuda, "triton": triton}
_ORDER = ("cpu", "cuda", "triton")


def select(name: str | None, x: Tensor) -> ModuleType | None:
    """The named backend, or for ``None`` the first that serves the call; ``None`` stands for the reference.

    Raises:
        TypeError, ValueError: on a name that is none.
        RuntimeError: where the named backend is missing here or cannot serve the call; the message says why.
    """
    if name is None:
        return next((KERNELS[n] for n in _ORDER if KERNELS[n].refusal(x) is None), None)
    check_name(name)
    if name == "reference":
        return None
    reason = KERNELS[name].refusal(x)
    if reason is not None:
        raise RuntimeError(f"backend: got {name!r}, which cannot serve this call: {reason}")
    return KERNELS[name]
