"""Checks of single arguments; every message names the argument, what it got and what was expected."""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor, nn

from .fields import Geometry
from .sharding import distributed

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def compute_dtype(t: Tensor) -> torch.dtype:
    """The dtype that sums and statistics of ``t`` are computed in."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def sizes_of(t: Tensor) -> tuple[int, ...]:
    """The shape of ``t``; while torch.jit traces, in numbers that leave no trace."""
    state = torch._C._get_tracing_state()
    if state is None:
        return t.shape
    torch._C._set_tracing_state(None)
    try:
        return tuple(t.shape)
    finally:
        torch._C._set_tracing_state(state)


def check_activation(x: object) -> None:
    """Raises unless ``x`` is a strided tensor of a supported dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: got {type(x).__name__}, expected a Tensor")
    _check_strided("x", x)
    if x.dtype not in DTYPES:
        raise TypeError(f"x: got dtype {x.dtype}, expected one of {', '.join(map(str, DTYPES))}")


def check_affine(name: str, t: object, g: Geometry, x: Tensor) -> None:
    """Raises unless ``t`` is ``None`` or one number per channel (feature) of ``x``."""
    if t is None:
        return
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: got {type(t).__name__}, expected a Tensor or None")
    if t.dim() != 1 or t.shape[0] != g.affine_size:
        what = "feature" if g.features else "channel"
        raise ValueError(f"{name}: got shape {tuple(t.shape)}, expected ({g.affine_size},), one per {what} of x")
    _check_parameter(name, t, x)


def check_threshold(threshold: object, g: Geometry, x: Tensor) -> None:
    """Raises unless ``threshold`` is one number per channel (feature) of ``x`` where "tlu" wants it, else ``None``."""
    wanted = g.norm.activation == "tlu"
    if not wanted and threshold is not None:
        got = f"{type(threshold).__name__} with activation {g.norm.activation!r}"
        raise ValueError(f'threshold: got {got}, expected None, for "tlu" alone has a threshold')
    if wanted and threshold is None:
        raise ValueError(f'threshold: got None, expected a Tensor of shape ({g.affine_size},) for activation "tlu"')
    if threshold is not None and not isinstance(threshold, Tensor):
        raise TypeError(f"threshold: got {type(threshold).__name__}, expected a Tensor of shape ({g.affine_size},)")
    check_affine("threshold", threshold, g, x)


def check_residual(residual: object, x: Tensor) -> None:
    """Raises unless ``residual`` is ``None`` or a tensor like ``x``: of its shape, dtype and device, and strided."""
    if residual is None:
        return
    if not isinstance(residual, Tensor):
        raise TypeError(f"residual: got {type(residual).__name__}, expected a Tensor or None")
    _check_strided("residual", residual)
    if sizes_of(residual) != sizes_of(x):
        raise ValueError(f"residual: got shape {tuple(residual.shape)}, expected that of x, {tuple(x.shape)}")
    if residual.dtype != x.dtype:
        remedy = "residual.to(x.dtype) makes it so"
        raise TypeError(f"residual: got dtype {residual.dtype}, expected that of x, {x.dtype} ({remedy})")
    if residual.device != x.device:
        raise ValueError(f"residual: got device {residual.device}, expected that of x, {x.device}")
    if distributed(residual) != distributed(x):
        raise ValueError(f"residual: got a {type(residual).__name__} beside an x that is a {type(x).__name__}")


def check_sigma(sigma: object, g: Geometry, x: Tensor) -> None:
    """Raises unless ``sigma`` is a number, or a tensor of shape () or (groups,)."""
    if not isinstance(sigma, Tensor):
        return check_number("sigma", sigma, "a float or a Tensor")
    if sigma.shape not in ((), (g.groups,)):
        raise ValueError(f"sigma: got shape {tuple(sigma.shape)}, expected () or ({g.groups},), one per group")
    _check_parameter("sigma", sigma, x)


def check_scalar(name: str, value: object, x: Tensor) -> None:
    """Raises unless ``value`` is a number, or a tensor of one beside ``x``."""
    if not isinstance(value, Tensor):
        check_number(name, value, "a float or a Tensor")
        if abs(value) == math.inf:
            raise ValueError(f"{name}: got {value}, expected a finite number or a Tensor")
        return
    if value.shape not in ((), (1,)):
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected () or (1,)")
    _check_parameter(name, value, x)


