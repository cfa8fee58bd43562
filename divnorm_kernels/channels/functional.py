"""The public call for windows over channels: checks its arguments, picks a backend, and runs it under autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .. import flops, sharding
from ..addresses import check_alive, check_held
from ..backends import check_name
from ..checks import check_activation, check_flag, compute_dtype
from ..norm import Span
from ..states import recorded, transformed, unless_transformed
from . import ops  # noqa: F401  registers the operators
from .backends import select
from .pool import Exponential, pool_of
from .reference import evaluate


def channel_norm(
    x: Tensor,
    window: int | Span | Exponential,
    *,
    alpha: Tensor | float = 1e-4,
    beta: Tensor | float = 0.75,
    k: Tensor | float = 1.0,
    squared: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Divides by a pool of neighbouring channels: ``y = x * D^-beta``, or ``x^2 * D^-beta``, at each position.

    For a window of channels ``D = k + alpha / size * (the sum of x^2 over the window)``, which is cut at the first and
    the last channel; size always divides. For an `Exponential` ``D = k * (1 + alpha / scale * (the sum over all
    channels j of exp(-abs(c - j) / scale) x_j^2))`` at channel c. Differentiable in x and in what of alpha, beta, k and
    scale is a tensor, twice. Nothing but x is kept for backward.
    Source: Krizhevsky et al., NIPS 2012, section 3.3, with `torch.nn.LocalResponseNorm`'s divisor; the exponential:
    Miller et al., ICLR 2022.

    Args:
        x: (N, C, ...) with up to three spatial dimensions. float64, float32, bfloat16 or float16; float64 computes in
            float64, the others in float32. Contiguous and channels_last tensors are read as they lie; any other layout
            costs one copy.
        window: a number of channels, of which an even one reaches one further down, as torch's; a `Span` of any others;
            or an `Exponential`.
        alpha: at least 0; a float, or a tensor of one number, of x's dtype or float32, which learns.
        beta: likewise, of any sign. Kernels that are told 0.5, 0.75 or 1 as a float take roots, not powers.
        k: likewise, at least 0. Where D is 0, y and gradients may be NaN or infinite.
        squared: whether x^2 stands in the numerator.
        backend: ``None`` (the best for x), ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Returns:
        y with x's shape, dtype and memory format.

    Raises:
        TypeError, ValueError: on a bad argument; the message names it, what it got and what was expected.
        RuntimeError: where the named backend cannot serve the call; the message says why.
    """
    scale = window.scale if isinstance(window, Exponential) else None
    tensors = x, alpha, beta, k, scale
    if has_torch_function(tensors):
        options = {"alpha": alpha, "beta": beta, "k": k, "squared": squared, "backend": backend}
        return handle_torch_function(channel_norm, tensors, x, window, **options)
    check_name(backend)
    check_activation(x)
    if not 2 <= x.dim() <= 5:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (N, C) and at most three spatial dimensions")
    check_flag("squared", squared)
    if sharding.distributed(x):
        return _on_shards(x, window, alpha, beta, k, squared, backend)
    eager = not (torch.compiler.is_compiling() or recorded() or transformed())
    given = {"x": x, "alpha": alpha, "beta": beta, "k": k, "scale": scale}
    if eager:
        check_held(**given)
    pool, learned = pool_of(x, window, alpha, beta, k, squared, compute_dtype(x))
    kernels = unless_transformed(select(backend, x), backend)
    if kernels is None or recorded():
        return evaluate(pool, x, learned)
    if eager:
        check_alive(**given)
    flops.register()
    box = [] if pool.box is None else list(pool.box)
    return torch.ops.divnorm_kernels.channel_forward(x, learned, box, squared, list(pool.scalars), backend)


def _on_shards(
    x: Tensor,
    window: int | Span | Exponential,
    alpha: Tensor | float,
    beta: Tensor | float,
    k: Tensor | float,
    squared: bool,
    backend: str | None,
) -> Tensor:
    """Of a DTensor, whose processes each compute on what they hold."""
    scale = window.scale if isinstance(window, Exponential) else None

    def on_own(x: Tensor, _: None, alpha: Any, beta: Any, k: Any, scale: Any) -> Any:
        field = window if scale is None else Exponential(scale)
        y = channel_norm(x, field, alpha=alpha, beta=beta, k=k, squared=squared, backend=backend)
        return y, None, None

    parameters = {"alpha": alpha, "beta": beta, "k": k, "scale": scale}
    return sharding.on_shards(on_own, x, None, parameters)[0]
