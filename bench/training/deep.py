"""Deep networks of equal layers, whose probes at the start are compared with what they learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .cifar import Classification
from .norms import Constants
from .placing import behind
from .probes import measure
from .settings import ClassSettings

WINDOW = 5
SIGMA = 0.5
"""The paper's for CIFAR, where the name alone does not say it."""
CONSTANTS = {name: Constants(SIGMA) for name in ("dn", "dn-mean-only", "dn*", "ln-s", "ln*", "bn-s", "bn*")}
DEPTH, WIDTH = 10, 32
"""Of the networks that are trained."""
GROUP = 4
"""Channels of a group of theirs, where groups are normalized."""
SAMPLES = 32
"""Pictures of the probes."""


class Deep(nn.Module):
    """A stem that halves height and width, then 3x3 convolutions, each with a norm and a ReLU, added to x or not.

    The convolutions have a bias where the norm has none.
    """

    def __init__(
        self,
        norm: str,
        depth: int,
        width: int,
        residual: bool,
        backend: str | None = None,
        num_groups: int | None = None,
    ) -> None:
        super().__init__()
        self.residual = residual
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(depth))
        for convolution in (self.stem, *self.convolutions):
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        self.norms = nn.ModuleList(
            behind(convolution, norm, CONSTANTS, backend, window=WINDOW, num_groups=num_groups)
            for convolution in self.convolutions
        )
        for convolution, layer in zip(self.convolutions, self.norms, strict=True):
            if getattr(layer, "bias", None) is None:
                convolution.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> list[Tensor]:
        """The activations behind the stem and behind every layer."""
        outputs = [self.stem(x)]
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            y = norm(convolution(outputs[-1]))
            outputs.append(outputs[-1] + y if self.residual else y)
        return outputs


class DeepClassifier(nn.Module):
    """`Deep`, the mean over positions of its last activations, and a linear layer."""

    def __init__(self, norm: str, classes: int, backend: str | None, residual: bool) -> None:
        super().__init__()
        self.features = Deep(norm, DEPTH, WIDTH, residual, backend, WIDTH // GROUP)
        self.classes = nn.Linear(WIDTH, classes)
        self.places = {f"layer {i}": self.features.norms[i - 1] for i in (1, DEPTH)}

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, classes) of pictures (N, 3, 32, 32)."""
        return self.classes(self.features(x)[-1].mean((2, 3)))


class DeepClassification(Classification):
    """`Classification` with deep networks, "plain" or "residual"; its log has the probes of the initial network."""

    MODELS: ClassVar = {
        kind: lambda norm, classes, backend, residual=kind == "residual": DeepClassifier(
            norm, classes, backend, residual
        )
        for kind in ("plain", "residual")
    }

    def __init__(self, settings: ClassSettings, norm: str, seed: int) -> None:
        super().__init__(settings, norm, seed)
        x = self._input(self.train[:SAMPLES])
        generator = torch.Generator().manual_seed(seed)
        direction = torch.randn(len(x), WIDTH, x.shape[2] // 2, x.shape[3] // 2, generator=generator)
        self.probes = measure(self.model.features, x, direction.to(self.device))

    def finish(self, folder: Path) -> dict[str, Any]:
        """The probes, behind the stem and behind every layer."""
        return {**super().finish(folder), "probes": self.probes}
