"""The smooth activations of the CPU kernels: their error over numbers of every size, and what is not finite.

A call without fields and parameters is the activation alone, and its gradient for dy = 1 the slope.
"""

import math

import mpmath
import pytest
import torch
from torch.nn import functional as F

from divnorm_kernels import divisive_norm
from divnorm_kernels.backends import cpu

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh")}
FORMS = ((1, 1, -1), (1, -1, 1), (1, -1))


@pytest.fixture(params=cpu.instruction_sets())
def instruction_set(request):
    before = cpu.instruction_set()
    cpu.use_instruction_set(request.param)
    yield request.param
    cpu.use_instruction_set(before)


def alone(z, activation, form=FORMS[0]):
    """The activation and its slope at z."""
    z = z.detach().requires_grad_()
    y = divisive_norm(z.view(form), window=None, norm_window=None, activation=activation, backend="cpu")
    (slope,) = torch.autograd.grad(y.sum(), z)
    return y.detach().view(-1), slope


def every_size():
    """Float32 numbers of every exponent, subnormal ones among them, both signs, and a zero."""
    bits = torch.arange(0, 0x7F800000, 7919, dtype=torch.int32)
    between = torch.linspace(-120, 20, 200_000)
    return torch.cat([bits.view(torch.float32), -bits.view(torch.float32), between])


def in_double(z, activation):
    """The activation to more digits than float32 has, for negative numbers too."""
    z = z.double()
    if activation == "gelu":
        return z * torch.special.erfc(-z / math.sqrt(2)) / 2
    steepened = z if activation == "silu" else 2 * math.sqrt(2 / math.pi) * z * (1 + 0.044715 * z * z)
    return z * torch.sigmoid(steepened)


def slope_in_double(z, activation):
    """Without the digits that torch's formulas lose by a 1 - sigmoid."""
    z = z.double()
    if activation == "gelu":
        density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        return torch.special.erfc(-z / math.sqrt(2)) / 2 + torch.where(density == 0, 0, z * density)
    c = 1 if activation == "silu" else 2 * math.sqrt(2 / math.pi)
    bend = 0 if activation == "silu" else 0.044715 * z * z
    share, other = torch.sigmoid(c * z * (1 + bend)), torch.sigmoid(-c * z * (1 + bend))
    return share * (1 + torch.where(other == 0, 0, other * z) * c * (1 + 3 * bend))


def spacing(y, dtype):
    """Between the numbers of a dtype at y."""
    tiny = torch.finfo(dtype).smallest_normal
    _, exponent = torch.frexp(y.abs().clamp_min(tiny))
    digits = {torch.float32: 24, torch.float64: 53}[dtype]
    return torch.ldexp(torch.ones_like(y), exponent - digits)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float32_errs_by_few_ulp(activation, instruction_set):
    """Of its own value, however small that is; the slope of one, for it passes through zero."""
    z = every_size()
    y, slope = alone(z, activation)
    exact = in_double(z, activation)
    ulp = (y.double() - exact).abs() / spacing(exact, torch.float32)
    limit = LIMITS["baseline" if instruction_set == "baseline" else "fused", activation]
    assert ulp.max() <= limit, (ulp.max().item(), z[ulp.argmax()].item())
    error = (slope.double() - slope_in_double(z, activation)).abs()
    assert error.max() <= 4 * torch.finfo(torch.float32).eps, (error.max().item(), z[error.argmax()].item())


LIMITS = {
    ("fused", "silu"): 2,
    ("fused", "gelu"): 2,
    ("fused", "gelu_tanh"): 2,
    ("baseline", "silu"): 3,
    ("baseline", "gelu"): 3.5,
    ("baseline", "gelu_tanh"): 150,
}
"""What is promised, and of the baseline the table in csrc/cpu/activations.cpp, with some room."""