def check_parameter(name: str, value: object, shape: tuple[int, ...], what: str, x: Tensor) -> None:
    """Raises unless ``value`` is a tensor of ``shape``, which a message says is ``what``, beside ``x``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a Tensor of shape {shape}, {what}")
    if sizes_of(value) != shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {shape}, {what}")
    _check_parameter(name, value, x)


def check_like(x: Tensor, **tensors: Tensor | None) -> None:
    """Raises unless the tensors that are there have the shape, dtype and device of ``x``."""
    for name, t in tensors.items():
        if t is None:
            continue
        if t.shape != x.shape:
            raise ValueError(f"{name}: got shape {tuple(t.shape)}, expected that of x, {tuple(x.shape)}")
        if t.dtype != x.dtype:
            raise TypeError(f"{name}: got dtype {t.dtype}, expected that of x, {x.dtype}")
        if t.device != x.device:
            raise ValueError(f"{name}: got device {t.device}, expected that of x, {x.device}")


def check_per_channel(x: Tensor, **tensors: Tensor | None) -> None:
    """Raises unless the tensors that are there have one number per channel of ``x``."""
    for name, t in tensors.items():
        if t is not None and tuple(t.shape) != (x.shape[1],):
            raise ValueError(f"{name}: got shape {tuple(t.shape)}, expected ({x.shape[1]},), one per channel of x")


def check_running(name: str, t: Tensor | None, channels: int, x: Tensor) -> None:
    """Raises unless ``t`` is ``None`` or a running statistic of as many ``channels``, beside ``x``."""
    if t is None:
        return
    _check_strided(name, t)
    if t.requires_grad:
        raise ValueError(f"{name}: got a tensor that requires grad, expected one that does not")
    if t.shape != (channels,):
        raise ValueError(f"{name}: got shape {tuple(t.shape)}, expected ({channels},), one per channel of x")
    if not t.is_floating_point():
        raise TypeError(f"{name}: got dtype {t.dtype}, expected a floating one")
    if t.device != x.device:
        raise ValueError(f"{name}: got device {t.device}, expected that of x, {x.device}")


def check_number(name: str, value: object, expected: str) -> None:
    """Raises unless ``value`` is a float, not NaN, or an int that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, (float, int)):
        raise TypeError(f"{name}: got {value!r} of type {type(value).__name__}, expected {expected}")
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise ValueError(f"{name}: got an int of {value.bit_length()} bits, expected {expected}")
    if not value <= math.inf:  # a compiler that takes value for a variable knows no isnan
        raise ValueError(f"{name}: got nan, expected {expected}")


def check_at_least_zero(name: str, value: object, kind: str) -> None:
    """Raises unless ``value``, which a message calls a ``kind``, is a number of at least 0."""
    check_number(name, value, f"{kind} of at least 0")
    if value < 0:
        raise ValueError(f"{name}: got {value}, expected {kind} of at least 0")


def check_flag(name: str, value: object) -> None:
    """Raises unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r} of type {type(value).__name__}, expected a bool")


def check_module(name: str, value: object) -> None:
    """Raises unless ``value`` is a module."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.nn.Module")


def check_size(name: str, value: object) -> None:
    """Raises unless ``value`` is a positive int."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r} of type {type(value).__name__}, expected a positive int")
    if value < 1:
        raise ValueError(f"{name}: got {value}, expected a positive int")


def _check_strided(name: str, t: Tensor) -> None:
    if t.is_nested:
        raise TypeError(f"{name}: got a nested tensor, expected a strided one (of a jagged one, its values())")
    if t.layout is not torch.strided:
        raise TypeError(f"{name}: got layout {t.layout}, expected torch.strided (to_dense() makes it so)")


def _check_parameter(name: str, t: Tensor, x: Tensor) -> None:
    _check_strided(name, t)
    if t.device != x.device:
        raise ValueError(f"{name}: got device {t.device}, expected that of x, {x.device}")
    if t.dtype != x.dtype and (t.dtype != torch.float32 or x.dtype == torch.float64):
        allowed = f"{x.dtype}" if x.dtype in (torch.float32, torch.float64) else f"{x.dtype} or torch.float32"
        raise TypeError(f"{name}: got dtype {t.dtype}, expected {allowed} for x of {x.dtype}")
