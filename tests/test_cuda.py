"""The CUDA kernels: on the GPU where there is one, else on the emulated device."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from emulated import DEVICE, HOPPER, TINY, backend, module
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Call, check, evaluate
from strategies import DTYPES, calls
from traffic import moved

from divnorm_kernels import divisive_norm, fields
from divnorm_kernels.backends import cuda, native
from divnorm_kernels.backends.cuda import table
from divnorm_kernels.norm import Norm
from divnorm_kernels.reference import divisive_norm as reference

SMALL = {0: 200, 1: 200, 2: 24, 3: 7}
EXAMPLES = settings(max_examples=max(20, settings.default.max_examples // 6))


def on_cuda(*args, **kwargs):
    return divisive_norm(*args, backend="cuda", **kwargs)


def on_device(call: Call) -> Call:
    return call.to(DEVICE)


SINGLE = {"blocks": 2, "cluster": 1}
CLUSTER = {"blocks": 42, "threads": 64, "bytes_per_thread": 32, "slice_channels": 2, "stretch_bytes": 8}
"""4.4 KB for a block."""
TWO_PASS = {"cluster": 0, "staged_threads": 64, "tile_bytes": 2048, "tile_positions": 32, "row_positions": 100}
"""Several tiles along every axis, several blocks to a map."""
EIGHT = dataclasses.replace(TINY, multiprocessors=8)
PIPELINED = {"device": EIGHT, "pipeline": 512, "cluster": 4, "threads": 128, "stretch_bytes": 16}
"""Clusters that go through several samples, each of them in several chunks."""
NAMES = {"single-block": SINGLE, "cluster-resident": CLUSTER, "two-pass": TWO_PASS, "pipelined": PIPELINED}
UNALIGNED = {("channel by channel", True), ("GELU", True)}
"""Cases of float32 whose chunks, contiguous or channels last, are no whole sixteen bytes: not for bulk copies."""

CASES = {
    "windows": ((5, 18, 9, 10), {"window": 3}),
    "ReLU": ((5, 18, 9, 10), {"window": 3, "activation": "relu"}),
    "SiLU": ((5, 18, 9, 10), {"window": 3, "activation": "silu"}),
    "GELU": ((2, 18, 9, 8), {"window": "all", "groups": 3, "activation": "gelu"}),
    "GELU by tanh": ((3, 36, 8, 11), {"window": (2, 4), "groups": 3, "edges": "zero", "activation": "gelu_tanh"}),
    "rectangles": ((2, 18, 9, 8), {"window": (5, 2), "norm_window": (1, 8)}),
    "groups": ((3, 36, 8, 11), {"window": (2, 4), "norm_window": 3, "groups": 3, "edges": "zero"}),
    "channel by channel": ((2, 3, 24, 25), {"window": 5, "groups": 3}),
    "neighbourhoods": ((5, 8, 24, 20), {"window": 3}),
    "lopsided neighbourhoods": ((4, 8, 24, 20), {"window": (2, 3), "norm_window": (3, 4), "edges": "zero"}),
    "odd planes": ((4, 48, 7, 7), {"window": 3}),
    "volume": ((2, 16, 4, 5, 6), {"window": (3, 2, "all"), "norm_window": 2}),
    "line": ((2, 4, 160), {"window": 101, "norm_window": 150}),
    "mean only": ((2, 24, 8, 6), {"window": 3, "norm_window": None}),
    "no mean": ((2, 24, 8, 6), {"window": None, "norm_window": 4}),
    "neither": ((3, 24, 8, 6), {"window": None}),
    "one position": ((4, 1500, 1, 1), {"window": 2, "edges": "zero"}),
    "mixed extents": ((2, 24, 8, 5), {"window": "all", "norm_window": 3}),
    "whole": ((2, 24, 8, 9), {"window": "all", "groups": 2}),
    "whole, no mean": ((2, 24, 8, 6), {"window": None, "norm_window": "all"}),
    "features": ((23, 520), {"window": 60, "norm_window": 7, "activation": "relu"}),
    "features, whole": ((7, 520), {"window": "all"}),
    "features, GELU": ((7, 520), {"window": "all", "activation": "gelu"}),
}
OVER_BATCH = {
    "windows": ((5, 12, 9, 8), {"window": 3, "norm_window": 4, "groups": 2, "over_batch": True}),
    "mean only": ((4, 6, 3, 5), {"window": 3, "norm_window": None, "over_batch": True}),
    "whole": ((3, 12, 7, 9), {"window": "all", "groups": 12, "over_batch": True}),
    "features": ((7, 70), {"window": 5, "over_batch": True}),
    "SiLU": ((3, 12, 7, 9), {"window": "all", "groups": 12, "over_batch": True, "activation": "silu"}),
}


def case(shape, options, dtype, channels_last=False) -> Call:
    x, dy = (torch.randn(shape).to(dtype) for _ in range(2))
    if channels_last:
        x, dy = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, dy))
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias = torch.randn(shape[1]).to(wide), torch.randn(shape[1]).to(dtype)
    sigma = (torch.rand(options.get("groups", 1)) + 0.5).to(wide)
    return on_device(Call(x, weight, bias, sigma, dy, 2.0, options))


def geometry_of(call: Call) -> fields.Geometry:
    return fields.geometry(Norm(**call.options), tuple(call.x.shape))


LAYOUTS = [
    pytest.param(
        strategy, name, channels_last, id=f"{strategy}, {name}, {'channels last' if channels_last else 'contiguous'}"
    )
    for strategy in NAMES
    for name, (shape, _) in CASES.items()
    for channels_last in ((False, True) if len(shape) > 2 else (False,))
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("strategy", "name", "channels_last"), LAYOUTS)
def test_every_strategy(strategy, name, channels_last, dtype):
    call = case(*CASES[name], dtype, channels_last)
    with backend(**NAMES[strategy]):
        got = check(on_cuda, call)
        taken = cuda.strategies(geometry_of(call), call.x)
    if (
        DEVICE == "cpu"
        and dtype == torch.float32
        and (strategy != "pipelined" or (name, channels_last) not in UNALIGNED)
    ):
        assert taken == (strategy, strategy)
    if channels_last and call.x.dim() == 4 and not call.x.is_contiguous():
        assert got["y"].is_contiguous(memory_format=torch.channels_last)
        assert got["dx"].is_contiguous(memory_format=torch.channels_last)


@contextmanager
def room(largest_cluster: int = 16, most_clusters: int = 1 << 16) -> Iterator[None]:
    """What the emulated device says that it holds."""
    module().set_room(largest_cluster, most_clusters)
    try:
        yield
    finally:
        module().set_room(16, 1 << 16)


@pytest.mark.skipif(DEVICE == "cuda", reason="the device's clusters are what they are")
@pytest.mark.parametrize(("largest", "taken"), [(16, "cluster-resident"), (3, "cluster-resident"), (1, "two-pass")])
def test_a_device_without_room_for_large_clusters(largest, taken):
    """Not every GPU has as many multiprocessors side by side as its architecture allows to a cluster."""
    call = case((2, 48, 40, 40), {"window": 3}, torch.float32)
    with backend(), room(largest_cluster=largest):
        check(on_cuda, call)
        assert cuda.strategies(geometry_of(call), call.x)[0] == taken


@pytest.mark.skipif(DEVICE == "cuda", reason="the device's clusters are what they are")
@pytest.mark.parametrize("strategy", ["single-block", "cluster-resident"])
def test_clusters_share_the_samples_as_the_device_has_room(strategy):
    """One cluster more than run at once would take as long as another round of them all."""
    call = case((7, 64, 5, 6), {"window": 3}, torch.float32)
    slots = []
    for most_clusters in (1 << 16, 2, 1):
        with backend(**NAMES[strategy]), room(most_clusters=most_clusters):
            check(on_cuda, call)
            assert cuda.strategies(geometry_of(call), call.x) == (strategy, strategy)
            slots.append(cuda.calls_for(geometry_of(call), call.x).scratch_bytes[1])
    assert slots[0] > slots[1] > slots[2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", OVER_BATCH)
def test_over_the_batch(name, channels_last, dtype):
    shape, options = OVER_BATCH[name]
    with backend(**TWO_PASS):
        check(on_cuda, case(shape, options, dtype, channels_last and len(shape) > 2))


@pytest.mark.parametrize("strategy", NAMES)
@pytest.mark.parametrize("window_rounds", [0, 1000])
def test_windows_by_blocks_and_one_by_one(strategy, window_rounds):
    """Whichever the table prefers."""
    with backend(**NAMES[strategy], window_rounds=window_rounds):
        for shape in ((2, 3, 23, 14), (2, 3, 24, 16)):
            check(on_cuda, case(shape, {"window": (11, 2), "norm_window": (6, 25)}, torch.float32))


@EXAMPLES
@given(calls(extents=SMALL).map(on_device), st.sampled_from(sorted(NAMES)), st.sampled_from([0, 4, 1000]))
def test_values_and_gradients(call: Call, strategy: str, window_rounds: int):
    with backend(**NAMES[strategy], window_rounds=window_rounds):
        check(on_cuda, call)


def test_a_y_above_zero_that_float16_cannot_hold():
    """Found by the search above: y = 1.5e-8 is stored as 0 and passes the gradient, as its sign says."""
    options = {"window": None, "norm_window": None, "activation": "relu"}
    call = case((2, 1, 3, 3), options, torch.float16)
    call = dataclasses.replace(call, x=0 * call.x, weight=None, bias=torch.full_like(call.sigma, 1.5e-8), sigma=1.0)
    with backend():
        got = evaluate(on_cuda, call)
        check(on_cuda, call)
    assert (got["y"] == 0).all()
    # d l1 / d x is 0 at x = 0
    assert torch.equal(got["dx"], call.dy)


@pytest.mark.parametrize("strategy", NAMES)
def test_parameters_and_gradients_that_are_not_there(strategy):
    """Without weight, bias, a sigma that learns, and a gradient of l1; and with some gradients not wanted."""
    call = case(*CASES["windows"], torch.float32)
    with backend(**NAMES[strategy]):
        check(on_cuda, dataclasses.replace(call, weight=None, bias=None, sigma=0.7))
        x, weight = call.x.clone().requires_grad_(), call.weight.clone().requires_grad_()
        y = on_cuda(x, weight, call.bias, sigma=call.sigma, **call.options)
        (alone,) = torch.autograd.grad(y, weight, call.dy, retain_graph=True)
        (dx,) = torch.autograd.grad(y, x, call.dy, retain_graph=True)
        both = torch.autograd.grad(y, (x, weight), call.dy)
        _, l1 = on_cuda(x, weight, call.bias, sigma=call.sigma, return_l1=True, **call.options)
        (of_l1,) = torch.autograd.grad(l1, x)
        expected = reference(x.double(), sigma=call.sigma.double(), return_l1=True, **call.options)[1]
    assert torch.equal(alone, both[1])
    assert torch.equal(dx, both[0])
    torch.testing.assert_close(of_l1, torch.autograd.grad(expected, x)[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("strategy", NAMES)
def test_same_bits_on_every_run(strategy):
    call = case(*CASES["groups"], torch.float32)
    with backend(**NAMES[strategy]):
        first, again = evaluate(on_cuda, call), evaluate(on_cuda, call)
    for key in first:
        assert torch.equal(first[key], again[key]), key


@pytest.mark.parametrize("shape", [(0, 4, 5, 5), (2, 4, 0, 5), (0, 7), (3, 0)], ids=str)
def test_empty(shape):
    x, affine, sigma = torch.zeros(shape), torch.ones(shape[1]), torch.ones(())
    with backend():
        call = on_device(Call(x, affine, affine, sigma, torch.zeros(shape), 1.0, {"window": 3}))
        results = evaluate(on_cuda, call)
    assert results["y"].shape == results["dx"].shape == shape
    assert all(not results[name].any() for name in ("l1", "dweight", "dbias", "dsigma"))


@pytest.mark.parametrize("shift", [1, 2, 4])
@pytest.mark.parametrize("strategy", NAMES)
def test_addresses_that_are_not_aligned(strategy, shift):
    memory = torch.randn(2 * 8 * 6 * 8 + 8, device=DEVICE).bfloat16()
    x = memory[shift : shift + 2 * 8 * 6 * 8].view(2, 8, 6, 8)
    with backend(**NAMES[strategy]):
        check(on_cuda, Call(x, None, None, 1.0, x.clone(), 1.0, {"window": 3}))


def test_through_the_dispatcher():
    """Compilers and dispatch modes see the same numbers through the raw operators."""
    x = torch.randn(2, 6, 5, 4, device=DEVICE)
    arguments = (x, None, None, None, 0.5, Norm(3, groups=2, activation="relu").text, True, False, "cuda")
    with backend():
        y, maps, l1 = torch.ops.divnorm_kernels.forward(*arguments)
        expected, l1_expected = on_cuda(x, window=3, groups=2, sigma=0.5, activation="relu", return_l1=True)
        torch.library.opcheck(
            torch.ops.divnorm_kernels.forward, arguments, test_utils=("test_schema", "test_faketensor")
        )
    assert torch.equal(y, expected)
    assert torch.equal(l1, l1_expected)
    assert maps.shape == (2, 2, 2, 5, 4)


def test_refusals(monkeypatch):
    with backend():
        with pytest.raises(RuntimeError, match="'cuda', which cannot serve this call: x is on meta"):
            on_cuda(torch.empty(2, 4, 5, 5, device="meta"), window=3)
        x = torch.randn(2, 4, 5, 5, device=DEVICE)
        old = dataclasses.replace(HOPPER, capability=(7, 5))
        monkeypatch.setattr(cuda, "device_of", lambda x: old)
        with pytest.raises(RuntimeError, match=r"compute capability \(7, 5\), these kernels need \(8, 0\)"):
            on_cuda(x, window=3)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="'cuda', which cannot serve this call: "):
            on_cuda(x, window=3)


def chosen(shape, dtype, direction, device=HOPPER, channels_last=False, **options):
    """The strategy for a call on a device that need not be here."""
    g = fields.geometry(Norm(**{"window": 5} | options), tuple(shape))
    row = table.row_for(device, direction, dtype.itemsize)
    return module().cuda_strategy(g, native.DTYPES[dtype], channels_last, direction == "backward", device.facts(), row)


@pytest.mark.parametrize("channels_last", [False, True])
def test_choices_for_an_h200(channels_last):
    """ResNet-50's stages are held on chip, two blocks to a multiprocessor where they can be."""
    half, single = torch.bfloat16, torch.float32
    for shape in ((64, 256, 56, 56), (64, 512, 28, 28), (64, 1024, 14, 14), (64, 2048, 7, 7), (64, 64, 56, 56)):
        for dtype in (half, single):
            for direction in ("forward", "backward"):
                found = chosen(shape, dtype, direction, channels_last=channels_last)
                bytes_held = shape[1] * shape[2] * shape[3] * dtype.itemsize * (2 if direction == "backward" else 1)
                if bytes_held < 16 * 100_000:
                    assert found["name"] != "two-pass", (shape, dtype, direction)
                    assert 2 * (found["shared_bytes"] + 1024) <= HOPPER.shared_bytes
                elif bytes_held < 16 * 200_000:
                    assert found["name"] == "cluster-resident", (shape, dtype, direction)
                assert found["shared_bytes"] <= HOPPER.block_shared_bytes
                assert found["cluster"] <= 16
    assert chosen((512, 16, 32, 32), half, "forward", channels_last=channels_last)["name"] == "single-block"
    assert chosen((1, 64, 1000, 1000), half, "forward", channels_last=channels_last)["name"] == "two-pass"
    ampere = table.Device((8, 0), 108, 40 << 20, 164 << 10, 163 << 10)
    assert chosen((64, 256, 56, 56), half, "forward", ampere, channels_last)["name"] == "two-pass"
    assert chosen((64, 16, 32, 32), half, "forward", ampere, channels_last)["name"] == "single-block"


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7), (64, 112, 112)], ids=str)
def test_channels_are_sliced_until_threads_have_positions(shape, dtype, direction):
    """Of contiguous tensors a thread sums as many positions as it can load at once, over a slice of the channels."""
    found = chosen((64, *shape), dtype, direction)
    positions = found["tile"][1]
    together = 8 // dtype.itemsize
    while positions % together:
        together //= 2
    assert found["slices"] * positions // together >= 0.75 * found["threads"]


