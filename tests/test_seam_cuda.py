"""The seam's CUDA kernels: on the GPU where there is one, else on the emulated device."""

import math
from dataclasses import replace

import pytest
import torch
from emulated import DEVICE, backend, module
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import check, evaluate
from strategies import DTYPES, recipes
from test_cuda import TWO_PASS, case, on_device
from torch.utils._python_dispatch import TorchDispatchMode

from divnorm_kernels import divisive_norm, fields
from divnorm_kernels.backends import cuda
from divnorm_kernels.checks import compute_dtype
from divnorm_kernels.norm import Norm
from divnorm_kernels.seam import backends
from divnorm_kernels.seam import cuda as kernels
from divnorm_kernels.seam.places import address, each, numbers

emulated_alone = pytest.mark.skipif(DEVICE != "cpu", reason="counts on the emulated device")
CASES = {
    "batch norm": ((5, 12, 7, 9), {"groups": 12, "over_batch": True}),
    "groups": ((2, 24, 8, 9), {"groups": 3}),
    "groups over the batch": ((3, 18, 5, 8), {"groups": 2, "over_batch": True}),
    "channel by channel": ((3, 4, 11, 5), {"groups": 4}),
    "layer norm": ((3, 18, 9, 7), {}),
    "line": ((2, 4, 161), {"groups": 2, "window": 400}),
    "volume": ((2, 16, 4, 5, 6), {"groups": 4, "over_batch": True, "edges": "zero"}),
    "one position": ((4, 300, 1, 1), {"groups": 3}),
    "one number a row": ((5, 6, 1), {"groups": 6}),
    "features": ((7, 523), {}),
    "features over the batch": ((9, 70), {"over_batch": True}),
}
ACTIVATIONS = ("relu", "tlu", "silu", "gelu", "gelu_tanh")


def unchanged(mean, variance):
    return mean, variance


def seam(*args, **kwargs):
    return divisive_norm(*args, backend="cuda", on_statistics=unchanged, **kwargs)


def made(shape, options, dtype=torch.float32, channels_last=False, residual=False):
    """A call by whole fields."""
    call = case(shape, {"window": "all"} | options, dtype, channels_last)
    if residual:
        call = replace(call, residual=torch.randn_like(call.x))
    if options.get("activation") == "tlu":
        call = replace(call, threshold=torch.randn_like(call.weight))
    return call


LAYOUTS = [
    pytest.param(name, channels_last, id=f"{name}, {'channels last' if channels_last else 'contiguous'}")
    for name, (shape, _) in CASES.items()
    for channels_last in ((False, True) if len(shape) > 2 else (False,))
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "channels_last"), LAYOUTS)
def test_values_and_gradients(name, channels_last, dtype):
    call = made(*CASES[name], dtype, channels_last)
    with backend(**TWO_PASS):
        got = check(seam, call)
    for t in (got["y"], got["dx"]):
        assert t.dtype == dtype
        assert t.stride() == call.x.stride()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("subtract_mean", [True, False])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_what_stands_behind_the_norm(activation, subtract_mean, residual, channels_last):
    behind = {"activation": activation, "subtract_mean": subtract_mean}
    for name, dtype in (("groups", torch.float32), ("batch norm", torch.bfloat16), ("features", torch.float64)):
        shape, options = CASES[name]
        with backend(**TWO_PASS):
            check(seam, made(shape, options | behind, dtype, channels_last and len(shape) > 2, residual))


@st.composite
def calls(draw):
    """Any layouts and dtypes, parameters there or not."""
    recipe = draw(recipes(extents={0: 200, 1: 200, 2: 24, 3: 7}))
    return replace(recipe, options=recipe.options | {"window": "all", "norm_window": "same", "p": 2}).call()


