"""Clocks and counters of a GPU, with the functions of `bench.timing`.

Work is captured into CUDA graphs of many steps. They rotate over copies of x and dy which together pass the
second-level cache several times over, and keep their results as long: so neither the host nor a warm cache is timed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil

import torch
from torch import Tensor

from .subjects import Subject

MOST_STEPS = 200
"""Steps in a graph, at most: of microseconds each, they still take many times as long as the graph takes to begin."""
GRAPH_SECONDS = 3e-3
"""How long a graph is to take, about."""
CACHES = 3
"""How many times the copies that are rotated over fill the second-level cache, at least."""
WARM_UP = 3


class Spoilt(RuntimeError):
    """A failure while a graph was captured: what torch goes by on this device may be wrong from here on."""


def spoilt(error: Exception) -> bool:
    """Whether nothing more can be measured in this process after a failure."""
    if isinstance(error, Spoilt):
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:  # a kernel's error stays with the process
        return True
    return False


def cache_bytes(device: torch.device) -> int:
    """The size of the second-level cache."""
    return torch.cuda.get_device_properties(device).L2_cache_size


def copies(x: Tensor) -> list[Tensor]:
    """``x`` and as many copies as it takes to leave nothing in the cache from one's use to its next."""
    size = x.numel() * x.element_size()
    count = max(2, min(MOST_STEPS, -(-CACHES * cache_bytes(x.device) // max(1, size)) + 1))
    return [x, *(x.detach().clone(memory_format=torch.preserve_format) for _ in range(count - 1))]


@contextmanager
def side_stream() -> Iterator[None]:
    """Work on another stream, as before a capture: after all that the current one was told, before what comes next."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield
    current.wait_stream(side)


def captured(step: Callable[[int], object], rotation: int) -> tuple[Callable[[], None], int]:
    """Steps 0, 1, 2 ... as a CUDA graph: a function that replays it, and their number.

    ``rotation``: the copies that the steps take in turn, the least number of steps. As many results are kept, or all
    would lie in the same memory and never leave the cache.
    """
    with side_stream():
        for i in range(WARM_UP):
            step(i)
    replay = recorded(step, rotation, rotation)
    replay()
    one = elapsed(replay) / rotation
    steps = max(rotation, min(MOST_STEPS, ceil(GRAPH_SECONDS / one)))
    return (recorded(step, steps, rotation) if steps > rotation else replay), steps


def recorded(step: Callable[[int], object], steps: int, rotation: int) -> Callable[[], None]:
    """A function that replays a graph of so many steps, the last ``rotation`` results alive at any time.

    Raises:
        Spoilt: where a step fails.
    """
    graph, results = torch.cuda.CUDAGraph(), deque(maxlen=rotation)
    try:
        with torch.cuda.graph(graph):
            for i in range(steps):
                results.append(step(i))
    except Exception as error:
        raise Spoilt(f"{type(error).__name__}: {error}") from error
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

    def forward(i: int) -> Tensor:
        return subject.function(xs[i % len(xs)]).detach()

    def both(i: int) -> tuple[Tensor, Tensor]:
        t = xs[i % len(xs)]
        y = subject.function(t)
        return y.detach(), torch.autograd.grad(y, [t, *subject.parameters], dys[i % len(dys)])[0]

    graphs = captured(forward, len(xs)), captured(both, len(xs))

    def once() -> tuple[float, float]:
        taken, together = (elapsed(replay) / steps for replay, steps in graphs)
        return taken, max(0.0, together - taken)

    return once


def copy_round(x: Tensor) -> Callable[[], tuple[float, float]]:
    """A round of the yardstick: x copied onto memory that is already there."""
    sources = copies(x.detach())
    targets = [torch.empty_like(t) for t in sources]
    replay, steps = captured(lambda i: targets[i % len(targets)].copy_(sources[i % len(sources)]), len(targets))
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
