"""The seam's Triton kernels: on the GPU where there is one, else under Triton's interpreter."""

import math
from dataclasses import replace

import pytest
import torch
from interpreted import DEVICE, DTYPES, SINGLE, STAGED, Traffic, laid_out, some, table
from seam_oracle import EPS, Call, call_of, check, evaluate

from divnorm_kernels import divisive_norm
from divnorm_kernels.backends.triton import launch
from divnorm_kernels.fields import geometry
from divnorm_kernels.norm import Norm
from divnorm_kernels.reference import row_statistics
from divnorm_kernels.seam import triton as backend
from divnorm_kernels.seam import triton_kernels, triton_plans

LAST = torch.channels_last
CUT = STAGED | {"tile": 256, "apply": 256, "window": 32, "programs": 4}
"""Several tiles along every axis."""
CASES = {
    "a row a tile": (SINGLE, (3, 4, 5, 7), {"groups": 2}, {"l1": True}),
    "a row a tile, x kept, ReLU": (SINGLE, (2, 6, 9), {"groups": 3, "subtract_mean": False, "activation": "relu"}, {}),
    "one number": (SINGLE, (1, 1, 1, 1), {}, {"affine": False}),
    "volume, GELU by tanh": (SINGLE, (2, 6, 3, 2, 5), {"groups": 3, "activation": "gelu_tanh"}, {"residual": True}),
    "features": (SINGLE, (7, 23), {}, {"affine": False}),
    "many tiles": (CUT, (2, 18, 3, 7), {"groups": 2, "activation": "silu"}, {"l1": True}),
    "many tiles, TLU": (CUT, (2, 9, 6, 7), {"activation": "tlu"}, {"residual": True, "l1": True}),
    "many tiles, residual": (CUT, (2, 5, 40), {}, {"residual": True, "affine": False, "l1": True}),
    "many tiles, several of them an item": (CUT, (2, 37, 4), {}, {"l1": True}),
    "many tiles, features, TLU": (CUT, (7, 70), {"activation": "tlu"}, {"residual": True, "l1": True}),
    "over the batch": (
        SINGLE,
        (3, 4, 3, 5),
        {"groups": 4, "over_batch": True, "activation": "relu"},
        {"residual": True},
    ),
    "over the batch, many tiles, x kept, GELU": (
        CUT,
        (2, 9, 5, 5),
        {"over_batch": True, "subtract_mean": False, "activation": "gelu"},
        {"l1": True},
    ),
    "over the batch, single channels": (CUT, (3, 3, 70), {"groups": 3, "over_batch": True}, {"l1": True}),
    "over the batch, features": (CUT, (7, 70), {"over_batch": True, "activation": "silu"}, {"l1": True}),
}
LAYOUTS = [
    (name, layout)
    for name, (_, shape, _, _) in CASES.items()
    for layout in ((torch.contiguous_format, LAST) if len(shape) > 3 and shape[1] > 4 else (torch.contiguous_format,))
]


def case(name: str, layout=torch.contiguous_format, dtype: torch.dtype | None = None) -> Call:
    """Of a dtype that goes by its place, unless told."""
    _, shape, options, rest = CASES[name]
    call = call_of(shape, {"window": "all"} | options, dtype or DTYPES[list(CASES).index(name) % 3], **rest)
    big = {name: getattr(call, name) for name in ("x", "dy", "residual")}
    laid = {name: laid_out(t, layout) for name, t in big.items() if t is not None}
    return replace(call, **laid).to(DEVICE)


def check_statistics(g, x):
    """A mean is off by its own rounding and by that of the distances from it, a variance by that of its squares; and
    by the square of what the mean is off, which a difference of large squares would be off by itself.
    """
    mean, variance = backend.statistics(g, x)
    exact_mean, exact_variance = row_statistics(g, x.double())
    for got in (mean, variance):
        assert (got.dtype, got.shape) == (torch.float32, g.maps_shape[1:])
    depth = EPS * (x.numel() / mean.numel() + 8)
    off = EPS * exact_mean.abs() + depth * exact_variance.sqrt()
    assert ((mean.double() - exact_mean).abs() <= off).all()
    assert ((variance.double() - exact_variance).abs() <= depth * exact_variance + off.square()).all()


