"""What the CUDA kernels move and do, counted on the emulated device: ``python tests/traffic.py`` prints a table.

The least that a call can move is the operator's limit: forward reads x and writes y, backward reads x and dy and writes
dx. The maps (mean and rstd, which forward returns and backward reads), the parameters and the partial sums of their
gradients come on top and are counted apart. What they do beside that goes into a prediction (`hopper_model`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from types import ModuleType
from typing import Any

import hopper_model
import torch
from emulated import HOPPER, backend, counted, module
from torch import Tensor

from divnorm_kernels import fields
from divnorm_kernels.backends import cuda, native
from divnorm_kernels.backends.cuda import table
from divnorm_kernels.checks import compute_dtype
from divnorm_kernels.norm import Norm

DIRECTIONS = ("forward", "backward")
STAGES = ((64, 56, 56), (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7))
BATCH = 64
STAGED_BATCH = 4
"""Two passes are run to their end, on this many samples, and taken to do as much for every sample of a batch."""
BLOCKS = 16
"""Of a resident kernel this many blocks are run, which all do the same."""


@dataclass(frozen=True)
class Moved:
    """What one direction of a call moved, in bytes."""

    strategy: str
    least: int
    activations: int
    maps: int
    elsewhere: int


@dataclass(frozen=True)
class Done:
    """What the main kernel of one direction did beside, and what that is predicted to come to."""

    strategy: str
    instructions: float
    """A number of x."""
    shared: float
    """Bytes that the wavefronts of shared memory could have moved, as a share of the least that the call moves."""
    barriers: dict[str, float]
    """Of a block for each of its tiles, by kind."""
    idle: float
    """The share of threads that wait for others at barriers, weighted by accesses to memory."""
    depth: float
    """Accesses of the busiest thread of each phase, one after the other, for each tile."""
    share: float
    """Of the speed of a copy."""


class Addresses:
    """A call with weight, bias, a sigma that learns and l1, on addresses; inside `emulated.backend`.

    With a threshold where it needs one, and with a residual where that is asked for.
    """

    def __init__(self, library: ModuleType, x: Tensor, residual: bool = False, **options: Any) -> None:
        norm = Norm(**{"window": 3} | options)
        self.geometry = fields.geometry(norm, tuple(x.shape))
        self.calls = cuda.calls_for(self.geometry, x, residual)
        compute = compute_dtype(x)
        parameters = [torch.ones(x.shape[1], dtype=compute) for _ in range(4)]
        learns = norm.activation == "tlu"
        threshold, dthreshold = (torch.ones(x.shape[1], dtype=compute) if learns else None for _ in range(2))
        added, dadded = (torch.ones_like(x) if residual else None for _ in range(2))
        reads, dreads = (added, dadded) if norm.activation else (None, None)
        scalars = [torch.ones((), dtype=compute) for _ in range(4)]
        (weight, bias, dweight, dbias), (sigma, dsigma, l1, dl1) = parameters, scalars
        self.x, self.y, self.dy, self.dx = x, torch.empty_like(x), torch.randn_like(x), torch.empty_like(x)
        self.maps = torch.empty(self.geometry.kept_shape(False), dtype=compute)
        scratch = [torch.empty(count, dtype=torch.uint8) for count in self.calls.scratch_bytes]
        given = (x, self.maps, weight, bias, sigma)

        def call(function: Callable[..., None], *more: Tensor | None) -> None:
            function(self.calls, *(0 if t is None else t.data_ptr() for t in (*given, *more)))

        upstream, gradients = (self.dy, dl1), (self.dx, dweight, dbias, dsigma, dreads, dthreshold)
        self.run = {
            "forward": lambda: call(library.forward, added, threshold, self.y, l1, scratch[0]),
            "backward": lambda: call(library.backward, reads, threshold, *upstream, *gradients, scratch[1]),
        }
        large = {"forward": (x, self.y, added), "backward": (x, self.dy, self.dx, reads, dreads)}
        self.activations = {name: [t for t in every if t is not None] for name, every in large.items()}


def moved(x: Tensor, **options: Any) -> tuple[Moved, Moved]:
    """Forward and backward of a call with weight, bias, a sigma that learns and l1; inside `emulated.backend`."""
    made = Addresses(module(), x, **options)
    found = []
    for strategy, direction in zip(made.calls.strategies, DIRECTIONS, strict=True):
        activations = made.activations[direction]
        module().forget_traffic()
        for t in (*activations, made.maps):
            module().watch(t.data_ptr(), t.numel() * t.element_size())
        made.run[direction]()
        of_activations = sum(sum(module().traffic_of(t.data_ptr())) for t in activations)
        maps, rest = sum(module().traffic_of(made.maps.data_ptr())), sum(module().traffic_elsewhere())
        least = len(activations) * x.numel() * x.element_size()
        found.append(Moved(strategy, least, of_activations, maps, rest))
    return found[0], found[1]


def done(x: Tensor, **options: Any) -> tuple[Done, Done]:
    """The same call for the costs of its main kernels, x being the whole batch; inside `backend(counted())`."""
    found = []
    for direction in DIRECTIONS:
        made = Addresses(counted(), x, **options)
        cut = _strategy(made, direction)
        resident = cut["name"] != "two-pass"
        if not resident:
            made = Addresses(counted(), x[:STAGED_BATCH].contiguous(memory_format=_format(x)), **options)
            cut = _strategy(made, direction)
        counted().keep_costs(max(BLOCKS, cut["cluster"]) if resident else 1 << 30)
        made.run[direction]()
        launches, phases = counted().launched(), counted().costs()
        counted().keep_costs(0)
        found.append(_summed(made, direction, cut, launches, phases))
    return found[0], found[1]


def _summed(
    made: Addresses, direction: str, cut: dict[str, Any], launches: list[tuple[int, ...]], phases: list[Any]
) -> Done:
    x, kernel = made.x, "staged" if cut["name"] == "two-pass" else "resident"
    main = next(
        i for i, launch in enumerate(launches) if launch[:1] == (cut["blocks"],) and launch[2] == cut["cluster"]
    )
    numbers, each = cut["tile"][0] * cut["tile"][1], _instructions(made, direction, kernel, cut["tile"])
    size = x.element_size()
    of_main = [p for p in phases if p.launch == main]
    work = [
        one
        for _, block in groupby(of_main, key=lambda p: p.block)
        for one in hopper_model.of_block(list(block), numbers, len(made.activations[direction]) - 1, size, each)
    ]
    blocks, run, *_ = launches[main]
    tiles = sum(p.written for p in of_main) / size / numbers  # of the result, which is most of what is written
    clocks = hopper_model.clocks_of(launches[main], work, kernel)
    least = len(made.activations[direction]) * x.numel() * size
    part = run / blocks
    barriers = Counter(p.ending.name for p in of_main)
    return Done(
        cut["name"],
        sum(w.instructions for w in work) * hopper_model.TOGETHER * 32 / (x.numel() * part),
        sum(p.wavefronts for p in of_main) * 128 / (least * part),
        {kind: count / tiles for kind, count in barriers.items() if kind != "kernel"},
        1 - sum(p.done for p in of_main) / sum(p.depth * p.threads for p in of_main),
        sum(p.depth for p in of_main) / tiles,
        least / hopper_model.COPY / hopper_model.MULTIPROCESSORS / clocks,
    )


def _strategy(made: Addresses, direction: str) -> dict[str, Any]:
    x = made.x
    row = table.row_for(HOPPER, direction, x.element_size())
    last = _format(x) == torch.channels_last
    return counted().cuda_strategy(
        made.geometry, native.DTYPES[x.dtype], last, direction == "backward", HOPPER.facts(), row
    )


def _format(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def _instructions(made: Addresses, direction: str, kernel: str, tile: tuple[int, int]) -> dict[str, float]:
    """Instructions a number of what a kernel does to a tile, with the vectors that it takes there."""
    from machine_code import instructions

    x = made.x
    last, dtype, size = _format(x) == torch.channels_last, str(x.dtype)[6:], x.element_size()
    found = instructions(dtype)
    row = tile[0 if last else 1]
    run = tile[0] * tile[1] if row == x.shape[1 if last else 2] else row

    def of(what: str, most: int, length: int) -> float:
        together = next(n for n in (8, 4, 2, 1) if n * size <= most and length % n == 0)
        known = {key[3]: each for key, each in found.items() if key[:3] == (f"{kernel}_{direction}", last, what)}
        return known[max(n for n in known if n <= together)]

    statistics, result = ("moments", "normalize") if direction == "forward" else ("sums", "differentiate")
    column = 16 if last else 8
    return {
        "copy_in": of("copy_in", 16, run),
        "copy_out": of("copy_out", 16, run),
        "statistics": of(statistics, column, row),
        "result": of(result, 16 if direction == "forward" else 8, row),
    }


def main() -> None:
    """ResNet-50's stages as they are cut for an H200."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    columns = ("x", "dtype", "format", "direction", "strategy", "x, y, dy, dx", "maps", "rest")
    beside = ("instructions", "shared", "barriers", "idle", "depth", "predicted")
    output = Table(
        *columns, *beside, title="bytes / least; of the main kernel what it does, and a predicted share of copy speed"
    )
    cases = [
        (stage, dtype, memory_format)
        for stage in STAGES
        for dtype in (torch.bfloat16, torch.float32)
        for memory_format in (torch.contiguous_format, torch.channels_last)
    ]
    for stage, dtype, memory_format in track(cases, console=Console(stderr=True)):
        x = torch.randn((BATCH, *stage)).to(dtype).contiguous(memory_format=memory_format)
        with backend(device=HOPPER):
            bytes_moved = moved(x[:2].contiguous(memory_format=memory_format), window=5)
        with backend(counted(), device=HOPPER):
            beside = done(x, window=5)
        for direction, m, d in zip(DIRECTIONS, bytes_moved, beside, strict=True):
            shares = (f"{part / m.least:.3f}" for part in (m.activations, m.maps, m.elsewhere))
            names = (str(dtype)[6:], str(memory_format)[6:], direction, d.strategy)
            barriers = " + ".join(f"{d.barriers.get(kind, 0):.1f}" for kind in ("block", "cluster_shared", "cluster"))
            costs = (
                f"{d.instructions:.1f}",
                f"{d.shared:.2f}",
                barriers,
                f"{d.idle:.0%}",
                f"{d.depth:.0f}",
                f"{d.share:.0%}",
            )
            output.add_row("x".join(map(str, stage)), *names, *shares, *costs)
    Console(width=180).print(output)


if __name__ == "__main__":
    main()
