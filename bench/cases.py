"""What is measured, as data: shapes, windows, and the suites that combine them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor

DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
FORMATS = ("contiguous", "channels_last")


def random_input(shape: tuple[int, ...]) -> Tensor:
    """Seeded normal numbers, float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Case:
    """An activation to normalize: its name, shape, and where its numbers come from."""

    name: str
    shape: tuple[int, ...]
    what: str
    load: Callable[[tuple[int, ...]], Tensor] = field(default=random_input, compare=False)

    def values(self) -> Tensor:
        """The activation, float32 and contiguous."""
        return self.load(self.shape)


def _case(what: str, *shape: int) -> Case:
    return Case("x".join(map(str, shape)), shape, what)


_RESNET_50 = (
    ("stage 2", (256, 56, 56)),
    ("stage 3", (512, 28, 28)),
    ("stage 4", (1024, 14, 14)),
    ("stage 5", (2048, 7, 7)),
)
CASES = {
    case.name: case
    for case in (
        _case("ResNet-50, stage 1", 32, 64, 56, 56),
        _case("ResNet-50, stage 3", 16, 256, 28, 28),
        _case("ResNet-50, stage 4", 16, 512, 14, 14),
        _case("ResNet-50, stage 5", 32, 512, 7, 7),
        _case("ResNet-50, stem", 64, 64, 112, 112),
        _case("CIFAR ResNet, stage 1", 8, 16, 32, 32),
        _case("CIFAR ResNet, stage 1, batch 128", 128, 16, 32, 32),
        _case("CIFAR ResNet, stage 2, batch 128", 128, 32, 16, 16),
        _case("CIFAR ResNet, stage 3, batch 128", 128, 64, 8, 8),
        _case("VGG, first block, batch 2", 2, 64, 224, 224),
        _case("VGG, first block, batch 1", 1, 64, 224, 224),
        _case("a picture with few channels", 4, 8, 512, 512),
        _case("super-resolution patches, batch 128", 128, 64, 33, 33),
        _case("an RNN's features", 64, 1024),
        _case("a transformer's features", 4096, 768),
        *(_case(f"ResNet-50, {what}, batch {n}", n, *shape) for n in (64, 256) for what, shape in _RESNET_50),
    )
}

_SHAPE = re.compile("[1-9][0-9]*(x[1-9][0-9]*){1,4}")


def case_named(name: str) -> Case:
    """The case of that name, or one of a shape that it spells, such as 8x64x56x56.

    Raises:
        ValueError: where it is neither.
    """
    if name not in CASES and not _SHAPE.fullmatch(name):
        raise ValueError(f"got {name!r}, expected a shape such as 8x64x56x56 (2 to 5 extents) or a name of `cases`")
    return CASES.get(name) or _case("a shape of your own", *map(int, name.split("x")))


TARGETS = ("32x64x56x56", "16x256x28x28", "32x512x7x7", "8x16x32x32", "2x64x224x224", "1x64x224x224")
"""The shapes the speed targets name."""
STAGES, _AT_256 = (tuple("x".join(map(str, (batch, *shape))) for _, shape in _RESNET_50) for batch in (64, 256))
"""ResNet-50's at batch 64, and at a larger one."""
GPU = (*STAGES, "128x16x32x32", "128x64x33x33", "4096x768")
GPU_TARGETS = (*STAGES, *_AT_256, "64x64x112x112", "128x16x32x32", "128x64x33x33", "4096x768")


@dataclass(frozen=True)
class Selection:
    """What one run measures: every combination of its fields."""

    cases: tuple[str, ...]
    dtypes: tuple[str, ...]
    formats: tuple[str, ...]
    windows: tuple[int, ...]
    compiled: tuple[str, ...]
    """Cases on which torch.compile is measured too; compiling takes ten seconds or more a row."""
    sweep: tuple[str, ...]
    """Cases whose time is measured against the window size."""


SUITES = {
    "quick": Selection(TARGETS, ("float32", "bfloat16"), FORMATS, (5,), ("16x256x28x28",), ("32x64x56x56",)),
    "targets": Selection((*TARGETS, "64x64x112x112"), ("float32", "bfloat16"), FORMATS, (5, 11), TARGETS, TARGETS),
    "gpu": Selection(GPU, ("float32", "bfloat16"), FORMATS, (5,), ("64x512x28x28",), ("64x512x28x28",)),
    "gpu-targets": Selection(GPU_TARGETS, ("float32", "bfloat16"), FORMATS, (5,), ("64x512x28x28",), GPU),
    "full": Selection(tuple(CASES), tuple(DTYPES), FORMATS, (3, 5, 11, 31), TARGETS, TARGETS),
}
SWEEP_WINDOWS = (3, 5, 7, 9, 11, 15, 21, 31)


@dataclass(frozen=True)
class Setting:
    """One line of the table: a case in a dtype and memory format, with a window."""

    case: Case
    dtype: str
    format: str
    window: int
    device: str = "cpu"


def settings(
    cases: list[Case], dtypes: list[str], formats: list[str], windows: list[int], device: str = "cpu"
) -> Iterator[Setting]:
    """Every combination; the (N, F) form has one memory format."""
    for case, dtype, format, window in product(cases, dtypes, formats, windows):
        if len(case.shape) > 2 or format == formats[0]:
            yield Setting(case, dtype, format, window, device)
