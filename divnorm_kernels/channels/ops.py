"""Channel normalization in torch's dispatcher, for tracing and for tensors that want to be asked before a kernel runs.

``box`` is a `divnorm_kernels.channels.pool.Pool`'s, empty for ``None``; an absent gradient is an empty tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import flops
from ..addresses import check_held, check_readable
from ..checks import check_activation, check_like, compute_dtype
from ..layout import dense
from .backends import select
from .pool import Pool
from .reference import gradients

_library = torch.library.Library("divnorm_kernels", "FRAGMENT")
_POOL = "int[] box, bool squared, float[] scalars, str? backend"
_library.define(f"channel_forward(Tensor x, Tensor? learned, {_POOL}) -> Tensor")
_library.define(
    f"channel_backward(Tensor dy, Tensor x, Tensor? learned, bool[] needs, {_POOL}) -> (Tensor dx, Tensor dlearned)"
)


def _pool(x: Tensor, learned: Tensor | None, box: list[int], squared: bool, scalars: list[float]) -> Pool:
    check_activation(x)
    if x.dim() < 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (N, C, ...)")
    if len(box) not in (0, 2) or any(not 0 <= side < max(x.shape[1], 1) for side in box):
        raise ValueError(f"box: got {list(box)}, expected two sides of 0 to {x.shape[1] - 1}, or none")
    if len(scalars) != 4:
        raise ValueError(f"scalars: got {len(scalars)}, expected k, a, beta and rho")
    pool = Pool(tuple(box) or None, squared, tuple(scalars))
    if any(pool.learns) and learned is None:
        raise ValueError("learned: got None where scalars has a NaN, expected a Tensor of shape (4,)")
    if learned is None:
        return pool
    if learned.shape != (4,):
        raise ValueError(f"learned: got shape {tuple(learned.shape)}, expected (4,): k, a, beta and rho")
    if learned.dtype != compute_dtype(x):
        raise TypeError(f"learned: got dtype {learned.dtype}, expected {compute_dtype(x)} for x of {x.dtype}")
    if learned.device != x.device:
        raise ValueError(f"learned: got device {learned.device}, expected that of x, {x.device}")
    return pool


def _check_upstream(dy: Tensor, x: Tensor, learned: Tensor | None, needs: list[bool]) -> None:
    check_like(x, dy=dy)
    if len(needs) != 2 or (needs[1] and learned is None):
        raise ValueError(f"needs: got {list(needs)}, expected whether of x and of learned, where that is given")


def _kernels(backend: str | None, x: Tensor) -> Any:
    kernels = select(backend, x)
    if kernels is None:
        raise RuntimeError(
            f"backend: got {backend!r}, which is no kernel for this call, and the operators run no other"
        )
    return kernels


def _forward(x, learned, box, squared, scalars, backend):
    check_readable(x=x, learned=learned)
    pool = _pool(x, learned, box, squared, scalars)
    return _kernels(backend, x).forward(pool, x, None if learned is None else learned.contiguous())


def _backward(dy, x, learned, needs, box, squared, scalars, backend):
    check_readable(dy=dy, x=x, learned=learned)
    pool = _pool(x, learned, box, squared, scalars)
    _check_upstream(dy, x, learned, needs)
    learned = None if learned is None else learned.contiguous()
    found = _kernels(backend, x).backward(pool, dy, x, learned, tuple(needs))
    return tuple(x.new_empty(0) if t is None else t for t in found)


def _forward_fake(x, learned, box, squared, scalars, backend):
    _pool(x, learned, box, squared, scalars)
    return torch.empty_like(dense(x))


def _backward_fake(dy, x, learned, needs, box, squared, scalars, backend):
    _pool(x, learned, box, squared, scalars)
    _check_upstream(dy, x, learned, needs)
    inputs = (dense(x), learned)
    return tuple(torch.empty_like(t) if need else x.new_empty(0) for t, need in zip(inputs, needs, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, learned, *ctx.pool, ctx.backend = inputs
    ctx.save_for_backward(x, learned)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, learned = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    if not any(needs):
        found = (None, None)
    elif torch.is_grad_enabled():  # exactly under create_graph=True
        check_held(dy=dy, x=x, learned=learned)
        found = gradients(_pool(x, learned, *ctx.pool), dy, x, learned, needs)
    else:
        flops.register()
        found = torch.ops.divnorm_kernels.channel_backward(dy, x, learned, needs, *ctx.pool, ctx.backend)
        found = tuple(t if need else None for t, need in zip(found, needs, strict=True))
    return (*found, None, None, None, None)


for _name, _implementation, _fake in (
    ("channel_forward", _forward, _forward_fake),
    ("channel_backward", _backward, _backward_fake),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"divnorm_kernels::{_name}", _fake, lib=_library)
torch.library.register_autograd(
    "divnorm_kernels::channel_forward", _autograd, setup_context=_setup_context, lib=_library
)
