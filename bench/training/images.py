"""Pictures with classes: CIFAR in its binary layout, or textures made on the spot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .data import DataError, first_there, read_bytes

SIDE = 32
PIXELS = 3 * SIDE * SIDE
SOURCE = "https://www.cs.toronto.edu/~kriz/cifar.html, the binary version"


@dataclass(frozen=True)
class Images:
    """Training and test pictures (N, 3, 32, 32) of bytes, and their classes."""

    name: str
    train: Tensor
    train_classes: Tensor
    test: Tensor
    test_classes: Tensor
    classes: int


@dataclass(frozen=True)
class _Layout:
    """A binary layout: label bytes before each picture, the last of them the class."""

    name: str
    train: tuple[str, ...]
    test: str
    labels: int
    classes: int


CIFAR10 = _Layout("CIFAR-10", tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", 1, 10)
CIFAR100 = _Layout("CIFAR-100", ("train.bin",), "test.bin", 2, 100)


def _records(path: Path, layout: _Layout) -> tuple[Tensor, Tensor]:
    size = layout.labels + PIXELS
    what = f"{layout.name} in records of {layout.labels} label bytes and {PIXELS} bytes of picture"
    values = np.frombuffer(read_bytes(path, what, SOURCE), dtype=np.uint8)
    if len(values) == 0 or len(values) % size:
        raise DataError(f"{path}: got {len(values)} bytes, expected {what}, a multiple of {size}; get it from {SOURCE}")
    values = torch.from_numpy(values.reshape(-1, size).copy())
    classes = values[:, layout.labels - 1].long()
    if classes.max() >= layout.classes:
        raise DataError(
            f"{path}: got class {classes.max()}, expected one of {layout.name}'s {layout.classes}; get it from {SOURCE}"
        )
    return values[:, layout.labels :].reshape(-1, 3, SIDE, SIDE), classes


def _folder(path: Path) -> Path:
    """The folder itself, or the one that the archive of either set unpacks to."""
    if not path.is_dir():
        raise DataError(f"{path}: no folder; expected one with {CIFAR10.train[0]} or {CIFAR100.train[0]}, see {SOURCE}")
    inner = [path / name for name in ("cifar-10-batches-bin", "cifar-100-binary") if (path / name).is_dir()]
    return inner[0] if inner else path


def read_cifar(path: Path) -> Images:
    """CIFAR-10 (as many of its training batches as are there) or CIFAR-100 from a folder in the binary layout."""
    folder = _folder(path)
    starts = (CIFAR10.train[0], CIFAR100.train[0])
    start = first_there(folder, starts, "CIFAR-10 or CIFAR-100 in the binary layout", SOURCE)
    layout = CIFAR10 if start.name in CIFAR10.train else CIFAR100
    parts = [_records(folder / name, layout) for name in layout.train if (folder / name).exists()]
    pictures, classes = (torch.cat(part) for part in zip(*parts, strict=True))
    test, test_classes = _records(folder / layout.test, layout)
    return Images(layout.name, pictures, classes, test, test_classes, layout.classes)


def textures(train: int = 2000, test: int = 500) -> Images:
    """Ten classes of gratings: five directions, two frequencies; phase, colour, contrast, light and noise at random."""
    generator = torch.Generator().manual_seed(0)
    count = train + test
    classes = torch.randint(10, (count,), generator=generator)
    angle = (classes % 5) * (torch.pi / 5)
    frequency = 0.5 + 0.5 * (classes // 5)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    axis = torch.arange(SIDE, dtype=torch.float32)
    along = axis.view(1, -1, 1) * angle.sin().view(-1, 1, 1) + axis.view(1, 1, -1) * angle.cos().view(-1, 1, 1)
    wave = torch.sin(frequency.view(-1, 1, 1) * along + uniform(0, 2 * torch.pi, 1, 1))
    contrast, light = uniform(4, 60, 3, 1, 1), uniform(60, 190, 3, 1, 1)
    noise = 25 * torch.randn(count, 3, SIDE, SIDE, generator=generator)
    pictures = (light + contrast * wave.unsqueeze(1) + noise).round().clamp(0, 255).to(torch.uint8)
    return Images("textures", pictures[:train], classes[:train], pictures[train:], classes[train:], 10)


def load(path: Path | None) -> Images:
    """CIFAR from a folder; textures made on the spot where none is given."""
    return textures() if path is None else read_cifar(path)