@pytest.mark.skipif(DEVICE != "cpu", reason="only the emulated device counts")
def test_a_blocks_own_maps_are_not_looked_up_in_the_cluster():
    """Only windows that reach into other blocks are; of whole fields a thread asks for one number of each map."""
    row = {"cluster": 8, "blocks": 12, "slice_channels": 8}
    for window, most in ((3, 1 / 8), ("all", 1 / 100)):
        x = case((3, 64, 12, 12), {}, torch.float32).x
        with backend(**row):
            forward, backward = moved(x, window=window)
            own, others = module().lookups()
        assert forward.strategy == backward.strategy == "cluster-resident"
        assert others > 0
        assert own <= most * others


@pytest.mark.parametrize("shape", [(70, 40, 12, 12), (600, 3, 5, 5)], ids=["columns", "few columns"])
def test_sums_over_many_partial_sums(shape):
    """Several blocks share the rows of a set of columns, and the last one adds up what they have."""
    call = case(shape, {"window": 3}, torch.float32)
    with backend(**TWO_PASS):
        check(on_cuda, call)
        first, again = evaluate(on_cuda, call), evaluate(on_cuda, call)
        row = table.row_for(TINY, "backward", 4)
        cut = module().cuda_strategy(geometry_of(call), native.DTYPES[torch.float32], False, True, TINY.facts(), row)
    assert cut["slots"] > 256
    assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize(("shape", "cluster"), [((64, 16, 32, 32), 4), ((64, 2048, 7, 7), 4), ((16, 16, 32, 32), 16)])
