"""The raw operators in torch's dispatcher, for tracing and for tensors that want to be asked before a kernel runs.

``divnorm_kernels::forward`` and ``divnorm_kernels::backward`` compute what a backend's two functions do. Compilers,
fake tensors and dispatch modes see these, and the dispatcher resolves negated, zero and batched tensors on the way.
``norm`` is `divnorm_kernels.norm.Norm.text`; an absent map or gradient is an empty tensor. ``sigma`` overrules
``sigma_value``. ``bias`` and ``residual`` are read where an activation stands behind them; elsewhere backward needs no
more than ``bias_dtype``, and takes no residual, whose gradient is dy.

On the CPU the compiled module's kernels take their calls (``csrc/operators.cpp``), and hand over to the functions below
what is unusual and the first call of a kind. Where torch lacks a C function that they need, or the module is not there,
these functions serve all calls.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import flops
from .addresses import check_held, check_readable
from .backends import cpu, select
from .backends.native import module
from .checks import (
    check_activation,
    check_affine,
    check_residual,
    check_sigma,
    check_threshold,
    compute_dtype,
)
from .fields import Geometry, geometry
from .layout import dense
from .norm import parsed
from .reference import gradients

_library = torch.library.Library("divnorm_kernels", "DEF")
_SCHEMAS = {
    "forward": "(Tensor x, Tensor? weight, Tensor? bias, Tensor? sigma, float sigma_value, str norm, bool with_l1, "
    "bool with_variance, str? backend, Tensor? residual=None, Tensor? threshold=None) "
    "-> (Tensor y, Tensor maps, Tensor l1)",
    "backward": "(Tensor? dy, Tensor? dl1, Tensor x, Tensor maps, Tensor? weight, Tensor? bias, "
    "ScalarType? bias_dtype, Tensor? sigma, float sigma_value, str norm, bool[] needs, str? backend, "
    "Tensor? residual=None, Tensor? threshold=None) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dsigma, Tensor dresidual, Tensor dthreshold)",
}


def unread_bias(x: Tensor, dtype: torch.dtype, g: Geometry, weight: Tensor | None) -> Tensor:
    """Stands for a bias whose values nothing reads: shape and dtype are its gradient's."""
    if weight is not None and weight.dtype == dtype:
        return weight
    return torch.empty(g.affine_size, dtype=dtype, device=x.device)


