"""The operator of generalized divisive normalization: values, gradients, how the CPU gets them, and bad input."""

import math
from types import SimpleNamespace

import pytest
import torch
from gdn_oracle import FORMS, Call, call_of, check, evaluate
from torch.nn import functional as F

from divnorm_kernels import Span, gdn
from divnorm_kernels.backends.native import module
from divnorm_kernels.gdn import cpu
from divnorm_kernels.gdn.form import Form, form_of
from divnorm_kernels.layout import dense

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
PLAIN = Form(False, False, "")
SHAPES = {
    "many parts of a sample": (2, 128, 48, 45),
    "many samples in a part": (80, 24, 7, 7),
    "a sample alone in its part": (3, 200, 18, 18),
    "rows": (700, 130),
    "few channels": (2, 3, 70),
    "three dimensions": (2, 5, 3, 4, 6),
    "one channel": (3, 1, 9, 9),
    "one position": (5, 33, 1, 1),
}


def by_cpu(*args, **kwargs):
    return gdn(*args, backend="cpu", **kwargs)


def by_reference(*args, **kwargs):
    return gdn(*args, backend="reference", **kwargs)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients(name, channels_last):
    for form in FORMS:
        call = call_of(SHAPES[name], channels_last=channels_last, **form)
        assert check(by_cpu, call)["y"].stride() == call.x.stride()


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
def test_large_tensors(channels_last):
    """From 8 MB on results are written past the caches."""
    for dtype, samples in ((torch.float32, 1), (torch.bfloat16, 2)):
        call = call_of((samples, 8, 513, 515), dtype, channels_last, torch.float32)
        assert call.x.nbytes >= 8 << 20
        check(by_cpu, call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_dtypes(form, dtype):
    """Half types also beside parameters in float32, whose gradients have their type."""
    for channels_last in (False, True):
        for parameters in {dtype, torch.float64 if dtype == torch.float64 else torch.float32}:
            call = call_of((2, 24, 9, 13), dtype, channels_last, parameters, **form)
            check(by_cpu, call)
            check(by_reference, call)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_instruction_sets(form):
    before = module.instruction_set()
    try:
        for name in module.instruction_sets():
            module.use_instruction_set(name)
            for dtype in DTYPES:
                check(by_cpu, call_of((2, 5, 7, 9), dtype, **form))
    finally:
        module.use_instruction_set(before)


@pytest.mark.parametrize("window", [1, 2, 3, 50])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
def test_windows(window, channels_last):
    for shape in ((2, 6, 7, 10), (3, 4, 11), (2, 3, 4, 3, 5)):
        for form, dtype in zip(FORMS, (torch.float32, torch.bfloat16, torch.float64, torch.float32), strict=True):
            call = call_of(shape, dtype, channels_last, window=window, **form)
            check(by_cpu, call)
            check(by_reference, call)


def test_windows_of_other_kinds():
    """An odd window is an average pool; one that covers all is the mean; sides and axes differ."""
    x = torch.rand(2, 4, 6, 5, dtype=torch.float64) + 0.1
    beta, gamma = torch.rand(4, dtype=torch.float64), torch.rand(4, 4, dtype=torch.float64)
    mean = (x * x).mean((2, 3), keepdim=True).expand_as(x)
    pooled = {
        (3, 5): F.avg_pool2d(x * x, (3, 5), 1, (1, 2), count_include_pad=False),
        "all": mean,
        (1, Span(0, 9)): (x * x).flip(3).cumsum(3).flip(3) / torch.arange(5, 0, -1),
    }
    for window, s in pooled.items():
        expected = x / (F.conv2d(s, gamma[..., None, None], beta)).sqrt()
        for backend in ("cpu", "reference"):
            torch.testing.assert_close(gdn(x, beta, gamma, window=window, backend=backend), expected)


@pytest.mark.parametrize(("form", "window"), [*((form, None) for form in FORMS), (FORMS[0], 2), (FORMS[3], (3, "all"))])
def test_first_and_second_derivatives(form, window):
    call = call_of((1, 3, 3, 2), torch.float64, **form, window=window)
    inputs = [t.requires_grad_() for t in call.inputs]
    for backend in ("cpu", "reference"):

        def function(*inputs, backend=backend):
            return gdn(*inputs, **call.options, backend=backend)

        assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    alone = [torch.autograd.grad(by_cpu(*call.inputs, **call.options), t, call.dy)[0] for t in inputs]
    together = torch.autograd.grad(by_cpu(*call.inputs, **call.options), inputs, call.dy)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


@pytest.mark.parametrize("numbers", [1, 20, 60, 300, 1000])
@pytest.mark.parametrize("shape", [(3, 4, 5, 3), (7, 4), (2, 4, 1), (5, 4, 2), (2, 4, 100)])
def test_parts_are_all_numbers_once(shape, numbers, monkeypatch):
    """As the kernels read their places."""
    monkeypatch.setattr(cpu, "_NUMBERS", numbers)
    for x in (torch.empty(shape), torch.empty(shape).movedim(1, -1).contiguous().movedim(-1, 1)):
        for samples in (False, True):
            seen = []
            for offset, places, positions in cpu._parts(dense(x), samples):
                blocks, rows, columns, block, row, scratch_block, scratch_row = places
                scratch = []
                for b in range(blocks):
                    for r in range(rows):
                        seen += range(offset + b * block + r * row, offset + b * block + r * row + columns)
                        begin = b * scratch_block + r * scratch_row
                        scratch += range(begin, begin + columns)
                assert sorted(scratch) == list(range(positions * x.shape[1]))
                assert samples or positions == 1 or positions * x.shape[1] <= numbers
            assert sorted(seen) == list(range(x.numel()))


@pytest.fixture
def calls(monkeypatch):
    """The names of the kernels that are called."""
    names = []

    def spied(name):
        def call(*args):
            names.append(name)
            return getattr(module, name)(*args)

        return call

    kernels = ("gdn_pool", "gdn_forward", "gdn_slope", "gdn_slope_of_result", "gdn_backward")
    monkeypatch.setattr(cpu, "module", SimpleNamespace(**{name: spied(name) for name in kernels}))
    return names


OF_RESULT = ["gdn_slope_of_result", "gdn_backward"]
BY_PRODUCT = ["gdn_slope_of_result", "gdn_pool", "gdn_slope", "gdn_backward"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_backward_takes_two_products_where_y_tells_the_third(form, dtype, calls):
    """And three where one number of a part is zero, subnormal or not finite."""
    tiny = torch.finfo(dtype).tiny
    call = call_of((1, 3, 19), dtype, **form)
    for place in (0, 7, 18, 37, 56):  # in vectors and behind them
        for value, expected in ((1.0, OF_RESULT), (0.0, BY_PRODUCT), (tiny / 8, BY_PRODUCT)):
            call.x.view(-1)[place] = value
            calls.clear()
            check(by_cpu, call)
            assert calls == ["gdn_pool", "gdn_forward", *expected]
        call.x.view(-1)[place] = 1.0
    for value in (math.inf, math.nan):
        call.x.view(-1)[3] = value
        calls.clear()
        evaluate(by_cpu, call)
        assert calls[2:] == BY_PRODUCT


def test_of_parts_behind_one_whose_y_does_not_tell_none_is_tried(calls, monkeypatch):
    monkeypatch.setattr(cpu, "_NUMBERS", 3 * 32)
    call = call_of((1, 3, 4 * 32))
    call.x[0, 1, 40] = 0.0
    check(by_cpu, call)
    assert calls[8:] == [*OF_RESULT, *BY_PRODUCT, *2 * BY_PRODUCT[1:]]


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001])
def test_any_nan_of_a_parameter_makes_nans(bits):
    """In bfloat16 too, whose numbers are the upper half of float32's."""
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    for of_beta in (True, False):
        call = call_of((1, 4, 9), torch.bfloat16, parameters=torch.float32)
        (call.beta if of_beta else call.gamma[2])[2] = nan
        got = evaluate(by_cpu, call)
        assert got["y"].isnan().any(2).tolist() == [[False, False, True, False]]
        assert got["y"][0, 2].isnan().all()
        assert got["dx"].isnan().all()


