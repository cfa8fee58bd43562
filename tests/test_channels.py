"""Windows over channels: the definition, what torch does with it, layers, and bad input."""

import math

import pytest
import torch
from channel_layers import BACKENDS, LEARNING, close, double
from torch import nn
from torch.nn import functional as F

import divnorm_kernels as dk
from divnorm_kernels import Exponential, Span, channel_norm
from divnorm_kernels.channels import cpu

SHAPES = [(3, 7), (2, 9, 5), (2, 6, 3, 4), (2, 5, 2, 3, 4)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torchs_local_response_norm(shape, backend):
    """Of every size, even ones and those that no channel has all of too."""
    for size in range(1, shape[1] + 3):
        x, dy = double(*shape).requires_grad_(), double(*shape)
        y = dk.LocalResponseNorm(size, 0.7, 0.6, 1.3, backend=backend)(x)
        image = x if x.dim() > 2 else x.unsqueeze(2)
        expected = nn.LocalResponseNorm(size, 0.7, 0.6, 1.3)(image).reshape(shape)
        close(y, expected)
        for got, want in zip(torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy), strict=True):
            close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_exponential_is_a_direct_sum(shape, squared, backend):
    scale, alpha, beta, k = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.7, 0.9, 0.8, 1.2))
    x, dy = double(*shape).requires_grad_(), double(*shape)
    y = channel_norm(x, Exponential(scale), alpha=alpha, beta=beta, k=k, squared=squared, backend=backend)
    rows = x.movedim(1, -1)
    sums = []
    for c in range(shape[1]):
        total = 0.0
        for j in range(shape[1]):
            total = total + rows[..., j] ** 2 * torch.exp(-abs(c - j) / scale)
        sums.append(total)
    divisor = k * (1 + alpha / scale * torch.stack(sums, 1))
    expected = (x**2 if squared else x) / divisor**beta
    close(y, expected)
    leaves = (x, scale, alpha, beta, k)
    for got, want in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True):
        close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_spans(backend):
    x = double(2, 8, 3)
    close(channel_norm(x, Span(3, 2), backend=backend), channel_norm(x, 6, backend=backend))
    y = channel_norm(x, Span(2, 0), alpha=3.0, beta=1, k=0.5, backend=backend)
    expected = [x[:, c] / (0.5 + (x[:, max(c - 2, 0) : c + 1] ** 2).sum(1)) for c in range(8)]
    close(y, torch.stack(expected, 1))
    far = Span(2**30, 2**29)
    close(channel_norm(x, far, backend=backend), x / (1 + 1e-4 / far.size * (x**2).sum(1, keepdim=True)) ** 0.75)


@pytest.mark.parametrize("window", [3, Span(0, 2), Exponential(2.0)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_first_and_second_derivatives(window, backend):
    x = double(2, 5, 3).requires_grad_()
    scalars = [torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (0.8, 0.6, 1.1)]
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)

    def call(x, alpha, beta, k, scale):
        field = Exponential(scale) if isinstance(window, Exponential) else window
        return channel_norm(x, field, alpha=alpha, beta=beta, k=k, squared=True, backend=backend)

    assert torch.autograd.gradcheck(call, (x, *scalars, scale))
    assert torch.autograd.gradgradcheck(call, (x, *scalars, scale))


def test_kernels_are_what_runs(monkeypatch):
    """By default, under autograd, and in both directions."""
    seen = []
    for name in ("forward", "backward"):
        function = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *a, f=function, name=name: seen.append(name) or f(*a))
    x = torch.randn(2, 6, 4, requires_grad=True)
    channel_norm(x, 3).sum().backward()
    assert seen == ["forward", "backward"]


