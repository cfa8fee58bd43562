"""Other exponents than 2, and x in the numerator: by loops, by closed forms of the gradients, at ties and at zero."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from strategies import windows
from torch.autograd import gradcheck, gradgradcheck

from divnorm_kernels import Span, divisive_norm
from divnorm_kernels.fields import geometry
from divnorm_kernels.norm import Norm, norm_of, parsed
from divnorm_kernels.reference import divisive_norm as reference
from divnorm_kernels.reference import field_average

EXPONENTS = (1, 1.5, 2, 3, math.inf)
FIELDS = (
    {"window": 3},
    {"window": Span(2, 0), "norm_window": (Span(0, 3), 2), "edges": "zero", "groups": 2},
    {"window": "all", "groups": 4, "over_batch": True},
    {"window": None, "norm_window": ("all", Span(7, 1))},
)


def double(*shape):
    return torch.randn(shape, dtype=torch.float64)


def scale(p):
    """c_p from the moments of a normal number."""
    if p == math.inf:
        return 1.0
    moment = 2 ** (p / 2) * math.gamma((p + 1) / 2) / math.sqrt(math.pi)
    return moment ** (-1 / p)


def covered(window, extent, q):
    """The positions of an axis that a window around q sees, and what the average divides by at edges="zero"."""
    if window == "all":
        return range(extent), extent
    span = window if isinstance(window, Span) else Span((window - 1) // 2, window // 2)
    return [i for i in range(extent) if q - span.before <= i <= q + span.after], span.before + span.after + 1


def definition(x, p, subtract_mean, sigma, window, norm_window="same", groups=1, edges="valid", over_batch=False):
    """The numerator and s, number by number, for (N, C, H, W)."""
    batch, channels, *extent = x.shape
    norm_window = window if norm_window == "same" else norm_window
    positions = list(itertools.product(*map(range, extent)))

    def field(k, at):
        axes = [covered(w, e, q) for w, e, q in zip(k if isinstance(k, tuple) else (k,) * 2, extent, at, strict=True)]
        inside = list(itertools.product(*(c for c, _ in axes)))
        return inside, len(inside) if edges == "valid" else math.prod(d for _, d in axes)

    s, numerator = torch.empty_like(x), torch.empty_like(x)
    samples = [range(batch)] if over_batch else [[n] for n in range(batch)]
    for ns, cs in itertools.product(samples, torch.arange(channels).chunk(groups)):
        members = list(itertools.product(ns, cs.tolist()))
        mean = {at: sum(x[(n, c, *at)].item() for n, c in members) / len(members) for at in positions}
        mu = dict.fromkeys(positions, 0.0)
        if window is not None:
            mu = {at: sum(mean[i] for i in field(window, at)[0]) / field(window, at)[1] for at in positions}
        v = {(n, c, at): x[(n, c, *at)].item() - mu[at] for n, c in members for at in positions}
        for at in positions:
            inside, divisor = field(norm_window, at)
            sizes = [scale(p) * abs(v[n, c, i]) for n, c in members for i in inside]
            if p == math.inf:
                deviation = abs(sigma) + max(sizes)
            else:
                deviation = (abs(sigma) ** p + sum(z**p for z in sizes) / (divisor * len(members))) ** (1 / p)
            for n, c in members:
                s[(n, c, *at)] = deviation
                numerator[(n, c, *at)] = v[n, c, at] if subtract_mean else x[(n, c, *at)]
    return numerator, s


@pytest.mark.parametrize("subtract_mean", [True, False])
@pytest.mark.parametrize("p", EXPONENTS)
@pytest.mark.parametrize("options", FIELDS, ids=str)
def test_equals_the_definition(options, p, subtract_mean):
    x, weight, bias = double(2, 4, 4, 5), double(4), double(4)
    numerator, s = definition(x, p, subtract_mean, -0.7, **options)
    y = reference(x, weight, bias, sigma=-0.7, p=p, subtract_mean=subtract_mean, **options)
    expected = weight.view(-1, 1, 1) * numerator / s + bias.view(-1, 1, 1)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("p", "expected"), [(1, math.sqrt(math.pi / 2)), (2, 1.0), (4, 3**-0.25)])
def test_the_deviation_of_normal_numbers_is_their_standard_deviation(p, expected):
    assert scale(p) == pytest.approx(expected)
    x = 3 * torch.randn(1, 1, 200_000, dtype=torch.float64)
    y = reference(x, window="all", sigma=0.0, p=p)
    assert (x / y).mean().item() == pytest.approx(3, rel=0.02)


@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
@pytest.mark.parametrize("options", FIELDS, ids=str)
def test_gradients_are_the_closed_forms(options, p):
    """FAMILY.md, section 1, with the adjoints of the averages taken by torch."""
    x, weight, dy = double(2, 4, 5, 4).requires_grad_(), double(4), double(2, 4, 5, 4)
    sigma = torch.tensor(-0.7, dtype=torch.float64, requires_grad=True)
    y = reference(x, weight, sigma=sigma, p=p, **options)
    dx, dsigma = torch.autograd.grad(y, (x, sigma), dy)

    g = geometry(Norm(p=p, **options), tuple(x.shape))
    numerator, s = definition(x.detach(), p, True, -0.7, **options)
    v, s, gradient = (t.unflatten(1, (g.groups, -1)) for t in (numerator, s, weight.view(-1, 1, 1) * dy))
    s, n = s[:, :, 0], v.shape[2]

    def adjoint(m, axes):
        """Of the average over samples and field; the former is symmetric."""
        if axes is None:
            return torch.zeros_like(m)
        m = m.mean(0, keepdim=True).expand_as(m) if g.over_batch else m
        leaf = torch.zeros_like(m, requires_grad=True)
        return torch.autograd.grad(field_average(leaf, axes, g.spatial), leaf, m.contiguous())[0]

    first, second = gradient.sum(2), (gradient * v).sum(2)
    a = adjoint(scale(p) ** p * second * s ** -(p + 1), g.suppression) / n
    k = v.sign() * v.abs() ** (p - 1)
    d = first / s - a * k.sum(2)
    expected = gradient / s.unsqueeze(2) - a.unsqueeze(2) * k - adjoint(d, g.summation).unsqueeze(2) / n
    torch.testing.assert_close(dx, expected.flatten(1, 2), rtol=1e-10, atol=1e-10)
    slope = -math.copysign(0.7 ** (p - 1), -0.7) * (second * s ** -(p + 1)).sum()
    torch.testing.assert_close(dsigma, slope, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", FIELDS, ids=str)
def test_gradients_with_x_in_the_numerator_are_the_closed_forms(options):
    """FAMILY.md, section 2."""
    x, dy = double(2, 4, 5, 4).requires_grad_(), double(2, 4, 5, 4)
    (dx,) = torch.autograd.grad(reference(x, sigma=0.7, subtract_mean=False, **options), x, dy)
    g = geometry(Norm(**options), tuple(x.shape))
    leaf = x.detach().requires_grad_()
    plain = {**options, "norm_window": None}
    v = reference(leaf, **plain)
    s = (leaf.detach() / reference(leaf.detach(), sigma=0.7, subtract_mean=False, **options)).detach()
    s = s.unflatten(1, (g.groups, -1))[:, :, 0]
    second = (dy * x.detach()).unflatten(1, (g.groups, -1)).sum(2)
    m = second / s**3
    m = m.mean(0, keepdim=True).expand_as(m) if g.over_batch else m
    inner = torch.zeros_like(m, requires_grad=True)
    a = torch.autograd.grad(field_average(inner, g.suppression, g.spatial), inner, m.contiguous())[0]
    a = (a / (g.channels // g.groups)).repeat_interleave(g.channels // g.groups, 1)
    through = torch.autograd.grad(v, leaf, a * v.detach())[0]  # a v, and less the adjoint of the mean of it
    expected = dy / s.repeat_interleave(g.channels // g.groups, 1) - through
    torch.testing.assert_close(dx, expected, rtol=1e-10, atol=1e-10)


@st.composite
def cases(draw):
    """Shapes, fields and exponents small enough for differences."""
    dims, groups = draw(st.sampled_from((0, 1, 2))), draw(st.sampled_from((1, 2)))
    spatial = tuple(draw(st.integers(1, 4)) for _ in range(max(dims, 1)))
    options = {
        "window": draw(windows(max(dims, 1), 6)),
        "norm_window": draw(windows(max(dims, 1), 6)),
        "groups": groups if dims else 1,
        "edges": draw(st.sampled_from(("valid", "zero"))),
        "over_batch": draw(st.booleans()),
        "p": draw(st.one_of(st.sampled_from(EXPONENTS), st.floats(1, 6))),
        "subtract_mean": draw(st.booleans()),
        "activation": draw(st.sampled_from((None, "relu", "tlu", "silu", "gelu", "gelu_tanh"))),
    }
    shape = (2, groups * draw(st.integers(1, 2)), *spatial) if dims else (2, *spatial)
    return shape, options, draw(st.booleans()), draw(st.integers(0, 2**31))


def kinks(inputs, options, residual):
    """What differences say nothing about where it is next to zero: the subgradients there are other tests' matter."""
    fields = {name: options[name] for name in ("window", "groups", "edges", "over_batch") if name in options}
    x = inputs[0]
    sizes = reference(x, **fields, norm_window=None).abs().flatten()
    yield sizes
    if options["p"] == math.inf and options["norm_window"] is not None:
        yield sizes.sort().values.diff()
    if options["activation"] in ("relu", "tlu"):
        y = reference(*inputs[:3], sigma=inputs[3], residual=residual, **{**options, "activation": None})
        tau = inputs[-1].view(-1, *[1] * max(x.dim() - 2, 0)) if options["activation"] == "tlu" else 0
        yield y - tau


