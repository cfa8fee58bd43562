"""A processor was met whose vector divisions in float64 err by 2**-34 for a minute in an hour, everyone's alike."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

LONGEST_FAULT = 300
"""Seconds for which it is waited."""


PROBED = 1.0
"""Seconds for which each core is looked at: what failed may have run on another than the test."""


def divides() -> bool:
    """Whether the vector divisions of every core give the numbers of scalar ones."""
    a = torch.linspace(1, 2, 4096, dtype=torch.float64)
    b = a.flip(0).sin()
    one_by_one = torch.tensor([p / q for p, q in zip(a.tolist(), b.tolist(), strict=True)], dtype=torch.float64)
    cores = os.sched_getaffinity(0)
    try:
        for core in cores:
            os.sched_setaffinity(0, {core})
            end = time.monotonic() + PROBED
            while time.monotonic() < end:
                if not torch.equal(a / b, one_by_one):
                    return False
    finally:
        os.sched_setaffinity(0, cores)
    return True


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