@pytest.mark.parametrize(("name", "layout"), some(LAYOUTS), ids=str)
def test_every_branch(name, layout):
    call = case(name, layout)
    with table(**CASES[name][0]):
        check_statistics(call.geometry, call.x)
        got = check(backend, call)
    assert got["y"].stride() == got["dx"].stride() == call.x.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype):
    """Strides that no kernel reads, and those of dy are others; an offset costs the statistics no accuracy."""
    call = case("many tiles, TLU", dtype=dtype)
    with table(**CUT):
        check(backend, replace(call, x=call.x.transpose(2, 3).contiguous().transpose(2, 3), dy=laid_out(call.dy, LAST)))
        check_statistics(call.geometry, call.x + 10_000)


@pytest.mark.parametrize("name", ["many tiles, TLU", "over the batch, features", "a row a tile"])
def test_wide_offsets(name, monkeypatch):
    """What tensors of more than 2^31 elements take: 64-bit offsets and table."""
    monkeypatch.setattr(launch, "_INT32", 1)
    call = case(name)
    with table(**CASES[name][0]):
        check_statistics(call.geometry, call.x)
        check(backend, call)


OPTIONS = [
    {"groups": 2, "activation": "relu"},
    {"groups": 4, "over_batch": True, "activation": "tlu"},
    {"over_batch": True, "subtract_mean": False, "activation": "silu"},
]


def step(x, given, options, prior, dy, name):
    """y, l1 and all gradients of a public call, whose statistics meet a prior on their way."""
    x, prior, *given = (t.detach().requires_grad_() for t in (x, prior, *given))
    weight, bias, sigma, residual, threshold = given
    bound = options["activation"] == "tlu"
    y, l1 = divisive_norm(
        *(x, weight, bias),
        window="all",
        sigma=sigma,
        residual=residual,
        threshold=threshold if bound else None,
        on_statistics=lambda mean, variance: (0.7 * mean + prior[0], variance + (mean - prior[1]).square()),
        return_l1=True,
        backend=name,
        **options,
    )
    wanted = (x, prior, *given) if bound else (x, prior, *given[:-1])
    return y, l1, *torch.autograd.grad((y, l1), wanted, (dy, torch.ones_like(l1)))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_through_the_public_call(options):
    """Both halves, with what is between them, and the way back; against the reference in float64.

    Statistics are within 2, s above 0.5 and the numbers of a row 60: what is summed up is off by 60 epsilon of itself.
    """
    x, residual = torch.randn(2, 3, 4, 3, 5, device=DEVICE)
    dy = torch.randn_like(x)
    weight, bias, threshold = torch.randn(3, 4, device=DEVICE)
    given = weight, bias, torch.rand(options.get("groups", 1), device=DEVICE) + 0.5, residual, threshold
    prior = torch.randn(2, *geometry(Norm("all", **options), x.shape).maps_shape[1:], device=DEVICE)
    got = step(x, given, options, prior, dy, "triton")
    exact = step(*(x.double(), [t.double() for t in given], options, prior.double(), dy.double()), "reference")
    for found, want in zip(got, exact, strict=True):
        sums = dy.numel() / want.numel()
        torch.testing.assert_close(found.double(), want, rtol=0, atol=60 * EPS * max(sums, want.abs().max().item()))


