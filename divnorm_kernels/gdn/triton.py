"""Generalized divisive normalization by Triton: one kernel forward; backward three, on a part of x after the other.

Between backward's kernels f(D) and the gradient of D are in scratch memory, of a quarter of x in float32, of half of it
in half types, of 32 MB at most: what the second and the third kernel read is then still in the GPU's cache.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.triton import INTERPRETED
from ..backends.triton import missing as backend_missing
from ..channels.layout import extents
from ..layout import dense
from .form import Form

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NUMBERS = 1 << 22
"""Of f(D) at most, 16 MB, and as many of the gradient of D."""
_PIECES = 8
"""In which backward cuts x where these have _SPLIT positions or more."""
_SPLIT = 4096
"""Positions that a program sums for dgamma: partial sums are cut by sizes alone."""
_INT32 = 2**31


def refusal(form: Form, x: Tensor) -> str | None:
    """Why this call cannot be served, or ``None``."""
    if form.window:
        return "it has a window, these kernels see one position at a time"
    if not (x.is_cpu if INTERPRETED else x.is_cuda):
        where = "the CPU (TRITON_INTERPRET is set)" if INTERPRETED else "a GPU"
        return backend_missing() or f"x is on {x.device}, this backend computes on {where}"
    if x.dtype not in _DTYPES:
        return f"x has dtype {x.dtype}, this backend computes in float32"
    return backend_missing()


def keeps_result(x: Tensor) -> bool:
    """Whether backward is to be given y."""
    return False


def precision() -> str:
    """How `tl.dot` rounds its inputs: as torch's own products do, "tf32" where a user allows it, else "ieee"."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"  # allow_tf32 raises where this was set
    return "tf32" if allowed and torch.version.hip is None else "ieee"


class _Steps(NamedTuple):
    """How many products of each number a program makes at a time, powers of two from 16 on, as `tl.dot` takes them."""

    channels: int
    """Of the sums over channels."""
    positions: int
    """Of the sums over positions."""
    stages: int
    """How many steps are on their way."""


_STEPS = {"ieee": _Steps(16, 16, 1), "tf32": _Steps(32, 64, 3)}
"""By precision. In "ieee" threads multiply, not tensor cores, and longer steps spill their registers."""
_CHANNELS, _POSITIONS, _WARPS = 64, 64, 8
"""Of a program; fewer channels where x has fewer."""


class _Launch:
    """Kernels on the positions of one x: their sizes and what they are compiled for."""

    def __init__(self, form: Form, x: Tensor) -> None:
        outer, self.channels, self.inner = extents(x)
        self.positions = outer * self.inner
        self._numbers = (self.channels, self.inner)
        channels = min(max(16, 1 << (self.channels - 1).bit_length()), _CHANNELS)
        self.rows = -(-self.channels // channels)
        rounding = precision()
        self._constants = {
            "SIDE_BY_SIDE": self.inner == 1,
            "INVERSE": form.inverse,
            "SIMPLIFIED": form.simplified,
            "PRECISION": rounding,
            "WIDE": x.numel() > _INT32 - _SPLIT,  # programs go on behind the last position, by less than _SPLIT
            "CHANNELS": channels,
        }
        steps = _STEPS[rounding]
        self._options = {"num_warps": _WARPS, "num_stages": steps.stages}
        self.over_channels = {"TERMS": steps.channels, "POSITIONS": _POSITIONS}
        self.over_positions = {"TERMS": steps.positions, "SPLIT": _SPLIT}

    def run(self, kernel: Any, tensors: tuple[Tensor, ...], first: int, end: int, *grid: int, **sums: int) -> None:
        """``kernel`` on the positions from ``first`` to before ``end``; ``sums``: those that it makes."""
        kernel[grid](*tensors, first, end, *self._numbers, **self._constants, **sums, **self._options)

    def columns(self, count: int) -> int:
        """How many programs share so many positions."""
        return -(-count // _POSITIONS)


def _on(x: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def forward(form: Form, x: Tensor, beta: Tensor, gamma: Tensor) -> Tensor:
    """y, of x's shape, dtype and memory format."""
    from .triton_kernels import forward_kernel  # brings triton, which takes a second

    x = dense(x)
    y = torch.empty_like(x)
    if x.numel() > 0:
        launch = _Launch(form, x)
        with _on(x):
            tensors = (x, beta.contiguous(), gamma.contiguous(), y)
            grid = launch.columns(launch.positions), launch.rows
            launch.run(forward_kernel, tensors, 0, launch.positions, *grid, **launch.over_channels)
    return y


def backward(
    form: Form, dy: Tensor, x: Tensor, y: None, beta: Tensor, gamma: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of x, beta and gamma, ``None`` where not needed."""
    from .triton_kernels import dgamma_kernel, dx_kernel, slope_kernel

    x = dense(x)
    dy = dense(dy, like=x)
    dx = torch.empty_like(x) if needs[0] else None
    dbeta, dgamma = (
        t.new_zeros(t.shape, dtype=torch.float32) if need else None
        for t, need in zip((beta, gamma), needs[1:], strict=True)
    )
    if x.numel() == 0:
        return dx, *(None if d is None else d.to(t.dtype) for d, t in ((dbeta, beta), (dgamma, gamma)))
    launch = _Launch(form, x)
    size = max(1, min(max(-(-launch.positions // _PIECES), _SPLIT), _NUMBERS // launch.channels, launch.positions))
    f, dd = x.new_empty((2, size * launch.channels), dtype=torch.float32)
    own = beta.contiguous(), gamma.contiguous()
    with _on(x):
        for first in range(0, launch.positions, size):
            end = min(first + size, launch.positions)
            grid, splits = (launch.columns(end - first), launch.rows), -(-(end - first) // _SPLIT)
            sums = x.new_empty((grid[0], launch.channels), dtype=torch.float32)
            launch.run(slope_kernel, (dy, x, *own, f, dd, sums), first, end, *grid, **launch.over_channels)
            if dbeta is not None:
                dbeta += sums.sum(0)
            if dgamma is not None:
                products = x.new_empty((splits, *gamma.shape), dtype=torch.float32)
                pairs = launch.rows, launch.rows, splits
                launch.run(dgamma_kernel, (x, dd, products), first, end, *pairs, **launch.over_positions)
                dgamma += products.sum(0)
            if dx is not None:
                launch.run(dx_kernel, (dy, x, own[1], f, dd, dx), first, end, *grid, **launch.over_channels)
    return dx, *(None if d is None else d.to(t.dtype) for d, t in ((dbeta, beta), (dgamma, gamma)))