def test_nothing_but_x_is_kept():
    saved = []
    x, alpha = torch.randn(2, 6, 40, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        channel_norm(x, 3)
        assert [t.data_ptr() for t in saved] == [x.data_ptr()]
        saved.clear()
        channel_norm(x, 3, alpha=alpha)
    assert [t.shape for t in saved if t.numel() > 1] == [x.shape, (4,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layouts_and_dtypes_pass_through(dtype):
    x = torch.randn(2, 6, 4, 5).to(dtype)
    sums = 16 * torch.finfo(torch.float32).eps  # of three squares, to a power, by two roots
    for given in (
        x,
        x.contiguous(memory_format=torch.channels_last),
        x[..., ::2],
        x.transpose(2, 3),
        x.expand(2, 6, 4, 5),
    ):
        y = channel_norm(given, 3, alpha=2.0)
        assert (y.dtype, y.shape) == (dtype, given.shape)
        torch.testing.assert_close(
            y.double(), channel_norm(given.double(), 3, alpha=2.0), rtol=torch.finfo(dtype).eps + sums, atol=0
        )
    assert channel_norm(x.contiguous(memory_format=torch.channels_last), 3).is_contiguous(
        memory_format=torch.channels_last
    )


def test_layers_learn_what_they_are_told():
    layer = dk.LocalResponseNorm(5, learnable=True, dtype=torch.float64)
    assert set(layer.state_dict()) == {"alpha", "beta", "k"}
    assert not dk.LocalResponseNorm(5).state_dict()
    x = double(2, 6, 4)
    close(layer(x), nn.LocalResponseNorm(5)(x))
    with torch.no_grad():
        layer.alpha.fill_(0.3)
    close(layer(x), nn.LocalResponseNorm(5, alpha=0.3)(x))
    layer.reset_parameters()
    close(layer(x), nn.LocalResponseNorm(5)(x))
    exponential = dk.ExponentialNorm(2.0, 0.1, 1.0)
    assert {name: p.item() for name, p in exponential.named_parameters()} == pytest.approx(
        {"scale": 2.0, "alpha": 0.1, "beta": 1.0, "k": 1.0}
    )
    assert repr(exponential) == "ExponentialNorm(scale=2.0, alpha=0.1, beta=1.0)"
    assert repr(dk.LocalResponseNorm(5, k=2.0)) == "LocalResponseNorm(5, k=2.0)"
    assert not list(dk.ExponentialNorm(learnable=False).parameters())


def test_conversion_from_torchs():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.LocalResponseNorm(4, 0.2, 0.6, 1.5), nn.ReLU())
    x = torch.randn(2, 3, 4, 4)
    expected = model(x)
    seen = []
    handle = model[1].register_forward_hook(lambda *_: seen.append(1))
    lines = []
    dk.convert_norm(model, "lrn", report=lines.append)
    assert type(model[1]) is dk.LocalResponseNorm
    assert lines == ["1: LocalResponseNorm -> LocalResponseNorm(4, alpha=0.2, beta=0.6, k=1.5)"]
    torch.testing.assert_close(model(x), expected)
    handle.remove()
    model(x)
    assert seen == [1]
    dk.convert_norm(model, "lrn", report=None, learnable=True)
    alpha = model[1].alpha
    dk.convert_norm(model, "lrn", report=None, size=3)
    assert model[1].size == 3
    assert model[1].alpha is alpha
    with torch.no_grad():
        alpha.fill_(0.5)
    dk.convert_norm(model, "lrn", report=None, learnable=False)
    assert (model[1].alpha, model[1].beta) == (0.5, pytest.approx(0.6))
    model[1].alpha = 0.25
    dk.convert_norm(model, "lrn", report=None, k=2.0)
    assert (model[1].alpha, model[1].k) == (0.25, 2.0)
    with pytest.warns(UserWarning, match=r"left as it is: BatchNorm2d \(0\) is no LocalResponseNorm"):
        dk.convert_norm(nn.Sequential(nn.BatchNorm2d(3)), "lrn")
    with pytest.raises(ValueError, match=r"^to: got 'lrn-s'"):
        dk.convert_norm(model, "lrn-s")
    with pytest.raises(ValueError, match=r"^to: got .*ExponentialNorm.*, which takes no number of channels"):
        dk.convert_norm(model, dk.ExponentialNorm)
    with pytest.warns(UserWarning, match=r"LocalResponseNorm \(0\) is none that kernels compute \(alpha: got -1"):
        dk.convert_norm(nn.Sequential(nn.LocalResponseNorm(5, alpha=-1)), "lrn")
    wide = dk.convert_norm(nn.Sequential(nn.Linear(3, 3), nn.LocalResponseNorm(5)).double(), "lrn", learnable=True)
    assert wide[1].alpha.dtype == torch.float64


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (ValueError, "window: got 0, expected a positive int", (torch.ones(2, 3), 0), {}),
        (TypeError, "window: got 2.0 of type float, expected a positive int", (torch.ones(2, 3), 2.0), {}),
        (TypeError, "window: got True of type bool", (torch.ones(2, 3), True), {}),
        (ValueError, "x: got shape (3,), expected (N, C)", (torch.ones(3), 1), {}),
        (TypeError, "x: got dtype torch.int64", (torch.ones(2, 3, dtype=torch.int64), 1), {}),
        (TypeError, "x: got list", ([1.0], 1), {}),
        (ValueError, "alpha: got -1, expected at least 0", (torch.ones(2, 3), 1), {"alpha": -1}),
        (ValueError, "k: got -0.5, expected at least 0", (torch.ones(2, 3), 1), {"k": -0.5}),
        (ValueError, "beta: got nan", (torch.ones(2, 3), 1), {"beta": math.nan}),
        (ValueError, "beta: got inf, expected a finite number", (torch.ones(2, 3), 1), {"beta": math.inf}),
        (ValueError, "alpha: got shape (3,), expected () or (1,)", (torch.ones(2, 3), 1), {"alpha": torch.ones(3)}),
        (TypeError, "k: got dtype torch.float64", (torch.ones(2, 3), 1), {"k": torch.ones((), dtype=torch.float64)}),
        (TypeError, "squared: got 1 of type int", (torch.ones(2, 3), 1), {"squared": 1}),
        (ValueError, "backend: got 'gpu'", (torch.ones(2, 3), 1), {"backend": "gpu"}),
    ],
)
def test_bad_input(error, message, arguments, options):
    with pytest.raises(error) as caught:
        channel_norm(*arguments, **options)
    assert message in str(caught.value)