@pytest.mark.parametrize(("of", "value"), [("x", -math.inf), ("x", math.nan), ("dy", math.inf)])
def test_what_is_not_finite_reaches_what_it_reaches_in_the_reference(of, value):
    """And in other rows every bit stays what it was."""
    x, residual, dy = torch.randn(3, 2, 18, 5, device=DEVICE)
    given = *torch.randn(2, 18, device=DEVICE), torch.ones(2, device=DEVICE), residual, torch.randn(18, device=DEVICE)
    prior = torch.randn(2, 2, 2, 1, device=DEVICE)
    options = {"groups": 2, "activation": "silu"}
    spoiled = {"x": x.clone(), "dy": dy.clone()}
    spoiled[of][1, 10, 2] = value
    arguments = spoiled["x"], given, options, prior, spoiled["dy"]
    g = geometry(Norm("all", **options), x.shape)
    with table(**CUT):
        clean, got = step(x, given, options, prior, dy, "triton"), step(*arguments, "triton")
        rows = backend.statistics(g, spoiled["x"])
    expected = *row_statistics(g, spoiled["x"]), *step(*arguments, "reference")
    for place, (found, want) in enumerate(zip((*rows, *got), expected, strict=True)):
        assert torch.equal(found.isnan(), want.isnan()), place
        assert torch.equal(found.isfinite(), want.isfinite()), place
    other = torch.ones_like(x, dtype=torch.bool)
    other[1, 9:] = False
    for place in (0, 2):
        assert torch.equal(got[place][other], clean[place][other])


def test_results_that_are_not_wanted():
    """The others keep their bits."""
    call = case("many tiles, TLU")
    g, (weight, bias) = call.geometry, (call.weight, call.bias)
    full = evaluate(backend, call)
    y, l1 = backend.normalize(g, call.x, call.rows, weight, bias, False, call.residual, call.threshold)
    assert l1 is None
    assert torch.equal(y, full["y"])
    upstream, behind = (g, call.dy, None, call.x, call.rows), (call.residual, call.threshold)
    sums, dweight, dbias, dthreshold = backend.sums(*upstream, weight, bias, (False, True, False), *behind)
    assert (dweight, dthreshold) == (None, None)
    assert torch.equal(dbias, full["dbias"])
    assert torch.equal(sums[:2], torch.stack((full["pull"], full["product"])))
    sums, *nothing = backend.sums(*upstream, weight, bias, (False, False, False), *behind)
    assert nothing == [None, None, None]
    assert torch.equal(sums[1], full["product"])
    dx, dresidual = backend.gradient(*upstream, call.slopes, weight, bias, *behind, (False, True))
    assert dx is None
    assert torch.equal(dresidual, full["dresidual"])


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 4, 0), (0, 7), (3, 0)], ids=str)
@pytest.mark.parametrize("over_batch", [False, True])
def test_empty(shape, over_batch):
    call = call_of(shape, {"window": "all", "over_batch": over_batch, "activation": "tlu"}, residual=True, l1=True)
    got = evaluate(backend, call.to(DEVICE))
    assert got["y"].shape == got["dx"].shape == got["dresidual"].shape == shape
    results = [*backend.statistics(call.geometry, call.x.to(DEVICE)), *got.values()]
    assert all(not t.any() for t in results)


def test_addresses_that_are_not_aligned():
    """A call like one that was compiled for aligned addresses."""
    call = case("a row a tile", dtype=torch.float32)
    memory = torch.empty(2, call.x.numel() + 1, device=DEVICE)
    for begin in (0, 1):
        x, dy = (m[begin : begin + call.x.numel()].view(call.x.shape) for m in memory)
        check(backend, replace(call, x=x.copy_(call.x), dy=dy.copy_(call.dy)))


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter runs one program after the other")
def test_same_bits_on_every_run():
    call = call_of((64, 96, 28, 28), {"window": "all", "groups": 3, "over_batch": True}, l1=True).to(DEVICE)
    once, again = (evaluate(backend, call) for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once if once[name] is not None)
    once, again = (backend.statistics(call.geometry, call.x) for _ in range(2))
    assert all(map(torch.equal, once, again))


