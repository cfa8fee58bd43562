"""The numerical promises, kept by the CUDA kernels: on the GPU where there is one, else on the emulated device."""

import pytest
import torch
from emulated import DEVICE, backend
from hypothesis import given
from hypothesis import strategies as st
from oracle import Call, evaluate
from strategies import calls
from test_cuda import EXAMPLES, NAMES, SMALL, case, on_cuda, on_device
from test_exact_sets import SPOILERS, check_sets, spoiled
from torch import Tensor
from variance import OPTIONS, SCALES, SHAPES, check_variance

from divnorm_kernels import fields
from divnorm_kernels.backends import cuda
from divnorm_kernels.norm import Norm
from divnorm_kernels.reference import divisive_norm as reference


@pytest.mark.parametrize("options", [{"window": 5}, {"window": "all"}, {"window": 1}], ids=str)
@pytest.mark.parametrize("strategy", NAMES)
def test_offset_costs_no_accuracy(strategy, options):
    """With x = 1e4 + unit variance in float32, the only loss is the rounding of x, which the oracle sees too."""
    x, dy = torch.randn(2, 64, 8, 8) + 1e4, torch.randn(2, 64, 8, 8)
    call = on_device(Call(x, None, None, 0.5, dy, 1.0, options))
    with backend(**NAMES[strategy]):
        got = evaluate(on_cuda, call)
    expected = evaluate(reference, call.in_double())
    for name in expected:
        error = (got[name].double() - expected[name]).abs().max().item()
        assert error < 8 * 2**-11, f"{name}: {error}"


@EXAMPLES
@given(spoiled(calls(extents=SMALL)), st.sampled_from(sorted(NAMES)))
def test_non_finite_values_reach_exactly_the_reference_set(call: Call, strategy: str):
    with backend(**NAMES[strategy]):
        check_sets(on_cuda, on_device(call))


