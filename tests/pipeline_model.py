"""The model of `hopper_model` for pipelined kernels, whose roles work side by side. A prediction.

The roles of a block are replayed in the order of csrc/cuda/ring.h and producer.h: chunks come into slots that
are free, at the block's share of the bandwidth; the computing warps take statistics of a sample while the maps of the
one before are made, and results when they are; a slot is free when its results have been read. What a chunk takes is
what `hopper_model` takes a phase to. All of a launch's blocks are at work, one to a multiprocessor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hopper_model import ALONE, AN_ACCESS, BARRIER, COPY, GLOBAL, MULTIPROCESSORS, OTHERS, TOGETHER

MAP_WARPS, COPY_WARPS = 2, 1
AROUND_A_COPY = 120
"""Instructions of the warp that copies for a chunk on its way in and as many on its way out, beside the copies."""
A_SHUFFLE = 8
"""Instructions of a warp for a shuffle: of the sums that lanes share, and between the loops over what they share."""
OUT_OF_SHARED = 64
"""Bytes a clock that a copy reads from shared memory on its way out."""
EXCHANGE = 2 * OTHERS
"""Clocks from a store to another block until it is known there that all have come."""


@dataclass(frozen=True)
class Cut:
    """How a launch is cut: what it is called with, and what its blocks go through."""

    blocks: int
    warps: int
    """That compute."""
    samples: int
    chunks: int
    slots: int
    again: int = 0
    """Slots of dy's own, through which it comes with the statistics and once more, from the cache, with the results."""


@dataclass(frozen=True)
class Pace:
    """What the roles of a block take for a chunk, and for a sample's maps; in clocks but for bytes."""

    read: float
    written: float
    copies_in: float
    """Of the warp that copies, to ask for it."""
    copies_out: float
    statistics: float
    results: float
    maps: float
    """From a sample's statistics to its maps."""
    saved: float
    """Before that, while the statistics are taken: what backward reads of forward's maps."""


@dataclass(frozen=True)
class Block:
    """What a block does for a sample."""

    numbers: float
    """Of x."""
    instructions: float
    """Of all warps."""
    wavefronts: float
    bytes: float
    """Of memory."""
    pace: Pace


