"""What torch is doing with the operations of a call, beside computing them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad


def recorded() -> bool:
    """Whether the call is written down in plain operators, by torch.export or torch.jit.trace, ONNX among them."""
    return torch.compiler._is_exporting_flag or torch.jit.is_tracing()


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, which see through plain PyTorch alone."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def unless_transformed(kernels: ModuleType | None, backend: str | None) -> ModuleType | None:
    """The kernels of a call, or the reference, which ``None`` stands for, where no kernel is seen through.

    Raises:
        RuntimeError: where a backend was named.
    """
    if kernels is None or not transformed():
        return kernels
    if backend is not None:
        raise RuntimeError(
            f"backend: got {backend!r}, which neither torch.func nor forward-mode differentiation can transform; "
            'expected None or "reference"'
        )
    return None


def under_autocast(x: Tensor) -> bool:
    """Whether torch.autocast is at work on x's device; there are devices that it does not know."""
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """In which matrix products stay in their operands' dtype: sums of half types are float32 sums in this package."""
    return torch.autocast(x.device.type, enabled=False) if under_autocast(x) else nullcontext()
