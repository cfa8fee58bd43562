"""The public call: checks its arguments, picks a backend, and runs it under autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .. import flops, sharding
from ..addresses import check_alive, check_held
from ..backends import check_name
from ..norm import Window
from ..states import recorded, transformed, unless_transformed
from . import ops  # noqa: F401  registers the operators
from .backends import select
from .form import check_tensors, form_of
from .reference import evaluate


def gdn(
    x: Tensor,
    beta: Tensor,
    gamma: Tensor,
    *,
    inverse: bool = False,
    simplified: bool = False,
    window: Window = None,
    backend: str | None = None,
) -> Tensor:
    """Generalized divisive normalization: ``y_i = x_i / sqrt(beta_i + sum_j gamma_ij x_j^2)`` over the channels j.

    Differentiable in x, beta and gamma, twice. The sums over channels are the platform's matrix product, in float32 or
    float64, of parts of x that a cache holds; under Triton `tl.dot`, which adds in float32 and rounds what it
    multiplies to tf32 where ``torch.backends.cuda.matmul.fp32_precision`` is "tf32". Both follow
    `torch.set_float32_matmul_precision`, and unless it is "highest" are less exact.
    On the CPU, x and for float32 and float64 y are kept for backward: where y was changed in place before it, torch
    raises. The same input gives the same bits on every run, on the CPU with as many threads of torch's: the products
    are torch's, which may add in another order with more.
    Source: Balle, Laparra & Simoncelli, ICLR 2016 (arXiv 1511.06281); simplified: Johnston et al., 2019.

    Args:
        x: (N, C, ...) with up to three spatial dimensions. float64, float32, bfloat16 or float16; float64 computes in
            float64, the others in float32. Contiguous and channels_last tensors are read as they lie; any other layout
            costs one copy.
        beta: (C,), of x's dtype or float32.
        gamma: (C, C), likewise. Where the sum is negative, y is NaN; `divnorm_kernels.GDN` keeps both above zero.
        inverse: multiply instead: ``y_i = x_i sqrt(...)``.
        simplified: abs(x) instead of x^2, and no root.
        window: averages x^2 (or abs(x)) over the positions around each before channels are summed, as ``norm_window``
            of `divnorm_kernels.divisive_norm` does; ``None``: a position sees itself alone. The reference and the CPU
            have it.
        backend: ``None`` (the best for x), ``"reference"``, ``"cpu"`` or ``"triton"``.

    Returns:
        y with x's shape, dtype and memory format.

    Raises:
        TypeError, ValueError: on a bad argument; the message names it, what it got and what was expected.
        RuntimeError: where the named backend cannot serve the call; the message says why.
    """
    tensors = x, beta, gamma
    options = {"inverse": inverse, "simplified": simplified, "window": window, "backend": backend}
    if has_torch_function(tensors):
        return handle_torch_function(gdn, tensors, *tensors, **options)
    check_name(backend)
    check_tensors(*tensors)
    form = form_of(x, inverse, simplified, window)
    if sharding.distributed(x):

        def on_own(x: Tensor, _: None, beta: Any, gamma: Any) -> Any:
            return gdn(x, beta, gamma, **options), None, None

        return sharding.on_shards(on_own, x, None, {"beta": beta, "gamma": gamma})[0]
    eager = not (torch.compiler.is_compiling() or recorded() or transformed())
    given = {"x": x, "beta": beta, "gamma": gamma}
    if eager:
        check_held(**given)
    kernels = unless_transformed(select(backend, form, x), backend)
    if kernels is None or recorded():
        return evaluate(form, *tensors)
    if eager:
        check_alive(**given)
    flops.register()
    return torch.ops.divnorm_kernels.gdn_forward(x, beta, gamma, *form, backend)
