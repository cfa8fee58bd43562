"""The backends: where the two functions of the operator, forward and backward, are computed.

A backend is a module with

- ``missing()``: why it is not available on this machine, or ``None``;
- ``refusal(g, x)``: why it cannot serve this call, or ``None``;
- ``description()``: what a benchmark names its kernels;
- ``forward`` and ``backward``, with the signatures of `divnorm_kernels.backends.cpu`.

The reference is the last resort and has none of these: it is plain PyTorch, differentiated by autograd.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from ..fields import Geometry
from ..norm import Norm
from . import cpu, cuda, triton
from .preference import order

KERNELS: dict[str, ModuleType] = {"cpu": cpu, "cuda": cuda, "triton": triton}

_NAME_OF = {backend: name for name, backend in KERNELS.items()}
_NAMES = (*KERNELS, "reference")


def availability() -> dict[str, str | None]:
    """Every backend's name, with the reason why it is missing here, or ``None`` where it is available."""
    return {**{name: backend.missing() for name, backend in KERNELS.items()}, "reference": None}


def without_kernels(norm: Norm) -> str | None:
    """What of a normalization no kernel computes, whatever its tensors; ``None`` where kernels may serve it."""
    return None if norm.p in (1, 2) else f"p={norm.p}: kernels compute 1 and 2"


def select(name: str | None, g: Geometry, x: Tensor) -> ModuleType | None:
    """The named backend, or for ``None`` the best one that serves the call; ``None`` stands for the reference.

    Raises:
        TypeError, ValueError: on a name that is none.
        RuntimeError: where the named backend is missing here or cannot serve the call; the message says why.
    """
    reason = without_kernels(g.norm)
    if name is None:
        for candidate in order(g, x) if reason is None else ():
            if KERNELS[candidate].refusal(g, x) is None:
                return KERNELS[candidate]
        return None
    check_name(name)
    if name == "reference":
        return None
    reason = reason or KERNELS[name].refusal(g, x)
    if reason is not None:
        raise RuntimeError(f"backend: got {name!r}, which cannot serve this call: {reason}")
    return KERNELS[name]


def serving(kernels: dict[str, ModuleType], name: str | None, *call: object) -> ModuleType | None:
    """The named one of an operator's backends, or for ``None`` the first that serves; ``None``: the reference.

    ``call`` is what their ``refusal`` takes.

    Raises:
        TypeError, ValueError: on a name that is none.
        RuntimeError: where the named backend is missing here or cannot serve the call; the message says why.
    """
    if name is None:
        return next((backend for backend in kernels.values() if backend.refusal(*call) is None), None)
    check_name(name)
    if name == "reference":
        return None
    reason = kernels[name].refusal(*call) if name in kernels else "it has no kernels for this normalization"
    if reason is not None:
        raise RuntimeError(f"backend: got {name!r}, which cannot serve this call: {reason}")
    return kernels[name]


def name_of(backend: ModuleType) -> str:
    """The name of a backend that was selected."""
    return _NAME_OF[backend]


def check_name(name: object) -> None:
    """Raises a TypeError or ValueError unless ``name`` is a backend's or ``None``."""
    if name is not None and not isinstance(name, str):
        raise TypeError(f"backend: got {name!r} of type {type(name).__name__}, expected a str or None")
    if name is not None and name not in _NAMES:
        raise ValueError(f"backend: got {name!r}, expected None or one of {', '.join(map(repr, _NAMES))}")
