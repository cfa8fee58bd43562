"""Generalized divisive normalization in torch's dispatcher, for tracing and for tensors that want to be asked before a
kernel runs.

``inverse``, ``simplified`` and ``window`` are a `divnorm_kernels.gdn.form.Form`; an absent gradient is an empty tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import flops
from ..addresses import check_held, check_readable
from ..checks import check_like
from ..layout import dense
from .backends import select
from .form import Form, check_tensors
from .reference import gradients

_library = torch.library.Library("divnorm_kernels", "FRAGMENT")
_FORM = "bool inverse, bool simplified, str window, str? backend"
_library.define(f"gdn_forward(Tensor x, Tensor beta, Tensor gamma, {_FORM}) -> Tensor")
_library.define(
    f"gdn_backward(Tensor dy, Tensor x, Tensor? y, Tensor beta, Tensor gamma, bool[] needs, {_FORM}) "
    "-> (Tensor dx, Tensor dbeta, Tensor dgamma)"
)


def _check_upstream(x: Tensor, needs: list[bool], **tensors: Tensor | None) -> None:
    check_like(x, **tensors)
    if len(needs) != 3:
        raise ValueError(f"needs: got {list(needs)}, expected whether of x, beta and gamma")


def _kernels(backend: str | None, form: Form, x: Tensor) -> Any:
    kernels = select(backend, form, x)
    if kernels is None:
        raise RuntimeError(
            f"backend: got {backend!r}, which is no kernel for this call, and the operators run no other"
        )
    return kernels


def _forward(x, beta, gamma, inverse, simplified, window, backend):
    check_readable(x=x, beta=beta, gamma=gamma)
    check_tensors(x, beta, gamma)
    form = Form(inverse, simplified, window)
    return _kernels(backend, form, x).forward(form, x, beta, gamma)


def _backward(dy, x, y, beta, gamma, needs, inverse, simplified, window, backend):
    check_readable(dy=dy, x=x, y=y, beta=beta, gamma=gamma)
    check_tensors(x, beta, gamma)
    _check_upstream(x, needs, dy=dy, y=y)
    form = Form(inverse, simplified, window)
    found = _kernels(backend, form, x).backward(form, dy, x, y, beta, gamma, tuple(needs))
    return tuple(x.new_empty(0) if t is None else t for t in found)


def _forward_fake(x, beta, gamma, inverse, simplified, window, backend):
    check_tensors(x, beta, gamma)
    return torch.empty_like(dense(x))


def _backward_fake(dy, x, y, beta, gamma, needs, inverse, simplified, window, backend):
    check_tensors(x, beta, gamma)
    _check_upstream(x, needs, dy=dy, y=y)
    inputs = (dense(x), beta, gamma)
    return tuple(
        torch.empty_like(t, memory_format=torch.preserve_format if t is inputs[0] else torch.contiguous_format)
        if need
        else x.new_empty(0)
        for t, need in zip(inputs, needs, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, beta, gamma, *form, ctx.backend = inputs
    ctx.form = Form(*form)
    keeps = _kernels(ctx.backend, ctx.form, x).keeps_result(x)
    ctx.save_for_backward(x, beta, gamma, output if keeps else None)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, beta, gamma, y = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    if not any(needs):
        found = (None,) * 3
    elif torch.is_grad_enabled():  # exactly under create_graph=True
        check_held(dy=dy, x=x, beta=beta, gamma=gamma)
        found = gradients(ctx.form, dy, x, beta, gamma, needs)
    else:
        flops.register()
        found = torch.ops.divnorm_kernels.gdn_backward(dy, x, y, beta, gamma, needs, *ctx.form, ctx.backend)
        found = tuple(t if need else None for t, need in zip(found, needs, strict=True))
    return (*found, None, None, None, None)


for _name, _implementation, _fake in (
    ("gdn_forward", _forward, _forward_fake),
    ("gdn_backward", _backward, _backward_fake),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"divnorm_kernels::{_name}", _fake, lib=_library)
torch.library.register_autograd("divnorm_kernels::gdn_forward", _autograd, setup_context=_setup_context, lib=_library)
