"""Small data sets of numbers with classes, which scikit-learn ships."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TEST_PART = 5
"""One sample in so many is for the test."""


@dataclass(frozen=True)
class Samples:
    """Training and test samples (N, features), and their classes; features have mean 0 and variance 1 in training."""

    train: Tensor
    train_classes: Tensor
    test: Tensor
    test_classes: Tensor
    classes: int


def _read(name: str) -> tuple[Tensor, Tensor]:
    from sklearn import datasets  # no other experiment needs scikit-learn

    read = {"digits": datasets.load_digits, "breast-cancer": datasets.load_breast_cancer, "wine": datasets.load_wine}
    values, classes = read[name](return_X_y=True)
    return torch.from_numpy(values).double(), torch.from_numpy(classes).long()


def parts(classes: Tensor, seed: int, held_out: float) -> tuple[Tensor, Tensor]:
    """``(train, test)``, numbers of samples, every class by the same share; the test set hangs on nothing.

    Args:
        classes: (N,), from 0.
        seed: of what is held out.
        held_out: the part of the training samples that takes the test set's place, which is dropped; 0 for none.
    """
    train, test = _split(torch.arange(len(classes)), classes, 0, TEST_PART)
    return _split(train, classes, seed, round(1 / held_out)) if held_out else (train, test)


def _split(numbers: Tensor, classes: Tensor, seed: int, part: int) -> tuple[Tensor, Tensor]:
    """``(rest, taken)``: of the samples of these numbers one in ``part`` is taken, at random within its class."""
    order = numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed))]
    order = order[classes[order].argsort(stable=True)]
    taken = torch.arange(len(order)) % part == 0
    return order[~taken], order[taken]


def load(name: str, seed: int, held_out: float) -> Samples:
    """The set "digits" (8x8 pictures of ten digits), "breast-cancer" or "wine" (tables), split by `parts`."""
    values, classes = _read(name)
    train, test = parts(classes, seed, held_out)
    mean, deviation = values[train].mean(0), values[train].std(0)
    scaled = ((values - mean) / torch.where(deviation > 0, deviation, 1.0)).float()
    return Samples(scaled[train], classes[train], scaled[test], classes[test], int(classes.max()) + 1)
