"""What a norm costs in a network: a training step of a small convolutional one, eager and under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

import divnorm_kernels

from . import gpu, timing
from .cases import Case, Setting, random_input
from .subjects import Subject, activation
from .timing import interleaved, step

TORCH = "torch BatchNorm2d"
NORMS: dict[str, Callable[[int], nn.Module]] = {
    TORCH: nn.BatchNorm2d,
    "BatchNorm2d": divnorm_kernels.BatchNorm2d,
    "DivisiveNorm2d": lambda channels: divnorm_kernels.DivisiveNorm2d(channels, window=5),
}
EAGER, COMPILED = "eager", "compiled"
SHAPE = (32, 3, 32, 32)
CHANNELS = (32, 64, 128)
CLASSES = 10


def network(norm: str) -> nn.Sequential:
    """Three convolutions, each with the norm behind it, and a linear layer; smooth, for gradients to be compared."""
    layers: list[nn.Module] = []
    before = SHAPE[1]
    for channels in CHANNELS:
        stride = 1 if before == SHAPE[1] else 2
        layers += [nn.Conv2d(before, channels, 3, stride, padding=1, bias=False), NORMS[norm](channels), nn.SiLU()]
        before = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, CLASSES))


def settings(dtypes: list[str], formats: list[str], device: str) -> list[Setting]:
    """Every dtype in every memory format."""
    case = Case("x".join(map(str, SHAPE)), SHAPE, "pictures of CIFAR's size", random_input)
    return [Setting(case, dtype, form, 0, device) for dtype in dtypes for form in formats]


def measure(setting: Setting, norms: list[str], modes: list[str], seconds: float) -> list[dict[str, Any]]:
    """Checks every network against itself in float64 with the reference's norm, then times all in turn.

    A row has the norm, the mode, the setting, the error in units of what rounding may make, and the `Times` in
    milliseconds of a step, ``None`` where the result was wrong.
    """
    x = activation(setting, setting.case.values()).detach().requires_grad_()
    dy = torch.randn(SHAPE[0], CLASSES, generator=torch.Generator().manual_seed(1)).to(x.device, x.dtype)
    clock = timing if setting.device == "cpu" else gpu
    torch.compiler.reset()
    rounds, errors = {}, {}
    for norm in norms:
        torch.manual_seed(0)
        model = network(norm).to(x.device, x.dtype)
        if setting.format == "channels_last":
            model = model.to(memory_format=torch.channels_last)
        exact = _exact(model)
        expected = step(_subject(norm, exact, exact), x.detach().double().requires_grad_(), dy.double())[2]
        for mode in modes:
            subject = _subject(f"{norm}, {mode}", torch.compile(model) if mode == COMPILED else model, model)
            errors[norm, mode] = _error(step(subject, x, dy)[2], expected, x.dtype)
            if errors[norm, mode] <= 1:
                rounds[norm, mode] = clock.round_of(subject, x, dy)
    times = interleaved(rounds, seconds) if rounds else {}
    return [
        {
            "norm": norm,
            "mode": mode,
            "dtype": setting.dtype,
            "format": setting.format,
            "error": error,
            "times": asdict(times[norm, mode]) if (norm, mode) in times else None,
        }
        for (norm, mode), error in errors.items()
    ]


def _subject(name: str, function: Callable[[Tensor], Tensor], model: nn.Module) -> Subject:
    return Subject(name, type(function).__name__, function, list(model.parameters()))


def _exact(model: nn.Module) -> nn.Module:
    """The same network in float64, its norms through the reference."""
    exact = deepcopy(model).double()
    for module in exact.modules():
        if isinstance(module, divnorm_kernels.NormalizationLayer):
            module.backend = "reference"
    return exact


def _error(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype) -> float:
    """The largest error of y, dx or a parameter's gradient, relative, as root mean squares.

    In units of a rounding per layer, forward and backward, and of float32's in the longest sum, a weight's gradient.
    """
    layers, terms = 3 * len(CHANNELS) + 2, SHAPE[0] * SHAPE[2] * SHAPE[3]
    rounding = 2 * layers * torch.finfo(dtype).eps + terms**0.5 * torch.finfo(torch.float32).eps
    return max(float((f - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True)) / rounding


def table(rows: list[dict[str, Any]]) -> Table:
    """A line per norm and mode, from rows as `write` keeps them."""
    title = f"a step of a network of {len(CHANNELS)} convolutions on {'x'.join(map(str, SHAPE))}"
    out = Table("norm", "mode", "dtype", "format", title=title)
    for name in ("forward ms", "backward ms", "both ms", f"{TORCH} / this"):
        out.add_column(name, justify="right", no_wrap=True)
    peers = {_place(row): row["times"] for row in rows if row["norm"] == TORCH}
    for row in rows:
        times, peer = row["times"], peers.get(_place(row))
        parts = ("forward", "backward", "both")
        cells = ["wrong", "", ""] if times is None else [f"{times[part]:.2f}" for part in parts]
        ratio = f"{peer['both'] / times['both']:.2f}x" if peer and times else "-"
        out.add_row(row["norm"], row["mode"], row["dtype"], row["format"], *cells, ratio)
    return out


def _place(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["mode"], row["dtype"], row["format"]