def is_near(values):
    return bool((values.abs() < 1e-4).any())


@settings(max_examples=60)
@given(cases())
@example(((2, 2, 3), {"window": None, "norm_window": Span(0, 2), "p": math.inf, "activation": "tlu"}, True, 0))
def test_two_derivatives_of_every_combination(case):
    shape, options, with_residual, seed = case
    torch.manual_seed(seed)
    size = shape[1]
    tlu = options["activation"] == "tlu"
    x, residual = ((torch.rand(shape, dtype=torch.float64) + 0.3) * torch.randn(shape).sign() for _ in range(2))
    inputs = [x, double(size), double(size), torch.rand((), dtype=torch.float64) + 0.5]
    inputs += [residual] * with_residual + [double(size)] * tlu
    inputs = [t.requires_grad_() for t in inputs]

    def call(x, weight, bias, sigma, *rest):
        behind = dict(zip(["residual"] * with_residual + ["threshold"] * tlu, rest, strict=True))
        return divisive_norm(x, weight, bias, sigma=sigma, backend="reference", return_l1=True, **behind, **options)

    assume(not any(is_near(kink) for kink in kinks(inputs, options, residual if with_residual else None)))
    assert gradcheck(call, inputs, fast_mode=True)
    assert gradgradcheck(call, inputs, fast_mode=True)


