"""The calls that tables are tuned on, and the kernels' two functions run on them, without autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from divnorm_kernels.backends import KERNELS
from divnorm_kernels.fields import Geometry, geometry
from divnorm_kernels.norm import Norm
from divnorm_kernels.reference import divisive_norm as reference

from .. import gpu
from ..cases import CASES, FORMATS, Setting
from ..subjects import activation, groups_for

WINDOW = 5
WINDOWED = (
    "64x256x56x56",
    "64x512x28x28",
    "64x1024x14x14",
    "64x2048x7x7",
    "128x16x32x32",
    "128x64x33x33",
    "2x64x224x224",
)
WHOLE = ("64x256x56x56", "64x512x28x28", "64x2048x7x7")
TOKENS = "4096x768"
TOKENS_WINDOW = 60
SIGMA = 1.0
NEEDS = (True, True, True, False, False, False)
"""Gradients for x, weight and bias."""
DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class Call:
    """An activation, and what it is normalized over: ``fields`` as the table of preferences names it."""

    setting: Setting
    fields: str
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        """For tables."""
        s = self.setting
        return " ".join([s.case.name, s.dtype, s.format, *(f"{key}={value}" for key, value in self.options)])

    def geometry(self) -> Geometry:
        """A geometry that no plan has been made for yet."""
        return replace(geometry(Norm(**dict(self.options)), self.setting.case.shape), cache={})


def calls(dtype: str, device: str) -> list[Call]:
    """Windows on images and features; batch, group and layer normalization."""
    wanted: list[tuple[str, str, dict[str, Any]]] = [(name, "windows", {"window": WINDOW}) for name in WINDOWED]
    for name in WHOLE:
        channels = CASES[name].shape[1]
        wanted.append((name, "whole", {"window": "all", "groups": channels, "over_batch": True}))
        wanted.append((name, "whole", {"window": "all", "groups": groups_for(channels)}))
    wanted += [(TOKENS, "windows", {"window": TOKENS_WINDOW}), (TOKENS, "whole", {"window": "all"})]
    return [
        Call(Setting(CASES[name], dtype, form, 0, device), fields, tuple(options.items()))
        for name, fields, options in wanted
        for form in (FORMATS if len(CASES[name].shape) > 2 else FORMATS[:1])
    ]


class Prepared:
    """A call's tensors on its device: copies of x and dy that pass the cache, parameters, and the right results."""

    def __init__(self, call: Call):
        self.call = call
        numbers = torch.Generator(call.setting.device).manual_seed(0)
        x, dy = (
            activation(call.setting, torch.randn(call.setting.case.shape, generator=numbers, device=numbers.device))
            for _ in range(2)
        )
        self.xs, self.dys = gpu.copies(x), gpu.copies(dy)
        self.weight, self.bias = (make(x.shape[1], device=x.device) for make in (torch.ones, torch.zeros))

    @cached_property
    def expected(self) -> dict[str, Tensor]:
        """Y and dx of the reference in float64."""
        wide = self.xs[0].double().requires_grad_()
        y = reference(wide, self.weight, self.bias, sigma=SIGMA, **dict(self.call.options))
        (dx,) = torch.autograd.grad(y, wide, self.dys[0].double())
        return {"forward": y.detach(), "backward": dx}

    def runner(self, backend: str, direction: str) -> Callable[[int], Tensor]:
        """A function of the step's number that runs one direction and gives its result; planned by this call."""
        kernels, g = KERNELS[backend], self.call.geometry()
        _, maps, _ = kernels.forward(g, self.xs[0], self.weight, self.bias, SIGMA, False)

        def forward(i: int) -> Tensor:
            return kernels.forward(g, self.xs[i % len(self.xs)], self.weight, self.bias, SIGMA, False)[0]

        def backward(i: int) -> Tensor:
            x, dy = self.xs[i % len(self.xs)], self.dys[i % len(self.dys)]
            return kernels.backward(g, dy, None, x, maps, self.weight, self.bias, SIGMA, NEEDS)[0]

        run = forward if direction == "forward" else backward
        run(0)
        return run

    def wrong(self, got: Tensor, direction: str) -> bool:
        """Whether a result is off by more than the arithmetic explains.

        A rounding of the output, and of the sums the root of their length: they are taken block by block.
        """
        want, g = self.expected[direction], self.call.geometry()
        length = g.numel // (g.groups if g.over_batch else g.groups * g.batch)
        relative = torch.finfo(got.dtype).eps + length**0.5 * torch.finfo(torch.float32).eps
        return not (got - want).abs().max() <= relative * max(1.0, want.abs().max().item())