def test_half_types_make_the_third_product(calls):
    check(by_cpu, call_of((1, 4, 5), torch.bfloat16))
    assert calls == ["gdn_pool", "gdn_forward", "gdn_pool", "gdn_slope", "gdn_backward"]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_is_not_finite_is_so_in_the_reference(form, value):
    for dtype in (torch.float32, torch.bfloat16):
        for of_dy in (False, True):
            call = call_of((2, 4, 3, 5), dtype, **form)
            (call.dy if of_dy else call.x)[1, 2, 1, 3] = value
            got, want = evaluate(by_cpu, call), evaluate(by_reference, call)
            for name, expected in want.items():
                assert torch.equal(got[name].isfinite(), expected.isfinite()), name


def test_bits_do_not_depend_on_the_passes_threads(monkeypatch):
    """Nor on the run; torch's products are given as many threads each time."""
    call = call_of((3, 48, 33, 31))
    first = evaluate(by_cpu, call)
    for count in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        for name, t in evaluate(by_cpu, call).items():
            assert torch.equal(t, first[name]), name


@pytest.mark.parametrize("shape", [(8, 192, 64, 64), (8, 128, 128, 128)])
def test_scratch_memory_is_a_small_share_of_x(shape):
    """And with a window that of three samples."""
    made = torch.empty(shape, device="meta")
    for x in (made, made.to(memory_format=torch.channels_last)):
        assert cpu._Work(PLAIN, x, 3)._scratch.numel() <= 3 * cpu._NUMBERS < x.numel() // 4
        assert cpu._Work(form_of(x, False, False, 3), x, 3)._scratch.numel() == 3 * x[0].numel() < x.numel() // 2