def test_clusters_fill_the_device(shape, cluster):
    """A row that one block would hold is shared by several where the batch alone leaves multiprocessors idle."""
    found = chosen(shape, torch.bfloat16, "forward")
    assert found["cluster"] == cluster
    assert chosen((8 * shape[0], *shape[1:]), torch.bfloat16, "forward")["cluster"] < cluster


@pytest.mark.skipif(DEVICE != "cpu", reason="only the emulated device counts")
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("strategy", NAMES)
def test_bytes_moved(strategy, dtype, channels_last, activation):
    """The activations are read once where a row is held on chip, twice in two passes; results are written once."""
    row = NAMES[strategy] if strategy != "cluster-resident" else {"cluster": 8, "blocks": 12, "slice_channels": 8}
    with backend(**row):
        forward, backward = moved(case((3, 64, 12, 12), {}, dtype, channels_last).x, window=5, activation=activation)
    assert forward.strategy == backward.strategy == strategy
    passes = 2 if strategy == "two-pass" else 1
    assert forward.activations / forward.least == (passes + 1) / 2
    assert backward.activations / backward.least == (2 * passes + 1) / 3
    if passes == 1:
        assert forward.maps == backward.maps == 2 * 3 * 12 * 12 * 4
        with backend(**row):
            device = row.get("device", TINY)
            cut = [chosen((3, 64, 12, 12), dtype, d, device, channels_last) for d in ("forward", "backward")]
        # once for a block: the parameters and a slot of their partial sums, which is read again; sigma for a thread
        vectors, thread = (2 * 64, (5 if activation is None else 6) * 64), 4
        for m, c, numbers in zip((forward, backward), cut, vectors, strict=True):
            assert m.elsewhere <= c["blocks"] * (4 * numbers + thread * c["threads"] + 16) + 3 * 4 * 64


