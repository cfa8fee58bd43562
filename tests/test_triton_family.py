"""What the family adds to the Triton kernels: residuals, thresholds, p = 1, x in the numerator."""

import pytest
import torch
from interpreted import (
    DEVICE,
    DTYPES,
    SINGLE,
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

from divnorm_kernels import fields
from divnorm_kernels.backends import triton as backend
from divnorm_kernels.backends.triton import launch
from divnorm_kernels.norm import Norm
from divnorm_kernels.reference import divisive_norm as reference

NAN, INF = float("nan"), float("inf")
TLU, ONE, OVER_S = {"activation": "tlu"}, {"p": 1}, {"subtract_mean": False}
FILTERS = {"window": None, "norm_window": "all"}
CUTS = {"one program a row": SINGLE, "looped": SMALL_LOOPS, "staged": SMALL_TILES}
EVERYWHERE = {
    "TLU, residual": ((2, 5, 3, 5), {"window": 3, **TLU}, True),
    "residual alone": ((2, 9, 3, 5), {"window": (2, 3)}, True),
    "GELU, residual": ((2, 5, 3, 5), {"window": 3, "activation": "gelu"}, True),
    "p = 1": ((2, 9, 3, 5), {"window": 3, "norm_window": (2, 4), **ONE}, False),
    "p = 1, groups, ReLU": ((2, 18, 2, 5), {"window": 3, "groups": 2, "activation": "relu", **ONE}, False),
    "p = 1, no mean, TLU": ((2, 5, 3, 5), {"window": None, "norm_window": 3, **ONE, **TLU}, False),
    "p = 1, mean only": ((2, 5, 3, 5), {"window": 3, "norm_window": None, **ONE}, False),
    "p = 1, single channels": ((2, 3, 4, 5), {"window": 3, "groups": 3, **ONE}, False),
    "p = 1, whole, residual": ((2, 6, 3, 6), {"window": "all", "groups": 2, **ONE}, True),
    "p = 1, whole, no mean": ((2, 6, 3, 6), FILTERS | {"groups": 2, **ONE}, False),
    "p = 1, mixed extents": ((2, 6, 3, 5), {"window": "all", "norm_window": 3, **ONE}, False),
    "p = 1, blocks": ((2, 2, 40), {"window": 30, "norm_window": 17, "edges": "zero", **ONE}, False),
    "p = 1, x over s, SiLU, residual": ((2, 5, 3, 5), {"window": 3, "activation": "silu", **ONE, **OVER_S}, True),
    "p = 1, x over s, whole, TLU": ((2, 18, 2, 5), {"window": "all", "groups": 2, **ONE, **OVER_S, **TLU}, False),
    "x over s": ((2, 9, 3, 5), {"window": 3, "norm_window": (2, 4), **OVER_S}, False),
    "x over s, mean only, TLU": ((2, 5, 3, 5), {"window": 3, "norm_window": None, **OVER_S, **TLU}, False),
    "x over s, whole, ReLU, residual": ((2, 6, 3, 6), {"window": "all", "activation": "relu", **OVER_S}, True),
    "filter response norm, residual": ((2, 4, 3, 6), FILTERS | {"groups": 4, **TLU}, True),
    "features, TLU, residual": ((3, 40), {"window": 9, **TLU}, True),
    "features, p = 1, x over s": ((3, 40), {"window": 9, "norm_window": 4, **ONE, **OVER_S}, False),
    "features, p = 1, whole, TLU, residual": ((3, 40), {"window": "all", **ONE, **TLU}, True),
}
BATCH = {"over_batch": True}
CASES = {f"{cut}, {name}": (changes, *what) for name, what in EVERYWHERE.items() for cut, changes in CUTS.items()} | {
    "over the batch, TLU, residual": (SMALL_TILES, (3, 4, 3, 5), {"window": 3, **BATCH, **TLU}, True),
    "over the batch, p = 1": (
        SMALL_TILES,
        (3, 4, 3, 5),
        {"window": 3, "norm_window": 4, "groups": 2, **BATCH, **ONE},
        False,
    ),
    "over the batch, p = 1, no mean": (
        SMALL_TILES,
        (3, 4, 3, 5),
        {"window": None, "norm_window": 4, **BATCH, **ONE},
        False,
    ),
    "over the batch, p = 1, whole": (SMALL_TILES, (3, 3, 3, 6), {"window": "all", "groups": 3, **BATCH, **ONE}, True),
    "over the batch, p = 1, launches": (STAGED | UNORDERED, (3, 6, 3, 5), {"window": 3, **BATCH, **ONE}, False),
    "over the batch, x over s": (SMALL_TILES, (3, 4, 3, 5), {"window": 3, **BATCH, **OVER_S}, False),
    "over the batch, x over s, whole": (
        SMALL_TILES,
        (3, 3, 3, 6),
        {"window": "all", "groups": 3, **BATCH, **OVER_S},
        False,
    ),
    "features, over the batch, p = 1, TLU": (SMALL_TILES, (4, 40), {"window": 5, **BATCH, **ONE, **TLU}, True),
    "features, over the batch, p = 1, whole": (STAGED, (4, 40), {"window": "all", **BATCH, **ONE}, False),
    "staged, p = 1, whole, launches": (
        SMALL_TILES | UNORDERED,
        (2, 6, 3, 6),
        {"window": "all", "groups": 2, **ONE},
        False,
    ),
}


def case(name: str, dtype: torch.dtype, memory_format: torch.memory_format) -> Call:
    _, shape, options, adds = CASES[name]
    x, dy, residual = (laid_out(torch.randn(shape).to(dtype), memory_format) for _ in range(3))
    if list(CASES).index(name) % 4 == 1:
        residual = residual.contiguous()
    weight, bias, threshold = torch.randn(shape[1]), torch.randn(shape[1]).to(dtype), torch.randn(shape[1]).to(dtype)
    sigma = torch.rand(options.get("groups", 1)) + 0.5
    behind = residual if adds else None, threshold if options.get("activation") == "tlu" else None
    return on_device(Call(x, weight, bias, sigma, dy, 2.0, options, *behind))


@pytest.mark.parametrize("name", some(CASES))
def test_every_branch(name):
    """Every other case with the channels side by side, every other of these with a residual that is not."""
    index = list(CASES).index(name)
    memory_format = torch.channels_last if index % 2 else torch.contiguous_format
    with table(**CASES[name][0]):
        got = check(triton, case(name, DTYPES[index // 3 % len(DTYPES)], memory_format))
    if len(CASES[name][1]) == 4:
        for key in {"y", "dx", "dresidual"} & got.keys():
            assert got[key].is_contiguous(memory_format=memory_format), key


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", ["TLU, residual", "p = 1", "x over s"])
def test_every_dtype(name, cut, dtype):
    with table(**CUTS[cut]):
        check(triton, case(f"{cut}, {name}", dtype, torch.contiguous_format))


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", ["TLU, residual", "features, p = 1, whole, TLU, residual"])
def test_some_gradients_alone_have_the_bits_that_they_have_together(name, cut):
    call = case(f"{cut}, {name}", torch.float32, torch.contiguous_format)
    with table(**CUTS[cut]):
        together = evaluate(triton, call)
        inputs = dict(zip(("dx", "dweight", "dbias", "dsigma", "dresidual", "dthreshold"), call.inputs, strict=True))
        for wanted in (("dx",), ("dresidual",), ("dthreshold",), ("dx", "dweight", "dsigma"), ("dbias", "dresidual")):
            tensors = {key: t.detach().requires_grad_(key in wanted) for key, t in inputs.items()}
            x, weight, bias, sigma, residual, threshold = tensors.values()
            behind = {"residual": residual, "threshold": threshold}
            y, l1 = triton(x, weight, bias, sigma=sigma, return_l1=True, **behind, **call.options)
            outputs = [(out, d) for out, d in ((y, call.dy), (l1, l1.new_tensor(call.dl1))) if out.requires_grad]
            outs, upstream = zip(*outputs, strict=True)
            found = torch.autograd.grad(outs, [tensors[key] for key in wanted], upstream)
            for key, t in zip(wanted, found, strict=True):
                assert torch.equal(t, together[key]), key


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("shape", [(3, 4, 5, 7), (6, 40)], ids=str)
def test_a_threshold_that_is_no_number_and_gradients_that_are_none(shape, cut):
    """What a NaN stops is the threshold's all the same; an infinite dy that passes leaves it finite."""
    x, dy, threshold = torch.randn(shape), torch.randn(shape), torch.zeros(shape[1])
    threshold[0], threshold[1] = NAN, -INF
    dy[:, 1] = INF
    residual = torch.zeros(shape)
    residual[0, 2], residual[1, 3] = NAN, INF
    call = on_device(Call(x, None, None, 1.0, dy, 0.0, {"window": 3, **TLU}, residual, threshold))
    with table(**CUTS[cut]):
        got = evaluate(triton, call)
    want = evaluate(reference, call.in_double())
    assert got["y"][:, 0].isnan().all()
    for name in ("y", "dresidual", "dthreshold"):
        assert torch.equal(got[name].isnan(), want[name].isnan()), name
        torch.testing.assert_close(got[name].double(), want[name], rtol=1e-5, atol=1e-5, equal_nan=True)
    assert torch.equal(got["dx"].isfinite(), want["dx"].isfinite())


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("options", [{"groups": 2}, {"groups": 6, **BATCH}, FILTERS], ids=str)
def test_the_variance_of_p_1_is_that_of_its_deviation(options, cut):
    x = torch.randn(3, 6, 5, 7, device=DEVICE) + 10
    g = fields.geometry(Norm(**{"window": "all"} | options | ONE), tuple(x.shape))
    with table(**CUTS[cut]):
        y, maps, _ = backend.forward(g, x, None, None, 1.0, False, with_variance=True)
        expected_y, expected_maps, _ = backend.forward(g, x, None, None, 1.0, False)
    assert torch.equal(y, expected_y)
    assert torch.equal(maps[:-1], expected_maps)
    deviation = 1 / maps[-2] - 1
    torch.testing.assert_close(maps[-1], deviation.square(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("options", [{"window": 5}, {"window": "all"}, {"window": 3, **OVER_S}], ids=str)
def test_offset_costs_no_accuracy(options, cut):
    """As for p = 2: the only loss is the rounding of x, which the oracle sees too, but for a sign where v is 0."""
    x, dy = torch.randn(2, 9, 8, 8) + 1e4, torch.randn(2, 9, 8, 8)
    call = on_device(Call(x, None, None, 0.5, dy, 0.0, {**options, **ONE}))
    with table(**CUTS[cut]):
        got = evaluate(triton, call)
    expected = evaluate(reference, call.in_double())
    size = 1e4 if "subtract_mean" in options else 1
    assert (got["y"].double() - expected["y"]).abs().max() < 8 * 2**-11 * size


@pytest.mark.parametrize("name", ["p = 1", "TLU, residual", "p = 1, whole, residual"])
@pytest.mark.parametrize("cut", CUTS)
def test_same_bits_on_every_run_and_with_one_launch_or_several(cut, name):
    call = case(f"{cut}, {name}", torch.float32, torch.contiguous_format)
    with table(**CUTS[cut]):
        first, again = evaluate(triton, call), evaluate(triton, call)
    with table(**CUTS[cut] | UNORDERED):
        other = evaluate(triton, call)
    for key in first:
        assert torch.equal(first[key], again[key]), key
        assert torch.equal(first[key], other[key]), key


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", ["p = 1", "TLU, residual"])
def test_wide_offsets(name, cut, monkeypatch):
    """What tensors of more than 2^31 elements take: 64-bit offsets and table."""
    monkeypatch.setattr(launch, "_INT32", 1)
    with table(**CUTS[cut]):
        check(triton, case(f"{cut}, {name}", torch.float32, torch.contiguous_format))


@pytest.mark.skipif(DEVICE != "cpu", reason="only the interpreter can be watched")
@pytest.mark.parametrize(
    ("name", "reads", "extra"),
    [
        ("one program a row, TLU, residual", 1, 0),
        ("looped, TLU, residual", 2, 0),
        ("staged, GELU, residual", 2, 0),
        ("one program a row, p = 1, x over s, SiLU, residual", 1, 0),
        ("looped, p = 1, x over s, SiLU, residual", 2, 1),
        ("staged, p = 1, x over s, SiLU, residual", 2, 1),
        ("features, over the batch, p = 1, TLU", 2, 1),
    ],
)
def test_reads_and_writes(name, reads, extra, monkeypatch):
    """The residual is read once forward, and backward as often as x; p = 1 takes one read of x more forward."""
    call = case(name, torch.float32, torch.contiguous_format)
    x, residual = call.x.requires_grad_(), call.residual.requires_grad_()
    traffic = Traffic(monkeypatch)
    behind = {"residual": residual, "threshold": call.threshold}
    with table(**CASES[name][0]):
        y = triton(x, call.weight, call.bias, sigma=call.sigma, **behind, **call.options)
        assert (traffic.of("load", x), traffic.of("load", residual), traffic.of("store", y)) == (reads + extra, 1, 1)
        dx, dresidual = torch.autograd.grad(y, (x, residual), call.dy)
    assert traffic.of("load", x) == 2 * reads + extra
    assert traffic.of("load", residual) == 1 + reads
    assert (traffic.of("store", dx), traffic.of("store", dresidual)) == (1, 1)
