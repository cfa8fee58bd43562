"""Residuals, thresholds, p = 1 and x in the numerator by the CPU kernels: which way they go, what they keep, edges."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch.autograd import gradgradcheck
from torch.overrides import TorchFunctionMode

import divnorm_kernels as dk
from divnorm_kernels import divisive_norm
from divnorm_kernels.backends import cpu
from divnorm_kernels.fields import geometry
from divnorm_kernels.norm import Norm

FAMILY = {
    "residual": {"residual": True},
    "residual, relu": {"residual": True, "activation": "relu"},
    "residual, silu": {"residual": True, "activation": "silu"},
    "tlu": {"activation": "tlu"},
    "residual, tlu": {"residual": True, "activation": "tlu"},
    "p = 1": {"p": 1},
    "p = 1, residual, gelu": {"p": 1, "residual": True, "activation": "gelu"},
    "x kept": {"subtract_mean": False},
    "p = 1, x kept, tlu": {"p": 1, "subtract_mean": False, "activation": "tlu"},
}
SHAPE = (2, 4, 9, 8)


def tensors_for(options, dtype=torch.float64, shape=SHAPE):
    """x, weight and bias, and by keyword what the options ask for."""
    x, residual = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(2))
    weight, bias, threshold = (torch.randn(shape[1], dtype=dtype, requires_grad=True) for _ in range(3))
    behind = {"residual": residual} if options.get("residual") else {}
    behind |= {"threshold": threshold} if options.get("activation") == "tlu" else {}
    return (x, weight, bias), options | {"window": 3} | behind, [x, weight, bias, *behind.values()]


@pytest.mark.parametrize("name", FAMILY)
def test_a_prepared_call_serves_it(name):
    inputs, options, leaves = tensors_for(FAMILY[name])
    y = divisive_norm(*inputs, **options)
    assert y.grad_fn.name() == "PreparedFunctionBackward"
    want = divisive_norm(*inputs, **options, backend="reference")
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(y)
    for got, expected in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", FAMILY)
def test_saved_is_x_and_the_residual_where_backward_reads_it(name):
    saved = []
    inputs, options, leaves = tensors_for(FAMILY[name])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = divisive_norm(*inputs, **options)
    reads = "residual" in options and options.get("activation") is not None
    assert sum(t.numel() == y.numel() for t in saved) == 1 + reads
    torch.autograd.grad(y.sum(), leaves)


def test_without_an_activation_the_residuals_gradient_is_ys():
    """Itself, not a copy of it."""
    inputs, options, _ = tensors_for({"residual": True})
    seen = []
    y = divisive_norm(*inputs, **options)
    y.register_hook(seen.append)
    (found,) = torch.autograd.grad(y, options["residual"], torch.randn_like(y))
    assert found.data_ptr() == seen[0].data_ptr()


@pytest.mark.parametrize("name", FAMILY)
def test_second_derivatives(name):
    _, options, leaves = tensors_for(FAMILY[name], shape=(2, 2, 3, 2))
    names = [key for key in ("residual", "threshold") if isinstance(options.get(key), torch.Tensor)]

    def call(*given):
        return divisive_norm(*given[:3], **options | dict(zip(names, given[3:], strict=True)), backend="cpu")

    with torch.no_grad():
        leaves[0].mul_(3)  # away from where abs(v) and the threshold bend
    assert gradgradcheck(call, leaves)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("window", [3, "all"])
def test_of_a_residual_in_another_layout(name, window):
    """And of another x's: channels last, or with gaps."""
    inputs, options, _ = tensors_for(FAMILY[name] | {"residual": True})
    options["window"] = window
    x, residual = inputs[0].detach(), options["residual"].detach()
    gaps = residual.new_zeros((*SHAPE[:-1], 2 * SHAPE[-1]))
    gaps[..., ::2] = residual
    last = torch.channels_last
    for own, other in (
        (x, residual.contiguous(memory_format=last)),
        (x.contiguous(memory_format=last), residual),
        (x.contiguous(memory_format=last), residual.contiguous(memory_format=last)),
        (x, gaps[..., ::2]),
        (x, residual[:1].expand(SHAPE)),
    ):
        y = divisive_norm(own, *inputs[1:], **options | {"residual": other})
        want = divisive_norm(x, *inputs[1:], **options | {"residual": other.contiguous()})
        torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
        assert y.stride() == own.stride()


