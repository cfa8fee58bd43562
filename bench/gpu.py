"""Clocks and counters of a GPU, with the functions of `bench.timing`.

Work is captured into CUDA graphs of many steps that rotate over copies of x and dy which together pass the second-level
cache several times over: so neither the host nor a warm cache is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle, islice

import torch
from torch import Tensor

from .subjects import Subject

STEPS = 24
"""Steps in a graph."""
CACHES = 3
"""How many times the copies that are rotated over fill the second-level cache, at least."""
MOST_COPIES = STEPS
WARM_UP = 3


def cache_bytes(device: torch.device) -> int:
    """The size of the second-level cache."""
    return torch.cuda.get_device_properties(device).L2_cache_size


def copies(x: Tensor) -> list[Tensor]:
    """``x`` and as many copies as it takes to leave nothing in the cache from one's use to its next."""
    size = x.numel() * x.element_size()
    count = max(2, min(MOST_COPIES, -(-CACHES * cache_bytes(x.device) // max(1, size)) + 1))
    return [x, *(x.detach().clone(memory_format=torch.preserve_format) for _ in range(count - 1))]


def captured(work: Callable[[], object]) -> Callable[[], None]:
    """``work`` as a CUDA graph: a function that replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def elapsed(replay: Callable[[], None]) -> float:
    """Seconds on the device."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def round_of(subject: Subject, x: Tensor, dy: Tensor) -> Callable[[], tuple[float, float]]:
    """A round: seconds of one forward and of one backward, the latter as what a step takes beyond a forward."""
    xs = [t.detach().requires_grad_() for t in copies(x)]
    dys = copies(dy)

    def forward() -> None:
        for t in islice(cycle(xs), STEPS):
            subject.function(t)

    def both() -> None:
        for t, upstream in islice(zip(cycle(xs), cycle(dys), strict=False), STEPS):
            torch.autograd.grad(subject.function(t), [t, *subject.parameters], upstream)

    replays = captured(forward), captured(both)

    def once() -> tuple[float, float]:
        taken, together = (elapsed(replay) / STEPS for replay in replays)
        return taken, max(0.0, together - taken)

    return once


def copy_round(x: Tensor) -> Callable[[], tuple[float, float]]:
    """A round of the yardstick: x copied onto memory that is already there."""
    sources = copies(x.detach())
    targets = [torch.empty_like(t) for t in sources]

    def work() -> None:
        for target, source in islice(zip(cycle(targets), cycle(sources), strict=False), STEPS):
            target.copy_(source)

    replay = captured(work)
    return lambda: (elapsed(replay) / STEPS, 0.0)


def extra_memory(subject: Subject, x: Tensor, dy: Tensor) -> int:
    """Bytes that one step allocates at its peak beyond y and dx."""
    subject.function(x)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(x.device)
    before = torch.cuda.memory_allocated(x.device)
    y = subject.function(x)
    gradients = torch.autograd.grad(y, [x, *subject.parameters], dy)
    peak = torch.cuda.max_memory_allocated(x.device)
    outputs = sum(t.numel() * t.element_size() for t in (y, gradients[0]))
    return max(0, peak - before - outputs)
