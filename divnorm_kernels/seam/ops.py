"""The two halves of a normalization by whole fields, in torch's dispatcher and under autograd.

``row_statistics`` and ``row_norm`` are the halves of forward. Backward sums up first (``row_sums``), hands the
gradients of the statistics through what the caller has put between the halves, and then makes that of x
(``row_gradient``) in one pass. For that the node of ``row_norm``, whose backward comes first, hands to that of
``row_statistics`` what the pass reads: as the gradients of ``messages``, tensors that the one gives the other, whose
values nobody may read.
``norm`` is `divnorm_kernels.norm.Norm.text`; ``rows`` are (2, rows) as in `divnorm_kernels.seam.backends`.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..addresses import check_held, check_readable
from ..arguments import checked
from ..checks import check_like, compute_dtype
from ..fields import Geometry, geometry
from ..layout import dense
from ..norm import Norm, parsed
from ..ops import unread_bias
from ..reference import Rows, deviation, gradients, row_statistics
from .backends import has_halves, select

_library = torch.library.Library("divnorm_kernels", "FRAGMENT")
_PARAMETERS = "Tensor? weight, Tensor? bias, Tensor? residual, Tensor? threshold"
_SCHEMAS = {
    "row_statistics": "(Tensor x, Tensor? residual, str norm, str? backend) -> (Tensor mean, Tensor variance, "
    "Tensor of_x, Tensor of_rows, Tensor of_parameters, Tensor of_l1)",
    "row_norm": "(Tensor[] messages, Tensor x, Tensor mean, Tensor variance, Tensor? sigma, float sigma_value, "
    f"{_PARAMETERS}, str norm, bool with_l1, str? backend) -> (Tensor y, Tensor l1)",
    "row_sums": f"(Tensor dy, Tensor? l1_scale, Tensor x, Tensor rows, {_PARAMETERS}, str norm, bool[] needs, "
    "str? backend) -> (Tensor sums, Tensor dweight, Tensor dbias, Tensor dthreshold)",
    "row_gradient": "(Tensor dy, Tensor? l1_scale, Tensor x, Tensor rows, Tensor slopes, Tensor? parameters, "
    "Tensor? residual, str norm, bool[] needs, str? backend) -> (Tensor dx, Tensor dresidual)",
}


def statistics(norm: Norm, x: Tensor, residual: Tensor | None, backend: str | None) -> tuple[Tensor, ...]:
    """Mean and variance of the rows of ``x``, and the ``messages`` of `normalized`.

    ``residual``: whose gradient comes about in the pass that makes x's, as it does in front of an activation.
    """
    return torch.ops.divnorm_kernels.row_statistics(x, residual, norm.text, backend)


def normalized(
    norm: Norm,
    messages: list[Tensor],
    x: Tensor,
    rows: Rows,
    weight: Tensor | None,
    bias: Tensor | None,
    sigma: Tensor | float,
    residual: Tensor | None,
    threshold: Tensor | None,
    with_l1: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor | None]:
    """``(y, l1)`` of ``x`` by mean and variance of its rows; l1 where it is asked for."""
    tensor, value = (sigma, 0.0) if isinstance(sigma, Tensor) else (None, sigma)
    given = weight, bias, residual, threshold
    y, l1 = torch.ops.divnorm_kernels.row_norm(messages, x, *rows, tensor, value, *given, norm.text, with_l1, backend)
    return y, l1 if with_l1 else None


def _geometry(x: Tensor, norm: str) -> Geometry:
    return geometry(parsed(norm), tuple(x.shape))


def _kernels(backend: str | None, g: Geometry, x: Tensor) -> ModuleType:
    kernels = select(backend, g, x)
    if kernels is None:
        raise RuntimeError(
            f"backend: got {backend!r}, which is no kernel for this call, and the operators run no other"
        )
    return kernels


def _check(x: Tensor, norm: str, weight, bias, sigma, residual, threshold) -> Geometry:
    g, _, _ = checked(parsed(norm), x, weight, bias, sigma, residual, threshold)
    if not has_halves(g):
        raise ValueError(f"norm: got {norm!r}, expected fields that are whole and both there, with p=2")
    return g


def _check_rows(g: Geometry, x: Tensor, count: int | None, **tensors: Tensor) -> None:
    """Raises unless they have a number a row, or ``count`` of them."""
    shape = g.maps_shape[1:] if count is None else (count, *g.maps_shape[1:])
    for name, t in tensors.items():
        if tuple(t.shape) != shape:
            raise ValueError(f"{name}: got shape {tuple(t.shape)}, expected {shape}")
        if t.dtype != compute_dtype(x):
            raise TypeError(f"{name}: got dtype {t.dtype}, expected {compute_dtype(x)} for x of {x.dtype}")
        if t.device != x.device:
            raise ValueError(f"{name}: got device {t.device}, expected that of x, {x.device}")


def _check_upstream(dy: Tensor, l1_scale: Tensor | None, x: Tensor) -> None:
    check_like(x, dy=dy)
    if l1_scale is not None and (l1_scale.dim() != 0 or l1_scale.dtype != compute_dtype(x)):
        raise ValueError(f"l1_scale: got {l1_scale.dtype} of shape {tuple(l1_scale.shape)}, expected one number")


def _messages(g: Geometry, x: Tensor) -> tuple[Tensor, ...]:
    """Tensors whose gradients are messages."""
    of_rows, of_parameters, of_l1 = (x.new_empty((), dtype=compute_dtype(x)) for _ in range(3))
    return (
        x.new_empty(()).expand(x.shape),
        of_rows.expand(2, *g.maps_shape[1:]),
        of_parameters.expand(3, g.affine_size),
        of_l1,
    )


def _statistics(x, residual, norm, backend):
    check_readable(x=x)
    g = _check(x, norm, None, None, 1.0, residual, _any_threshold(x, norm))
    return *_kernels(backend, g, x).statistics(g, x), *_messages(g, x)


def _statistics_fake(x, residual, norm, backend):
    g = _check(x, norm, None, None, 1.0, residual, _any_threshold(x, norm))
    row = x.new_empty(g.maps_shape[1:], dtype=compute_dtype(x))
    return row, torch.empty_like(row), *_messages(g, x)


def _norm(messages, x, mean, variance, sigma, sigma_value, weight, bias, residual, threshold, norm, with_l1, backend):
    given = {"weight": weight, "bias": bias, "sigma": sigma_value if sigma is None else sigma}
    behind = {"residual": residual, "threshold": threshold}
    check_readable(x=x, mean=mean, variance=variance, **given, **behind)
    g = _check(x, norm, **given, **behind)
    _check_rows(g, x, None, mean=mean, variance=variance)
    rows = _rows(mean, variance, given["sigma"])
    y, l1 = _kernels(backend, g, x).normalize(g, x, rows, weight, bias, with_l1, **behind)
    return y, l1 if with_l1 else mean.new_empty(0)


def _norm_fake(
    messages, x, mean, variance, sigma, sigma_value, weight, bias, residual, threshold, norm, with_l1, backend
):
    g = _check(x, norm, weight, bias, sigma_value if sigma is None else sigma, residual, threshold)
    _check_rows(g, x, None, mean=mean, variance=variance)
    return torch.empty_like(dense(x)), mean.new_empty(() if with_l1 else 0)


def _rows(mean: Tensor, variance: Tensor, sigma: Tensor | float) -> Tensor:
    """Mean and 1/s."""
    if isinstance(sigma, Tensor):
        sigma = sigma.to(mean.dtype).reshape(-1, *[1] * (mean.dim() - 2))
    return torch.stack((mean, deviation(sigma, variance, 2).reciprocal()))


def _sums(dy, l1_scale, x, rows, weight, bias, residual, threshold, norm, needs, backend):
    behind = {"residual": residual, "threshold": threshold}
    check_readable(dy=dy, l1_scale=l1_scale, x=x, rows=rows, weight=weight, bias=bias, **behind)
    g = _check(x, norm, weight, bias, 1.0, **behind)
    _check_sums(g, dy, l1_scale, x, rows, needs)
    found = _kernels(backend, g, x).sums(g, dy, l1_scale, x, rows.contiguous(), weight, bias, tuple(needs), **behind)
    return tuple(x.new_empty(0) if t is None else t for t in found)


def _check_sums(g: Geometry, dy: Tensor, l1_scale: Tensor | None, x: Tensor, rows: Tensor, needs: list[bool]) -> None:
    _check_upstream(dy, l1_scale, x)
    _check_rows(g, x, 2, rows=rows)
    if len(needs) != 3:
        raise ValueError(f"needs: got {len(needs)} entries, expected weight's, bias' and threshold's")


def _sums_fake(dy, l1_scale, x, rows, weight, bias, residual, threshold, norm, needs, backend):
    g = _check(x, norm, weight, bias, 1.0, residual, threshold)
    _check_sums(g, dy, l1_scale, x, rows, needs)
    inputs = (weight, bias, threshold)
    found = (torch.empty_like(t) if need else x.new_empty(0) for t, need in zip(inputs, needs, strict=True))
    return rows.new_empty(3, *rows.shape[1:]), *found


def _gradient(dy, l1_scale, x, rows, slopes, parameters, residual, norm, needs, backend):
    check_readable(dy=dy, l1_scale=l1_scale, x=x, rows=rows, slopes=slopes, parameters=parameters, residual=residual)
    g, given = _check_gradient(dy, l1_scale, x, rows, slopes, parameters, residual, norm, needs)
    rows, slopes = rows.contiguous(), slopes.contiguous()
    found = _kernels(backend, g, x).gradient(g, dy, l1_scale, x, rows, slopes, *given, tuple(needs))
    return tuple(x.new_empty(0) if t is None else t for t in found)


def _check_gradient(
    dy, l1_scale, x, rows, slopes, parameters, residual, norm, needs
) -> tuple[Geometry, tuple[Tensor | None, ...]]:
    """The geometry, and weight, bias, residual and threshold."""
    weight, bias, threshold = (None, None, None) if parameters is None else parameters.unbind()
    threshold = threshold if parsed(norm).activation == "tlu" else None
    g = _check(x, norm, weight, bias, 1.0, residual, threshold)
    _check_upstream(dy, l1_scale, x)
    _check_rows(g, x, 2, rows=rows, slopes=slopes)
    if len(needs) != 2 or (needs[1] and residual is None):
        raise ValueError(f"needs: got {list(needs)}, expected whether of x and of a residual that is given")
    return g, (weight, bias, residual, threshold)


def _gradient_fake(dy, l1_scale, x, rows, slopes, parameters, residual, norm, needs, backend):
    _check_gradient(dy, l1_scale, x, rows, slopes, parameters, residual, norm, needs)
    return tuple(torch.empty_like(dense(x)) if need else x.new_empty(0) for need in needs)


def _any_threshold(x: Tensor, norm: str) -> Tensor | None:
    """Stands for one that the statistics do not come to."""
    g = _geometry(x, norm)
    return x.new_empty(g.affine_size) if g.norm.activation == "tlu" else None


def _keep_for_statistics(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, ctx.norm, ctx.backend = inputs
    ctx.save_for_backward(x, residual, output[0])
    ctx.set_materialize_grads(False)


def _of_statistics(ctx: Any, dmean, dvariance, dy, rows, parameters, l1_scale) -> tuple[Any, ...]:
    """The gradients of x and residual; without a message, that of x by the statistics alone.

    None comes under create_graph=True, and where y is not in the loss.
    """
    x, residual, mean = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    check_held(x=x, mean=mean, dmean=dmean, dvariance=dvariance)
    if dy is None and (not needs[0] or (dmean is None and dvariance is None)):
        return None, None, None, None
    dmean, dvariance = (torch.zeros_like(mean) if t is None else t for t in (dmean, dvariance))
    if dy is None:
        return _by_statistics(_geometry(x, ctx.norm), x, dmean, dvariance), None, None, None
    count = max(x.numel() // max(mean.numel(), 1), 1)
    slope = dvariance * (-2 / count)
    shift = slope * (rows[0] - mean) - dmean / count
    # by 1/s that is 0 nothing comes back but by the shift
    slopes = torch.stack((torch.where(rows[1] == 0, 0, slope / rows[1]), shift))
    given = dy, l1_scale, x, rows, slopes, parameters, residual, ctx.norm, needs, ctx.backend
    found = torch.ops.divnorm_kernels.row_gradient(*given)
    return *(t if need else None for t, need in zip(found, needs, strict=True)), None, None


def _by_statistics(g: Geometry, x: Tensor, dmean: Tensor, dvariance: Tensor) -> Tensor:
    twice = torch.is_grad_enabled()
    with torch.enable_grad():
        own = x.view_as(x) if twice else x.detach().requires_grad_()
        return torch.autograd.grad(row_statistics(g, own), own, (dmean, dvariance), create_graph=twice)[0]


def _keep_for_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, x, mean, variance, sigma, ctx.sigma_value, weight, bias, residual, threshold, *rest = inputs
    ctx.norm, ctx.with_l1, ctx.backend = rest
    ctx.bias_dtype = None if bias is None else bias.dtype
    read_again = (bias, residual) if parsed(ctx.norm).activation is not None else (None, None)
    ctx.save_for_backward(x, mean, variance, sigma, weight, *read_again, threshold)
    ctx.set_materialize_grads(False)


def _of_norm(ctx: Any, dy: Tensor | None, dl1: Tensor | None) -> tuple[Any, ...]:
    """Gradients of rows and parameters; the rest of backward is handed to `_of_statistics`."""
    x, mean, variance, sigma, weight, bias, residual, threshold = ctx.saved_tensors
    to_hand, of_x, of_mean, of_variance, of_sigma, _, *of_given = ctx.needs_input_grad[:10]
    of_weight, of_bias, of_residual, of_threshold = of_given
    dl1 = dl1 if ctx.with_l1 else None  # tracers hand in a gradient of the empty tensor
    none = [None] * len(to_hand)
    if dy is None and dl1 is None:
        return (none, *(None,) * 12)
    g = _geometry(x, ctx.norm)
    check_held(dy=dy, dl1=dl1, x=x, mean=mean, variance=variance, sigma=sigma, weight=weight)
    if dy is not None and dy.layout is not torch.strided:
        dy = dy.to_dense()
    activates = g.norm.activation is not None
    if bias is None and ctx.bias_dtype is not None:
        bias = unread_bias(x, ctx.bias_dtype, g, weight)
    if torch.is_grad_enabled():  # exactly under create_graph=True: there is no message then
        check_held(bias=bias, residual=residual, threshold=threshold)
        if bias is not None and not activates:
            bias = torch.zeros_like(bias).requires_grad_()
        needs = of_x, of_weight, of_bias, of_sigma, of_residual and activates, of_threshold, of_mean, of_variance
        sigma = ctx.sigma_value if sigma is None else sigma
        found = gradients(g, x, weight, bias, sigma, dy, dl1, needs, True, residual, threshold, (mean, variance))
        dx, dweight, dbias, dsigma, dresidual, dthreshold, dmean, dvariance = found
        dresidual = dresidual if activates or not of_residual else dy
        return none, dx, dmean, dvariance, dsigma, None, dweight, dbias, dresidual, dthreshold, None, None, None
    rows = _rows(mean, variance, ctx.sigma_value if sigma is None else sigma)
    dy = torch.zeros_like(x) if dy is None else dense(dy, like=x)
    l1_scale = None if dl1 is None else dl1 / max(x.numel(), 1)
    needs = [of_weight, of_bias, of_threshold]
    sums, dweight, dbias, dthreshold = torch.ops.divnorm_kernels.row_sums(
        dy, l1_scale, x, rows, weight, bias, residual, threshold, ctx.norm, needs, ctx.backend
    )
    pull, product, signs = sums
    dvariance = product * rows[1] * rows[1] * rows[1] * -0.5
    dmean = -pull * rows[1] if g.norm.subtract_mean else torch.zeros_like(pull)
    if l1_scale is not None:
        dmean = dmean - l1_scale * signs
    dsigma = None
    if of_sigma:
        each = dvariance.sum([d for d in range(dvariance.dim()) if d != 1]) if sigma.dim() else dvariance.sum()
        dsigma = (2 * sigma * each.reshape(sigma.shape)).to(sigma.dtype)
    messages = none
    if any(to_hand):
        messages = [dy, rows, _parameters(g, rows, weight, bias, threshold), l1_scale]
    found = (dweight, dbias, None if activates else dy, dthreshold)
    found = tuple(t if need else None for t, need in zip(found, of_given, strict=True))
    return messages, None, dmean, dvariance, dsigma, None, *found, None, None, None


def _parameters(
    g: Geometry, like: Tensor, weight: Tensor | None, bias: Tensor | None, threshold: Tensor | None
) -> Tensor | None:
    """Those that the second pass of backward reads, a row each, or ``None`` where there are none."""
    if weight is None and g.norm.activation is None:
        return None
    absent = (1.0, 0.0, 0.0)
    rows = [
        like.new_full((g.affine_size,), value) if t is None else t.to(like.dtype)
        for t, value in zip((weight, bias, threshold), absent, strict=True)
    ]
    return torch.stack(rows)


for _name, _implementation, _fake in (
    ("row_statistics", _statistics, _statistics_fake),
    ("row_norm", _norm, _norm_fake),
    ("row_sums", _sums, _sums_fake),
    ("row_gradient", _gradient, _gradient_fake),
):
    _library.define(_name + _SCHEMAS[_name])
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"divnorm_kernels::{_name}", _fake, lib=_library)
for _name, _backward, _keep in (
    ("row_statistics", _of_statistics, _keep_for_statistics),
    ("row_norm", _of_norm, _keep_for_norm),
):
    torch.library.register_autograd(f"divnorm_kernels::{_name}", _backward, setup_context=_keep, lib=_library)