def test_of_equal_largest_the_first_has_the_gradient():
    """In the order of samples, channels and positions."""
    for options in (
        {"window": None, "norm_window": "all"},
        {"window": None, "norm_window": (2, 3), "over_batch": True},
    ):
        x = torch.ones(2, 2, 2, 3, dtype=torch.float64, requires_grad=True)
        y = reference(x, sigma=1.0, p=math.inf, **options)
        (dx,) = torch.autograd.grad(y.sum(), x)
        # y = x / (1 + max): 1/2 of its own, -1/4 for each that x is the largest of
        taken = (0.5 - dx) * 4
        assert taken.sum() == 24
        if options["norm_window"] == "all":
            expected = torch.zeros(2, 2, 2, 3, dtype=torch.float64)
            expected[:, 0, 0, 0] = 12
            torch.testing.assert_close(taken, expected)
        else:
            assert (taken[1] == 0).all()
            assert (taken[:, 1] == 0).all()


@pytest.mark.parametrize("p", [1, 1.5, 3, math.inf])
def test_zero_is_flat(p):
    """Where v is 0 abs(v) counts as flat, to any order; the gradients are finite."""
    x = torch.zeros(1, 1, 4, dtype=torch.float64, requires_grad=True)
    y, l1 = reference(x, window=None, norm_window=3, sigma=0.5, p=p, return_l1=True)
    (dx,) = torch.autograd.grad(y.sum() + l1, x, create_graph=True)
    torch.testing.assert_close(dx, torch.full_like(x, 2.0))
    (again,) = torch.autograd.grad(dx.square().sum(), x)
    assert torch.equal(again, torch.zeros_like(x))


