"""The public call: checks its arguments, picks a backend, and runs it under autograd."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function

from . import flops, seam, sharding
from .addresses import check_alive, direct
from .arguments import by_reference, checked
from .autograd import DivisiveNormFunction
from .backends import check_name, select
from .checks import check_flag
from .norm import Norm, Window, exact, norm_of
from .prepared import prepared
from .reference import OnStatistics, statistics
from .states import recorded, unless_transformed

# Function.apply without its test for torch.func, which transformed() has made already.
_apply = super(torch.autograd.Function, DivisiveNormFunction).apply


def divisive_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    window: Window,
    norm_window: Window = "same",
    sigma: Tensor | float = 1.0,
    groups: int = 1,
    edges: str = "valid",
    over_batch: bool = False,
    p: float = 2,
    subtract_mean: bool = True,
    residual: Tensor | None = None,
    activation: str | None = None,
    threshold: Tensor | None = None,
    on_statistics: OnStatistics | None = None,
    return_l1: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Divisive normalization: ``y = weight * v / sqrt(sigma^2 + B[mean v^2]) + bias`` with ``v = x - A[mean x]``.

    The means run over the channels of a group, A and B average over the summation and the suppression field around
    each position; v in B is each neighbour's own. What may stand behind it: ``activation(y + residual)``.
    Differentiable in x, weight, bias, sigma, residual and threshold, twice.
    Source: Ren et al., "Normalizing the Normalizers", ICLR 2017 (arXiv 1611.04520), equations 1 to 4; p = 1: Hoffer et
    al., "Norm matters", NeurIPS 2018; "tlu": Singh & Krishnan, "Filter Response Normalization Layer", CVPR 2020.

    Args:
        x: ``(N, C, *S)`` with one to three spatial dimensions, or (N, F), which is computed as (N, 1, F). float64,
            float32, bfloat16 or float16; float64 computes in float64, the others in float32. Contiguous and
            channels_last tensors are read as they lie; any other layout costs one copy.
        weight: (C,), or (F,) for the feature form; ``None`` stands for ones.
        bias: as ``weight``; ``None`` stands for zeros.
        window: the summation field A: an int k, centred, covering positions p-(k-1)//2 .. p+k//2, a `Span` of any
            others, as for causal windows, a tuple or list with one entry per spatial dimension, ``"all"`` (also as an
            entry), or ``None``: no mean is subtracted.
        norm_window: the suppression field B, likewise; ``"same"``: as ``window``; ``None``: no division.
        sigma: a float, or a tensor of shape () or (groups,). Only its size enters.
        groups: number of equal groups the channels form.
        edges: ``"valid"`` divides an average by the positions inside the image, ``"zero"`` by the full window.
        over_batch: also average the statistics over N (the batch-norm family).
        p: the exponent of the deviation, at least 1: ``s = (abs(sigma)^p + B[mean (c_p abs(v))^p])^(1/p)``, where c_p
            makes s without sigma the standard deviation of a normal v: 1 for p = 2, sqrt(pi/2) for p = 1. For
            ``math.inf`` s is abs(sigma) plus the largest abs(v) of the field, times c_inf, which is taken to be 1; of
            equal ones the first has the gradient. Float32 holds powers from 1e-38 to 1e38. Where v is 0, abs(v) counts
            as flat. Kernels compute 1 and 2.
        subtract_mean: without, x stands in the numerator in place of v; s is v's all the same.
        residual: added before the activation: a tensor of x's shape, dtype and device. Under torch.autocast one of x
            and residual may be of a half type and the other of float32 or of the other half type: as torch adds them,
            both are taken in float32, y's dtype then. With parameters of a half type, and in float64, they may not.
        activation: ``"relu"``: y is never below zero, and where it would be its gradient is zero; costs no pass.
            ``"silu"``, y sigmoid(y), and ``"gelu"`` and ``"gelu_tanh"``, torch's two forms of it; ``"tlu"``,
            max(y, threshold).
        threshold: of "tlu", as ``weight``; where y is no larger, the gradient is the threshold's.
        on_statistics: of fields that are whole and both there, with p = 2: ``mean, variance = on_statistics(mean,
            variance)`` stands between the statistics and their use, on tensors of one number a row, of shape
            (N, groups, 1, ...) or over the batch (1, groups, 1, ...), in the dtype of the computation; the variance is
            the biased one, without sigma. It runs under autograd, once a call, and may be anything of torch's: a merge
            of processes' statistics, or one with a prior.
        return_l1: also return the mean of abs(v), the paper's sparse regulariser before its coefficient.
        backend: ``None`` (the best for x), ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Returns:
        y with x's shape, dtype and memory format, or ``(y, l1)`` with l1 a scalar in the dtype of the computation.
        sigma = 0 over a constant region is 0/0: NaN.

    Raises:
        TypeError, ValueError: on a bad argument; the message names it, what it got and what was expected.
        RuntimeError: where the named backend cannot serve the call; the message says why.
    """
    if on_statistics is None and exact(window, norm_window) and not is_dynamo_compiling():
        try:
            call = _prepared(window, norm_window, groups, edges, over_batch, activation, p, subtract_mean, backend)
        except (TypeError, ValueError):  # a list, which has no hash, or what is refused below
            pass
        else:
            found = call(x, weight, bias, sigma, return_l1, False, residual, threshold)
            if found is not NotImplemented:
                return found[:2] if return_l1 else found
    tensors = x, weight, bias, sigma, residual, threshold
    if has_torch_function(tensors):
        return handle_torch_function(
            divisive_norm,
            tensors,
            x,
            weight,
            bias,
            window=window,
            norm_window=norm_window,
            sigma=sigma,
            groups=groups,
            edges=edges,
            over_batch=over_batch,
            p=p,
            subtract_mean=subtract_mean,
            residual=residual,
            activation=activation,
            threshold=threshold,
            on_statistics=on_statistics,
            return_l1=return_l1,
            backend=backend,
        )
    norm = norm_of(window, norm_window, groups, edges, over_batch, activation, p, subtract_mean)
    if on_statistics is not None:
        y, l1 = seam.normalize(norm, x, weight, bias, sigma, residual, threshold, on_statistics, return_l1, backend)
        return (y, l1) if return_l1 else y
    y, l1, _ = normalize(norm, x, weight, bias, sigma, return_l1, backend, residual=residual, threshold=threshold)
    return (y, l1) if return_l1 else y


