"""A processor was met whose vector divisions in float64 err by 2**-34 for a minute in an hour, everyone's alike."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

LONGEST_FAULT = 300
"""Seconds for which it is waited."""


def divides() -> bool:
    """Whether the processor's vector divisions give the numbers of its scalar ones."""
    a = torch.linspace(1, 2, 4096, dtype=torch.float64)
    b = a.flip(0).sin()
    one_by_one = torch.tensor([p / q for p, q in zip(a.tolist(), b.tolist(), strict=True)], dtype=torch.float64)
    return all(torch.equal(a / b, one_by_one) for _ in range(50))


def once_more_if_it_erred(function: Callable[[], Any]) -> Any:
    """Calls ``function``; where it fails while the processor errs, again when it does not."""
    try:
        return function()
    except Exception:
        if divides():
            raise
    for _ in range(LONGEST_FAULT):
        if divides():
            break
        time.sleep(1)
    warnings.warn("the processor divided wrongly, what failed is done again", stacklevel=2)
    return function()
