"""What torch is doing with the operations of a call, beside computing them."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def recorded() -> bool:
    """Whether the call is written down in plain operators, by torch.export or torch.jit.trace, ONNX among them."""
    return torch.compiler._is_exporting_flag or torch.jit.is_tracing()


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, which see through plain PyTorch alone."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
