"""A language model over words: recurrent networks with a norm in every step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from divnorm_kernels import BatchNorm1d

from . import cells
from .cells import State
from .data import DataError
from .loop import Plan, Task
from .norms import Constants, OverTime
from .settings import Settings
from .words import PARTS, Text, load

LAYERS, UNITS = 2, 200
BATCH, STEPS = 20, 20
RANGE = 0.1
CLIP = 5.0
EPOCHS, FULL_RATE_EPOCHS = 13, 4
TEST_STEPS = 100
PROBED = 20
ESTIMATED = 100
"""Stretches of training text that batch normalization's statistics for the evaluation are means over."""

WINDOWS = {"tanh": 60, "relu": 60, "lstm": 30}
PENALTIES = {
    "tanh": {"bn*": 1e-4, "ln*": 1e-2, "dn*": 1e-2, "none*": 1e-2},
    "relu": {"bn*": 0.1, "ln*": 1e-2, "dn*": 1e-2, "none*": 1e-2},
    "lstm": {"bn*": 0.1, "ln*": 1e-3, "dn*": 1e-4, "none*": 1e-4},
}
PAPER = {
    "lstm": {
        "none": 115.7,
        "none*": 111.9,
        "bn": 123.2,
        "bn-s": 123.2,
        "bn*": 116.9,
        "ln": 119.2,
        "ln-s": 102.5,
        "ln*": 101.7,
        "dn": 103.7,
        "dn*": 102.2,
    },
    "tanh": {
        "none": 149.4,
        "none*": 144.0,
        "bn": 148.1,
        "bn-s": 131.7,
        "bn*": 129.2,
        "ln": 154.3,
        "ln-s": 133.8,
        "ln*": 129.8,
        "dn": 132.1,
        "dn*": 123.7,
    },
    "relu": {
        "none": 147.6,
        "none*": 148.6,
        "bn": 165.0,
        "bn-s": 139.2,
        "bn*": 138.9,
        "ln": 149.1,
        "ln-s": 118.8,
        "ln*": 116.6,
        "dn": 118.8,
        "dn*": 117.9,
    },
}
"""Perplexity on Penn Treebank."""


@dataclass(frozen=True)
class TextSettings(Settings):
    """With the number of words that are told apart."""

    vocabulary: int = 10_000
    patience: int | None = None
    """The run ends when so many evaluations in a row have not lowered the validation text's perplexity, from where the
    rate falls, and the evaluation with the lowest counts, in place of the last."""


def constants(model: str) -> dict[str, Constants]:
    """The paper's: sigma 0.01 where it is no part of the model, 1 elsewhere."""
    found = {name: Constants(1.0, weight) for name, weight in PENALTIES[model].items()}
    found |= {name: Constants(0.01) for name in ("bn", "ln")}
    return found | {name: Constants(1.0) for name in ("bn-s", "ln-s", "dn", "dn-mean-only")}


def over_time(norm: str, model: str, backend: str | None, units: int, parts: int) -> OverTime:
    """The norm of a layer of that model."""
    return OverTime(norm, units, parts, constants(model), window=WINDOWS[model], backend=backend)


class LanguageModel(nn.Module):
    """Words to vectors, two recurrent layers, vectors to scores of words."""

    def __init__(self, model: str, norm: str, vocabulary: int, backend: str | None = None) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, UNITS)
        self.layers = nn.ModuleList(
            cells.make(model, UNITS, UNITS, lambda units, parts: over_time(norm, model, backend, units, parts))
            for _ in range(LAYERS)
        )
        self.scores = nn.Linear(UNITS, vocabulary)
        for module in self.modules():
            if isinstance(module, nn.Embedding | nn.Linear):
                nn.init.uniform_(module.weight, -RANGE, RANGE)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def start(self, batch: int) -> list[State]:
        """The state before the first word."""
        zeros = self.scores.weight.new_zeros(batch, UNITS)
        return [(zeros,) * layer.STATES for layer in self.layers]

    def forward(self, words: Tensor, states: list[State]) -> tuple[Tensor, list[State]]:
        """``(scores, states)``: scores (T * N, words) of what follows each of ``words`` (T, N)."""
        x, after = self.words(words), []
        for layer, state in zip(self.layers, states, strict=True):
            x, state = layer(x, state)
            after.append(tuple(s.detach() for s in state))
        return self.scores(x.flatten(0, 1)), after