def test_bad_windows_and_layers():
    for scale in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"^scale: got"):
            Exponential(scale)
    with pytest.raises(TypeError, match=r"^scale: got '2'"):
        Exponential("2")
    with pytest.raises(ValueError, match=r"^scale: got inf, expected a finite number above 0"):
        Exponential(math.inf)
    with pytest.raises(TypeError, match=r"^scale: got dtype torch.int64"):
        Exponential(torch.tensor(2))
    with pytest.raises(ValueError, match=r"^scale: got shape \(2,\)"):
        Exponential(torch.ones(2))
    with pytest.raises(TypeError, match=r"^window.scale: got dtype torch.float64"):
        channel_norm(torch.ones(2, 3), Exponential(torch.tensor(2.0, dtype=torch.float64)))
    with pytest.raises(ValueError, match=r"^size: got 0"):
        dk.LocalResponseNorm(0)
    with pytest.raises(ValueError, match=r"^alpha: got -1"):
        dk.LocalResponseNorm(3, alpha=-1)
    with pytest.raises(ValueError, match=r"^scale: got 0"):
        dk.ExponentialNorm(0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_freed_storage_is_told_before_it_is_read(backend):
    """By kernels and, of the reference, by torch."""
    for name in ("x", "alpha"):
        given = {"x": torch.ones(2, 3), "alpha": torch.ones(())}
        given[name].untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=rf"^{name}: got a Tensor of shape"):
            channel_norm(given["x"], 3, alpha=given["alpha"], backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_types_round_once(backend):
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(4, 32, 20).to(dtype)
        exact = F.local_response_norm(x.double(), 5, 0.5)
        y = channel_norm(x, 5, alpha=0.5, backend=backend)
        kind = torch.finfo(dtype)
        limit = exact.abs() * (kind.eps / 2 + 32 * torch.finfo(torch.float32).eps) + kind.smallest_normal * kind.eps
        assert bool(((y.double() - exact).abs() <= limit).all())


def test_gradients_of_any_layout():
    x, dy = torch.randn(2, 6, 4, 5), torch.randn(2, 6, 4, 5)
    expected, expanded = None, dy.sum().expand(dy.shape)
    for upstream in (
        dy,
        dy.contiguous(memory_format=torch.channels_last),
        dy.mT.contiguous().mT,
        expanded,
    ):
        for layout in (torch.contiguous_format, torch.channels_last):
            leaf = x.contiguous(memory_format=layout).requires_grad_()
            (dx,) = torch.autograd.grad(channel_norm(leaf, 3, alpha=2.0), leaf, upstream)
            assert dx.stride() == leaf.stride()
            if upstream is expanded:
                exact = torch.autograd.grad(channel_norm(leaf, 3, alpha=2.0, backend="reference"), leaf, upstream)[0]
                torch.testing.assert_close(dx, exact)
                continue
            expected = dx if expected is None else expected
            torch.testing.assert_close(dx, expected)


@pytest.mark.parametrize("make", LEARNING, ids=["lrn", "exp"])
def test_layers_in_other_dtypes(make):
    """Parameters of x's dtype or float32, as everywhere; half ones beside a float32 x are told."""
    x = torch.randn(2, 6, 4)
    layer = make()
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    half = make().bfloat16()
    y = half(x.bfloat16())
    y.sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in half.parameters())
    with pytest.raises(TypeError, match=r"got dtype torch.bfloat16, expected torch.float32 for x of torch.float32"):
        half(x)