@pytest.mark.skipif(DEVICE != "cpu", reason="only the interpreter can be watched")
@pytest.mark.parametrize("name", ["a row a tile", "many tiles, TLU", "many tiles, features, TLU", "over the batch"])
def test_reads_and_writes(name, monkeypatch):
    """Every pass reads once what it needs and writes once what it makes."""
    call = case(name, dtype=torch.float32)
    x, dy, residual = call.x, call.dy, call.residual
    beside = [] if residual is None else [(residual, 1)]
    with table(**CASES[name][0]):
        traffic = Traffic(monkeypatch)
        backend.statistics(call.geometry, x)
        assert traffic.of("load", x) == 1
        got = evaluate(backend, call)
    written = [got[name] for name in ("y", "dx", "dresidual") if got[name] is not None]
    # normalize, sums and gradient after the statistics
    for t, reads in [(x, 4), (dy, 2), *((t, 3) for t, _ in beside)]:
        assert traffic.of("load", t) == reads
    assert all(traffic.of("store", t) == 1 and traffic.of("load", t) == 0 for t in written)


class Spy:
    """A kernel whose launches are counted, under its name."""

    def __init__(self, name, counts):
        self.name, self.counts, self.kernel = name, counts, getattr(triton_kernels, name)

    def __getitem__(self, grid):
        self.counts[self.name.removesuffix("_kernel")] += 1
        return self.kernel[grid]


@pytest.mark.parametrize(
    ("name", "merges"),
    [
        ("a row a tile", {"statistics": 0, "normalize": 1, "sums": 1, "gradient": 0}),
        ("features", {"statistics": 0, "normalize": 0, "sums": 1, "gradient": 0}),
        ("over the batch", {"statistics": 1, "normalize": 0, "sums": 1, "gradient": 0}),
    ],
)
def test_a_pass_is_a_launch_and_another_where_partial_sums_are_merged(name, merges, monkeypatch):
    """And no memory is filled for them, which would be one more."""
    counts = dict.fromkeys(merges, 0)
    for kernel in merges:
        monkeypatch.setattr(triton_kernels, f"{kernel}_kernel", Spy(f"{kernel}_kernel", counts))
    call = case(name)
    with table(**CASES[name][0]), monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_zeros", None)
        backend.statistics(call.geometry, call.x)
        evaluate(backend, call)
    assert counts == {kernel: 1 + more for kernel, more in merges.items()}


def test_a_table_is_as_wide_as_the_end_of_the_scratch_memory():
    """The kernels add to the table's numbers in its type, here to where the partial sums of dthreshold begin."""
    x = torch.empty(2800, 1 << 18, 1, device="meta")
    (plan,) = triton_plans.sums(geometry(Norm("all", activation="tlu"), x.shape), x, True)
    (small,) = triton_plans.sums(geometry(Norm("all", activation="tlu"), (2800, 1 << 17, 1)), x[:, : 1 << 17], True)
    assert plan.order.scratch * 2 / 3 < 2**31 <= plan.order.scratch
    assert (plan.table.dtype, small.table.dtype) == (torch.int64, torch.int32)


def test_through_the_dispatcher():
    """What compilers are told of the operators is what they give."""
    x, dy, residual = torch.randn(3, 2, 6, 5, device=DEVICE)
    weight, bias, threshold = torch.randn(3, 6, device=DEVICE)
    norm, scale = Norm("all", groups=2, activation="tlu").text, torch.tensor(0.3, device=DEVICE)
    rows = torch.rand(2, 2, 2, 1, device=DEVICE) + 0.5
    operators = torch.ops.divnorm_kernels
    given = weight, bias, residual, threshold
    parameters = torch.stack((weight, bias, threshold))
    for operator, arguments in (
        (operators.row_statistics, (x, residual, norm, "triton")),
        (operators.row_norm, ([], x, *rows, None, 0.5, *given, norm, True, "triton")),
        (operators.row_sums, (dy, scale, x, rows, *given, norm, [True, True, True], "triton")),
        (operators.row_gradient, (dy, scale, x, rows, rows, parameters, residual, norm, [True, True], "triton")),
    ):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_refusals():
    x = torch.randn(2, 4, 5, dtype=torch.float64, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"'triton', which cannot serve this call: x has dtype torch\.float64"):
        divisive_norm(x, window="all", on_statistics=lambda *rows: rows, backend="triton")
    with pytest.raises(RuntimeError, match="x is on meta"):
        divisive_norm(x.float().to("meta"), window="all", on_statistics=lambda *rows: rows, backend="triton")