def check_norm(norm: str) -> None:
    """Raises ValueError on a name that is not of the family, or needs more than one dimension."""
    over_time(norm, "lstm", None, UNITS, 1)


@cache
def texts(path: Path | None, vocabulary: int) -> Text:
    """The data of a run, read once."""
    found = load(path, vocabulary)
    for part in PARTS:
        words = len(getattr(found, part))
        if words < 2 * BATCH:
            raise DataError(f"{found.name}: got {words} words in {part}.txt, expected at least {2 * BATCH}")
    return found


def _columns(words: Tensor, device: str) -> Tensor:
    """(length, BATCH): the text cut into as many parts as a batch has rows, side by side."""
    length = len(words) // BATCH
    return words[: length * BATCH].view(BATCH, length).t().contiguous().to(device)


def plan(settings: TextSettings, norm: str) -> Plan:
    """The paper's schedule, over the steps there are: full rate for 4 parts of 13, then half of the last in each."""
    slow = (settings.model != "lstm" and norm in ("none", "none*")) or (settings.model, norm) == ("relu", "bn")
    decays = tuple((epoch / EPOCHS, 0.5) for epoch in range(FULL_RATE_EPOCHS, EPOCHS))
    until = {} if settings.patience is None else {"lowest": "valid", "patience": settings.patience}
    return settings.plan(0.1 if slow else 1.0, decays, clip=CLIP, **until)


class Language(Task):
    """Truncated backpropagation through 20 words, the state carried on; perplexity on validation and test text."""

    def __init__(self, settings: TextSettings, norm: str, seed: int) -> None:
        data = texts(settings.data, settings.vocabulary)
        self.model = LanguageModel(settings.model, norm, data.vocabulary, settings.backend).to(settings.device)
        self.plan = plan(settings, norm)
        self.train, self.valid, self.test = (_columns(w, settings.device) for w in (data.train, data.valid, data.test))
        self.pieces = -(-(len(self.train) - 1) // STEPS)
        self.states = self.model.start(BATCH)

    def loss(self, step: int) -> Tensor:
        """Of one stretch of 20 words, summed over them."""
        at = step % self.pieces
        if at == 0:
            self.states = self.model.start(BATCH)
        stretch = self.train[at * STEPS : (at + 1) * STEPS + 1]
        scores, self.states = self.model(stretch[:-1], self.states)
        return F.cross_entropy(scores, stretch[1:].flatten()) * (len(stretch) - 1)

    def _perplexity(self, words: Tensor) -> float:
        states, total = self.model.start(BATCH), 0.0
        for at in range(0, len(words) - 1, TEST_STEPS):
            stretch = words[at : at + TEST_STEPS + 1]
            scores, states = self.model(stretch[:-1], states)
            total += F.cross_entropy(scores, stretch[1:].flatten(), reduction="sum").item()
        return float(torch.tensor(total / ((len(words) - 1) * BATCH), dtype=torch.float64).exp())

    def _estimate(self) -> None:
        """Takes batch normalization's running statistics anew: those of training are of all the models there were."""
        for module in self.model.modules():
            if isinstance(module, BatchNorm1d):
                module.reset_running_stats()
        states = self.model.train().start(BATCH)
        for at in range(min(ESTIMATED, self.pieces)):
            _, states = self.model(self.train[at * STEPS : (at + 1) * STEPS], states)
        self.model.eval()

    def evaluate(self, final: bool) -> dict[str, float]:
        """Perplexity on validation text, and where the evaluation may count on test text too."""
        if any(isinstance(module, BatchNorm1d) for module in self.model.modules()):
            self._estimate()
        figures = {"valid": self._perplexity(self.valid)}
        counts = final or self.plan.lowest is not None
        return {**figures, "perplexity": self._perplexity(self.test)} if counts else figures

    def state(self) -> dict[str, Any]:
        """Where the network is in the text."""
        return {"states": [list(state) for state in self.states]}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes `state` back."""
        device = self.train.device
        self.states = [tuple(s.to(device) for s in one) for one in state["states"]]

    def places(self) -> dict[str, nn.Module]:
        """The hidden units of each layer."""
        return {f"layer {i + 1}": layer for i, layer in enumerate(self.model.layers)}

    def probe(self) -> None:
        """A stretch of the validation text."""
        self.model(self.valid[: PROBED * STEPS], self.model.start(BATCH))
