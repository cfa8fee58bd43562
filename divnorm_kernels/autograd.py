"""The operator as a `torch.autograd.Function`."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from . import flops
from .addresses import direct
from .backends import name_of
from .fields import Geometry
from .ops import differentiable_gradients, unread_bias


class DivisiveNormFunction(torch.autograd.Function):
    """``apply(x, weight, bias, sigma, geometry, backend, with_l1, with_variance)`` -> ``(y, l1, maps)``.

    Most users want `divnorm_kernels.divisive_norm`, which checks its arguments and finds geometry and backend. Here
    ``sigma`` is a float or a tensor, ``geometry`` comes from `divnorm_kernels.fields.geometry` and ``backend`` from
    `divnorm_kernels.backends.select`; l1 is ``None`` unless asked for. Saved for backward: x, the maps (one tensor)
    and the parameters, bias only where an activation makes backward read it.
    Under ``create_graph=True`` the gradient is the reference's, which is differentiable again.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        sigma: Tensor | float,
        g: Geometry,
        backend: ModuleType,
        with_l1: bool,
        with_variance: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Computes y and l1 and saves what backward reads."""
        y, maps, l1 = backend.forward(g, x, weight, bias, sigma, with_l1, with_variance)
        sigma_tensor = sigma if isinstance(sigma, Tensor) else None
        ctx.save_for_backward(x, weight, bias if g.activation else None, sigma_tensor, maps)
        ctx.sigma = None if sigma_tensor is not None else sigma
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.geometry, ctx.backend = g, backend
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(maps)
        return y, l1, maps

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dl1: Tensor | None, dmaps: None) -> tuple[Tensor | None, ...]:
        """Gradients for x, weight, bias and sigma."""
        x, weight, bias, sigma, maps = ctx.saved_tensors
        sigma = ctx.sigma if sigma is None else sigma
        needs = ctx.needs_input_grad[:4]
        g = ctx.geometry
        if dy is not None and dy.layout is not torch.strided:
            dy = dy.to_dense()
        if torch.is_grad_enabled():  # exactly under create_graph=True
            found = differentiable_gradients(g, dy, dl1, x, weight, bias, ctx.bias_dtype, sigma, needs)
        elif direct(dy, dl1, x, maps, weight, bias, sigma):
            if bias is None and needs[2]:
                bias = unread_bias(x, ctx.bias_dtype, g, weight)
            found = ctx.backend.backward(g, dy, dl1, x, maps, weight, bias, sigma, needs)
        else:
            flops.register()
            given, value = (sigma, 0.0) if isinstance(sigma, Tensor) else (None, float(sigma))
            found = torch.ops.divnorm_kernels.backward(
                dy, dl1, x, maps, weight, bias, ctx.bias_dtype, given, value, *g.options, needs, name_of(ctx.backend)
            )
            found = (t if need else None for t, need in zip(found, needs, strict=True))
        return (*found, None, None, None, None)
