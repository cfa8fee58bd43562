"""The raw operators in torch's dispatcher, for tracing: compilers, fake tensors and dispatch modes see these.

``divnorm_kernels::forward`` and ``divnorm_kernels::backward`` compute what a backend's two functions do. Windows are
int lists with one entry per spatial dimension, 0 for ``"all"``; an absent field is ``None``, an absent map or gradient
an empty tensor. ``sigma`` overrules ``sigma_value``.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .backends import select
from .fields import Geometry, Window, geometry
from .layout import dense

_GEOMETRY = "int[]? window, int[]? norm_window, int groups, str edges, bool over_batch, str? activation"

_library = torch.library.Library("divnorm_kernels", "DEF")
_library.define(
    f"forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? sigma, float sigma_value, {_GEOMETRY}, bool with_l1, "
    "str? backend) -> (Tensor y, Tensor maps, Tensor l1)"
)
_library.define(
    "backward(Tensor? dy, Tensor? dl1, Tensor x, Tensor maps, Tensor? weight, Tensor? bias, "
    f"Tensor? sigma, float sigma_value, {_GEOMETRY}, bool[] needs, str? backend) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dsigma)"
)


def encode(window: Window, dims: int) -> list[int] | None:
    """A window as the operators take it, for ``dims`` spatial dimensions."""
    if window is None:
        return None
    entries = window if isinstance(window, tuple) else (window,) * dims
    return [0 if entry == "all" else entry for entry in entries]


def _decode(window: list[int] | None) -> Window:
    return None if window is None else tuple("all" if entry == 0 else entry for entry in window)


def _geometry(x: Tensor, window: Any, norm_window: Any, *options: Any) -> Geometry:
    return geometry(tuple(x.shape), _decode(window), _decode(norm_window), *options)


def _kernels(backend: str | None, g: Geometry, x: Tensor) -> ModuleType:
    kernels = select(backend, g, x)
    if kernels is None:
        raise RuntimeError("the operators run kernels only; call divnorm_kernels.reference.divisive_norm instead")
    return kernels


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _filled(t: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if t is None else t


def _forward(
    x, weight, bias, sigma, sigma_value, window, norm_window, groups, edges, over_batch, activation, with_l1, backend
):
    g = _geometry(x, window, norm_window, groups, edges, over_batch, activation)
    sigma = sigma_value if sigma is None else sigma
    y, maps, l1 = _kernels(backend, g, x).forward(g, x, weight, bias, sigma, with_l1)
    return y, maps, l1 if with_l1 else maps.new_empty(0)


def _backward(
    dy,
    dl1,
    x,
    maps,
    weight,
    bias,
    sigma,
    sigma_value,
    window,
    norm_window,
    groups,
    edges,
    over_batch,
    activation,
    needs,
    backend,
):
    g = _geometry(x, window, norm_window, groups, edges, over_batch, activation)
    sigma = sigma_value if sigma is None else sigma
    found = _kernels(backend, g, x).backward(g, dy, dl1, x, maps, weight, bias, sigma, tuple(needs))
    return tuple(_filled(t, x) for t in found)


def _forward_fake(
    x, weight, bias, sigma, sigma_value, window, norm_window, groups, edges, over_batch, activation, with_l1, backend
):
    g = _geometry(x, window, norm_window, groups, edges, over_batch, activation)
    compute = _compute_dtype(x)
    maps = x.new_empty(_kernels(backend, g, x).maps_shape(g), dtype=compute)
    return torch.empty_like(dense(x)), maps, x.new_empty(() if with_l1 else (0,), dtype=compute)


def _backward_fake(dy, dl1, x, maps, weight, bias, sigma, *rest):
    needs = rest[-2]
    inputs = (dense(x), weight, bias, sigma)
    return tuple(torch.empty_like(t) if need else x.new_empty(0) for t, need in zip(inputs, needs, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, sigma = inputs[:4]
    _, maps, _ = output
    ctx.mark_non_differentiable(maps)
    ctx.save_for_backward(x, weight, bias, sigma, maps)
    ctx.sigma_value, ctx.geometry_args, (ctx.with_l1, ctx.backend_name) = inputs[4], inputs[5:11], inputs[11:13]
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dy: Tensor | None, dmaps: None, dl1: Tensor | None) -> tuple[Any, ...]:
    x, weight, bias, sigma, maps = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:4])
    dl1 = dl1 if ctx.with_l1 else None  # tracers hand in a gradient of the empty tensor
    found = torch.ops.divnorm_kernels.backward(
        dy, dl1, x, maps, weight, bias, sigma, ctx.sigma_value, *ctx.geometry_args, needs, ctx.backend_name
    )
    return (*(t if need else None for t, need in zip(found, needs, strict=True)), *(None,) * 9)


for _name, _implementation, _fake in (
    ("forward", _forward, _forward_fake),
    ("backward", _backward, _backward_fake),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"divnorm_kernels::{_name}", _fake, lib=_library)
torch.library.register_autograd("divnorm_kernels::forward", _autograd, setup_context=_setup_context, lib=_library)
