"""The native CPU backend: hands addresses to the compiled module."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..checks import compute_dtype
from ..fields import Geometry
from ..layout import dense
from .native import DTYPES, backward_tensors, missing, module, packed, parameter, plan_for

if module is not None and "DIVNORM_INSTRUCTION_SET" in os.environ:
    module.use_instruction_set(os.environ["DIVNORM_INSTRUCTION_SET"])


def refusal(g: Geometry, x: Tensor) -> str | None:
    """Why this call cannot be served, or ``None``."""
    if module is None:
        return missing()
    if not x.is_cpu:
        return f"x is on {x.device}, this backend computes on the CPU"
    if x.dtype not in DTYPES:
        return f"x has dtype {x.dtype}"
    return None


def instruction_set() -> str | None:
    """The instruction set in use."""
    return module.instruction_set() if module is not None else None


def description() -> str:
    """What a benchmark names this backend's kernels."""
    return f"native, {instruction_set()}"


def instruction_sets() -> list[str]:
    """The instruction sets this processor runs, best first."""
    return module.instruction_sets() if module is not None else []


def use_instruction_set(name: str) -> None:
    """Computes with the named set from here on, in the whole process."""
    module.use_instruction_set(name)


def forward(
    g: Geometry,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sigma: Tensor | float,
    with_l1: bool,
    with_variance: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(y, maps, l1)``; maps, of ``g.kept_shape(with_variance)``, holds mean, rstd and the variance.

    ``with_variance`` is for geometries that are `whole` and divide; the variance is that of v, without sigma^2.
    """
    x = dense(x)
    compute = compute_dtype(x)
    y = torch.empty_like(x)
    maps = torch.empty(g.kept_shape(with_variance), dtype=compute, device=x.device)
    if g.numel == 0:
        return y, maps, torch.zeros((), dtype=compute, device=x.device) if with_l1 else None
    value, sigma = (0.0, sigma) if isinstance(sigma, Tensor) else (sigma, None)
    weight, bias, sigma = packed(weight), packed(bias), packed(sigma)
    l1 = plan_for(g, x).forward(
        x.data_ptr(),
        *parameter(weight),
        *parameter(bias),
        *parameter(sigma),
        0 if sigma is None else sigma.numel(),
        value,
        y.data_ptr(),
        maps.data_ptr(),
        with_l1,
        with_variance,
        torch.get_num_threads(),
    )
    return y, maps, torch.tensor(l1, dtype=compute, device=x.device) if with_l1 else None


def backward(
    g: Geometry,
    dy: Tensor | None,
    dl1: Tensor | None,
    x: Tensor,
    maps: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sigma: Tensor | float,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients for (x, weight, bias, sigma) from those of y and l1 (``None``: zero); ``None`` where not needed."""
    x, dy, dx, dweight, dbias, dsigma = backward_tensors(g, dy, x, weight, bias, sigma, needs)
    if g.numel == 0:
        return dx if needs[0] else None, dweight, dbias, dsigma
    weight, bias = packed(weight), packed(bias)
    sigma = packed(sigma) if isinstance(sigma, Tensor) else None
    plan_for(g, x).backward(
        x.data_ptr(),
        dy.data_ptr(),
        maps.data_ptr(),
        *parameter(weight),
        *parameter(bias),
        *parameter(sigma),
        0 if sigma is None else sigma.numel(),
        0.0 if dl1 is None else dl1.item(),
        dx.data_ptr(),
        parameter(dweight)[0],
        parameter(dbias)[0],
        parameter(dsigma)[0],
        torch.get_num_threads(),
    )
    return dx if needs[0] else None, dweight, dbias, dsigma
