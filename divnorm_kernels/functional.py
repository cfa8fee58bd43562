"""The public call: checks its arguments, picks a backend, and runs it under autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .autograd import DivisiveNormFunction
from .backends import select
from .fields import Geometry, Window, geometry
from .ops import encode
from .reference import evaluate

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN = (Tensor, torch.nn.Parameter, type(None), float, int)


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
    return_l1: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Divisive normalization: ``y = weight * v / sqrt(sigma^2 + B[mean v^2]) + bias`` with ``v = x - A[mean x]``.

    The means run over the channels of a group, A and B average over the summation and the suppression field around
    each position; v in B is each neighbour's own. Differentiable in x, weight, bias and sigma, twice.
    Source: Ren et al., "Normalizing the Normalizers", ICLR 2017 (arXiv 1611.04520), equations 1 to 4.

    Args:
        x: (N, C, *S) with one to three spatial dimensions, or (N, F), which is computed as (N, 1, F). float64, float32,
            bfloat16 or float16; float64 computes in float64, the others in float32. Contiguous and channels_last
            tensors are read as they lie; any other layout costs one copy.
        weight: (C,), or (F,) for the feature form; ``None`` stands for ones.
        bias: as ``weight``; ``None`` stands for zeros.
        window: the summation field A: an int k covering positions p-(k-1)//2 .. p+k//2, a tuple with one entry per
            spatial dimension, ``"all"`` (also as an entry), or ``None``: no mean is subtracted.
        norm_window: the suppression field B, likewise; ``"same"``: as ``window``; ``None``: no division.
        sigma: a float, or a tensor of shape () or (groups,). Only its square enters.
        groups: number of equal groups the channels form.
        edges: ``"valid"`` divides an average by the positions inside the image, ``"zero"`` by the full window.
        over_batch: also average the statistics over N (the batch-norm family).
        return_l1: also return the mean of abs(v), the paper's sparse regulariser before its coefficient.
        backend: ``None`` (the best for x), ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Returns:
        y with x's shape, dtype and memory format, or ``(y, l1)`` with l1 a scalar in the dtype of the computation.
        sigma = 0 over a constant region is 0/0: NaN.

    Raises:
        TypeError, ValueError: on a bad argument; the message names it, what it got and what was expected.
        RuntimeError: where the named backend cannot serve the call; the message says why.
    """
    if has_torch_function((x, weight, bias, sigma)):
        return handle_torch_function(
            divisive_norm,
            (x, weight, bias, sigma),
            x,
            weight,
            bias,
            window=window,
            norm_window=norm_window,
            sigma=sigma,
            groups=groups,
            edges=edges,
            over_batch=over_batch,
            return_l1=return_l1,
            backend=backend,
        )
    if not isinstance(x, Tensor):
        raise TypeError(f"x: got {type(x).__name__}, expected a Tensor")
    if x.dtype not in _DTYPES:
        raise TypeError(f"x: got dtype {x.dtype}, expected one of {', '.join(map(str, _DTYPES))}")
    try:
        g = geometry(tuple(x.shape), window, norm_window, groups, edges, over_batch)
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
        raise _unhashable(window=window, norm_window=norm_window, groups=groups, edges=edges) from None
    _check_affine("weight", weight, g, x)
    _check_affine("bias", bias, g, x)
    _check_sigma(sigma, g, x)
    if not isinstance(return_l1, bool):
        raise TypeError(f"return_l1: got {return_l1!r} of type {type(return_l1).__name__}, expected a bool")

    kernels = select(backend, g, x)
    if kernels is not None and _in_functorch():
        if backend is not None:
            raise RuntimeError(
                f'backend: got {backend!r}, which torch.func cannot transform; expected None or "reference"'
            )
        kernels = None
    if kernels is None or torch.compiler.is_exporting():
        y, l1 = evaluate(g, x, weight, bias, sigma)
    elif _plain_eager(x, weight, bias, sigma):
        y, l1 = DivisiveNormFunction.apply(x, weight, bias, sigma, g, kernels, return_l1)
    else:
        dims = len(g.spatial)
        y, _, _, l1 = torch.ops.divnorm_kernels.forward(
            x,
            weight,
            bias,
            sigma if isinstance(sigma, Tensor) else None,
            0.0 if isinstance(sigma, Tensor) else float(sigma),
            encode(window, dims),
            encode(window if norm_window == "same" else norm_window, dims),
            groups,
            edges,
            over_batch,
            return_l1,
            backend,
        )
    return (y, l1) if return_l1 else y


def _in_functorch() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def _plain_eager(*arguments: object) -> bool:
    """Whether the kernels may be called on the tensors' addresses at once, past the dispatcher."""
    for argument in arguments:
        if type(argument) not in _PLAIN:
            return False
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0


def _check_affine(name: str, t: Tensor | None, g: Geometry, x: Tensor) -> None:
    if t is None:
        return
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: got {type(t).__name__}, expected a Tensor or None")
    if t.dim() != 1 or t.shape[0] != g.affine_size:
        what = "feature" if g.features else "channel"
        raise ValueError(f"{name}: got shape {tuple(t.shape)}, expected ({g.affine_size},), one per {what} of x")
    _check_parameter(name, t, x)


def _check_parameter(name: str, t: Tensor, x: Tensor) -> None:
    if t.device != x.device:
        raise ValueError(f"{name}: got device {t.device}, expected that of x, {x.device}")
    if t.dtype != x.dtype and (t.dtype != torch.float32 or x.dtype == torch.float64):
        allowed = f"{x.dtype}" if x.dtype in (torch.float32, torch.float64) else f"{x.dtype} or torch.float32"
        raise TypeError(f"{name}: got dtype {t.dtype}, expected {allowed} for x of {x.dtype}")


def _check_sigma(sigma: Tensor | float, g: Geometry, x: Tensor) -> None:
    if isinstance(sigma, Tensor):
        if sigma.shape not in ((), (g.groups,)):
            raise ValueError(f"sigma: got shape {tuple(sigma.shape)}, expected () or ({g.groups},), one per group")
        _check_parameter("sigma", sigma, x)
    elif isinstance(sigma, bool) or not isinstance(sigma, (float, int)):
        raise TypeError(f"sigma: got {sigma!r} of type {type(sigma).__name__}, expected a float or a Tensor")


def _unhashable(**arguments: object) -> TypeError:
    for name, value in arguments.items():
        try:
            hash(value)
        except TypeError:
            return TypeError(
                f"{name}: got {value!r} of type {type(value).__name__}, expected a tuple for several entries"
            )
    raise AssertionError("every argument is hashable")