@pytest.mark.skipif(DEVICE != "cpu", reason="only the emulated device counts")
@pytest.mark.parametrize("window", [5, "all"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("options", [{"residual": True, "activation": "relu"}, {"residual": True}, {"p": 1}], ids=str)
@pytest.mark.parametrize("strategy", NAMES)
def test_bytes_moved_beside_a_residual_and_for_a_mean_deviation(strategy, options, channels_last, window):
    """On chip each tensor once, a residual and its gradient as x and dx; in two passes p = 1 looks at x once more."""
    row = NAMES[strategy] if strategy != "cluster-resident" else {"cluster": 8, "blocks": 12, "slice_channels": 8}
    with backend(**row):
        x = case((3, 64, 12, 12), {}, torch.float32, channels_last).x
        forward, backward = moved(x, window=window, **options)
    again = strategy == "pipelined" and options.get("p") == 1  # goes through a sample once more, forward
    assert (forward.strategy, backward.strategy) == ("cluster-resident" if again else strategy, strategy)
    size = x.numel() * x.element_size()
    twice = strategy == "two-pass"
    residual, behind = "residual" in options, options.get("activation") is not None
    assert forward.activations / size == 2 + residual + twice * (2 if options.get("p") == 1 else 1)
    assert backward.activations / size == 3 + 2 * (residual and behind) + twice * (2 + (residual and behind))


def test_a_table_that_the_kernels_are_not_compiled_for():
    row = {**table.ROWS[-1], "threads": 2 * module().cuda_compiled_for["resident"][0]}
    g = fields.geometry(Norm(3), (2, 4, 5, 5))
    with pytest.raises(ValueError, match="more threads than the CUDA kernels are compiled for"):
        module().cuda_strategy(g, native.DTYPES[torch.float32], False, False, HOPPER.facts(), row)