MEAN_ONLY = {
    "windows": ((2, 10, 7, 6), {"window": 3, "groups": 2}),
    "aligned windows": ((2, 16, 8, 6), {"window": 3, "groups": 2}),
    "aligned, whole": ((2, 16, 8, 6), {"window": "all", "groups": 2}),
    "whole": ((2, 10, 7, 6), {"window": "all"}),
    "no mean": ((2, 10, 7, 6), {"window": None}),
    "features": ((9, 70), {"window": 5}),
    "features, whole": ((9, 70), {"window": "all"}),
    "over the batch": ((3, 10, 5, 6), {"window": 3, "over_batch": True}),
    "over the batch, whole": ((3, 10, 5, 6), {"window": "all", "over_batch": True}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("name", MEAN_ONLY)
@pytest.mark.parametrize("strategy", NAMES)
def test_without_suppression_dx_does_not_depend_on_x(strategy, name, channels_last, dtype):
    """Not even on a number that is not finite."""
    shape, options = MEAN_ONLY[name]
    call = case(shape, options | {"norm_window": None}, dtype, channels_last and len(shape) > 2)
    call.dl1 = 0.0
    with backend(**NAMES[strategy]):
        expected = evaluate(on_cuda, call)["dx"]
        for value in SPOILERS:
            call.x[1, 3] = value
            assert torch.equal(evaluate(on_cuda, call)["dx"], expected)


SMALLEST = 2.0**-149
"""Of float32's numbers above zero: half of it is what a square next to it loses."""
SMALL_NUMBERS = {
    "1/s^3 is beyond float32": ([0, 0, 0], [1, 0, 0], 1e-13, 3, [5e12, -5e12, 0]),
    "and so is 1/s^2": ([0, 0, 0], [1, 0, 0], 1e-30, 3, [5e29, -5e29, 0]),
    "squares next to nothing": ([0, 4e-20, 0], [0, 0, 0], 0.0, 3, [0, 0, 0]),
    "whole fields": ([0, 3e-20, 6e-20], [1, 2, 5], 0.0, "all", None),
    "whole fields, sigma as small": ([0, 3e-20, 6e-20], [1, 2, 5], 4e-20, "all", None),
    "whole fields without a mean": ([1e-20, 3e-20, 6e-20], [1, 2, 5], 4e-20, None, None),
}


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("name", SMALL_NUMBERS)
@pytest.mark.parametrize("strategy", NAMES)
def test_what_float32_can_represent_is_represented(strategy, name, channels_last):
    x, dy, sigma, window, dx = SMALL_NUMBERS[name]
    call = on_device(
        Call(
            torch.tensor([[x, x]], dtype=torch.float32),
            torch.tensor([1.0, 2.0]),
            None,
            torch.tensor(sigma),
            torch.tensor([[dy, dy]], dtype=torch.float32),
            0.0,
            {"window": window, "norm_window": window or "all", "groups": 2},
        )
    )
    if channels_last:
        call.x, call.dy = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (call.x, call.dy))
    with backend(**NAMES[strategy]):
        got = evaluate(on_cuda, call)
    expected = evaluate(reference, call.in_double())
    q = expected["y"].new_tensor(x).square().max()
    rounding = 16 * (torch.finfo(torch.float32).eps + (SMALLEST / q if q > 0 else 0))
    for key, want in expected.items():
        if sigma == 0 and key == "dsigma":
            continue  # of y by sigma, which is 0
        assert got[key].isfinite().all(), key
        error = (got[key].double() - want).abs().max()
        assert error <= rounding * want.abs().max(), f"{key}: {got[key].tolist()}, expected {want.tolist()}"
    if dx is not None:
        torch.testing.assert_close(got["dx"][0, 0].cpu(), torch.tensor(dx, dtype=torch.float32))


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
@SCALES
@SHAPES
@pytest.mark.parametrize("strategy", NAMES)
def test_the_variance_is_right_beside_a_large_sigma(strategy, shape, options, scale, offset, channels_last):
    """It is not what is left of s^2 without sigma^2."""
    x = (scale * torch.randn(shape) + offset).to(DEVICE)
    if channels_last and len(shape) > 2:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    with backend(**NAMES[strategy]):
        g = fields.geometry(Norm(**OPTIONS | options), shape)
        y, maps, l1 = cuda.forward(g, x, None, None, 1.0, True, with_variance=True)
        plain = cuda.forward(g, x, None, None, 1.0, True)
        needs = (True, *(False,) * 5)
        gradients = [cuda.backward(g, x, None, x, m, None, None, 1.0, needs)[0] for m in (maps, plain[1])]
    check_variance(g, x, maps, scale, offset)
    for alone, beside in zip(plain, (y, maps[:-1], l1), strict=True):
        assert torch.equal(alone, beside)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("strategy", NAMES)
def test_results_are_where_x_is(strategy):
    """Whatever device tensors are made on by default."""

    def both(call: Call) -> tuple[Tensor, ...]:
        g = fields.geometry(Norm(3), tuple(call.x.shape))
        y, maps, l1 = cuda.forward(g, call.x, call.weight, call.bias, call.sigma, True)
        found = cuda.backward(
            g,
            call.dy,
            torch.ones_like(l1),
            call.x,
            maps,
            call.weight,
            call.bias,
            call.sigma,
            (True,) * 4 + (False,) * 2,
        )
        without = cuda.backward(g, None, None, call.x, maps, None, None, 1.0, (True, *(False,) * 5))
        return y, maps, l1, *found[:4], without[0]

    call = case((2, 6, 5, 4), {"window": 3}, torch.float32)
    with backend(**NAMES[strategy]):
        expected = both(call)
        with torch.device("meta"):
            got = both(call)
    for have, want in zip(got, expected, strict=True):
        assert have.device == call.x.device
        assert torch.equal(have, want)


@pytest.mark.parametrize("window", [3, "all"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", NAMES)
def test_squares_that_overflow_are_infinite(name, memory_format, window):
    x = ((torch.rand(2, 32, 14, 16) * 2 - 1) * 2e19).contiguous(memory_format=memory_format)
    with backend(**NAMES[name]):
        y = on_cuda(x, window=window)
    assert torch.equal(y, reference(x, window=window))
    assert y.isfinite().all()
