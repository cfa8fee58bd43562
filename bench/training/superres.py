"""Enlarging pictures threefold: the three-layer network on brightness."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import luma, order
from .loop import Plan, Task
from .norms import Constants, image_norm
from .plots import plot_pictures
from .settings import Settings

PATCH, STRIDE = 33, 14
BATCH = 16
DEVIATION = 1e-3
CLIP = 10.0
"""Not the paper's: without it batch normalization, whose first gradients are ten times the others', diverges."""
SHOWN = 120
"""Pixels of the picture that is shown, in height and width."""

CONSTANTS = {
    "none*": Constants(1.0, 0.1),
    "bn": Constants(0.01),
    "ln": Constants(0.01),
    **{name: Constants(1.0) for name in ("bn-s", "ln-s", "dn", "dn-mean-only")},
    **{name: Constants(1.0, 0.1) for name in ("bn*", "ln*", "dn*")},
}
PAPER = {3: {"none": 29.35, "bn": 22.31, "dn*": 29.34}, 4: {"none": 27.53, "bn": 21.40, "dn*": 27.64}}
"""PSNR on Set14 in dB by scale."""


@dataclass(frozen=True)
class SuperresSettings(Settings):
    """With the factor of height and width."""

    scale: int = 3


class Network(nn.Module):
    """Convolutions of 9x9, 5x5 and 5x5 with 64, 32 and 1 filters, a norm behind the first two.

    It pads nothing: what comes out is smaller than what goes in by `MARGIN` on every side.
    """

    SIZES = (9, 5, 5)
    WIDTHS = (64, 32, 1)
    MARGIN = sum(size // 2 for size in SIZES)

    def __init__(self, norm: str, backend: str | None = None) -> None:
        super().__init__()
        layers, channels, self.places = [], 1, {}
        for i, (size, width) in enumerate(zip(self.SIZES, self.WIDTHS, strict=True)):
            convolution = nn.Conv2d(channels, width, size)
            nn.init.normal_(convolution.weight, std=DEVIATION)
            nn.init.zeros_(convolution.bias)
            layers.append(convolution)
            if i < len(self.SIZES) - 1:
                place = image_norm(norm, width, CONSTANTS, window=5, norm_window=7, backend=backend)
                self.places[f"layer {i + 1}"] = place
                layers.append(place)
            channels = width
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, H - 2 MARGIN, W - 2 MARGIN) of brightness (N, 1, H, W)."""
        return self.layers(x)


@dataclass(frozen=True)
class Pictures:
    """Training patches (P, 1, 33, 33) with the middles of their targets, and test pairs by name, all from 0 to 255."""

    patches: Tensor
    targets: Tensor
    test: dict[str, tuple[np.ndarray, np.ndarray]]


@cache
def pictures(path: Path | None, scale: int) -> Pictures:
    """The data of a run, read and cut once."""
    train, test = luma.load(path)
    patches, targets, margin = [], [], Network.MARGIN
    for values in train.values():
        for into, whole in zip((patches, targets), luma.pair(values, scale), strict=True):
            cut = torch.from_numpy(whole).float().unfold(0, PATCH, STRIDE).unfold(1, PATCH, STRIDE)
            into.append(cut.reshape(-1, 1, PATCH, PATCH))
    middles = torch.cat(targets)[:, :, margin:-margin, margin:-margin]
    return Pictures(
        torch.cat(patches), middles.contiguous(), {name: luma.pair(values, scale) for name, values in test.items()}
    )


def plan(settings: SuperresSettings) -> Plan:
    """The paper's rate throughout, and gradients that are cut."""
    return settings.plan(1e-4, (), momentum=0.9, clip=CLIP)


class SuperResolution(Task):
    """Half the squared difference, summed over a patch; PSNR and SSIM of whole pictures."""

    def __init__(self, settings: SuperresSettings, norm: str, seed: int) -> None:
        self.data = pictures(settings.data, settings.scale)
        self.seed, self.device, self.scale = seed, settings.device, settings.scale
        self.model = Network(norm, settings.backend).to(settings.device)
        self.plan = plan(settings)

    def loss(self, step: int) -> Tensor:
        """Of one batch of patches, shuffled anew in every pass."""
        chosen = order.batch(len(self.data.patches), BATCH, self.seed, step)
        x, target = ((part[chosen] / luma.FULL).to(self.device) for part in (self.data.patches, self.data.targets))
        return (self.model(x) - target).square().sum() / (2 * len(x))

    @torch.no_grad()
    def enlarged(self, bicubic: np.ndarray) -> np.ndarray:
        """The network's result on a whole picture, whose edge is repeated for the margin."""
        x = torch.from_numpy(bicubic / luma.FULL).float().to(self.device)[None, None]
        y = self.model(F.pad(x, (Network.MARGIN,) * 4, mode="replicate"))
        return (y[0, 0].double().cpu().numpy() * luma.FULL).round().clip(0, luma.FULL)

    def _qualities(self) -> dict[str, dict[str, float]]:
        rows = {}
        for name, (bicubic, target) in self.data.test.items():
            psnr, ssim = luma.quality(self.enlarged(bicubic), target, self.scale)
            plain_psnr, plain_ssim = luma.quality(bicubic, target, self.scale)
            rows[name] = {"psnr": psnr, "ssim": ssim, "bicubic psnr": plain_psnr, "bicubic ssim": plain_ssim}
        return rows

    def evaluate(self, final: bool) -> dict[str, float]:
        """Means over the test pictures, for the bicubic result too."""
        self.qualities = self._qualities()
        rows = list(self.qualities.values())
        return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}

    def places(self) -> dict[str, nn.Module]:
        """Behind the nonlinearities."""
        return self.model.places

    def probe(self) -> None:
        """The first test picture."""
        bicubic, _ = next(iter(self.data.test.values()))
        self.enlarged(bicubic)

    def finish(self, folder: Path) -> dict[str, Any]:
        """Figures of every picture; and the middle of the one whose bicubic PSNR is the median, side by side."""
        rows = self.qualities
        name = sorted(rows, key=lambda name: rows[name]["bicubic psnr"])[len(rows) // 2]
        bicubic, target = self.data.test[name]
        height, width = (size // self.scale for size in target.shape)
        small = luma.resized(target, height, width).repeat(self.scale, 0).repeat(self.scale, 1)
        result = self.enlarged(bicubic)
        top, left = ((size - SHOWN) // 2 if size > SHOWN else 0 for size in target.shape)
        parts = {
            f"input ({name})": small,
            f"bicubic, {rows[name]['bicubic psnr']:.2f} dB": bicubic,
            f"result, {rows[name]['psnr']:.2f} dB": result,
            "target": target,
        }
        plot_pictures(
            folder / "pictures.png",
            {title: values[top : top + SHOWN, left : left + SHOWN] for title, values in parts.items()},
        )
        return {"pictures": rows}
