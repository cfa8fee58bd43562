"""Deep fully connected networks: norms against self-normalizing activations.

Source: Klambauer et al., "Self-Normalizing Neural Networks", NIPS 2017.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from divnorm_kernels import convert_norm, to_snn

from . import order, samples
from .loop import Plan, Task
from .norms import Constants, family
from .settings import Settings

SELF_NORMALIZING = "selu"
MODELS = ("digits", "breast-cancer", "wine")
WIDTH = 64
WINDOW = 15
"""Of hidden units, for divisive normalization."""
DROPOUT = 0.05
"""Of every network: alpha dropout in the self-normalizing one, whose paper takes 0.05 to 0.1."""
RATE = 0.01
CONSTANTS = {
    "bn": Constants(0.01),
    "ln": Constants(0.01),
    **{name: Constants(0.5) for name in ("bn-s", "ln-s", "dn")},
    **{name: Constants(0.5, 0.005) for name in ("bn*", "ln*", "dn*")},
}
"""As for the paper's convolutional network."""


@dataclass(frozen=True)
class DenseSettings(Settings):
    """With the hidden layers, the samples of a step, and the part of the training samples that is held out."""

    depth: int = 8
    batch: int = 32
    held_out: float = 0.0


def check_norm(name: str) -> None:
    """Raises ValueError on a name that these networks do not know."""
    known = ("none", SELF_NORMALIZING, *CONSTANTS)
    if name not in known:
        raise ValueError(f"norm: got {name!r}, expected one of {', '.join(known)}")


class Dense(nn.Module):
    """Hidden layers of `WIDTH` units, each with a norm, a ReLU and dropout, or with SELU and alpha dropout."""

    def __init__(self, norm: str, features: int, depth: int, classes: int, backend: str | None = None) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(depth):
            layers += [
                nn.Linear(WIDTH if i else features, WIDTH),
                nn.BatchNorm1d(WIDTH),
                nn.ReLU(),
                nn.Dropout(DROPOUT),
            ]
        self.hidden, self.classes = nn.Sequential(*layers), nn.Linear(WIDTH, classes)
        for layer in self.hidden:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        if norm == SELF_NORMALIZING:
            to_snn(self.hidden, init=True, report=None)
        elif norm == "none":
            convert_norm(self.hidden, "none", report=None)
        else:
            self._normalize(norm, backend)

    def _normalize(self, norm: str, backend: str | None) -> None:
        known = CONSTANTS[norm]
        options = {"sigma": known.sigma, "l1_weight": known.l1_weight, "backend": backend}
        if family(norm) != "bn":
            for i, layer in enumerate(self.hidden):
                if isinstance(layer, nn.BatchNorm1d):
                    self.hidden[i] = nn.LayerNorm(WIDTH)
        if family(norm) == "dn":
            options |= {"window": WINDOW}
        convert_norm(self.hidden, norm, report=None, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, classes) of samples (N, features)."""
        return self.classes(self.hidden(x))


class DenseClassification(Task):
    """Cross entropy on batches, shuffled anew in every pass; accuracy on the test samples."""

    def __init__(self, settings: DenseSettings, norm: str, seed: int) -> None:
        self.data = samples.load(settings.model, seed, settings.held_out)
        features = self.data.train.shape[1]
        self.seed, self.batch, self.device = seed, settings.batch, settings.device
        self.model = Dense(norm, features, settings.depth, self.data.classes, settings.backend).to(self.device)
        self.plan: Plan = settings.plan(RATE, ((1 / 2, 0.1), (3 / 4, 0.1)), momentum=0.9)

    def loss(self, step: int) -> Tensor:
        """Of one batch."""
        chosen = order.batch(len(self.data.train), self.batch, self.seed, step)
        torch.manual_seed(order.number(self.seed, step))  # of the dropout: the same for a run that goes on
        x, classes = (part[chosen].to(self.device) for part in (self.data.train, self.data.train_classes))
        return F.cross_entropy(self.model(x), classes)

    def evaluate(self, final: bool) -> dict[str, float]:
        """The share of test samples whose class has the highest score."""
        right = self.model(self.data.test.to(self.device)).argmax(1).cpu() == self.data.test_classes
        return {"accuracy": float(right.double().mean())}

    def places(self) -> dict[str, nn.Module]:
        """The last hidden layer's dropout, which does nothing in eval mode."""
        return {"last layer": self.model.hidden[-1]}

    def probe(self) -> None:
        """All test samples."""
        self.model(self.data.test.to(self.device))