@settings(max_examples=max(20, settings.default.max_examples // 10))
@given(calls().map(on_device), st.sampled_from([{}, TWO_PASS]))
def test_any_call(call, row):
    with backend(**row):
        check(seam, call)


@pytest.mark.parametrize("with_l1", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["batch norm", "groups", "features"])
def test_what_the_caller_puts_between(name, channels_last, with_l1):
    """Its gradients too, and those of statistics that go elsewhere as well: as the reference's, to float64's places."""
    shape, options = CASES[name]
    results = []
    for kind in ("cuda", "reference"):
        torch.manual_seed(5)
        call = made(shape, options | {"activation": "silu"}, torch.float64, channels_last and len(shape) > 2, True)
        keys = ("x", "weight", "bias", "sigma", "residual")
        inputs = {key: getattr(call, key).clone().requires_grad_() for key in keys}
        g = fields.geometry(Norm(**call.options), shape)
        prior = torch.randn(2, *g.maps_shape[1:], dtype=torch.float64, device=DEVICE, requires_grad=True)
        seen = []

        def between(mean, variance, prior=prior, seen=seen):
            seen += [mean, variance]
            apart = mean - prior[0]
            return 0.9 * mean + 0.1 * prior[0], 0.8 * variance + 0.2 * prior[1].exp() + 0.05 * apart * apart

        with backend(**TWO_PASS):
            y, l1 = divisive_norm(**inputs, **call.options, on_statistics=between, return_l1=True, backend=kind)
            loss = (y * call.dy).sum() + seen[0].square().sum() + seen[1].sum() + (5 * l1 if with_l1 else 0)
            gradients = torch.autograd.grad(loss, (*inputs.values(), prior))
        results.append((y.detach(), l1.detach(), *(t.detach() for t in seen), *gradients))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def geometry_of(call):
    return fields.geometry(Norm(**call.options), tuple(call.x.shape))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["batch norm", "groups", "line", "features", "one number a row"])
def test_variance_keeps_its_places_far_from_zero(name, channels_last):
    """Moments are merged: the error is what rounding x itself would make, not that of squares of what is so large."""
    shape, options = CASES[name]
    call = made(shape, options, torch.float32, channels_last and len(shape) > 2)
    x = call.x + 1e4
    g = geometry_of(call)
    with backend(**TWO_PASS):
        mean, variance = kernels.statistics(g, x)
    want_mean, want = by_plain_sums(g, x.double())
    rounding = 1e4 * 2**-23
    assert (mean - want_mean).abs().max() <= rounding
    assert ((variance - want).abs() <= 2 * want.sqrt() * rounding).all()


def by_plain_sums(g, x):
    """Mean and biased variance by plain sums."""
    rows = x[:, None] if g.features else x.unflatten(1, (g.groups, -1))
    dims = [*range(2, rows.dim()), *([0] if g.over_batch else [])]
    variance, mean = torch.var_mean(rows, dims, correction=0)
    return mean.view(g.maps_shape[1:]), variance.view(g.maps_shape[1:])


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["batch norm", "groups", "features"])
def test_what_is_not_finite_reaches_what_it_reaches_in_the_reference(name, channels_last, number):
    shape, options = CASES[name]
    for where in ("x", "dy"):
        call = made(shape, options | {"activation": "relu"}, torch.float32, channels_last and len(shape) > 2)
        getattr(call, where)[1, 3] = number
        with backend(**TWO_PASS):
            got, want = evaluate(seam, call), evaluate(reference, call)
        for result, have in got.items():
            assert torch.equal(have.isfinite(), want[result].isfinite()), (where, result)


def reference(*args, **kwargs):
    return divisive_norm(*args, backend="reference", on_statistics=unchanged, **kwargs)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["batch norm", "groups", "features"])
def test_the_same_bits_again(name, channels_last):
    shape, options = CASES[name]
    call = made(shape, options | {"activation": "tlu"}, torch.float32, channels_last and len(shape) > 2, True)
    with backend(**TWO_PASS):
        first, again = evaluate(seam, call), evaluate(seam, call)
    for name_of, t in first.items():
        assert torch.equal(t, again[name_of]), name_of


