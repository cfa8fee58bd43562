"""Networks for small pictures: the paper's convolutional one, and ResNet-32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from divnorm_kernels import kalman_chain

from .norms import Constants, family, image_norm
from .placing import KALMAN, behind


def _constants(sigma: float, batch_sigma: float, penalties: dict[str, float]) -> dict[str, Constants]:
    """By norm: 0.01 where sigma is no part of the model, ``batch_sigma`` for batch and ``sigma`` for other norms."""
    sigmas = {"none*": 1.0, "bn": 0.01, "l1bn": 0.01, "ln": 0.01, "bn-s": batch_sigma, "bn*": batch_sigma}
    names = (*sigmas, "ln-s", "ln*", "dn", "dn*", "dn-mean-only")
    return {name: Constants(sigmas.get(name, sigma), penalties.get(name, 0.0)) for name in names}


CONSTANTS = {
    10: _constants(0.5, 1.0, {"none*": 0.01, "bn*": 0.005, "ln*": 0.005, "dn*": 0.005}),
    100: _constants(0.5, 0.25, {"none*": 0.01, "bn*": 0.01, "ln*": 0.005, "dn*": 0.001}),
}
"""The paper's for the convolutional network, by the number of classes."""
RESNET_CONSTANTS = {
    10: _constants(0.5, 0.5, dict.fromkeys(("none*", "bn*", "ln*", "dn*"), 1e-3)),
    100: _constants(2.0, 2.0, dict.fromkeys(("none*", "bn*", "ln*", "dn*"), 1e-2)),
}


class Convolutional(nn.Module):
    """Three convolutions of 5x5, pooling behind each, and two dense layers: the paper's small network.

    ``he`` draws initial values after He et al. in place of the paper's: for pictures of unit variance, not for bytes.
    """

    WINDOWS = (5, 3, 3)
    WIDTHS = (32, 32, 64)
    DEVIATIONS = (1e-4, 1e-2, 1e-2)
    GROUP = 4
    """Channels of a group, where groups are normalized."""

    def __init__(self, norm: str, classes: int, backend: str | None = None, he: bool = False) -> None:
        super().__init__()
        pools = (nn.MaxPool2d(3, 2, ceil_mode=True), *[nn.AvgPool2d(3, 2, ceil_mode=True) for _ in range(2)])
        layers, channels, self.places = [], 3, {}
        for i, (width, window, pool, std) in enumerate(
            zip(self.WIDTHS, self.WINDOWS, pools, self.DEVIATIONS, strict=True)
        ):
            convolution = nn.Conv2d(channels, width, 5, padding=2)
            _draw(convolution, None if he else std)
            options = {"window": window, "edges": "zero", "num_groups": width // self.GROUP}
            place = behind(convolution, norm, CONSTANTS[classes], backend, **options)
            layers += [convolution, place, pool]
            self.places[f"layer {i + 1}"] = place
            channels = width
        self.features = nn.Sequential(*layers)
        if norm == KALMAN:
            kalman_chain(self.features)
        self.hidden, self.classes = nn.Linear(16 * channels, 64), nn.Linear(64, classes)
        for dense in (self.hidden, self.classes):
            _draw(dense, None if he else 0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, classes) of pictures (N, 3, 32, 32)."""
        return self.classes(self.hidden(self.features(x).flatten(1)).relu())


def _draw(layer: nn.Conv2d | nn.Linear, std: float | None) -> None:
    """Weights of this deviation, or of He et al.'s; no bias."""
    if std is None:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    else:
        nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)


class Block(nn.Module):
    """Two convolutions and a path around them, which drops positions and adds zero channels where sizes change."""

    def __init__(self, inputs: int, width: int, norm: Callable[..., nn.Module], window: int, bias: bool) -> None:
        super().__init__()
        self.stride = 1 if inputs == width else 2
        self.first = nn.Conv2d(inputs, width, 3, self.stride, padding=1, bias=bias)
        self.first_norm = norm(width, window=window)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=bias)
        self.second_norm = norm(width, window=window, activation=None)
        self.added = width - inputs

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, H / stride, W / stride) of (N, inputs, H, W)."""
        y = self.second_norm(self.second(self.first_norm(self.first(x))))
        around = x[:, :, :: self.stride, :: self.stride]
        return (y + F.pad(around, (0, 0, 0, 0, 0, self.added))).relu()


class ResNet32(nn.Module):
    """He et al.'s ResNet-32 for CIFAR, with the paper's windows and a learned sigma."""

    WINDOWS = (7, 5, 5, 5)
    WIDTHS = (16, 16, 32, 64)
    BLOCKS = 5

    def __init__(self, norm: str, classes: int, backend: str | None = None) -> None:
        super().__init__()
        constants, bias = RESNET_CONSTANTS[classes], family(norm) == "none"
        normed = partial(image_norm, norm, constants=constants, edges="zero", learn_sigma=True, backend=backend)
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=bias)
        self.stem_norm = normed(16, window=self.WINDOWS[0])
        blocks, channels = [], 16
        for width, window in zip(self.WIDTHS[1:], self.WINDOWS[1:], strict=True):
            for _ in range(self.BLOCKS):
                blocks.append(Block(channels, width, normed, window, bias))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.classes = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        ends = {f"stage {i + 1}": self.blocks[self.BLOCKS * (i + 1) - 1] for i in range(3)}
        self.places = {"stem": self.stem_norm, **ends}

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, classes) of pictures (N, 3, 32, 32)."""
        return self.classes(self.blocks(self.stem_norm(self.stem(x))).mean((2, 3)))