def test_empty():
    for shape in ((0, 4, 3, 3), (2, 4, 0, 3), (0, 4), (2, 0, 3)):
        for backend in ("cpu", "reference"):
            call = call_of(shape, backend=backend)
            results = evaluate(gdn, call)
            assert results["y"].shape == shape
            assert not any(t.any() for t in results.values())


def test_layouts_with_gaps_and_gradients_of_other_layouts():
    call = call_of((2, 8, 6, 10))
    wide = Call(call.x.repeat(1, 1, 1, 2)[..., ::2], call.beta, call.gamma, call.dy.transpose(2, 3))
    wide.dy = wide.dy.transpose(2, 3)
    wide.x.copy_(call.x)
    a, b = evaluate(by_cpu, call), evaluate(by_cpu, wide)
    assert all(torch.equal(a[name], b[name]) for name in a)
    check(by_cpu, Call(call.x, call.beta.repeat_interleave(2)[::2], call.gamma.t(), call.dy[:1].expand_as(call.x)))


def test_y_changed_in_place_before_backward_is_an_error():
    x = torch.randn(2, 4, 3, requires_grad=True)
    y = by_cpu(x, torch.ones(4), torch.eye(4))
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("backend", [None, "reference"])
def test_autocast_changes_nothing(backend):
    call = call_of((2, 16, 6, 6), backend=backend)
    plain = evaluate(gdn, call)
    inputs = [t.requires_grad_() for t in call.inputs]
    with torch.autocast("cpu", torch.bfloat16):
        y = gdn(*inputs, **call.options)
    cast = y, *torch.autograd.grad(y, inputs, call.dy)
    assert all(torch.equal(one, other) for one, other in zip(plain.values(), cast, strict=True))


def test_tensors_without_memory():
    """On a device that autocast does not know."""
    for form in FORMS:
        call = call_of((2, 4, 3, 5), torch.bfloat16, **form)
        made = evaluate(gdn, Call(*(t.to("meta") for t in (*call.inputs, call.dy)), call.options))
        for name, t in evaluate(gdn, call).items():
            assert (made[name].is_meta, made[name].shape, made[name].dtype) == (True, t.shape, t.dtype), name


def test_transformations_take_the_reference():
    call = call_of((3, 4, 5), torch.float64)
    per_sample = torch.func.vmap(lambda x: gdn(x[None], call.beta, call.gamma)[0])(call.x)
    torch.testing.assert_close(per_sample, by_cpu(*call.inputs))
    with pytest.raises(RuntimeError, match=r"^backend: got 'cpu', which neither torch\.func"):
        torch.func.vmap(lambda x: by_cpu(x[None], call.beta, call.gamma)[0])(call.x)