def with_mpmath(z, activation):
    z = mpmath.mpf(z)
    if abs(z) > 1000:
        return max(z, 0)
    if activation == "gelu":
        return z * mpmath.erfc(-z / mpmath.sqrt(2)) / 2
    steepened = z if activation == "silu" else 2 * mpmath.sqrt(2 / mpmath.pi) * z * (1 + mpmath.mpf("0.044715") * z * z)
    return z / (1 + mpmath.exp(-steepened))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float64_errs_by_few_ulp(activation, instruction_set):
    sizes = torch.logspace(-320, 300, 300, dtype=torch.float64)
    z = torch.cat([sizes, -sizes, torch.linspace(-40, 10, 1500, dtype=torch.float64)])
    if activation == "silu":
        z = torch.cat([z, torch.linspace(-760, -40, 500, dtype=torch.float64)])
    y, slope = alone(z, activation)
    with mpmath.workdps(60):
        exact = [with_mpmath(number, activation) for number in z.tolist()]
        rounded = torch.tensor([float(number) for number in exact], dtype=torch.float64)
        ulps = [
            float(abs(got - want) / step)
            for got, want, step in zip(y.tolist(), exact, spacing(rounded, torch.float64).tolist(), strict=True)
        ]
    limit = 3.5 if instruction_set != "baseline" else {"silu": 3.5, "gelu": 4.5, "gelu_tanh": 1500}[activation]
    assert max(ulps) <= limit, (max(ulps), z[ulps.index(max(ulps))].item())
    error = (slope - slope_in_double(z, activation)).abs()[z.abs() < 1e100]
    assert error.max() <= 4 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_not_finite_is_torchs(dtype, activation, instruction_set):
    """In vectors, and in the single numbers behind them."""
    z, largest = torch.randn(67).to(dtype), min(torch.finfo(dtype).max, 1e38)  # torch's slopes square z
    for place in (*range(3), 40, 66):
        for value in (math.inf, -math.inf, math.nan, largest, -largest, -0.0):
            z[place] = value
            for form in FORMS:
                y, slope = alone(z, activation, form)
                want = ACTIVATIONS[activation](z.double()).to(dtype)
                assert torch.equal(y.isnan(), want.isnan())
                assert torch.equal(y.isinf(), want.isinf())
                assert (y[place] == want[place]) | want[place].isnan()
                exact = z.double().clone().requires_grad_()
                (want,) = torch.autograd.grad(ACTIVATIONS[activation](exact).sum(), exact)
                assert torch.equal(slope.isfinite(), want.isfinite())
        z[place] = 0.5


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward_saves_nothing_more_of_xs_size(activation):
    saved = []
    x = torch.randn(2, 4, 9, 8, requires_grad=True)
    weight, bias = (torch.randn(4, requires_grad=True) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = divisive_norm(x, weight, bias, window=3, activation=activation, backend="cpu")
    assert sum(t.numel() == y.numel() for t in saved) == 1
    torch.autograd.grad(y.sum(), x)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("window", [3, "all"])
def test_second_derivatives(activation, window):
    """Of backward, which kernels compute, by the reference."""
    x, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 4, 7), 4, 4))

    def twice(backend):
        y = divisive_norm(x, weight, bias, window=window, activation=activation, backend=backend)
        first = torch.autograd.grad(y.square().sum(), (x, weight, bias), create_graph=True)
        return torch.autograd.grad(sum(t.sin().sum() for t in first), (x, weight, bias))

    for got, want in zip(twice("cpu"), twice("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_under_compile_and_by_a_prepared_call(activation):
    x = torch.randn(2, 4, 9, 8)

    def step(x, weight, bias):
        return divisive_norm(x, weight, bias, window=3, activation=activation)

    def gradients(function):
        tensors = [t.clone().requires_grad_() for t in (x, torch.linspace(-1, 2, 4), torch.linspace(-2, 1, 4))]
        y = function(*tensors)
        return y, *torch.autograd.grad(y.square().sum(), tensors)

    want = gradients(lambda *t: divisive_norm(*t, window=3, activation=activation, backend="reference"))
    for function in (step, step, step, torch.compile(step, fullgraph=True)):
        for got, expected in zip(gradients(function), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert gradients(step)[0].grad_fn.name().startswith("PreparedFunction")