def differentiable_gradients(
    g: Geometry,
    dy: Tensor | None,
    dl1: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    bias_dtype: torch.dtype | None,
    sigma: Tensor | float,
    residual: Tensor | None,
    threshold: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Backward under ``create_graph=True``: the reference's gradients, which are differentiable again."""
    check_held(dy=dy, dl1=dl1, x=x, weight=weight, bias=bias, sigma=sigma, residual=residual, threshold=threshold)
    if bias is None and needs[2]:
        bias = x.new_zeros(g.affine_size, dtype=bias_dtype).requires_grad_()
    return gradients(g, x, weight, bias, sigma, dy, dl1, needs, True, residual, threshold)


def operators_gradients(
    dy: Tensor | None,
    dl1: Tensor | None,
    x: Tensor,
    maps: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    bias_dtype: torch.dtype | None,
    sigma: Tensor | None,
    sigma_value: float,
    norm: str,
    needs: tuple[bool, ...],
    backend: str | None,
    residual: Tensor | None,
    threshold: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """What ``divnorm_kernels::backward`` gives, ``None`` where not needed."""
    flops.register()
    found = torch.ops.divnorm_kernels.backward(
        dy, dl1, x, maps, weight, bias, bias_dtype, sigma, sigma_value, norm, needs, backend, residual, threshold
    )
    return tuple(t if need else None for t, need in zip(found, needs, strict=True))


def _geometry(x: Tensor, norm: str) -> Geometry:
    return geometry(parsed(norm), tuple(x.shape))


def _checked(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sigma: Tensor | float | None,
    norm: str,
    residual: Tensor | None,
    threshold: Tensor | None,
) -> Geometry:
    """The geometry of a call whose tensors are the operator's."""
    check_activation(x)
    g = _geometry(x, norm)
    check_affine("weight", weight, g, x)
    check_affine("bias", bias, g, x)
    if sigma is not None:
        check_sigma(sigma, g, x)
    check_threshold(threshold, g, x)
    check_residual(residual, x)
    return g


def _check_beside(x: Tensor, **tensors: Tensor | None) -> None:
    """Raises unless the tensors are on the device of ``x``."""
    for name, t in tensors.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"{name}: got device {t.device}, expected that of x, {x.device}")


def _check_upstream(
    dy: Tensor | None, dl1: Tensor | None, x: Tensor, maps: Tensor, g: Geometry, given: dict[str, bool], needs: list
) -> None:
    """Raises unless these are backward's for an ``x`` of a geometry; ``given``: which inputs are there."""
    compute = compute_dtype(x)
    kept = [g.kept_shape(with_variance) for with_variance in (False, True)]
    for name, t, shapes, dtype in (
        ("dy", dy, [tuple(x.shape)], x.dtype),
        ("dl1", dl1, [()], compute),
        ("maps", maps, kept, compute),
    ):
        if t is None:
            continue
        if tuple(t.shape) not in shapes:
            raise ValueError(f"{name}: got shape {tuple(t.shape)}, expected {' or '.join(map(str, shapes))}")
        if t.dtype != dtype:
            raise TypeError(f"{name}: got dtype {t.dtype}, expected {dtype} for x of {x.dtype}")
    if len(needs) != 1 + len(given):
        raise ValueError(f"needs: got {len(needs)} entries, expected {1 + len(given)}, for x and {', '.join(given)}")
    for (name, there), need in zip(given.items(), needs[1:], strict=True):
        if need and not there:
            raise ValueError(f"needs: got True for {name}, which is not given")


def _kernels(backend: str | None, g: Geometry, x: Tensor) -> ModuleType:
    kernels = select(backend, g, x)
    if kernels is None:
        raise RuntimeError(
            f"backend: got {backend!r}, which is no kernel for this call, and the operators run kernels only; call "
            "divnorm_kernels.reference.divisive_norm instead"
        )
    return kernels


def _forward(x, weight, bias, sigma, sigma_value, norm, with_l1, with_variance, backend, residual=None, threshold=None):
    check_readable(x=x, weight=weight, bias=bias, sigma=sigma, residual=residual, threshold=threshold)
    sigma = sigma_value if sigma is None else sigma
    g = _checked(x, weight, bias, sigma, norm, residual, threshold)
    kernels = _kernels(backend, g, x)
    y, maps, l1 = kernels.forward(g, x, weight, bias, sigma, with_l1, with_variance, residual, threshold)
    return y, maps, l1 if with_l1 else maps.new_empty(0)


def _backward(
    dy,
    dl1,
    x,
    maps,
    weight,
    bias,
    bias_dtype,
    sigma,
    sigma_value,
    norm,
    needs,
    backend,
    residual=None,
    threshold=None,
):
    given = {"residual": residual, "threshold": threshold}
    check_readable(dy=dy, dl1=dl1, x=x, maps=maps, weight=weight, bias=bias, sigma=sigma, **given)
    g = _checked_backward(dy, dl1, x, maps, weight, bias, bias_dtype, sigma, sigma_value, norm, needs, **given)
    if bias is None and needs[2]:
        bias = unread_bias(x, bias_dtype, g, weight)
    sigma = sigma_value if sigma is None else sigma
    kernels = _kernels(backend, g, x)
    found = kernels.backward(g, dy, dl1, x, maps, weight, bias, sigma, tuple(needs), **given)
    return tuple(x.new_empty(0) if t is None else t for t in found)


def _checked_backward(
    dy, dl1, x, maps, weight, bias, bias_dtype, sigma, sigma_value, norm, needs, residual, threshold
) -> Geometry:
    """The geometry of a backward whose tensors are the operator's."""
    g = _checked(x, weight, bias, sigma_value if sigma is None else sigma, norm, residual, threshold)
    if residual is not None and g.norm.activation is None:
        raise ValueError("residual: got a Tensor without an activation, expected None, for its gradient is dy")
    _check_beside(x, dy=dy, dl1=dl1, maps=maps)
    present = {
        "weight": weight is not None,
        "bias": bias_dtype is not None,
        "sigma": sigma is not None,
        "residual": residual is not None,
        "threshold": threshold is not None,
    }
    _check_upstream(dy, dl1, x, maps, g, present, needs)
    return g


def _forward_fake(
    x, weight, bias, sigma, sigma_value, norm, with_l1, with_variance, backend, residual=None, threshold=None
):
    compute = compute_dtype(x)
    g = _checked(x, weight, bias, sigma, norm, residual, threshold)
    maps = x.new_empty(g.kept_shape(with_variance), dtype=compute)
    return torch.empty_like(dense(x)), maps, x.new_empty(() if with_l1 else (0,), dtype=compute)


def _backward_fake(
    dy,
    dl1,
    x,
    maps,
    weight,
    bias,
    bias_dtype,
    sigma,
    sigma_value,
    norm,
    needs,
    backend,
    residual=None,
    threshold=None,
):
    g = _checked(x, weight, bias, sigma, norm, residual, threshold)
    _check_beside(x, dy=dy, dl1=dl1, maps=maps)
    if bias is None and needs[2]:
        bias = unread_bias(x, bias_dtype, g, weight)
    inputs = (dense(x), weight, bias, sigma, dense(x), threshold)
    return tuple(torch.empty_like(t) if need else x.new_empty(0) for t, need in zip(inputs, needs, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, sigma, ctx.sigma_value, ctx.norm, ctx.with_l1, _, ctx.backend, residual, threshold = inputs
    _, maps, _ = output
    ctx.mark_non_differentiable(maps)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.activates = parsed(ctx.norm).activation is not None
    read_again = (bias, residual) if ctx.activates else (None, None)
    ctx.save_for_backward(x, weight, read_again[0], sigma, read_again[1], threshold, maps)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dy: Tensor | None, dmaps: None, dl1: Tensor | None) -> tuple[Any, ...]:
    x, weight, bias, sigma, residual, threshold, maps = ctx.saved_tensors
    needed = (*ctx.needs_input_grad, False, False)  # of arguments that were left to their defaults there is none
    adds, thresholds = needed[9], needed[10]
    needs = (*needed[:4], adds and ctx.activates, thresholds)
    dl1 = dl1 if ctx.with_l1 else None  # tracers hand in a gradient of the empty tensor
    if not any(needs):
        found = (None,) * 6
    elif torch.is_grad_enabled():  # exactly under create_graph=True
        g = _geometry(x, ctx.norm)
        value = ctx.sigma_value if sigma is None else sigma
        found = differentiable_gradients(g, dy, dl1, x, weight, bias, ctx.bias_dtype, value, residual, threshold, needs)
    else:
        given = x, maps, weight, bias, ctx.bias_dtype, sigma, ctx.sigma_value, ctx.norm
        found = operators_gradients(dy, dl1, *given, needs, ctx.backend, residual, threshold)
    dresidual = found[4] if ctx.activates or not adds else dy
    return (*found[:4], *(None,) * 5, dresidual, found[5])


def _remember(x: Tensor, norm: str, backend: str | None, residual: bool) -> None:
    """Tells the compiled kernels the plan that calls like this one are served by."""
    g = _geometry(x, norm)
    if g.numel > 0 and dense(x) is x and _kernels(backend, g, x) is cpu:
        module.remember(norm, backend or "", x, cpu.plan_for(g, x, residual))


def _forward_in_python(x, weight, bias, sigma, sigma_value, with_l1, with_variance, residual=None, threshold=None):
    norm, backend = module.operator_texts()
    arguments = x, weight, bias, sigma, sigma_value, norm, with_l1, with_variance, backend, residual, threshold
    return _for_kernel(_forward, arguments, x, norm, backend, residual is not None)


def _backward_in_python(
    dy, dl1, x, maps, weight, bias, bias_dtype, sigma, sigma_value, needs, residual=None, threshold=None
):
    norm, backend = module.operator_texts()
    arguments = dy, dl1, x, maps, weight, bias, bias_dtype, sigma, sigma_value, norm, needs, backend
    return _for_kernel(_backward, (*arguments, residual, threshold), x, norm, backend, residual is not None)


def _for_kernel(implementation, arguments, x, norm, backend, residual):
    try:
        found = implementation(*arguments)
        _remember(x, norm, backend, residual)
    except BaseException as error:  # torch's C functions, by which the kernel calls, would lose it
        module.operator_raised(error)
        return (torch.empty(0),) * (3 if implementation is _forward else 6)
    return found


for _name, _implementation, _fake in (
    ("forward", _forward, _forward_fake),
    ("backward", _backward, _backward_fake),
):
    _library.define(_name + _SCHEMAS[_name])
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"divnorm_kernels::{_name}", _fake, lib=_library)
torch.library.register_autograd("divnorm_kernels::forward", _autograd, setup_context=_setup_context, lib=_library)

by_kernels = False
"""Whether the compiled module's kernels take the CPU's calls."""
if module is not None:
    for _name, _implementation in (("forward", _forward_in_python), ("backward", _backward_in_python)):
        _schema = _SCHEMAS[_name].replace(" str norm,", "").replace(", str? backend", "")
        _library.define(f"{_name}_in_python{_schema}")
        _library.impl(f"{_name}_in_python", _implementation, "CompositeExplicitAutograd")
        _library.impl(f"{_name}_in_python", torch.library.fallthrough_kernel, "Autograd")
    by_kernels = module.register_operators(torch._C.__file__)
