"""Clocks and counters: interleaved rounds, medians, memory beyond the results."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import TypeVar

import torch
from torch import Tensor

from .subjects import Subject

Key = TypeVar("Key", bound=Hashable)

LEAST_RUNS = 6
IN_A_ROW = 3
"""Runs of a subject per round: after the first, the cache is as its own last run left it, for every subject alike."""
MOST_RUNS = 300

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4


@dataclass
class Times:
    """Medians in milliseconds, and the quartiles of the whole."""

    forward: float
    backward: float
    both: float
    low: float
    high: float
    rounds: int


def keep_freed_memory() -> None:
    """Lets the C library keep what is freed, so that page faults, which hit any subject at random, hit none.

    A training loop reaches the same state by itself. Other C libraries than glibc stay as they are.
    """
    _set_malloc_option(_M_MMAP_MAX, 0)
    _set_malloc_option(_M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Lets the C library return every larger block as it is freed, so that resident memory is what is in use."""
    _set_malloc_option(_M_MMAP_THRESHOLD, 1 << 16)


def _set_malloc_option(option: int, value: int) -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(option, value)


def spoilt(error: Exception) -> bool:
    """Whether nothing more can be measured in this process after a failure; on the CPU there is no such failure."""
    return False


def step(subject: Subject, x: Tensor, dy: Tensor) -> tuple[float, float, tuple[Tensor, ...]]:
    """One forward and one backward; seconds of each, and y with the gradients."""
    begin = perf_counter()
    y = subject.function(x)
    middle = perf_counter()
    gradients = torch.autograd.grad(y, [x, *subject.parameters], dy)
    return middle - begin, perf_counter() - middle, (y.detach(), *gradients)


def copy_round(x: Tensor) -> Callable[[], tuple[float, float]]:
    """A round of the yardstick: x copied onto memory that is already there."""
    target = torch.empty_like(x)

    def round_() -> tuple[float, float]:
        begin = perf_counter()
        target.copy_(x.detach())
        return perf_counter() - begin, 0.0

    return round_


def round_of(subject: Subject, x: Tensor, dy: Tensor) -> Callable[[], tuple[float, float]]:
    """A round: seconds of one forward and of one backward."""
    return lambda: step(subject, x, dy)[:2]


def interleaved(rounds: dict[Key, Callable[[], tuple[float, float]]], seconds: float) -> dict[Key, Times]:
    """Runs every subject in turn, round after round, until each has had its share of ``seconds``."""
    taken: dict[Key, list[tuple[float, float]]] = {name: [] for name in rounds}
    for once in rounds.values():
        once()  # the first round pays for code, threads and memory
    share = seconds / len(rounds)
    spent = dict.fromkeys(rounds, 0.0)
    active = list(rounds)
    while active:
        for name in active:
            for _ in range(IN_A_ROW):
                result = rounds[name]()
                taken[name].append(result)
                spent[name] += sum(result)
        active = [
            name
            for name in active
            if len(taken[name]) < LEAST_RUNS or (spent[name] < share and len(taken[name]) < MOST_RUNS)
        ]
    return {name: _times(samples) for name, samples in taken.items()}


def _times(samples: list[tuple[float, float]]) -> Times:
    forward, backward = ([1e3 * part for part in parts] for parts in zip(*samples, strict=True))
    both = [f + b for f, b in zip(forward, backward, strict=True)]
    low, _, high = quantiles(both, n=4)
    return Times(median(forward), median(backward), median(both), low, high, len(samples))


def extra_memory(subject: Subject, x: Tensor, dy: Tensor) -> int | None:
    """Bytes of resident memory one step needs at its peak beyond x, y, dy and dx; ``None`` where it cannot be read.

    To be called under `return_freed_memory` alone, before anything was timed.
    """
    status, references = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not references.exists():
        return None
    step(subject, x, dy)  # thread pools, plans and compiled code come with the first call
    gc.collect()
    try:
        references.write_text("5")  # the peak restarts at what is resident now
    except OSError:
        return None
    before = _kilobytes(status, "VmRSS")
    _, _, results = step(subject, x, dy)
    peak = _kilobytes(status, "VmHWM")
    outputs = sum(t.numel() * t.element_size() for t in results[:2])
    return max(0, (peak - before) * 1024 - outputs)


def _kilobytes(status: Path, name: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])
