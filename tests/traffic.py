"""What the CUDA kernels move and do, counted on the emulated device: ``python tests/traffic.py`` prints a table.

With ``--pipeline 24576``: of the pipelined kernels, with slots of about so many bytes.

The least that a call can move is the operator's limit: forward reads x and writes y, backward reads x and dy and writes
dx. The maps (mean and rstd, which forward returns and backward reads), the parameters and the partial sums of their
gradients come on top and are counted apart. What they do beside that goes into a prediction (`hopper_model`).
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from types import ModuleType
from typing import Any

import hopper_model
import pipeline_model
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
SAMPLES = 2
"""That a block of a pipelined kernel is run on."""
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


@dataclass(frozen=True)
class Streamed:
    """What a pipelined kernel of one direction did, and what that is predicted to come to."""

    ring: tuple[int, ...]
    """Slots, chunks of a sample, and slots that dy passes through twice."""
    bytes: float
    """That the copies of chunks move, as a share of the least that the call moves."""
    loops: float
    """Instructions a number of x in the loops over chunks, for a call without an activation."""
    instructions: float
    """With those around the loops, of the maps and of the warp that copies."""
    shared: float
    """As in `Done`."""
    issue: float
    """The share of the speed of a copy that the instructions alone would leave,"""
    share: float
    """and all of it."""


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
    numbers, each = cut["tile"][0] * cut["tile"][1], _instructions(made, direction, kernel, cut)
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


def streamed(x: Tensor, direction: str, **options: Any) -> Streamed | None:
    """The same of a direction that a pipeline takes, else None; inside `backend(counted(), pipeline=...)`.

    One cluster is run, on two samples; the launch that is predicted has all of x.
    """
    whole = _strategy(Addresses(counted(), x, **options), direction)
    if whole["name"] != "pipelined":
        return None
    parts = whole["blocks"] // whole["cluster"]
    made = Addresses(counted(), x[: SAMPLES * parts].contiguous(memory_format=_format(x)), **options)
    counted().keep_costs(whole["cluster"])
    made.run[direction]()
    launches, phases = counted().launched(), counted().costs()
    counted().keep_costs(0)
    main = next(i for i, launch in enumerate(launches) if launch[:1] == (whole["blocks"],))
    phases = [p for p in phases if p.launch == main]
    slots, chunks, *again = whole["ring"]
    tensors, size = len(made.activations[direction]) - 1, x.element_size()
    warps = whole["threads"] // 32 - pipeline_model.MAP_WARPS - pipeline_model.COPY_WARPS
    cut = pipeline_model.Cut(whole["blocks"], warps, -(-len(x) // parts), chunks, slots, *again)
    samples = len(made.x) // parts
    numbers = x[0].numel() / whole["cluster"]
    each = _instructions(made, direction, "pipelined", whole)
    blocks = [
        pipeline_model.block_of(list(of), cut, samples, numbers, tensors, size, each)
        for _, of in groupby(phases, key=lambda p: p.block)
    ]
    slowest = max(blocks, key=lambda block: pipeline_model.clocks_of(cut, block))
    tensor = x.numel() * size
    copies = [p for p in phases if p.warp == warps + pipeline_model.MAP_WARPS]
    last = max(p.index for p in copies if p.ending.name == "mbarrier") + 1  # behind which the last results leave
    copied = sum(p.read + p.written for p in copies if 0 < p.index <= last)
    of_copy = (tensors + 1) * tensor / hopper_model.COPY / hopper_model.MULTIPROCESSORS
    of_cluster = (tensors + 1) * tensor / len(x) * samples
    return Streamed(
        whole["ring"],
        copied / of_cluster,
        each["statistics"] + each["start"] / chunks + each["result"],
        slowest.instructions * 32 / numbers,
        sum(block.wavefronts for block in blocks) * samples * 128 / of_cluster,
        of_copy / (cut.samples * slowest.instructions / hopper_model.TOGETHER),
        of_copy / pipeline_model.clocks_of(cut, slowest),
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


def _instructions(made: Addresses, direction: str, kernel: str, cut: dict[str, Any]) -> dict[str, float]:
    """Instructions a number of what a kernel does to a tile, with the vectors that it takes there."""
    from machine_code import instructions

    x = made.x
    last, dtype, size = _format(x) == torch.channels_last, str(x.dtype)[6:], x.element_size()
    found = instructions(dtype)
    tile, forward = cut["tile"], direction == "forward"
    row = tile[0 if last else 1]
    run = tile[0] * tile[1] if row == x.shape[1 if last else 2] else row
    statistics, result = ("moments", "normalize") if forward else ("sums", "differentiate")

    def of(what: str, together: int) -> float:
        known = {key[3]: each for key, each in found.items() if key[:3] == (f"{kernel}_{direction}", last, what)}
        return known[max(n for n in known if n <= together)]

    def fits(most: int, length: int) -> int:
        return next(n for n in (8, 4, 2, 1) if n * size <= most and length % n == 0)

    of_result = fits(16 if forward else 8, row)
    if kernel != "pipelined":
        each = {"statistics": of(statistics, fits(16 if last else 8, row)), "result": of(result, of_result)}
        return each | {"copy_in": of("copy_in", fits(16, run)), "copy_out": of("copy_out", fits(16, run))}
    of_statistics, period = (fits(16, row), 1) if last else cut["vector"]
    start = of("start", of_statistics) if forward and not last else 0.0
    if period > 1 and not forward:
        statistics = f"across {statistics}"
    if forward:
        of_result, result = of_statistics, f"across {result}" if period > 1 else result
    return {
        "statistics": of(statistics, of_statistics),
        "result": of(result, of_result),
        "around statistics": of(f"around {statistics}", of_statistics),
        "around result": of(f"around {result}", of_result),
        "start": start,
        "copy": of("copy_bulk", 1),
    }


def main() -> None:
    """ResNet-50's stages as they are cut for an H200."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    parser = ArgumentParser()
    parser.add_argument("--pipeline", type=int, default=0)
    pipeline = parser.parse_args().pipeline
    kinds = ("strategy", "x, y, dy, dx", "maps", "rest", "instructions", "shared", "barriers", "idle", "depth")
    if pipeline:
        kinds = ("ring", "x, y, dy, dx", "loops", "instructions", "shared", "at most")
    title = "bytes / least; of the main kernel what it does, and a predicted share of copy speed"
    output = Table("x", "dtype", "format", "direction", *kinds, "predicted", title=title)
    cases = [
        (stage, dtype, memory_format)
        for stage in STAGES
        for dtype in (torch.bfloat16, torch.float32)
        for memory_format in (torch.contiguous_format, torch.channels_last)
    ]
    for stage, dtype, memory_format in track(cases, console=Console(stderr=True)):
        x = torch.randn((BATCH, *stage)).to(dtype).contiguous(memory_format=memory_format)
        if pipeline:
            with backend(counted(), device=HOPPER, pipeline=pipeline):
                rows = [_of_pipeline(streamed(x, direction, window=5)) for direction in DIRECTIONS]
        else:
            with backend(device=HOPPER):
                bytes_moved = moved(x[:2].contiguous(memory_format=memory_format), window=5)
            with backend(counted(), device=HOPPER):
                rows = [_of_tiles(m, d) for m, d in zip(bytes_moved, done(x, window=5), strict=True)]
        for direction, cells in zip(DIRECTIONS, rows, strict=True):
            output.add_row("x".join(map(str, stage)), str(dtype)[6:], str(memory_format)[6:], direction, *cells)
    Console(width=180).print(output)


def _of_tiles(m: Moved, d: Done) -> list[str]:
    shares = [f"{part / m.least:.3f}" for part in (m.activations, m.maps, m.elsewhere)]
    barriers = " + ".join(f"{d.barriers.get(kind, 0):.1f}" for kind in ("block", "cluster_shared", "cluster"))
    costs = [f"{d.instructions:.1f}", f"{d.shared:.2f}", barriers, f"{d.idle:.0%}", f"{d.depth:.0f}"]
    return [d.strategy, *shares, *costs, f"{d.share:.0%}"]


def _of_pipeline(s: Streamed | None) -> list[str]:
    if s is None:
        return []
    costs = [f"{s.bytes:.3f}", f"{s.loops:.1f}", f"{s.instructions:.1f}", f"{s.shared:.2f}"]
    return ["/".join(map(str, s.ring)), *costs, f"{min(s.issue, 1):.0%}", f"{s.share:.0%}"]


if __name__ == "__main__":
    main()
