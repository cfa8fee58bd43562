"""Whether the address of a tensor may be read, before Python calls a kernel; for prepared calls, see torch_api.h.

Not every tensor lies in memory as its sizes say: it may be a view that negates, a zero that was never written, a
wrapper without a storage of its own, or its storage may have been freed. The dispatcher resolves the former kinds on
its way to a kernel; what is left at its end has an address, or no right to be there.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)
_NUMBERS = (float, int, type(None))
_NO_STORAGE = (RuntimeError, NotImplementedError)
"""What torch raises for sparse, opaque and wrapped tensors."""


def _held(t: Tensor) -> bool:
    """Whether the storage of ``t`` reaches to its last element."""
    if t.is_contiguous():
        last = t.numel() - 1
    else:
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return (t.storage_offset() + last + 1) * t.element_size() <= t.untyped_storage().nbytes()


def readable(t: Tensor) -> bool:
    """Whether every element of ``t`` lies in memory, at the place that its address and strides tell."""
    try:
        return _held(t) and not t.is_neg() and (t.data_ptr() != 0 or t.numel() == 0)
    except _NO_STORAGE:
        return False


def plain(*arguments: Tensor | float | None) -> bool:
    """Whether all tensors among the arguments are readable and of no type that wants to be asked first."""
    for argument in arguments:
        kind = type(argument)
        if kind in _NUMBERS:
            continue
        if kind not in _PLAIN or not readable(argument):
            return False
    return True


def direct(*arguments: Tensor | float | None) -> bool:
    """Whether kernels may be called on the arguments at once, past the dispatcher."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0 and plain(*arguments)


def check_readable(**tensors: Tensor | float | None) -> None:
    """Raises a ValueError that names the first argument whose address may not be read."""
    for name, t in tensors.items():
        if isinstance(t, Tensor) and not readable(t):
            raise _not_in_memory(name, t)


def check_held(**tensors: Tensor | float | None) -> None:
    """Raises a ValueError that names the first argument whose storage has been freed: torch itself would read it."""
    for name, t in tensors.items():
        try:
            held = not isinstance(t, Tensor) or _held(t)
        except _NO_STORAGE:
            continue
        if not held:
            raise _not_in_memory(name, t)


def check_alive(**tensors: Tensor | float | None) -> None:
    """Raises a ValueError that names the first argument which a transformation of torch.func has left behind."""
    for name, t in tensors.items():
        if isinstance(t, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(t):
            raise ValueError(f"{name}: got a tensor of a torch.func transformation that has ended, expected its result")


def _not_in_memory(name: str, t: Tensor) -> ValueError:
    try:
        storage = f"whose storage holds {t.untyped_storage().nbytes()} bytes"
    except _NO_STORAGE:
        storage = "without a storage"
    got = f"a {type(t).__name__} of shape {tuple(t.shape)} {storage}"
    return ValueError(f"{name}: got {got}, expected a tensor with all of its elements in memory")
