"""The operator as a `torch.autograd.Function`."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .fields import Geometry
from .reference import gradients


class DivisiveNormFunction(torch.autograd.Function):
    """``apply(x, weight, bias, sigma, geometry, backend, with_l1)`` -> ``(y, l1, maps)``; l1 ``None`` unless asked for.

    Most users want `divnorm_kernels.divisive_norm`, which checks its arguments and finds geometry and backend. Here
    ``sigma`` is a float or a tensor, ``geometry`` comes from `divnorm_kernels.fields.geometry` and ``backend`` from
    `divnorm_kernels.backends.select`. Saved for backward: x, the two maps (one tensor) and the parameters.
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
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Computes y and l1 and saves x, the maps and the parameters."""
        y, maps, l1 = backend.forward(g, x, weight, bias, sigma, with_l1)
        sigma_tensor = sigma if isinstance(sigma, Tensor) else None
        ctx.save_for_backward(x, weight, bias, sigma_tensor, maps)
        ctx.sigma = None if sigma_tensor is not None else sigma
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
        if torch.is_grad_enabled():  # exactly under create_graph=True
            found = gradients(g, x, weight, bias, sigma, dy, dl1, needs, create_graph=True)
        else:
            found = ctx.backend.backward(g, dy, dl1, x, maps, weight, bias, sigma, needs)
        return (*found, None, None, None)
