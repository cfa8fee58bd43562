"""Classes of small pictures: the paper's convolutional network and ResNet-32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .images import Images, load
from .loop import Plan, Task
from .norms import Constants, family, image_norm
from .settings import Settings

BATCH = 100
TEST_BATCH = 500
PROBED = 1000


def _constants(sigma: float, batch_sigma: float, penalties: dict[str, float]) -> dict[str, Constants]:
    """By norm: 0.01 where sigma is no part of the model, ``batch_sigma`` for batch and ``sigma`` for other norms."""
    sigmas = {"none*": 1.0, "bn": 0.01, "ln": 0.01, "bn-s": batch_sigma, "bn*": batch_sigma}
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

PAPER = {
    "CIFAR-10": {
        "none": 0.7565,
        "none*": 0.7839,
        "bn": 0.7807,
        "bn-s": 0.8017,
        "bn*": 0.8179,
        "ln": 0.7211,
        "ln-s": 0.8083,
        "ln*": 0.8091,
        "dn": 0.8058,
        "dn*": 0.8122,
    },
    "CIFAR-100": {
        "none": 0.4409,
        "none*": 0.4517,
        "bn": 0.4814,
        "bn-s": 0.5005,
        "bn*": 0.5156,
        "ln": 0.4249,
        "ln-s": 0.4863,
        "ln*": 0.4957,
        "dn": 0.4892,
        "dn*": 0.5066,
    },
}
"""Accuracy of the convolutional network with all 50,000 pictures and 80,000 steps."""


class Convolutional(nn.Module):
    """Three convolutions of 5x5, pooling behind each, and two dense layers: the paper's small network."""

    WINDOWS = (5, 3, 3)
    WIDTHS = (32, 32, 64)
    DEVIATIONS = (1e-4, 1e-2, 1e-2)

    def __init__(self, norm: str, classes: int, backend: str | None = None) -> None:
        super().__init__()
        pools = (nn.MaxPool2d(3, 2, ceil_mode=True), *[nn.AvgPool2d(3, 2, ceil_mode=True) for _ in range(2)])
        layers, channels, self.places = [], 3, {}
        for i, (width, window, pool, std) in enumerate(
            zip(self.WIDTHS, self.WINDOWS, pools, self.DEVIATIONS, strict=True)
        ):
            place = image_norm(norm, width, CONSTANTS[classes], window=window, edges="zero", backend=backend)
            convolution = nn.Conv2d(channels, width, 5, padding=2)
            nn.init.normal_(convolution.weight, std=std)
            nn.init.zeros_(convolution.bias)
            layers += [convolution, place, pool]
            self.places[f"layer {i + 1}"] = place
            channels = width
        self.features = nn.Sequential(*layers)
        self.hidden, self.classes = nn.Linear(16 * channels, 64), nn.Linear(64, classes)
        for dense in (self.hidden, self.classes):
            nn.init.normal_(dense.weight, std=0.1)
            nn.init.zeros_(dense.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, classes) of pictures (N, 3, 32, 32)."""
        return self.classes(self.hidden(self.features(x).flatten(1)).relu())


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


MODELS = {"cnn": Convolutional, "resnet": ResNet32}


def plan(settings: Settings, norm: str) -> Plan:
    """The paper's schedule, over the steps there are."""
    resnet = settings.model == "resnet"
    rate = (0.005 if norm == "none" else 0.1) if resnet else 1e-3
    decays = ((1 / 2, 0.1), (3 / 4, 0.1)) if resnet else ((3 / 8, 0.1), (5 / 8, 0.1))
    return settings.plan(rate, decays, momentum=0.9, weight_decay=2e-4 if resnet else 0.0)


@cache
def pictures(path: Path | None) -> Images:
    """The data of a run, read once."""
    return load(path)


class Classification(Task):
    """Cross entropy on batches of 100, shuffled anew in every pass; accuracy on the test pictures."""

    def __init__(self, settings: Settings, norm: str, seed: int) -> None:
        data = pictures(settings.data)
        self.seed, self.device = seed, settings.device
        self.augments = settings.model == "resnet"
        self.model = MODELS[settings.model](norm, data.classes, settings.backend).to(settings.device)
        self.plan = plan(settings, norm)
        values = data.train.float()
        self.mean = values.mean((0, 2, 3), keepdim=True)
        # the small network's initial values are made for bytes, the ResNet's for unit variance
        self.scale = values.std((0, 2, 3), keepdim=True) if self.augments else torch.ones(())
        self.train, self.train_classes = data.train, data.train_classes
        self.test, self.test_classes = data.test, data.test_classes
        self.batches = len(self.train) // BATCH

    def _input(self, pictures: Tensor) -> Tensor:
        return ((pictures.float() - self.mean) / self.scale).to(self.device)

    def loss(self, step: int) -> Tensor:
        """Of one batch; the ResNet's is shifted and mirrored at random."""
        around, at = divmod(step, self.batches)
        order = torch.randperm(len(self.train), generator=_generator(self.seed, around))
        chosen = order[at * BATCH : (at + 1) * BATCH]
        x = self._input(self.train[chosen])
        if self.augments:
            x = _shifted(x, _generator(self.seed, self.plan.steps + step))
        return F.cross_entropy(self.model(x), self.train_classes[chosen].to(self.device))

    def _test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, classes in zip(self.test.split(TEST_BATCH), self.test_classes.split(TEST_BATCH), strict=True):
            yield self._input(x), classes.to(self.device)

    def evaluate(self, final: bool) -> dict[str, float]:
        """The share of test pictures whose class has the highest score."""
        right = sum((self.model(x).argmax(1) == classes).sum().item() for x, classes in self._test_batches())
        return {"accuracy": right / len(self.test)}

    def places(self) -> dict[str, nn.Module]:
        """Behind the nonlinearities."""
        return self.model.places

    def probe(self) -> None:
        """The first thousand test pictures."""
        self.model(self._input(self.test[:PROBED]))


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + number)


def _shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture moved by up to four pixels and mirrored, or not."""
    padded = F.pad(x, (4, 4, 4, 4))
    down, right = torch.randint(9, (2, len(x)), generator=generator).tolist()
    mirrored = torch.rand(len(x), generator=generator).lt(0.5).tolist()
    rows = [p[:, i : i + x.shape[2], j : j + x.shape[3]] for p, i, j in zip(padded, down, right, strict=True)]
    return torch.stack([row.flip(2) if flip else row for row, flip in zip(rows, mirrored, strict=True)])