def block_of(
    phases: list[Any], cut: Cut, samples: int, numbers: float, tensors: int, size: int, each: dict[str, float]
) -> Block:
    """From a block's phases over so many ``samples``, with ``numbers`` of each of the ``tensors`` that are read in one.

    ``size``: bytes of a number. ``each``: instructions a number by what is done, of a copy, and around a chunk.
    """

    def of(first: int) -> list[Any]:
        """A role's phases, without the barriers of all that lie around them."""
        return [p for p in phases if p.warp == first and p.index > 0]

    compute, maps, copies = of(0), of(cut.warps), of(cut.warps + MAP_WARPS)
    full_warps = -(-max(p.at_work for p in compute) // 32)
    lanes = sum(p.done for p in compute) / sum(p.shared + p.others + p.global_ for p in compute)  # of a warp, at work
    shuffles = A_SHUFFLE * sum(p.shuffles for p in compute) / samples / cut.chunks
    chunk = numbers / cut.chunks
    statistics = (
        chunk * (each["statistics"] + each["start"] / cut.chunks) / lanes + full_warps * each["around statistics"]
    )
    results = chunk * each["result"] / lanes + full_warps * each["around result"] + shuffles
    wavefronts = sum(p.wavefronts for p in compute) / samples / cut.chunks

    def clocks(instructions: float) -> float:
        part = wavefronts * instructions / (statistics + results)
        return max(instructions / TOGETHER, instructions / full_warps * ALONE, part)

    saved = [p for p in maps if p.read]
    work = [p for p in maps if not p.read and p.ending.name in ("warps", "mbarrier")]
    asked = sum(p.global_ for p in copies) / samples / cut.chunks  # copies, in and out
    outs = asked / (tensors + 1 + (cut.again > 0))
    pace = Pace(
        chunk * size * tensors,
        chunk * size,
        (outs * tensors * each["copy"] + AROUND_A_COPY) * ALONE,
        (outs * each["copy"] + AROUND_A_COPY) * ALONE,
        clocks(statistics),
        clocks(results),
        sum(map(_chain, work)) / samples + EXCHANGE,
        sum(map(_chain, saved)) / samples,
    )
    of_maps = sum(map(_instructions, maps)) / samples
    return Block(
        numbers,
        (statistics + results + asked * each["copy"] + 2 * AROUND_A_COPY) * cut.chunks + of_maps,
        sum(p.wavefronts for p in (*compute, *maps)) / samples,
        sum(p.read + p.written for p in phases) / samples - (numbers * size if cut.again else 0),
        pace,
    )


def _instructions(phase: Any) -> float:
    return (phase.shared + phase.others + phase.global_) * AN_ACCESS + 2 * phase.shuffles


def _chain(phase: Any) -> float:
    busiest = _instructions(phase) * phase.depth / max(phase.done / 32, 1)
    return max(busiest * ALONE, phase.wavefronts) + (GLOBAL if phase.read else 0) + BARRIER["block"]


def clocks_of(cut: Cut, block: Block) -> float:
    """How long a launch takes."""
    rate = COPY * MULTIPROCESSORS / min(cut.blocks, MULTIPROCESSORS)
    return max(
        replayed(cut, block.pace, rate),
        cut.samples * block.instructions / TOGETHER,
        cut.samples * block.wavefronts,
        cut.samples * block.bytes / rate,
    )


def replayed(cut: Cut, pace: Pace, rate: float) -> float:
    """When a block's last role has ended; ``rate``: bytes a clock that it may move."""
    return _Replay(cut, pace, rate).ended()


def steps(cut: Cut) -> Iterator[tuple[bool, int, int]]:
    """What computing warps do one after the other: whether it is statistics, of which sample, and of which chunk."""
    ahead = (cut.slots - cut.chunks) // 2  # csrc/cuda/pipeline_plan.cpp
    for sample in range(-1, cut.samples):
        takes = cut.chunks if sample + 1 < cut.samples else 0
        finishes = cut.chunks if sample >= 0 else 0
        taken = finished = 0
        while taken < takes or finished < finishes:
            if taken < takes and (sample < 0 or taken < ahead + finished):
                yield True, sample + 1, taken
                taken += 1
            else:
                yield False, sample, finished
                finished += 1


class _Replay:
    """Who waits for what. Roles go on as far as they can, in turns, each with a clock of its own."""

    def __init__(self, cut: Cut, pace: Pace, rate: float) -> None:
        self.cut, self.pace, self.rate = cut, pace, rate
        self.free = 0.0  # when memory is
        self.full: dict[int, float] = {}  # chunks by number
        self.done: dict[int, float] = {}
        self.taken: dict[int, float] = {}
        self.once_more: dict[int, float] = {}
        self.passed: dict[int, float] = {}  # steps by number
        self.statistics: dict[int, float] = {}  # samples by number
        self.maps: dict[int, float] = {}
        self.last = 0.0

    def ended(self) -> float:
        roles = [self.copy(), self.compute(), self.make_maps()]
        while roles:
            roles = [role for role in roles if next(role, None) is not None]
        return self.last

    def until(self, clock: float, times: dict[int, float], number: int) -> Iterator[bool]:
        """Gives way until a time is known, and ends with the later of it and the clock."""
        while number not in times:
            yield True
        return max(clock, times[number])

    def move(self, clock: float, count: float) -> float:
        self.free = max(self.free, clock) + count / self.rate
        self.last = max(self.last, self.free)
        return self.free

    def copy(self) -> Iterator[bool]:
        clock, pace, cut = 0.0, self.pace, self.cut
        out = 0
        for step, (takes, sample, chunk) in enumerate(steps(cut)):
            if takes:
                number = sample * cut.chunks + chunk
                if number >= cut.slots:
                    clock = yield from self.until(clock, self.done, out)
                    clock = self.hand_out(clock) + OTHERS + pace.written / OUT_OF_SHARED
                    out += 1
                clock += pace.copies_in
                self.full[number] = self.move(clock, pace.read) + GLOBAL
            elif cut.again:
                if step >= cut.again:
                    clock = yield from self.until(clock, self.passed, step - cut.again)
                clock += pace.copies_out  # as many
                self.once_more[sample * cut.chunks + chunk] = clock + GLOBAL
        while out < cut.samples * cut.chunks:
            clock = yield from self.until(clock, self.done, out)
            clock = self.hand_out(clock)
            out += 1

    def hand_out(self, clock: float) -> float:
        self.move(clock + self.pace.copies_out, self.pace.written)
        return clock + self.pace.copies_out

    def compute(self) -> Iterator[bool]:
        clock, pace, cut = 0.0, self.pace, self.cut
        for step, (takes, sample, chunk) in enumerate(steps(cut)):
            number = sample * cut.chunks + chunk
            if takes:
                clock = yield from self.until(clock, self.full, number)
                clock += pace.statistics
                self.taken[number] = clock
            else:
                clock = yield from self.until(clock, self.maps, sample)
                if cut.again:
                    clock = yield from self.until(clock, self.once_more, number)
                clock += pace.results
                self.done[number] = clock
            self.passed[step] = clock
            # A sample's statistics are told behind the first results of the one before, whose place they take.
            told = sample if takes else sample + 1
            last, first = (told + 1) * cut.chunks - 1, (told - 1) * cut.chunks
            if last in self.taken and (told == 0 or first in self.done):
                self.statistics.setdefault(told, clock)
        self.last = max(self.last, clock)

    def make_maps(self) -> Iterator[bool]:
        clock = 0.0
        for sample in range(self.cut.samples):
            clock = yield from self.until(clock + self.pace.saved, self.statistics, sample)
            clock += self.pace.maps
            self.maps[sample] = clock
