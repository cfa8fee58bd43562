"""How the pipelined CUDA kernels hold rows, counted on the emulated device, and which rows they take."""

from dataclasses import replace

import pytest
import torch
from emulated import DEVICE, HOPPER, TINY, backend, module
from oracle import Call, check
from strategies import DTYPES
from test_cuda import CASES, PIPELINED, case, chosen, on_cuda
from traffic import DIRECTIONS, Addresses, moved

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="only the emulated device counts")
ROW = {"threads": 128, "cluster": 4, "stretch_bytes": 16}
STAGES = ((64, 56, 56), (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7))


def ring(call, direction, device):
    """Slots, chunks of a sample, and slots of the ring that dy passes through twice; inside `emulated.backend`."""
    cut = chosen(call.x.shape, call.x.dtype, direction, device, not call.x.is_contiguous(), **call.options)
    return cut.get("ring", (0, 0, 0))


def smallest(call):
    """The device with the least shared memory on which backward is pipelined: room for x alone."""
    for shared_bytes in range(2 << 10, 128 << 10, 64):
        device = replace(TINY, block_shared_bytes=shared_bytes)
        if ring(call, "backward", device)[2] > 0:
            return device
    raise AssertionError("none")


@pytest.mark.parametrize("options", [{}, {"activation": "gelu"}, {"activation": "relu"}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["mixed extents", "neighbourhoods", "line", "whole"])
def test_dy_comes_twice_where_x_alone_can_stay(name, channels_last, dtype, options):
    """Backward reads x once, dy with the statistics and with the results, and writes dx."""
    shape, of_case = CASES[name]
    shape = (shape[0], {"whole": 512, "mixed extents": 256}.get(name, 64), *shape[2:])  # many chunks of every type
    call = case(shape, of_case | options, dtype, channels_last)
    row = ROW | {"pipeline": 64 * dtype.itemsize}
    with backend(**row):
        device = smallest(call)
    with backend(**row, device=device):
        assert ring(call, "backward", device)[2] > 0
        check(on_cuda, call)
        _, backward = moved(call.x, **call.options)
    assert backward.strategy == "pipelined"
    assert backward.activations * 3 == backward.least * 4


PLANES = {
    (7, 7): (8, 8),
    (3, 3): (8, 8),
    (5, 9): (8, 8),
    (5, 6): (8, 4),
    (6, 6): (4, 1),
    (4, 6): (8, 1),
    (2, 3): (1, 1),
}
"""Numbers of two bytes that a thread takes together, and after how many channels they start at a channel again."""


@pytest.mark.parametrize("options", [{}, {"activation": "gelu"}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("extents", PLANES, ids=str)
def test_odd_planes_go_by_the_period_of_their_vectors(extents, dtype, options):
    call = case((3, 48, *extents), {"window": 3, "groups": 2} | options, dtype, False)
    with backend(**PIPELINED | {"pipeline": 256 * dtype.itemsize}):
        check(on_cuda, call)
        cut = chosen(call.x.shape, dtype, "forward", TINY, False, **call.options)
    assert cut["name"] == "pipelined"
    if dtype.itemsize == 2:
        assert cut["vector"] == PLANES[extents]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("channels_last", "options"), [(False, {}), (True, {"groups": 2})], ids=["planes", "pixels"])
def test_rows_that_are_apart_go_box_by_box(channels_last, options, direction):
    """A copy for each box in place of its rows: of channels in a slice of the positions, the last of which is shorter,
    or of positions in a group of the channels.
    """
    x = torch.randn(3, 64, 9, 8)
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    device = replace(TINY, multiprocessors=12)
    with backend(**ROW | {"pipeline": 4096}, device=device):
        made = Addresses(module(), x, window=3, **options)
        cut = chosen(x.shape, x.dtype, direction, device, channels_last, window=3, **options)
        made.run["forward"]()
        module().keep_costs(1 << 20)
        made.run[direction]()
        phases = module().costs()
        module().keep_costs(0)
    copied = sum(p.global_ for p in phases if (p.launch, p.warp) == (0, ROW["threads"] // 32 + 2))
    rows = 2 * 72 if channels_last else cut["cluster"] * 64
    assert cut["name"] == "pipelined"
    assert cut["box"] > 4
    assert copied == (2 if direction == "forward" else 3) * len(x) * rows / cut["box"]


@pytest.mark.parametrize("options", [{}, {"activation": "gelu"}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 16, 44, 26), 1), ((3, 1040, 4, 3), 2)], ids=["planes", "pixels in groups"]
)
def test_wide_rows(shape, groups, dtype, options):
    """In boxes up to 2048 bytes, of the last slice of the positions too, else each by itself; with a residual."""
    channels_last = groups > 1
    call = case(shape, {"window": 3, "groups": groups} | options, dtype, channels_last)
    if options:
        call = replace(call, residual=torch.randn_like(call.x))
    row = ROW | {"pipeline": 8192 * dtype.itemsize, "threads": 256}
    with backend(**row):
        for direction in DIRECTIONS:
            cut = chosen(call.x.shape, dtype, direction, TINY, channels_last, **call.options)
            assert cut["name"] == "pipelined"
            assert (cut["box"] > 1) == (cut["tile"][0 if channels_last else 1] * dtype.itemsize <= 2048)
        check(on_cuda, call)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("window", [3, "all"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_no_barrier_of_the_cluster_between_samples(channels_last, window, direction):
    x = torch.randn(6, 8, 24, 20)
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    with backend(**PIPELINED):
        made = Addresses(module(), x, window=window)
        assert made.calls.strategies == ("pipelined",) * 2
        made.run["forward"]()
        module().keep_costs(1 << 20)
        made.run[direction]()
        launched, phases = module().launched(), module().costs()
        module().keep_costs(0)
    cluster = launched[0][2]
    assert cluster > 1
    endings = [p.ending.name for p in phases if (p.launch, p.block, p.warp) == (0, 0, 0)]
    assert endings.count("cluster") + endings.count("cluster_shared") == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_choices_for_an_h200(channels_last, direction, dtype):
    """ResNet-50's stages with a chunk of the next sample beside a whole one; but the largest rows."""
    with backend(device=HOPPER, pipeline=12288, stretch_bytes=128):
        for shape in STAGES:
            found = chosen((64, *shape), dtype, direction, HOPPER, channels_last)
            if dtype == torch.float32 and shape == (256, 56, 56):
                assert found["name"] != "pipelined"
                continue
            slots, chunks, again = found["ring"]
            held = shape[0] * shape[1] * shape[2] * dtype.itemsize * (2 if direction == "backward" else 1)
            assert found["name"] == "pipelined", shape
            assert slots > chunks
            assert (again > 0) == (held > 16 * 190_000), shape
            assert found["shared_bytes"] <= HOPPER.block_shared_bytes


@pytest.mark.parametrize("channels_last", [False, True])
def test_no_pipeline_without_a_warp_that_computes(channels_last):
    with backend(**PIPELINED | {"threads": 16}):
        found = chosen((2, 8, 6, 8), torch.float32, "forward", TINY, channels_last, window=3)
    assert found["name"] != "pipelined"


def test_tensors_at_other_addresses_take_the_kernels_beside():
    memory = torch.randn(2 * 8 * 6 * 8 + 4)
    for shift in (0, 1, 4):
        x = memory[shift : shift + 2 * 8 * 6 * 8].view(2, 8, 6, 8)
        with backend(**PIPELINED):
            module().keep_costs(1 << 20)
            check(on_cuda, Call(x, None, None, 1.0, x.clone(), 1.0, {"window": 3}))
            threads = [launch[3] for launch in module().launched()]
            module().keep_costs(0)
        assert (PIPELINED["threads"] + 96 in threads) == (shift % 4 == 0)
