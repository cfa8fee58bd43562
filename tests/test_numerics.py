"""The numerical promises: offsets, drift, non-finite values, repeatability, huge and empty tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import Call, check, evaluate
from strategies import calls
from variance import OPTIONS, SCALES, SHAPES, check_variance

from divnorm_kernels import divisive_norm
from divnorm_kernels.backends import cpu as backend
from divnorm_kernels.fields import geometry
from divnorm_kernels.norm import Norm
from divnorm_kernels.reference import divisive_norm as reference

FORMATS = [torch.contiguous_format, torch.channels_last]
SETS = backend.instruction_sets()


def cpu(*args, **kwargs):
    return divisive_norm(*args, backend="cpu", **kwargs)


@pytest.fixture(params=SETS)
def instruction_set(request):
    """Every set this processor runs, one after the other."""
    before = backend.instruction_set()
    backend.use_instruction_set(request.param)
    yield request.param
    backend.use_instruction_set(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_every_instruction_set(instruction_set, memory_format, dtype):
    x, dy = (torch.randn(3, 35, 33, 29).to(dtype).contiguous(memory_format=memory_format) for _ in range(2))
    options = {"window": 5, "norm_window": (4, 20), "groups": 5}
    check(
        cpu,
        Call(x, torch.randn(35).to(dtype), torch.randn(35).to(dtype), torch.rand(5).to(dtype) + 0.5, dy, 1.0, options),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_half_conversions_are_exact_and_round_to_nearest_even(instruction_set, memory_format, dtype):
    """Every one of the 65,536 bit patterns in, and halfway and neighbouring float32 values out."""
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype).reshape(1, 64, 32, 32)
    every = every.contiguous(memory_format=memory_format)
    assert torch.equal(cpu(every, window=None, norm_window=None).nan_to_num(7.0), every.nan_to_num(7.0))
    # weight * x is exact in float32, so the only rounding is the output's
    scale = torch.tensor([1 + k / 512 for k in range(64)])
    y = cpu(every, scale, window=None, norm_window=None)
    expected = (every.float() * scale.view(1, 64, 1, 1)).to(dtype)
    assert torch.equal(y.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_nan_of_a_parameter_keeps_being_one(instruction_set, memory_format):
    """A NaN whose every payload bit is set must not be rounded up to a number in bfloat16."""
    nan = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    x = torch.randn(2, 35, 6, 5).bfloat16().contiguous(memory_format=memory_format).requires_grad_()
    one = torch.arange(35) == 4
    for weight, bias, sigma, channels in (
        (torch.where(one, nan, 1.0), None, 1.0, one),
        (None, torch.where(one, nan, 1.0), 1.0, one),
        (None, None, nan, one | True),
    ):
        y, l1 = cpu(x, weight, bias, window=3, sigma=sigma, return_l1=True)
        assert torch.equal(y.isnan(), channels.view(1, 35, 1, 1).expand_as(y))
    (dx,) = torch.autograd.grad(l1, x, nan)
    assert dx.isnan().all()


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    "options", [{"window": 5}, {"window": "all"}, {"window": 1}, {"window": 9, "over_batch": True}], ids=str
)
@pytest.mark.parametrize("shape", [(4, 64, 24, 24), (2, 6, 40, 40)], ids=str)
def test_offset_costs_no_accuracy(shape, options, memory_format):
    """With x = 1e4 + unit variance in float32, the only loss is the rounding of x, which the oracle sees too."""
    x = (torch.randn(shape) + 1e4).contiguous(memory_format=memory_format)
    dy = torch.randn(shape)
    call = Call(x, None, None, 0.5, dy, 1.0, options)
    expected, got = evaluate(reference, call.in_double()), evaluate(cpu, call)
    # mu has one rounding at 1e4, 2^-11; v, y and the gradients inherit it a few times
    for name in expected:
        error = (got[name].double() - expected[name]).abs().max().item()
        assert error < 8 * 2**-11, f"{name}: {error}"


@pytest.mark.parametrize("window", [3, 8, 9, 1000, 99_999, 400_000])
def test_no_drift_along_a_row(window):
    """After numbers of 1e6, unit numbers are summed as if alone: a running sum would keep the rounding of 1e6."""
    x = torch.randn(1, 1, 100_000)
    x[..., :50_000] += 1e6 * (torch.rand(50_000) - 0.5)
    call = Call(x, None, None, 1.0, torch.randn_like(x), 0.0, {"window": window, "norm_window": None})
    expected, got = reference(x.double(), **call.options), cpu(x, **call.options)
    far = 50_000 + window // 2 + 1
    if far < 100_000:
        depth = 2 * window**0.5 + 16
        error = (got[..., far:].double() - expected[..., far:]).abs().max().item()
        assert error < 2**-23 * depth * 4
    check(cpu, Call(torch.randn(1, 2, 100_000), None, None, 1.0, torch.randn(1, 2, 100_000), 0.0, {"window": window}))


@pytest.mark.parametrize("memory_format", FORMATS)
@SCALES
@SHAPES
def test_the_variance_is_right_beside_a_large_sigma(shape, options, scale, offset, memory_format):
    """It is not what is left of s^2 without sigma^2."""
    x = scale * torch.randn(shape) + offset
    x = x.contiguous(memory_format=memory_format) if x.dim() == 4 else x
    g = geometry(Norm(**OPTIONS | options), shape)
    y, maps, l1 = backend.forward(g, x, None, None, 1.0, True, with_variance=True)
    check_variance(g, x, maps, scale, offset)
    plain = backend.forward(g, x, None, None, 1.0, True)
    for alone, beside in zip(plain, (y, maps[:-1], l1), strict=True):
        assert torch.equal(alone, beside)


@given(calls(), st.sampled_from((float("inf"), -float("inf"), float("nan"))), st.integers(0, 2**31))
def test_non_finite_values_reach_exactly_the_reference_set(call: Call, value: float, where: int):
    x = call.x.clone(memory_format=torch.preserve_format)
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(where % x.numel()), x.shape))
    x[index] = value
    call.x = x
    of_double = call.in_double()  # in float32 torch's GELU of infinity may be NaN (AVX-512)
    want = reference(of_double.x, of_double.weight, of_double.bias, sigma=of_double.sigma, **of_double.keywords)
    got = cpu(call.x, call.weight, call.bias, sigma=call.sigma, **call.keywords)
    assert torch.equal(want.isfinite(), got.isfinite())
    assert torch.equal(want.isnan(), got.isnan())


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("window", [5, 20])
def test_non_finite_values_stay_in_their_windows(window, memory_format):
    x = torch.randn(2, 70, 60, 60).contiguous(memory_format=memory_format)
    x[0, 3, 20, 30] = float("nan")
    x[1, 69, 0, 0] = float("inf")
    x[1, 0, 59, 59] = -float("inf")
    want, got = reference(x, window=window), cpu(x, window=window)
    assert torch.equal(want.isfinite(), got.isfinite())
    assert got.isfinite().any()


@given(calls())
def test_same_bits_on_every_run_and_for_any_number_of_threads(call: Call):
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (2, 2, 1, 3):
            torch.set_num_threads(count)
            results.append(evaluate(cpu, call))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name in results[0]:
            assert torch.equal(results[0][name], other[name]), name


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", [(1, 64, 112, 112), (5, 32, 60, 60), (64, 48, 7, 7)], ids=str)
def test_same_bits_for_any_number_of_threads_on_shared_samples(shape, memory_format):
    x, dy = (torch.randn(shape).contiguous(memory_format=memory_format) for _ in range(2))
    call = Call(x, torch.randn(shape[1]), torch.randn(shape[1]), torch.tensor(1.0), dy, 1.0, {"window": 5})
    results = []
    for count in (1, 2, 3, 4, 7):
        torch.set_num_threads(count)
        results.append(evaluate(cpu, call))
    torch.set_num_threads(2)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in results[0])


def test_layout_of_the_gradient_does_not_matter():
    x, dy = torch.randn(2, 8, 9, 9), torch.randn(2, 8, 9, 9)
    plain = evaluate(cpu, Call(x, None, None, 1.0, dy, 0.0, {"window": 3}))
    other = evaluate(
        cpu, Call(x, None, None, 1.0, dy.contiguous(memory_format=torch.channels_last), 0.0, {"window": 3})
    )
    assert torch.equal(plain["dx"], other["dx"])


@pytest.mark.parametrize("shape", [(0, 4, 5, 5), (2, 4, 0, 5), (2, 4, 5, 0), (0, 7), (3, 0), (2, 0, 5)], ids=str)
@pytest.mark.parametrize("function", [cpu, reference], ids=["cpu", "reference"])
def test_empty(shape, function):
    affine = shape[1]
    x, weight, bias = torch.zeros(shape), torch.ones(affine), torch.ones(affine)
    sigma = torch.ones(())
    results = evaluate(function, Call(x, weight, bias, sigma, torch.zeros(shape), 1.0, {"window": 3}))
    assert results["y"].shape == results["dx"].shape == shape
    assert results["l1"] == 0
    assert all(
        torch.equal(results[n], torch.zeros_like(t))
        for n, t in (("dweight", weight), ("dbias", bias), ("dsigma", sigma))
    )


def test_sigma_zero_over_a_constant_region_is_nan():
    x = torch.full((1, 2, 8, 8), 3.0)
    x[..., 6:, 6:] = torch.tensor([[1.0, 2.0], [5.0, 4.0]])
    want, got = reference(x, window=3, sigma=0.0), cpu(x, window=3, sigma=0.0)
    assert got[..., :3, :3].isnan().all()
    assert torch.equal(want.isnan(), got.isnan())


def test_only_the_square_of_sigma_enters():
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(cpu(x, window=3, sigma=-0.7), cpu(x, window=3, sigma=0.7))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(33, 64, 1024, 1024), (1, 64, 5800, 5800), (2**16 + 1, 2**15)], ids=str)
def test_more_than_2_to_the_31_elements(shape):
    """The last sample, or of a single one the last rows, are computed where they lie."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    x = torch.zeros(shape, dtype=torch.bfloat16)
    last, near = (x[-1:], x[-1:]) if shape[0] > 1 else (x[..., -16:, :], x[..., -32:, :])
    last.copy_(torch.randn(last.shape))
    x.requires_grad_()
    y = cpu(x, window=3)
    (dx,) = torch.autograd.grad(y, x, y.detach())
    part = near.detach().clone().requires_grad_()
    expected = cpu(part, window=3)
    (expected_dx,) = torch.autograd.grad(expected, part, expected.detach())
    for whole, alone in ((y, expected), (dx, expected_dx)):
        rows = slice(None) if shape[0] > 1 else slice(-16, None)
        assert torch.equal(whole[-1:][..., rows, :], alone[..., rows, :])
