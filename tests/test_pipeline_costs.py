"""What pipelined kernels move, wait for and cost, counted on the emulated device; the model of their time."""

import shutil
from dataclasses import replace
from itertools import groupby

import pytest
import torch
from emulated import DEVICE, HOPPER, backend, counted
from hopper_model import COPY, GLOBAL, OTHERS
from pipeline_model import OUT_OF_SHARED, Cut, Pace, replayed
from traffic import DIRECTIONS, STAGES, Addresses, moved, streamed

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="needs the emulated device")
SLOT = 24576
"""Bytes, as `bench tune` tries them."""
FORMATS = (torch.contiguous_format, torch.channels_last)
SMALL = {"cluster": 4, "threads": 64, "stretch_bytes": 64}
"""Clusters of four blocks, each with a part of the channels or positions of several samples."""


def batch(*shape, dtype=torch.bfloat16, memory_format=FORMATS[0]):
    return torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stage", STAGES[3:])
def test_stages_move_the_least(stage, dtype, memory_format):
    """As 64 samples are cut for an H200: two of them for their share of it, each tensor once."""
    with backend(device=replace(HOPPER, multiprocessors=4), pipeline=SLOT):
        found = moved(batch(2, *stage, dtype=dtype, memory_format=memory_format), window=5)
    for one in found:
        assert (one.strategy, one.activations) == ("pipelined", one.least)


@pytest.fixture
def endings():
    """How often a block comes to barriers of its cluster, the only one that there is room for, by role."""

    def run(samples, direction, **row):
        with backend(counted(), device=replace(HOPPER, multiprocessors=4), **SMALL, **row):
            made = Addresses(counted(), batch(samples, 64, 12, 12), window=5)
            counted().keep_costs(4)
            made.run[direction]()
            assert made.calls.strategies[DIRECTIONS.index(direction)] == ("pipelined" if row else "cluster-resident")
            assert counted().conflicts()[0] == 0
            of_block = [phase for phase in counted().costs() if phase.launch == phase.block == 0]
        return {
            warp: sum(phase.ending.name.startswith("cluster") for phase in role)
            for warp, role in groupby(of_block, key=lambda phase: phase.warp)
        }

    counted().set_room(16, 1)
    yield run
    counted().set_room(16, 1 << 16)
    counted().keep_costs(0)


@pytest.mark.parametrize(("direction", "each"), [("forward", 6), ("backward", 7)])
def test_no_barrier_of_the_cluster_stands_between_samples(direction, each, endings):
    """Blocks meet once, before any of them stores to another; the resident kernel's meet again and again."""
    assert endings(2, direction, pipeline=2048) == {0: 1, 2: 1, 4: 1}
    assert endings(5, direction, pipeline=2048) == {0: 1, 2: 1, 4: 1}
    assert endings(5, direction)[0] - endings(2, direction)[0] == 3 * each


CUT = Cut(132, 8, samples=50, chunks=4, slots=8)
IDLE = Pace(1e6, 1e6, *[0.0] * 6)
"""Bytes of a chunk, beside which the latencies of memory are little, and no work."""


def test_a_replay_takes_as_long_as_the_bytes_where_nothing_else_takes_any():
    bytes_alone = 50 * 4 * 2e6 / COPY
    assert replayed(CUT, IDLE, COPY) == pytest.approx(bytes_alone, rel=0.01)
    assert replayed(CUT, IDLE, 2 * COPY) == pytest.approx(bytes_alone / 2, rel=0.01)


def test_a_replay_takes_as_long_as_the_work_where_that_is_longest():
    """Statistics and results of the same warps, one after the other; maps beside the rest of the results before them
    and statistics of two chunks, and what takes longer is waited for.
    """
    busy = replace(IDLE, read=4096.0, written=4096.0, statistics=3000.0, results=5000.0)
    work = 50 * 4 * (3000 + 5000)
    assert work < replayed(CUT, busy, COPY) < 1.01 * work
    beside = 2 * 5000 + 2 * 3000
    assert replayed(CUT, replace(busy, maps=beside - 1000.0), COPY) < 1.03 * work
    waited = replayed(CUT, replace(busy, maps=beside + 1000.0), COPY) - replayed(CUT, replace(busy, maps=beside), COPY)
    assert waited == pytest.approx(50 * 1000, rel=0.05)


def test_a_replay_shows_what_a_ring_without_slack_waits_for():
    """With one slot more than a sample has chunks, two of them share a chunk's way out and in."""
    busy = replace(IDLE, read=4096.0, written=4096.0, statistics=100.0, results=100.0)
    tight, loose = (replayed(Cut(132, 8, 50, 8, slots), busy, COPY) for slots in (9, 16))
    assert tight > 49 * 8 / 2 * (100 + 100 + OTHERS + 4096 / OUT_OF_SHARED + GLOBAL)
    assert loose < 0.8 * tight


def test_a_replay_of_what_comes_twice():
    """From the cache, it takes the warp that copies as long as results do, and no bandwidth; its slots hold it up."""
    busy = replace(IDLE, read=4096.0, written=4096.0, statistics=3000.0, results=3000.0)
    twice = replace(CUT, again=4)
    once, again = (replayed(cut, busy, COPY) for cut in (CUT, twice))
    assert once <= again < 1.02 * once
    slow = replace(busy, copies_out=4000.0)
    assert replayed(CUT, slow, COPY) < 1.05 * once
    assert replayed(twice, slow, COPY) > 50 * 4 * 2 * 4000


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_instructions_of_pipelined_kernels(direction):
    """In bfloat16, contiguous, of the loops over chunks; a prediction is below the speed of a copy."""
    pytest.importorskip("triton")
    with backend(counted(), device=HOPPER, pipeline=SLOT):
        found = streamed(batch(64, 128, 28, 28), direction, window=5)
        assert streamed(batch(64, 3, 5, 5), direction, window=5) is None
    assert found.bytes == 1
    assert found.loops <= {"forward": 13, "backward": 26}[direction]
    assert found.loops < found.instructions
    assert 0 < found.share <= found.issue
    assert found.share < 1
