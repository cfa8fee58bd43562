"""The operator as a `torch.autograd.Function`."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .addresses import direct
from .backends import name_of
from .backends.native import module
from .fields import Geometry
from .ops import differentiable_gradients, operators_gradients, unread_bias


class DivisiveNormFunction(torch.autograd.Function):
    """``apply(x, weight, bias, sigma, residual, threshold, geometry, backend, with_l1, with_variance)``.

    Gives ``(y, l1, maps)``.

    Most users want `divnorm_kernels.divisive_norm`, which checks its arguments and finds geometry and backend. Here
    ``sigma`` is a float or a tensor, ``geometry`` comes from `divnorm_kernels.fields.geometry` and ``backend`` from
    `divnorm_kernels.backends.select`; l1 is ``None`` unless asked for. Saved for backward: x, the maps (one tensor)
    and the parameters, bias and residual only where an activation makes backward read them.
    Under ``create_graph=True`` the gradient is the reference's, which is differentiable again.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        sigma: Tensor | float,
        residual: Tensor | None,
        threshold: Tensor | None,
        g: Geometry,
        backend: ModuleType,
        with_l1: bool,
        with_variance: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Computes y and l1 and saves what backward reads."""
        y, maps, l1 = backend.forward(g, x, weight, bias, sigma, with_l1, with_variance, residual, threshold)
        sigma_tensor = sigma if isinstance(sigma, Tensor) else None
        read_again = (bias, residual) if g.norm.activation else (None, None)
        ctx.save_for_backward(x, weight, read_again[0], sigma_tensor, read_again[1], threshold, maps)
        ctx.sigma = None if sigma_tensor is not None else sigma
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.geometry, ctx.backend = g, backend
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(maps)
        return y, l1, maps

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dl1: Tensor | None, dmaps: None) -> tuple[Tensor | None, ...]:
        """Gradients for the tensors."""
        found = _gradients(ctx, ctx.saved_tensors, ctx.geometry, ctx.backend, dy, dl1)
        return (*found, None, None, None, None)


def _gradients(
    ctx: Any,
    saved: tuple[Tensor | None, ...],
    g: Geometry,
    backend: ModuleType,
    dy: Tensor | None,
    dl1: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of the saved inputs, which may have a layer's shapes in place of the operator's."""
    x, weight, bias, sigma, residual, threshold, maps = saved
    if dy is not None and dy.layout is not torch.strided:
        dy = dy.to_dense()
    shape, parameters = x.shape, (weight, bias, threshold)
    if shape == g.input_shape and all(t is None or t.dim() == 1 for t in parameters):
        return _gradients_in_form(ctx, g, backend, dy, dl1, x, weight, bias, sigma, residual, threshold, maps)
    # the saved ones' shapes; a bias whose values nothing reads has weight's
    shapes = [None if t is None else t.shape for t in parameters]
    shapes[1] = shapes[0] if shapes[1] is None else shapes[1]
    x, dy, residual = (None if t is None else t.reshape(g.input_shape) for t in (x, dy, residual))
    weight, bias, threshold = (None if t is None else t.flatten() for t in parameters)
    dx, dweight, dbias, dsigma, dresidual, dthreshold = _gradients_in_form(
        ctx, g, backend, dy, dl1, x, weight, bias, sigma, residual, threshold, maps
    )
    dx, dresidual = (None if t is None else t.reshape(shape) for t in (dx, dresidual))
    dweight, dbias, dthreshold = (
        t if t is None or own is None else t.reshape(own)
        for t, own in zip((dweight, dbias, dthreshold), shapes, strict=True)
    )
    return dx, dweight, dbias, dsigma, dresidual, dthreshold


def _gradients_in_form(
    ctx: Any,
    g: Geometry,
    backend: ModuleType,
    dy: Tensor | None,
    dl1: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sigma: Tensor | None,
    residual: Tensor | None,
    threshold: Tensor | None,
    maps: Tensor,
) -> tuple[Tensor | None, ...]:
    sigma = ctx.sigma if sigma is None else sigma
    needs, bias_dtype = ctx.needs_input_grad[:6], getattr(ctx, "bias_dtype", None)
    added = dy if needs[4] and g.norm.activation is None else None  # the residual's gradient where it is dy
    needs = (*needs[:4], needs[4] and g.norm.activation is not None, needs[5])
    if not any(needs):
        found = (None,) * 6
    elif torch.is_grad_enabled():  # exactly under create_graph=True
        found = differentiable_gradients(g, dy, dl1, x, weight, bias, bias_dtype, sigma, residual, threshold, needs)
    elif direct(dy, dl1, x, maps, weight, bias, sigma, residual, threshold):
        if bias is None and needs[2]:
            bias = unread_bias(x, bias_dtype, g, weight)
        found = backend.backward(g, dy, dl1, x, maps, weight, bias, sigma, needs, residual, threshold)
    else:
        tensor, value = (sigma, 0.0) if isinstance(sigma, Tensor) else (None, float(sigma))
        given = x, maps, weight, bias, bias_dtype, tensor, value, g.norm.text
        found = operators_gradients(dy, dl1, *given, needs, name_of(backend), residual, threshold)
    return found if added is None else (*found[:4], added, found[5])


if module is not None:

    class PreparedFunction(torch.autograd.Function):
        """``apply(x, weight, bias, sigma, residual, threshold)`` for a prepared call, which knows the rest.

        Of the compiled module.
        """

        forward = staticmethod(module.forward)

        @staticmethod
        def backward(ctx: Any, dy: Tensor | None, dl1: Tensor | None = None, dmaps: None = None) -> Any:
            """Gradients for the tensors, of shapes as a layer has them."""
            # a function of Python's, as a compiler of backward needs
            saved = ctx.saved_tensors  # once: a checkpoint hands them out no second time
            if not torch.compiler.is_dynamo_compiling():
                found = module.backward(ctx, saved, dy, dl1)
                if found is not NotImplemented:
                    return found
            return _gradients(ctx, saved, ctx.plan.geometry, ctx.plan.backend, dy, dl1)

    # without apply's own test for torch.func, which a prepared call has made already
    module.differentiate_by(super(torch.autograd.Function, PreparedFunction).apply)