def normalize(
    norm: Norm,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sigma: Tensor | float,
    with_l1: bool,
    backend: str | None,
    with_statistics: bool = False,
    call: Callable[..., Any] | None = None,
    residual: Tensor | None = None,
    threshold: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
    """`divisive_norm` by a `Norm`: ``(y, l1, statistics)``, the latter two where asked for.

    ``statistics``, of whole fields, is mean and biased variance, each one number a row, of shape (N, groups, 1, ...)
    or over the batch (1, groups, 1, ...). They have no gradient. ``call``: the prepared one, where the caller holds it.
    """
    check_name(backend)
    if not is_dynamo_compiling():
        call = prepared(norm, backend) if call is None else call
        found = call(x, weight, bias, sigma, with_l1, with_statistics, residual, threshold)
        if found is not NotImplemented:
            y, l1, maps = found if with_l1 or with_statistics else (found, None, None)
            return y, l1, (maps[0], maps[-1]) if with_statistics else None
    g, x, residual = checked(norm, x, weight, bias, sigma, residual, threshold)
    if not isinstance(sigma, Tensor):
        sigma = float(sigma)
    check_flag("return_l1", with_l1)

    kernels = unless_transformed(select(backend, g, x), backend)
    without_kernels = kernels is None or recorded()
    if not without_kernels and direct(x, weight, bias, sigma, residual, threshold):
        if torch.is_grad_enabled():
            y, l1, maps = _apply(x, weight, bias, sigma, residual, threshold, g, kernels, with_l1, with_statistics)
        else:
            y, maps, l1 = kernels.forward(g, x, weight, bias, sigma, with_l1, with_statistics, residual, threshold)
    elif sharding.distributed(x):

        def on_own(
            x: Tensor, residual: Tensor | None, weight: Any, bias: Any, sigma: Any, threshold: Tensor | None
        ) -> Any:
            behind = {"residual": residual, "threshold": threshold}
            y, l1, found = normalize(norm, x, weight, bias, sigma, with_l1, backend, with_statistics, **behind)
            return y, l1 if with_l1 else None, found

        parameters = {"weight": weight, "bias": bias, "sigma": sigma, "threshold": threshold}
        return sharding.on_shards(on_own, x, residual, parameters, norm.over_batch)
    elif without_kernels:
        behind = {"residual": residual, "threshold": threshold}
        y, l1 = by_reference(g, x, with_l1, weight=weight, bias=bias, sigma=sigma, **behind)
        return y, l1, statistics(g, x) if with_statistics else None
    else:
        if not torch.compiler.is_compiling():
            check_alive(x=x, weight=weight, bias=bias, sigma=sigma, residual=residual, threshold=threshold)
        flops.register()
        y, maps, l1 = torch.ops.divnorm_kernels.forward(
            x,
            weight,
            bias,
            sigma if isinstance(sigma, Tensor) else None,
            0.0 if isinstance(sigma, Tensor) else sigma,
            norm.text,
            with_l1,
            with_statistics,
            backend,
            residual,
            threshold,
        )
    return y, l1, (maps[0], maps[-1]) if with_statistics else None


@lru_cache(maxsize=256, typed=True)
def _prepared(
    window: Window,
    norm_window: Window,
    groups: int,
    edges: str,
    over_batch: bool,
    activation: str | None,
    p: float,
    subtract_mean: bool,
    backend: str | None,
) -> Callable[..., Any]:
    check_name(backend)
    return prepared(Norm(window, norm_window, groups, edges, over_batch, activation, p, subtract_mean), backend)
