"""Classes of small pictures, learned from CIFAR or textures."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from divnorm_kernels import NormalizationLayer
from divnorm_kernels.weights import project

from . import norms, order, placing
from .images import Images, load
from .loop import Plan, Task
from .networks import Convolutional, ResNet32
from .settings import ClassSettings
from .sigma import sigma_shares

TEST_BATCH = 500
PROBED = 1000

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


def plan(settings: ClassSettings, norm: str) -> Plan:
    """The paper's schedule, over the steps there are."""
    resnet = settings.model == "resnet"
    rate = (0.005 if norm == "none" else 0.1) if resnet else 1e-3
    decays = ((1 / 2, 0.1), (3 / 4, 0.1)) if resnet else ((3 / 8, 0.1), (5 / 8, 0.1))
    return settings.plan(rate, decays, momentum=0.9, weight_decay=2e-4 if resnet else 0.0)


def check_norm(norm: str, model: str) -> None:
    """Raises ValueError on a norm that the network of that name has no place for."""
    (norms if model == "resnet" else placing).check_norm(norm)


@cache
def pictures(path: Path | None) -> Images:
    """The data of a run, read once."""
    return load(path)


class Classification(Task):
    """Cross entropy on batches that are shuffled anew in every pass; accuracy on the test pictures.

    With ``settings.held_out`` so many of the training pictures, the last, take the test pictures' place and are not
    trained on.
    """

    MODELS: ClassVar = {"cnn": Convolutional, "cnn-he": partial(Convolutional, he=True), "resnet": ResNet32}

    def __init__(self, settings: ClassSettings, norm: str, seed: int) -> None:
        data = pictures(settings.data)
        self.seed, self.device, self.batch = seed, settings.device, settings.batch
        self.augments, self.projected = settings.model == "resnet", settings.projected
        self.half = settings.precision == "bfloat16"
        self.classes = data.classes
        self.model = self.MODELS[settings.model](norm, data.classes, settings.backend)
        self.model.to(settings.device, memory_format=torch.channels_last)  # three quarters of the time on a CPU
        self.first_norms = _weight_norms(self.model)
        self.plan = plan(settings, norm)
        kept = len(data.train) - settings.held_out
        self.train, self.train_classes = data.train[:kept], data.train_classes[:kept]
        self.test, self.test_classes = data.test, data.test_classes
        if settings.held_out:
            self.test, self.test_classes = data.train[kept:], data.train_classes[kept:]
        values = self.train.float()
        self.mean = values.mean((0, 2, 3), keepdim=True)
        # the paper's initial values are made for bytes, the others for unit variance
        self.scale = torch.ones(()) if settings.model == "cnn" else values.std((0, 2, 3), keepdim=True)

    def attach(self, optimizer: Optimizer) -> None:
        """Projects the weights after each step, where the settings say so."""
        if self.projected:
            learned = any(isinstance(m, NormalizationLayer) and m.weight is not None for m in self.model.modules())
            project(optimizer, self.model, affine="joint" if learned else None, skip=self.model.classes)

    def _input(self, pictures: Tensor) -> Tensor:
        x = (pictures.float() - self.mean) / self.scale
        return x.to(self.device, memory_format=torch.channels_last)

    def _scores(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.half):
            return self.model(x).float()

    def _chosen(self, step: int) -> Tensor:
        """The numbers of a step's pictures."""
        return order.batch(len(self.train), self.batch, self.seed, step)

    def loss(self, step: int) -> Tensor:
        """Of one batch; the ResNet's is shifted and mirrored at random."""
        chosen = self._chosen(step)
        x = self._input(self.train[chosen])
        if self.augments:
            x = _shifted(x, order.generator(self.seed, self.plan.steps + step))
        return F.cross_entropy(self._scores(x), self.train_classes[chosen].to(self.device))

    def _accuracy(self, pictures: Tensor, classes: Tensor) -> float:
        parts = zip(pictures.split(TEST_BATCH), classes.split(TEST_BATCH), strict=True)
        right = sum((self._scores(self._input(x)).argmax(1) == y.to(self.device)).sum().item() for x, y in parts)
        return right / len(pictures)

    def evaluate(self, final: bool) -> dict[str, float]:
        """The share of pictures whose class has the highest score, and `_scales`."""
        return {"accuracy": self._accuracy(self.test, self.test_classes), **self._scales()}

    def _scales(self) -> dict[str, float]:
        """The mean over the weights of their norm by the initial one, and that of `sigma_shares`."""
        growths = [float(now / first) for now, first in zip(_weight_norms(self.model), self.first_norms, strict=True)]
        shares = sigma_shares(self.model, self.probe)
        found = {"growth": sum(growths) / len(growths)}
        return {**found, "sigma share": sum(shares) / len(shares)} if shares else found

    def places(self) -> dict[str, nn.Module]:
        """Behind the nonlinearities."""
        return self.model.places

    def probe(self) -> None:
        """The first thousand test pictures."""
        self.model(self._input(self.test[:PROBED]))


def _weight_norms(model: nn.Module) -> list[Tensor]:
    """Of all weights but the output layer's."""
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear) and m is not model.classes]
    return [layer.weight.detach().norm() for layer in layers]


def _shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture moved by up to four pixels and mirrored, or not."""
    padded = F.pad(x, (4, 4, 4, 4))
    down, right = torch.randint(9, (2, len(x)), generator=generator).tolist()
    mirrored = torch.rand(len(x), generator=generator).lt(0.5).tolist()
    rows = [p[:, i : i + x.shape[2], j : j + x.shape[3]] for p, i, j in zip(padded, down, right, strict=True)]
    return torch.stack([row.flip(2) if flip else row for row, flip in zip(rows, mirrored, strict=True)])
