"""Real activations: a file of numbers, pictures, and a first layer's response to them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image
from torch import Tensor
from torch.nn.functional import conv2d

from .cases import Case

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm"}
MAX_PICTURES = 8


def _named(name: str, values: Tensor, what: str) -> Case:
    return Case(name, tuple(values.shape), what, lambda _: values.clone())


def tensor_case(path: Path) -> Case:
    """A case from an array of shape (N, F) or (N, C, *S) in a .npy file; nothing is unpickled."""
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a .npy file of numbers ({error})") from None
    if values.dtype.kind not in "fiu" or not 2 <= values.ndim <= 5:
        raise ValueError(f"{path}: got {values.dtype} of shape {values.shape}, expected numbers of 2 to 5 dimensions")
    return _named(path.name, torch.from_numpy(values.astype(np.float32)), f"the array in {path.name}")


def first_layer(picture: Tensor) -> Tensor:
    """The response of 64 seeded 7x7 filters at stride 2, as a network's first layer would give."""
    filters = torch.randn(64, picture.shape[1], 7, 7, generator=torch.Generator().manual_seed(0))
    return conv2d(picture, filters / filters[0].numel() ** 0.5, stride=2, padding=3)


def _picture(image: Image.Image) -> Tensor:
    """(1, 3, H, W), zero mean and unit variance over the picture."""
    values = torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32)).permute(2, 0, 1).unsqueeze(0)
    return ((values - values.mean()) / values.std()).contiguous()


def _both(name: str, picture: Tensor) -> list[Case]:
    return [
        _named(name, picture, "a picture's three channels"),
        _named(f"conv({name})", first_layer(picture), "a seeded first layer's response to it"),
    ]


def sample_cases() -> list[Case]:
    """The photograph that matplotlib ships."""
    with get_sample_data("grace_hopper.jpg") as file:
        return _both("grace_hopper.jpg", _picture(Image.open(file)))


def image_cases(folder: Path) -> list[Case]:
    """The pictures of a folder, the first few by name."""
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES)[:MAX_PICTURES]
    if not paths:
        raise ValueError(f"{folder}: expected a folder with pictures ({', '.join(sorted(PICTURE_SUFFIXES))})")
    return [case for path in paths for case in _both(path.name, _picture(Image.open(path)))]
