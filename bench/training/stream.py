"""A stream of tasks: whether a network that has learned many still learns.

Source: Lyle et al., "Normalization and effective learning rates in reinforcement learning", NeurIPS 2024, whose
Normalize-and-Project is tried here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from . import order
from .cifar import Classification
from .loop import Plan
from .settings import ClassSettings

RATE = 1e-3
"""Of Adam, the optimizer of that paper."""


@dataclass(frozen=True)
class StreamSettings(ClassSettings):
    """With the number of tasks, of equal steps, and of pictures that they are about."""

    tasks: int = 20
    pictures: int = 2000


class LabelStream(Classification):
    """The same pictures with their labels permuted anew in every task; the weights go on from task to task.

    "fitted" is the share of training pictures that the network tells right at the end of a task, "accuracy" the mean of
    it over the tasks until then.
    """

    def __init__(self, settings: StreamSettings, norm: str, seed: int) -> None:
        super().__init__(settings, norm, seed)
        self.train, self.train_classes = self.train[: settings.pictures], self.train_classes[: settings.pictures]
        self.task_steps, rest = divmod(settings.steps, settings.tasks)
        if rest:
            raise ValueError(f"steps: got {settings.steps}, expected a multiple of the {settings.tasks} tasks")
        self.task, self.fitted = 0, []
        self.plan: Plan = replace(settings.plan(RATE, (), optimizer="adam"), evaluations=settings.tasks)

    def _labels(self) -> Tensor:
        """Of the training pictures in the present task."""
        return torch.randperm(self.classes, generator=order.generator(self.seed, self.task))[self.train_classes]

    def loss(self, step: int) -> Tensor:
        """Of one batch, with the labels of the step's task."""
        self.task = step // self.task_steps
        chosen = self._chosen(step)
        return F.cross_entropy(self._scores(self._input(self.train[chosen])), self._labels()[chosen].to(self.device))

    def evaluate(self, final: bool) -> dict[str, float]:
        """With the labels of the task that ends."""
        self.fitted.append(self._accuracy(self.train, self._labels()))
        return {"accuracy": sum(self.fitted) / len(self.fitted), "fitted": self.fitted[-1], **self._scales()}

    def state(self) -> dict[str, list[float]]:
        """What the tasks so far came to."""
        return {"fitted": self.fitted}

    def restore(self, state: dict[str, list[float]]) -> None:
        """Takes `state` back."""
        self.fitted = list(state["fitted"])
