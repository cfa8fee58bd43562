"""Clocks and counters of a GPU, with the functions of `bench.timing`.

Work is captured into CUDA graphs of several steps that rotate over copies of x and dy which together pass the
second-level cache several times over: so neither the host nor a warm cache is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import torch
from torch import Tensor

from .subjects import Subject

MOST_STEPS = 24
"""Steps in a graph, at most; the least is two."""
GRAPH_SECONDS = 3e-3
"""How long a graph is to take, about."""
CACHES = 3
"""How many times the copies that are rotated over fill the second-level cache, at least."""
WARM_UP = 3


def cache_bytes(device: torch.device) -> int:
    """The size of the second-level cache."""
    return torch.cuda.get_device_properties(device).L2_cache_size


def copies(x: Tensor) -> list[Tensor]:
    """``x`` and as many copies as it takes to leave nothing in the cache from one's use to its next."""
    size = x.numel() * x.element_size()
    count = max(2, min(MOST_STEPS, -(-CACHES * cache_bytes(x.device) // max(1, size)) + 1))
    return [x, *(x.detach().clone(memory_format=torch.preserve_format) for _ in range(count - 1))]


def captured(step: Callable[[int], object]) -> tuple[Callable[[], None], int]:
    """Steps 0, 1, 2 ... as a CUDA graph: a function that replays it, and their number."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(WARM_UP):
            step(i)
        one = elapsed(lambda: step(0))
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    steps = max(2, min(MOST_STEPS, ceil(GRAPH_SECONDS / one)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(steps):
            step(i)
    return graph.replay, steps


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

    def forward(i: int) -> None:
        subject.function(xs[i % len(xs)])

    def both(i: int) -> None:
        t = xs[i % len(xs)]
        torch.autograd.grad(subject.function(t), [t, *subject.parameters], dys[i % len(dys)])

    graphs = captured(forward), captured(both)

    def once() -> tuple[float, float]:
        taken, together = (elapsed(replay) / steps for replay, steps in graphs)
        return taken, max(0.0, together - taken)

    return once


def copy_round(x: Tensor) -> Callable[[], tuple[float, float]]:
    """A round of the yardstick: x copied onto memory that is already there."""
    sources = copies(x.detach())
    targets = [torch.empty_like(t) for t in sources]
    replay, steps = captured(lambda i: targets[i % len(targets)].copy_(sources[i % len(sources)]))
    return lambda: (elapsed(replay) / steps, 0.0)


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