@pytest.mark.parametrize("p", [1, 1.5, 3, 40, math.inf])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_a_sigma_whose_power_is_nothing_stands_for_itself(p, as_tensor):
    sigma = torch.tensor(-1e-4) if as_tensor else -1e-4
    y = reference(torch.full((1, 1, 3), 5.0), window=None, norm_window="all", sigma=sigma, p=p, subtract_mean=True)
    z = reference(torch.zeros(1, 1, 3), torch.ones(1), torch.ones(1), window=None, norm_window=3, sigma=sigma, p=p)
    assert y.isfinite().all()
    assert torch.equal(z, torch.ones(1, 1, 3))


@pytest.mark.parametrize("subtract_mean", [True, False])
@pytest.mark.parametrize("p", EXPONENTS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_reaches_its_fields_alone(bad, p, subtract_mean):
    x = torch.randn(1, 2, 9, 9)
    options = {"window": Span(1, 0), "norm_window": Span(0, 2), "p": p, "subtract_mean": subtract_mean}
    clean = reference(x, **options)
    x[0, 1, 4, 4] = bad
    y = reference(x, **options)
    # means reach up to 1 behind, and from there deviations up to 2 before
    touched = torch.zeros(9, 9, dtype=torch.bool)
    touched[2:6, 2:6] = True
    assert torch.equal(y[..., ~touched], clean[..., ~touched])
    assert not (y == clean)[..., touched].any()
    assert y[..., touched].isnan().any()


def test_a_norm_is_its_text():
    norms = [
        Norm(Span(3, 0), (Span(1, 2), "all"), p=math.inf, activation="tlu", subtract_mean=False),
        Norm((3, Span(0, 0)), None, 4, "zero", True, "gelu_tanh", 1.5),
        *(Norm(3, p=p) for p in EXPONENTS),
    ]
    for norm in norms:
        assert parsed(norm.text) == norm
        assert "Infinity" not in norm.text, "which JSON has not"
    assert norm_of(3, p=2.0) == norm_of(3, p=2) == Norm(3)
    assert geometry(Norm(3, p=2.0), (2, 3, 4)) is geometry(Norm(3), (2, 3, 4))
    assert type(Norm(3, p=2.0).p) is int


def test_a_text_of_no_span_is_refused():
    with pytest.raises(ValueError, match="expected the text of a Norm"):
        parsed('{"window": {"before": -1, "after": 0}}')


def test_half_types_compute_in_float32():
    x, residual = torch.randn(2, 2, 4, 5, 5).bfloat16()
    y = reference(x, torch.ones(4), window=3, p=1, residual=residual, activation="silu")
    wide = reference(x.float(), torch.ones(4), window=3, p=1, residual=residual.float(), activation="silu")
    assert torch.equal(y, wide.bfloat16())