class NoNumberIsAskedFor(TorchDispatchMode):
    """Of a tensor, for which the host would wait."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


def test_no_half_waits_for_the_device():
    call = made(*CASES["batch norm"])
    g, given = geometry_of(call), (call.weight, call.bias)
    with backend(), NoNumberIsAskedFor():
        mean, variance = kernels.statistics(g, call.x)
        rows = torch.stack((mean, variance.rsqrt()))
        _, l1 = kernels.normalize(g, call.x, rows, *given, True, None, None)
        sums, *_ = kernels.sums(g, call.dy, l1, call.x, rows, *given, (True, True, False), None, None)
        kernels.gradient(g, call.dy, l1, call.x, rows, sums[:2], *given, None, None, (True, False))


@pytest.mark.parametrize("over_batch", [False, True])
@pytest.mark.parametrize("shape", [(0, 6, 3), (2, 6, 0), (0, 7)], ids=str)
def test_empty(shape, over_batch):
    call = made(shape, {"over_batch": over_batch, "groups": 1 if len(shape) == 2 else 3})
    with backend():
        got, want = evaluate(seam, call), evaluate(reference, call)
    for result, have in got.items():
        assert torch.equal(have, want[result]), result


def test_which_calls_they_serve():
    call = made(*CASES["groups"])
    g = geometry_of(call)
    windows = fields.geometry(Norm(window=3, groups=3), tuple(call.x.shape))
    with backend():
        assert backends.select("cuda", g, call.x) is kernels
        assert kernels.refusal(g, call.x.to("meta")) == f"x is on meta, this backend computes on {DEVICE} devices"
        with pytest.raises(ValueError, match="rows are of fields that are whole and both there"):
            cuda.kept("CudaSeam", windows, call.x, False)


# What they read and write.


class Launched:
    """Every half of a call on tensors that are there before: ``run`` by name, ``large`` what each reads and writes."""

    def __init__(self, call, with_gradients=True, with_l1=True):
        g, x = geometry_of(call), call.x
        compute = compute_dtype(x)
        shape = g.maps_shape[1:]
        self.rows, self.slopes = torch.rand(2, *shape, dtype=compute) + 0.5, torch.rand(2, *shape, dtype=compute)
        self.statistics, self.sums = torch.empty(2, *shape, dtype=compute), torch.empty(3, *shape, dtype=compute)
        self.y, self.dx = torch.empty_like(x), torch.empty_like(x)
        residual, dresidual = call.residual, None if call.residual is None else torch.empty_like(x)
        given = [call.weight, call.bias, call.threshold]
        self.gradients = [None if t is None or not with_gradients else torch.empty_like(t) for t in given]
        self.l1, scale = (torch.rand((), dtype=compute) if with_l1 else None for _ in range(2))
        made = cuda.kept("CudaSeam", g, x, residual is not None)
        self.scratch = [torch.empty(count, dtype=torch.uint8) for count in made.scratch_bytes]
        where = [(0, 0, t.data_ptr()) for t in self.scratch]
        at = address
        forward = at(x), each(self.rows), numbers(*given), at(residual), at(self.y), at(self.l1)
        backward = at(call.dy), at(scale), at(x), each(self.rows)
        self.run = {
            "statistics": lambda: made.statistics(at(x), each(self.statistics), where[0]),
            "normalize": lambda: made.normalize(*forward, where[1]),
            "sums": lambda: made.sums(
                *backward, numbers(*given), at(residual), at(self.sums), numbers(*self.gradients), where[2]
            ),
            "gradient": lambda: made.gradient(
                *backward, at(self.slopes), numbers(*given), at(residual), at(self.dx), at(dresidual), where[3]
            ),
        }
        reads = {"statistics": [x], "normalize": [x, residual], "sums": [x, call.dy, residual]}
        reads["gradient"] = reads["sums"]
        writes = {"statistics": [], "normalize": [self.y], "sums": [], "gradient": [self.dx, dresidual]}
        present = {half: [t for t in reads[half] if t is not None] for half in reads}
        self.reads, self.writes = present, {half: [t for t in writes[half] if t is not None] for half in writes}
        self.kept = (given, scale, dresidual)

    @property
    def results(self):
        """Of all halves that have been run."""
        return [t for t in (self.statistics, self.y, self.l1, self.sums, *self.gradients, self.dx) if t is not None]


@emulated_alone
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("name", "channels_last"), LAYOUTS)
def test_every_number_is_moved_once(name, channels_last, residual, dtype):
    """Statistics read x; sums read x and dy, and what they are made of beside; no half touches a number twice."""
    call = made(CASES[name][0], CASES[name][1] | {"activation": "silu"}, dtype, channels_last, residual)
    once = call.x.nbytes
    with backend(**TWO_PASS):
        launched = Launched(call)
        for half, run in launched.run.items():
            module().forget_traffic()
            for t in (*launched.reads[half], *launched.writes[half]):
                module().watch(t.data_ptr(), t.nbytes)
            run()
            assert [module().traffic_of(t.data_ptr()) for t in launched.reads[half]] == [(once, 0)] * len(
                launched.reads[half]
            ), half
            assert [module().traffic_of(t.data_ptr()) for t in launched.writes[half]] == [(0, once)] * len(
                launched.writes[half]
            ), half
        module().forget_traffic()


@emulated_alone
@pytest.mark.parametrize("with_l1", [False, True])
@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("name", ["batch norm", "groups"])
def test_launches(name, with_gradients, with_l1):
    """One beside the kernel, that clears its counters or adds up; both where l1 has to be."""
    call = made(*CASES[name])
    expected = {"statistics": 2, "normalize": 2 + with_l1, "sums": 2, "gradient": 2}
    with backend(**TWO_PASS):
        launched = Launched(call, with_gradients, with_l1)
        for half, run in launched.run.items():
            module().keep_costs(1 << 20)
            run()
            found = len(module().launched())
            module().keep_costs(0)
            assert found == expected[half], half