@pytest.mark.parametrize("window", [3, "all", None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_thresholds_that_are_no_numbers(memory_format, dtype, window):
    """A NaN in y stays one, and a NaN threshold is y's wherever that is none; gradients go where the value does."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    threshold = torch.tensor([math.nan, math.inf, -math.inf, 0.0], dtype=wide).requires_grad_()
    x = torch.randn(SHAPE).to(dtype).contiguous(memory_format=memory_format)
    residual = torch.zeros_like(x)
    residual[0, :, 0, 0], residual[0, :, 1, 1] = math.nan, -math.inf
    residual.requires_grad_()
    y, want = (
        divisive_norm(x, window=window, activation="tlu", threshold=threshold, residual=residual, backend=backend)
        for backend in ("cpu", "reference")
    )
    torch.testing.assert_close(y, want, equal_nan=True, rtol=4 * torch.finfo(dtype).eps, atol=1e-5)
    dy = torch.randn(SHAPE).to(dtype)
    dy[:, :, 2, 2] = math.inf
    for got, expected in zip(*(torch.autograd.grad(z, (residual, threshold), dy) for z in (y, want)), strict=True):
        torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-3, atol=1e-3)


class Kept(torch.nn.Module):
    """Layers with what stands behind them, of parameters of every shape."""

    def __init__(self):
        super().__init__()
        self.windows = dk.DivisiveNorm2d(4, 3, activation="tlu", p=1)
        self.rows = dk.LayerNorm((4, 9, 8), activation="tlu")
        self.groups = dk.GroupNorm(2, 4, activation="silu")
        self.response = dk.FilterResponseNorm2d(4)
        self.batch = dk.BatchNorm2d(4, p=1, activation="relu")

    def forward(self, x, residual):
        """Each with a residual."""
        for layer in self.children():
            x = layer(x, residual)
        return x


def test_layers_go_by_prepared_calls():
    model = Kept().double()
    for p in model.parameters():
        torch.nn.init.normal_(p)
    x, residual = (torch.randn(SHAPE, dtype=torch.float64, requires_grad=True) for _ in range(2))
    leaves = [x, residual, *model.parameters()]
    outputs = []
    handles = [m.register_forward_hook(lambda m, _, y: outputs.append(y)) for m in model.children()]
    y = model(x, residual)
    assert [t.grad_fn.name() for t in outputs] == ["PreparedFunctionBackward"] * 5
    for handle in handles:
        handle.remove()
    for layer in model.children():
        layer.backend = "reference"
    want, dy = model(x, residual), torch.randn_like(y)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    for got, expected in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True):
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("over_batch", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_mean_deviation_is_the_same_for_any_number_of_threads(memory_format, over_batch):
    x = torch.randn(3, 32, 65, 63).contiguous(memory_format=memory_format)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for window in (5, "all"):
                leaf = x.clone().requires_grad_()
                y = divisive_norm(leaf, window=window, p=1, activation="silu", residual=x, over_batch=over_batch)
                found.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaf)))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(found, found[2:], strict=False):
        assert all(map(torch.equal, one, other))


class Misplaced(TorchFunctionMode):
    """Gives room like ``what`` one number away from where the allocator would."""

    def __init__(self, what):
        super().__init__()
        self.what, self.given = what, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.empty_like and args[0] is self.what:
            self.given += 1
            like = args[0]
            return torch.empty(like.numel() + 1, dtype=like.dtype)[1:].as_strided(like.shape, like.stride(), 1)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("options", [{"window": "all", "groups": 10}, {"window": 3}], ids=["whole", "windows"])
def test_written_past_the_cache_beside_a_residual_that_lies_otherwise(options, memory_format):
    """A residual and its gradient one number away from where vectors of y and dx begin, which moves no bit."""
    shape, norm = (2, 40, 240, 240), Norm(**options, activation="relu")
    x, dy, residual = (torch.randn(shape).contiguous(memory_format=memory_format) for _ in range(3))
    away = torch.empty(residual.numel() + 1)[1:].as_strided(shape, residual.stride(), 1).copy_(residual)
    assert away.data_ptr() % 64 != residual.data_ptr() % 64
    g, found = geometry(norm, shape), []
    for added in (residual, away):
        y, maps, _ = cpu.forward(g, x, None, None, 0.8, False, False, added)
        with Misplaced(added) if added is away else nullcontext() as misplaced:
            needs = (True, False, False, False, True, False)
            dx, *_, dresidual, _ = cpu.backward(g, dy, None, x, maps, None, None, 0.8, needs, added)
        found.append((y, dx, dresidual))
    assert misplaced.given == 1
    assert dresidual.data_ptr() % 64 != dx.data_ptr() % 64
    assert all(map(torch.equal, *found))
