"""Sums over partial sums that a CUDA kernel makes at its end, in place of a launch behind it."""

from dataclasses import replace

import pytest
import torch
from emulated import DEVICE, HOPPER, TINY, backend, module
from oracle import check, evaluate
from strategies import DTYPES
from test_cuda import CASES, CLUSTER, PIPELINED, SINGLE, case, chosen, on_cuda
from traffic import DIRECTIONS, Addresses

from divnorm_kernels.backends.cuda import table

ROWS = {
    "single-block": SINGLE,
    "cluster-resident": CLUSTER,
    "pipelined": {key: value for key, value in PIPELINED.items() if key != "device"} | {"pipeline": 1024},
}
ROOMY = replace(TINY, multiprocessors=12)
"""It holds all blocks of a few groups at once."""
STAGES = ((64, 56, 56), (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7))
LAYOUTS = [
    pytest.param(strategy, name, channels_last, id=f"{strategy}, {name}, {'last' if channels_last else 'contiguous'}")
    for strategy in ROWS
    for name in ("windows", "GELU by tanh", "groups", "line", "neither", "whole", "volume", "features")
    for channels_last in ((False, True) if len(CASES[name][0]) > 2 else (False,))
]


def cut(call, direction):
    """How a direction of a call is cut for the emulated device; inside `emulated.backend`."""
    return chosen(call.x.shape, call.x.dtype, direction, ROOMY, not call.x.is_contiguous(), **call.options)


@pytest.mark.parametrize("blocks", [8, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("strategy", "name", "channels_last"), LAYOUTS)
def test_values(strategy, name, channels_last, dtype, blocks):
    call = case(*CASES[name], dtype, channels_last)
    with backend(**ROWS[strategy], device=ROOMY, finish_inside=blocks):
        check(on_cuda, call)
        if DEVICE == "cpu" and (name != "features" or blocks > 8):  # fewer have much to do there
            assert all(1 <= cut(call, direction)["summing_blocks"] <= blocks for direction in DIRECTIONS)


@pytest.mark.parametrize("strategy", ROWS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_sums_of_a_launch_behind_bit_by_bit(strategy, channels_last):
    """Of whole numbers, whose sums are what they are in any order."""
    x, dy = (torch.randint(-8, 9, (5, 24, 9, 10)).float() for _ in range(2))
    found = []
    for blocks in (0, 1, 4):
        with backend(**ROWS[strategy], device=ROOMY, finish_inside=blocks):
            call = case((5, 24, 9, 10), {"window": None, "norm_window": None}, torch.float32, channels_last)
            call.x.copy_(x)
            call.dy.copy_(dy)
            found.append(evaluate(on_cuda, call))
    for name in ("dweight", "dbias", "l1"):
        assert found[0][name].abs().max() > 0
        assert all(torch.equal(found[0][name], one[name]) for one in found[1:]), name


@pytest.mark.parametrize("strategy", ROWS)
def test_the_same_bits_on_every_run(strategy):
    call = case(*CASES["groups"], torch.float32)
    with backend(**ROWS[strategy], device=ROOMY, finish_inside=4):
        first, again = evaluate(on_cuda, call), evaluate(on_cuda, call)
    assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.skipif(DEVICE != "cpu", reason="only the emulated device tells what it launched")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("strategy", ROWS)
def test_nothing_is_launched_behind_the_kernel(strategy, channels_last, direction):
    x = case((5, 18, 9, 10), {}, torch.float32, channels_last).x
    launched = {}
    for blocks in (0, 4):
        with backend(**ROWS[strategy], device=ROOMY, finish_inside=blocks):
            call = Addresses(module(), x)
            module().keep_costs(1 << 20)
            call.run[direction]()
            launched[blocks] = module().launched()
            module().keep_costs(0)
    assert len(launched[0]) == 2
    assert [launch[2:] for launch in launched[4]] == [launch[2:] for launch in launched[0][:1]]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", STAGES, ids=str)
def test_choices_for_an_h200(shape, dtype, channels_last):
    """What the last sixteen blocks have to do is little, and a slot is one of a cluster whatever positions it holds."""
    for direction in DIRECTIONS:
        behind = chosen((64, *shape), dtype, direction, HOPPER, channels_last)
        with backend(device=HOPPER, finish_inside=16):
            inside = chosen((64, *shape), dtype, direction, HOPPER, channels_last)
        assert behind["summing_blocks"] == 0
        if behind["name"] == "two-pass":
            assert inside == behind
            continue
        assert inside["summing_blocks"] == 16
        assert inside["scratch_bytes"] < behind["scratch_bytes"] + 16 * 8 * inside["blocks"]
        if direction == "backward":
            assert inside["slots"] == inside["blocks"] // inside["cluster"] <= behind["slots"]


def test_much_to_sum_is_left_to_a_launch():
    """One block would go through a megabyte that sixteen share, and that a device does at once."""
    found = []
    for blocks in (1, 16):
        with backend(device=HOPPER, finish_inside=blocks):
            found.append(chosen((4096, 512, 7, 7), torch.bfloat16, "backward"))
    assert [one["summing_blocks"] for one in found] == [0, 16]
    assert found[0]["name"] == "single-block"


def test_the_table_leaves_sums_to_a_launch_until_a_gpu_has_decided():
    assert {row["finish_inside"] for row in table.ROWS} == {0}
