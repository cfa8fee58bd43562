"""The order in which samples come: it follows from the seed and a number, so that a run goes on anywhere."""

from __future__ import annotations

import torch
from torch import Tensor


def number(seed: int, at: int) -> int:
    """What to seed with at a pass or a step."""
    return seed * 1_000_003 + at


def generator(seed: int, at: int) -> torch.Generator:
    """One for a pass or a step: those of a pass and a step of one number are alike."""
    return torch.Generator().manual_seed(number(seed, at))


def batch(samples: int, size: int, seed: int, step: int) -> Tensor:
    """The numbers of a step's samples, of ``samples`` that are shuffled anew in every pass; a rest is left out."""
    around, at = divmod(step, samples // size)
    order = torch.randperm(samples, generator=generator(seed, around))
    return order[at * size : (at + 1) * size]
