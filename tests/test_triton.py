"""The Triton kernels: on the GPU where there is one, else under Triton's interpreter on the CPU."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from interpreted import (
    DEVICE,
    DTYPES,
    EXAMPLES,
    LOOPED,
    SINGLE,
    SMALL,
    SMALL_LOOPS,
    SMALL_TILES,
    STAGED,
    UNORDERED,
    Traffic,
    laid_out,
    on_device,
    some,
    table,
    triton,
)
from oracle import Call, check, evaluate
from strategies import calls

from divnorm_kernels import divisive_norm, fields
from divnorm_kernels.backends import triton as backend
from divnorm_kernels.backends.triton import launch
from divnorm_kernels.norm import Norm
from divnorm_kernels.reference import divisive_norm as reference

CASES = {
    "one program a row": (SINGLE, (3, 5, 6, 7), {"window": 3}),
    "one program a row, groups": (SINGLE, (3, 6, 5, 7), {"window": (2, 4), "norm_window": 3, "groups": 3}),
    "one program a row, ReLU": (SINGLE, (3, 4, 5, 7), {"window": "all", "activation": "relu"}),
    "one program a row, SiLU": (SINGLE, (3, 5, 6, 7), {"window": 3, "activation": "silu"}),
    "one program a row, whole, GELU": (SINGLE, (5, 6, 3, 5), {"window": "all", "groups": 2, "activation": "gelu"}),
    "one program a row, features, GELU by tanh": (SINGLE, (7, 23), {"window": 6, "activation": "gelu_tanh"}),
    "one program a row, blocks": (SINGLE, (2, 2, 50), {"window": 17, "norm_window": 40}),
    "one program a row, features": (
        SINGLE,
        (7, 23),
        {"window": 6, "norm_window": 13, "edges": "zero", "activation": "relu"},
    ),
    "one program a row, whole": (SINGLE, (5, 6, 3, 5), {"window": "all", "groups": 2}),
    "one program a row, whole features": (SINGLE, (7, 23), {"window": "all"}),
    "one program a row, one position": (SINGLE, (1, 1, 1, 1), {"window": 2, "edges": "zero"}),
    "one program a row, launches": (UNORDERED, (3, 4, 5, 6), {"window": 3}),
    "looped": (LOOPED, (3, 9, 9, 10), {"window": 3}),
    "looped, groups": (SMALL_LOOPS, (3, 20, 5, 7), {"window": (5, 2), "norm_window": (1, 8), "groups": 2}),
    "looped, ReLU": (SMALL_LOOPS, (2, 9, 9, 10), {"window": 3, "activation": "relu"}),
    "looped, SiLU": (SMALL_LOOPS, (2, 9, 9, 10), {"window": 3, "activation": "silu"}),
    "looped, GELU": (SMALL_LOOPS, (2, 9, 9, 10), {"window": 3, "activation": "gelu"}),
    "looped, whole, GELU by tanh": (SMALL_LOOPS, (3, 20, 5, 9), {"window": "all", "activation": "gelu_tanh"}),
    "looped, volume": (SMALL_LOOPS, (2, 3, 3, 5, 4), {"window": (3, 2, "all"), "norm_window": 2}),
    "looped, blocks": (SMALL_LOOPS, (2, 2, 160), {"window": 101, "norm_window": 40, "edges": "zero"}),
    "looped, single channels": (SMALL_LOOPS, (2, 3, 7, 9), {"window": 3, "groups": 3}),
    "looped, mean only": (SMALL_LOOPS, (2, 6, 6, 5), {"window": 3, "norm_window": None}),
    "looped, no mean": (SMALL_LOOPS, (2, 6, 6, 5), {"window": None, "norm_window": 4}),
    "looped, whole": (SMALL_LOOPS, (3, 20, 5, 9), {"window": "all", "groups": 2}),
    "looped, whole, no mean": (SMALL_LOOPS, (2, 4, 5, 9), {"window": None, "norm_window": "all"}),
    "looped, whole, mean only": (SMALL_LOOPS, (2, 4, 5, 9), {"window": "all", "norm_window": None}),
    "staged": (STAGED, (2, 9, 9, 10), {"window": 3}),
    "staged, ReLU": (STAGED, (2, 9, 9, 10), {"window": 3, "activation": "relu"}),
    "staged, SiLU": (STAGED, (2, 9, 9, 10), {"window": 3, "activation": "silu"}),
    "staged, GELU": (STAGED, (2, 9, 9, 10), {"window": 3, "activation": "gelu"}),
    "staged, mean only, GELU by tanh": (
        STAGED,
        (2, 6, 6, 5),
        {"norm_window": None, "window": 3, "activation": "gelu_tanh"},
    ),
    "staged, neither, SiLU": (SMALL_TILES, (3, 6, 6, 5), {"window": None, "activation": "silu"}),
    "staged, features, GELU": (SMALL_TILES, (7, 70), {"window": 9, "activation": "gelu"}),
    "staged, features, ReLU": (STAGED, (3, 300), {"window": 9, "activation": "relu"}),
    "staged, small tiles": (SMALL_TILES, (3, 10, 5, 7), {"window": (5, 2), "norm_window": (1, 8)}),
    "staged, launches": (SMALL_TILES | UNORDERED, (2, 4, 5, 7), {"window": 3, "edges": "zero", "groups": 2}),
    "staged, volume": (SMALL_TILES, (2, 3, 3, 5, 4), {"window": (3, 2, "all"), "norm_window": 2}),
    "staged, blocks of blocks": (STAGED, (1, 2, 160), {"window": 101, "norm_window": 150}),
    "staged, blocks and a second axis": (STAGED, (2, 2, 5, 40), {"window": (2, 30), "norm_window": (3, 20)}),
    "staged, mean only": (STAGED, (2, 6, 6, 5), {"window": 3, "norm_window": None}),
    "staged, no mean": (STAGED, (2, 6, 6, 5), {"window": None, "norm_window": 4}),
    "staged, neither": (SMALL_TILES, (3, 6, 6, 5), {"window": None}),
    "staged, mixed extents": (STAGED, (2, 6, 6, 5), {"window": "all", "norm_window": 3}),
    "staged, whole": (SMALL_TILES, (2, 6, 5, 9), {"window": "all", "groups": 2}),
    "staged, whole, no mean": (SMALL_TILES, (2, 4, 5, 9), {"window": None, "norm_window": "all"}),
    "staged, whole, mean only": (SMALL_TILES, (2, 4, 5, 9), {"window": "all", "norm_window": None}),
    "over the batch": (SMALL_TILES, (3, 4, 5, 8), {"window": 3, "norm_window": 4, "groups": 2, "over_batch": True}),
    "over the batch, mean only": (SINGLE, (4, 6, 3, 5), {"window": 3, "norm_window": None, "over_batch": True}),
    "over the batch, whole": (SMALL_TILES, (3, 3, 5, 9), {"window": "all", "groups": 3, "over_batch": True}),
    "over the batch, SiLU": (SMALL_TILES, (3, 4, 5, 8), {"window": 3, "over_batch": True, "activation": "silu"}),
    "over the batch, whole, GELU": (
        SMALL_TILES,
        (3, 3, 5, 9),
        {"window": "all", "over_batch": True, "activation": "gelu"},
    ),
    "over the batch, launches": (STAGED | UNORDERED, (4, 6, 3, 5), {"window": 3, "over_batch": True}),
    "features, staged": (SMALL_TILES, (7, 70), {"window": 20, "norm_window": 3}),
    "features, staged, whole": (SMALL_TILES, (7, 70), {"window": "all"}),
    "features, over the batch": (SMALL_TILES, (7, 70), {"window": 5, "over_batch": True}),
    "features, over the batch, whole": (STAGED, (7, 70), {"window": "all", "over_batch": True}),
}


def case(name: str, dtype: torch.dtype, memory_format: torch.memory_format, sigmas: bool) -> Call:
    _, shape, options = CASES[name]
    x, dy = (laid_out(torch.randn(shape).to(dtype), memory_format) for _ in range(2))
    weight, bias = torch.randn(shape[1]), torch.randn(shape[1]).to(dtype)
    sigma = torch.rand(options.get("groups", 1)) + 0.5 if sigmas else torch.tensor(0.8)
    return on_device(Call(x, weight, bias, sigma, dy, 2.0, options))


LAYOUTS = {
    f"{name}, {layout}": (name, memory_format)
    for name, (_, shape, _) in CASES.items()
    for layout, memory_format in (("contiguous", torch.contiguous_format), ("channels last", torch.channels_last))
    if len(shape) > 2 or layout == "contiguous"
}


@pytest.mark.parametrize("layout", some(LAYOUTS))
def test_every_branch(layout):
    name, memory_format = LAYOUTS[layout]
    dtype = DTYPES[list(CASES).index(name) % len(DTYPES)]
    with table(**CASES[name][0]):
        got = check(triton, case(name, dtype, memory_format, sigmas=memory_format == torch.contiguous_format))
    if len(CASES[name][1]) == 4:
        assert got["y"].is_contiguous(memory_format=memory_format)
        assert got["dx"].is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["one program a row", "looped", "staged", "over the batch, whole", "staged, GELU"])
def test_every_dtype(name, dtype):
    with table(**CASES[name][0]):
        check(triton, case(name, dtype, torch.contiguous_format, sigmas=False))


@EXAMPLES
@given(calls(dtypes=DTYPES, extents=SMALL).map(on_device))
def test_values_and_gradients(call: Call):
    check(triton, call)


@EXAMPLES
@given(calls(dtypes=DTYPES, extents=SMALL).map(on_device))
def test_values_and_gradients_in_stages(call: Call):
    with table(**STAGED):
        check(triton, call)


@EXAMPLES
@given(calls(dtypes=DTYPES, extents=SMALL).map(on_device))
def test_values_and_gradients_in_a_loop(call: Call):
    with table(**LOOPED):
        check(triton, call)


@pytest.mark.parametrize(
    "name", ["one program a row", "looped", "staged", "one program a row, SiLU", "looped, GELU", "staged, SiLU"]
)
def test_parameters_and_gradients_that_are_not_there(name):
    """Without weight, bias, a sigma that learns, and a gradient of l1; and with some gradients not wanted."""
    call = case(name, torch.float32, torch.contiguous_format, sigmas=False)
    with table(**CASES[name][0]):
        check(triton, dataclasses.replace(call, weight=None, bias=None, sigma=0.7))
        x, weight = call.x.clone().requires_grad_(), call.weight.clone().requires_grad_()
        y = triton(x, weight, call.bias, sigma=call.sigma, **call.options)
        (alone,) = torch.autograd.grad(y, weight, call.dy, retain_graph=True)
        dx, together = torch.autograd.grad(y, (x, weight), call.dy)
        _, l1 = triton(x, weight, call.bias, sigma=call.sigma, return_l1=True, **call.options)
        (of_l1,) = torch.autograd.grad(l1, x)
        expected = reference(x.double(), sigma=call.sigma.double(), return_l1=True, **call.options)[1]
    assert torch.equal(alone, together)
    assert dx.isfinite().all()
    torch.testing.assert_close(of_l1, torch.autograd.grad(expected, x)[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["staged, small tiles", "over the batch, whole", "one program a row", "looped"])
def test_same_bits_on_every_run_and_with_one_launch_or_several(name):
    call = case(name, torch.float32, torch.contiguous_format, sigmas=True)
    with table(**CASES[name][0]):
        first, again = evaluate(triton, call), evaluate(triton, call)
    with table(**CASES[name][0] | UNORDERED):
        other = evaluate(triton, call)
    for key in first:
        assert torch.equal(first[key], again[key]), key
        assert torch.equal(first[key], other[key]), key


@pytest.mark.parametrize("name", ["one program a row", "looped", "staged", "features, staged", "over the batch"])
def test_wide_offsets(name, monkeypatch):
    """What tensors of more than 2^31 elements take: 64-bit offsets and table."""
    monkeypatch.setattr(launch, "_INT32", 1)
    with table(**CASES[name][0]):
        check(triton, case(name, torch.float32, torch.contiguous_format, sigmas=True))


@pytest.mark.parametrize("changes", [SINGLE, LOOPED, STAGED], ids=["single", "looped", "staged"])
@pytest.mark.parametrize("options", [{"window": 5}, {"window": "all"}, {"window": 1}], ids=str)
def test_offset_costs_no_accuracy(options, changes):
    """With x = 1e4 + unit variance in float32, the only loss is the rounding of x, which the oracle sees too."""
    x, dy = torch.randn(2, 9, 8, 8) + 1e4, torch.randn(2, 9, 8, 8)
    call = on_device(Call(x, None, None, 0.5, dy, 1.0, options))
    with table(**changes):
        got = evaluate(triton, call)
    expected = evaluate(reference, call.in_double())
    for name in expected:
        error = (got[name].double() - expected[name]).abs().max().item()
        assert error < 8 * 2**-11, f"{name}: {error}"


@EXAMPLES
@given(
    calls(dtypes=DTYPES, extents=SMALL).map(on_device),
    st.sampled_from((float("inf"), -float("inf"), float("nan"))),
    st.integers(0, 2**31),
    st.sampled_from((SINGLE, LOOPED, STAGED)),
)
def test_non_finite_values_reach_exactly_the_reference_set(call: Call, value: float, where: int, changes: dict):
    x = call.x.clone(memory_format=torch.preserve_format)
    x[tuple(int(i) for i in torch.unravel_index(torch.tensor(where % x.numel()), x.shape))] = value
    call = dataclasses.replace(call, x=x)
    with table(**changes):
        got = evaluate(triton, call)["y"]
    want = evaluate(reference, call.in_double())["y"]  # in float32 torch's GELU of infinity may be NaN (AVX-512)
    assert torch.equal(want.isfinite(), got.isfinite())
    assert torch.equal(want.isnan(), got.isnan())


def test_an_infinite_mean_stays_one_when_chunks_of_channels_are_merged():
    """Found by the search above: the chunk after one with an infinity made the mean NaN."""
    x = torch.randn(3, 34, 3, 7, device=DEVICE)
    x[0, 0, 0, 0] = float("inf")
    with table(**STAGED):
        got = triton(x, window=5, groups=2)
    want = reference(x, window=5, groups=2)
    assert torch.equal(want.isnan(), got.isnan())
    assert torch.equal(want.isfinite(), got.isfinite())


@pytest.mark.parametrize("shape", [(0, 4, 5, 5), (2, 4, 0, 5), (0, 7), (3, 0)], ids=str)
def test_empty(shape):
    x, affine, sigma = torch.zeros(shape), torch.ones(shape[1]), torch.ones(())
    results = evaluate(triton, on_device(Call(x, affine, affine, sigma, torch.zeros(shape), 1.0, {"window": 3})))
    assert results["y"].shape == results["dx"].shape == shape
    assert all(not results[name].any() for name in ("l1", "dweight", "dbias", "dsigma"))


def test_addresses_that_are_not_aligned():
    """A call like one that was compiled for aligned addresses."""
    memory = torch.randn(2 * 4 * 6 * 8 + 1, device=DEVICE)
    aligned, shifted = (memory[i : i + 2 * 4 * 6 * 8].view(2, 4, 6, 8) for i in (0, 1))
    for x in (aligned, shifted):
        check(triton, Call(x, None, None, 1.0, x.clone(), 1.0, {"window": 3}))


def test_the_maps_of_whole_fields_are_one_number_a_row():
    x = torch.randn(2, 6, 5, 4, device=DEVICE)
    for options, expected in (
        ({"window": "all", "groups": 3}, (2, 2, 3, 1, 1)),
        ({"window": "all", "groups": 3, "over_batch": True}, (2, 1, 3, 1, 1)),
        ({"window": (3, "all")}, (2, 2, 1, 5, 4)),
        ({"window": None, "norm_window": "all"}, (1, 2, 1, 1, 1)),
    ):
        g = fields.geometry(Norm(**options), tuple(x.shape))
        _, maps, _ = backend.forward(g, x, None, None, 1.0, False)
        assert maps.shape == g.kept_shape(False) == expected
        assert maps.isfinite().all()


def test_through_the_dispatcher():
    """Compilers and dispatch modes see the same numbers through the raw operators."""
    x = torch.randn(2, 6, 5, 4, device=DEVICE)
    y, maps, l1 = torch.ops.divnorm_kernels.forward(
        x, None, None, None, 0.5, Norm("all", groups=2, activation="relu").text, True, True, "triton"
    )
    expected, l1_expected = triton(x, window="all", groups=2, sigma=0.5, activation="relu", return_l1=True)
    assert torch.equal(y, expected)
    assert torch.equal(l1, l1_expected)
    assert maps.shape == (3, 2, 2, 1, 1)
    torch.library.opcheck(
        torch.ops.divnorm_kernels.forward,
        (x, None, None, None, 0.5, Norm("all", groups=2, activation="relu").text, True, True, "triton"),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_refusals():
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"'triton', which cannot serve this call: x has dtype torch\.float64"):
        triton(x, window=3)
    with pytest.raises(RuntimeError, match="x is on meta"):
        triton(torch.empty(2, 4, 5, 5, device="meta"), window=3)
    assert divisive_norm(x, window=3).dtype == torch.float64


@pytest.mark.skipif(DEVICE != "cpu", reason="only the interpreter can be watched")
@pytest.mark.parametrize(
    ("name", "reads"),
    [
        ("one program a row, groups", 1),
        ("one program a row, features", 1),
        ("one program a row, whole", 1),
        ("looped", 2),
        ("looped, groups", 2),
        ("looped, whole", 2),
        ("one program a row, SiLU", 1),
        ("looped, SiLU", 2),
        ("staged, GELU", 2),
        ("staged, small tiles", 2),
        ("staged, whole", 2),
        ("features, staged", 2),
        ("over the batch", 2),
        ("staged, neither", 1),
    ],
)
def test_reads_and_writes_of_the_activation(name, reads, monkeypatch):
    """One read of x, and of dy, where a program holds the row, two elsewhere; one write of y and of dx."""
    call = case(name, torch.float32, torch.contiguous_format, sigmas=True)
    x, weight = call.x.requires_grad_(), call.weight.requires_grad_()
    traffic = Traffic(monkeypatch)
    with table(**CASES[name][0]):
        y = triton(x, weight, call.bias, sigma=call.sigma, **call.options)
        assert (traffic.of("load", x), traffic.of("store", y)) == (reads, 1)
        dx, _ = torch.autograd.grad(y, (x, weight), call.dy)
    assert (traffic.of("load", x), traffic.of("load", call.dy), traffic.of("store", dx)) == (2 * reads, reads, 1)
