"""Brightness of pictures, their reduction and enlargement, and how near one is to another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ..inputs import PICTURE_SUFFIXES
from .data import DataError

SOURCE = "the web pages of SRCNN or A+ (91 training images, Set14)"
WEIGHTS = np.array([65.481, 128.553, 24.966]) / 255
"""ITU-R BT.601 in studio range, as published figures use it."""
FULL = 255.0

TRAINING_SAMPLES = ("astronaut", "coffee", "rocket", "brick", "grass", "gravel", "coins")
TEST_SAMPLES = ("chelsea", "camera", "moon")


def luma(picture: np.ndarray) -> np.ndarray:
    """(H, W) between 16 and 235, whole numbers, of bytes (H, W) or (H, W, 3)."""
    colours = np.repeat(picture[..., None], 3, axis=-1) if picture.ndim == 2 else picture[..., :3]
    return np.round(16 + colours.astype(np.float64) @ WEIGHTS)


def resized(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic, over as many pixels as a reduction calls for; bytes again, as a picture file would hold them."""
    image = Image.fromarray(values.astype(np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), np.float64).round().clip(0, FULL)


def pair(target: np.ndarray, scale: int) -> tuple[np.ndarray, np.ndarray]:
    """``(bicubic, target)``: the target cut to multiples of the scale, and itself reduced and enlarged again."""
    height, width = (size - size % scale for size in target.shape)
    target = target[:height, :width]
    return resized(resized(target, height // scale, width // scale), height, width), target


def quality(result: np.ndarray, target: np.ndarray, border: int) -> tuple[float, float]:
    """``(PSNR in dB, SSIM)`` without a border, as published: Gaussian windows of deviation 1.5."""
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity  # no other command needs scikit-image

    result, target = (a[border:-border, border:-border] for a in (result, target))
    psnr = peak_signal_noise_ratio(target, result, data_range=FULL)
    ssim = structural_similarity(
        target, result, data_range=FULL, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    return float(psnr), float(ssim)


def _folder(path: Path) -> dict[str, np.ndarray]:
    what = f"pictures ({', '.join(sorted(PICTURE_SUFFIXES))})"
    paths = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES) if path.is_dir() else []
    if not paths:
        raise DataError(f"{path}: not there or empty; expected a folder with {what}, to be had from {SOURCE}")
    found = {}
    for file in paths:
        try:
            with Image.open(file) as image:
                found[file.stem] = luma(np.asarray(image.convert("RGB")))
        except OSError as error:
            raise DataError(f"{file}: expected a whole picture ({error}); get it from {SOURCE}") from None
    return found


def _samples(names: tuple[str, ...]) -> dict[str, np.ndarray]:
    from skimage import data

    return {name: luma(getattr(data, name)()) for name in names}


def load(path: Path | None) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Brightness of training and test pictures by name: ``path``/train and ``path``/Set14, or scikit-image's own."""
    if path is None:
        return _samples(TRAINING_SAMPLES), _samples(TEST_SAMPLES)
    return _folder(path / "train"), _folder(path / "Set14")
