"""A model of how long the CUDA kernels take on a Hopper GPU, from what the emulated device counts. A prediction.

Nothing here was measured on a GPU. A phase, which is what a block does between two barriers, takes as long as the
slowest of: the instructions of its busiest warp, one at a time; all of its instructions at the rate of a
multiprocessor; and the wavefronts of its shared memory. Loads from other blocks add their latency, and those from
global memory theirs and their bytes at the multiprocessor's share of the bandwidth. Phases follow one another, blocks
on a multiprocessor overlap, and what multiprocessors have in all bounds the whole: bytes, instructions, wavefronts.
Left out: the start of a launch, misses of the instruction cache, and the second-level cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

CLOCK = 1.755e9
"""A second's clocks of an H200."""
MULTIPROCESSORS = 132
COPY = 4.3e12 / CLOCK / MULTIPROCESSORS
"""Bytes a clock and multiprocessor, of a copy of a tensor."""
TOGETHER = 2.2
"""Instructions of warps that a multiprocessor issues a clock, of the four that it could."""
ALONE = 1.7
"""Clocks from one instruction of a warp to its next."""
GLOBAL, OTHERS = 800, 200
"""Clocks to global memory and back, and to another block's shared memory, of which UNROLLED are under way at once."""
UNROLLED = 4
BARRIER = {"block": 30, "cluster": 400, "cluster_shared": 250, "kernel": 0}
"""Clocks from the last arrival to the first that goes on."""
AN_ACCESS = 4
"""Instructions around an access in loops that are not counted in the machine code, those over maps."""
BETWEEN_BLOCKS = 1024
"""Bytes of shared memory that the driver keeps of a block."""
SHARED = 228 << 10
THREADS = 2048
REGISTERS = {"resident": 2, "staged": 4}
"""Blocks of a multiprocessor that the kernels' registers are compiled for."""


@dataclass
class Work:
    """What a share of a launch takes of a multiprocessor, in clocks but for ``bytes``."""

    chain: float = 0
    instructions: float = 0
    wavefronts: float = 0
    bytes: float = 0

    def add(self, other: Work) -> None:
        """One after the other."""
        self.chain += other.chain
        self.instructions += other.instructions
        self.wavefronts += other.wavefronts
        self.bytes += other.bytes


def of_block(phases: list[Any], tile: int, tensors: int, size: int, each: dict[str, float]) -> Iterator[Work]:
    """A block's phases, in order.

    ``tile``: the numbers of a whole tile of each of the ``tensors`` that are read, of ``size`` bytes. ``each``:
    instructions a number of x by what is done (`machine_code`).
    """
    least = tile * size / 8  # bytes of what still counts as a tile, at the end of a row
    numbers, result = tile, None  # the latter: the last phase that has gone through the tile when it is written
    of_tile = {}
    for i, phase in enumerate(phases):
        if phase.read >= least:
            numbers = min(phase.read / size / tensors, tile)
        elif phase.written >= least:
            of_tile[result] = phase.written / size * each["result"] / 32
        elif phase.shared_bytes >= tensors * numbers * size:
            result = i
            of_tile[i] = numbers * each["statistics"] / 32
    for i, phase in enumerate(phases):
        if max(phase.read, phase.written) >= least:
            instructions = (each["copy_in"] * phase.read + each["copy_out"] * phase.written) / size / 32
        else:
            instructions = of_tile.get(i, (phase.shared + phase.others + phase.global_) * AN_ACCESS)
        yield _of_phase(phase, instructions + 2 * phase.shuffles)


def _of_phase(phase: Any, instructions: float) -> Work:
    busiest = instructions * phase.depth / max(phase.done / 32, 1)
    waiting = phase.depth_others / UNROLLED * OTHERS + (GLOBAL + phase.read / COPY if phase.read else 0)
    chain = max(busiest * ALONE, instructions / TOGETHER, phase.wavefronts) + waiting + BARRIER[phase.ending.name]
    return Work(chain, instructions / TOGETHER, phase.wavefronts, phase.read + phase.written)


def clocks_of(launch: tuple[int, ...], work: Iterable[Work], kernel: str) -> float:
    """How long a launch takes: its ``work`` is that of the blocks that were run."""
    blocks, run, cluster, threads, shared_bytes = launch
    total = Work()
    for one in work:
        total.add(one)
    resident = min(REGISTERS.get(kernel, 8), THREADS // threads, SHARED // (shared_bytes + BETWEEN_BLOCKS), 32)
    places = max(resident, 1) * MULTIPROCESSORS // cluster * cluster
    scale = blocks / run
    rounds = ceil(blocks / places) if kernel == "resident" else blocks / places
    at_work = min(MULTIPROCESSORS, blocks)
    return max(
        total.chain / run * max(rounds, 1),
        scale * total.instructions / at_work,
        scale * total.wavefronts / at_work,
        scale * total.bytes / COPY / MULTIPROCESSORS,
    )