X, BETA, GAMMA = torch.randn(2, 4, 3, 3), torch.ones(4), torch.eye(4)
BAD = {
    "no tensor": ((1.0, BETA, GAMMA), {}, TypeError, "x: got float, expected a Tensor"),
    "integers": ((X.int(), BETA, GAMMA), {}, TypeError, "x: got dtype torch.int32, expected one of"),
    "one dimension": ((BETA, BETA, GAMMA), {}, ValueError, r"x: got shape \(4,\), expected \(N, C\)"),
    "six": ((X[None, None], BETA, GAMMA), {}, ValueError, r"x: got shape .* at most three spatial"),
    "sparse": ((X.to_sparse(), BETA, GAMMA), {}, TypeError, "x: got layout torch.sparse_coo"),
    "beta no tensor": ((X, 1.0, GAMMA), {}, TypeError, r"beta: got float, expected a Tensor of shape \(4,\)"),
    "beta's shape": ((X, BETA[:3], GAMMA), {}, ValueError, r"beta: got shape \(3,\), expected \(4,\), one per channel"),
    "gamma's shape": (
        (X, BETA, GAMMA[:3]),
        {},
        ValueError,
        r"gamma: got shape \(3, 4\), expected \(4, 4\), one per pair",
    ),
    "beta's dtype": ((X, BETA.double(), GAMMA), {}, TypeError, "beta: got dtype torch.float64, expected torch.float32"),
    "gamma's dtype": ((X.double(), BETA.double(), GAMMA), {}, TypeError, "gamma: got dtype torch.float32, expected"),
    "gamma's device": ((X, BETA, GAMMA.to("meta")), {}, ValueError, "gamma: got device meta, expected that of x, cpu"),
    "inverse": ((X, BETA, GAMMA), {"inverse": 1}, TypeError, "inverse: got 1 of type int, expected a bool"),
    "simplified": ((X, BETA, GAMMA), {"simplified": None}, TypeError, "simplified: got None"),
    "window": ((X, BETA, GAMMA), {"window": 0}, ValueError, "window: got 0, expected"),
    "window's type": ((X, BETA, GAMMA), {"window": 1.5}, TypeError, "window: got 1.5"),
    "window's entries": (
        (X, BETA, GAMMA),
        {"window": (3,)},
        ValueError,
        r"window: got \(3,\) with 1 entries, expected 2",
    ),
    "window without positions": (
        (X[..., 0, 0], BETA, GAMMA),
        {"window": 3},
        ValueError,
        "window: got 3 for x of shape",
    ),
    "no backend": ((X, BETA, GAMMA), {"backend": "gpu"}, ValueError, "backend: got 'gpu', expected None or one of"),
    "cuda": ((X, BETA, GAMMA), {"backend": "cuda"}, RuntimeError, "backend: got 'cuda', .* no kernels for this norm"),
    "cpu elsewhere": (
        (X.to("meta"), BETA.to("meta"), GAMMA.to("meta")),
        {"backend": "cpu"},
        RuntimeError,
        "backend: got 'cpu', which cannot serve this call: x is on meta",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    inputs, options, error, message = BAD[name]
    with pytest.raises(error, match=f"^{message}"):
        gdn(*inputs, **options)


def test_the_operators_refuse_what_they_cannot_read():
    forward, backward = torch.ops.divnorm_kernels.gdn_forward, torch.ops.divnorm_kernels.gdn_backward
    form = False, False, "", None
    freed = X.clone()
    freed.untyped_storage().resize_(0)
    for call in (lambda: gdn(freed, BETA, GAMMA), lambda: forward(freed, BETA, GAMMA, *form)):
        with pytest.raises(ValueError, match=r"^x: got a Tensor of shape .* with all of its elements in memory"):
            call()
    with pytest.raises(ValueError, match=r"^beta: got shape \(3,\)"):
        forward(X, BETA[:3], GAMMA, *form)
    with pytest.raises(ValueError, match=r"^dy: got shape \(1, 4, 3, 3\), expected that of x"):
        backward(X[:1], X, None, BETA, GAMMA, [True] * 3, *form)
    with pytest.raises(TypeError, match=r"^y: got dtype torch.float64, expected that of x"):
        backward(X, X, X.double(), BETA, GAMMA, [True] * 3, *form)
    with pytest.raises(ValueError, match=r"^needs: got \[True\], expected whether"):
        backward(X, X, None, BETA, GAMMA, [True], *form)
    with pytest.raises(RuntimeError, match="backend: got 'reference', which is no kernel for this call"):
        forward(X, BETA, GAMMA, False, False, "", "reference")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_freed_storage_is_told_before_it_is_read(backend):
    """By kernels and, of the reference, by torch."""
    for name in ("x", "beta", "gamma"):
        given = {"x": X.clone(), "beta": BETA.clone(), "gamma": GAMMA.clone()}
        given[name].untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=rf"^{name}: got a Tensor of shape"):
            gdn(*given.values(), backend=backend)


def test_views_that_negate_are_resolved():
    imaginary = torch.complex(torch.zeros_like(X), -X).conj().imag
    assert imaginary.is_neg()
    torch.testing.assert_close(gdn(imaginary, BETA, GAMMA), gdn(X, BETA, GAMMA))


def test_the_registered_operators_are_sound():
    x, beta, gamma = X.clone().requires_grad_(), BETA.clone().requires_grad_(), GAMMA.clone().requires_grad_()
    operators = torch.ops.divnorm_kernels
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operators.gdn_forward, (x, beta, gamma, False, True, "", None), test_utils=checks)
    y = by_cpu(X, BETA, GAMMA)
    rest = BETA, GAMMA, [True, False, True], False, False, "", None
    torch.library.opcheck(operators.gdn_backward, (X, X, y, *rest), test_utils=checks)
