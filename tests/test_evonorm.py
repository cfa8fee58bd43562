"""EvoNorm: its formulas by numpy, gradients by differences, and timm's layers."""

import copy

import numpy as np
import pytest
import torch

import divnorm_kernels as dk

KINDS = {"B0": dk.EvoNorm2dB0, "S0": lambda c, **options: dk.EvoNorm2dS0(c, 2, **options)}


def randomized(layer):
    for name, t in (*layer.named_parameters(), *layer.named_buffers()):
        torch.nn.init.uniform_(t, 0.5, 1.5) if name == "running_var" else torch.nn.init.normal_(t)
    return layer


def by_numpy(kind, layer, x, variance=None):
    """The equations of the paper's table 2, on (N, C, H, W)."""
    x = x.detach().numpy()
    w, b, v = (t.detach().numpy().reshape(-1, 1, 1) for t in (layer.weight, layer.bias, layer.v))
    if kind == "S0":
        groups = x.reshape(len(x), layer.groups, -1)
        deviation = np.sqrt(groups.var(2) + layer.eps)
        return x / (1 + np.exp(-v * x)) / deviation.repeat(x.shape[1] // layer.groups, 1)[..., None, None] * w + b
    variance = x.var((0, 2, 3)) if variance is None else variance.numpy()
    instance = np.sqrt(x.var((2, 3), keepdims=True) + layer.eps)
    return x / np.maximum(np.sqrt(variance + layer.eps).reshape(-1, 1, 1), v * x + instance) * w + b


@pytest.mark.parametrize("size", [(5, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_formula(kind, size):
    layer, x = randomized(KINDS[kind](6, dtype=torch.float64)), torch.randn(4, 6, *size, dtype=torch.float64) * 2 + 1
    expected = by_numpy(kind, layer, x)
    np.testing.assert_allclose(layer(x).detach(), expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(layer(x.contiguous(memory_format=torch.channels_last)).detach(), expected, 1e-10, 1e-10)
    layer.eval()
    expected = by_numpy(kind, layer, x, getattr(layer, "running_var", None))
    np.testing.assert_allclose(layer(x).detach(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [(2, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind, size, training):
    layer = randomized(KINDS[kind](4, dtype=torch.float64, eps=0.1)).train(training)
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    names = ("weight", "bias", "v")

    def call(x, *parameters):
        twin = copy.deepcopy(layer)  # whose running variance alone moves
        return torch.func.functional_call(twin, dict(zip(names, parameters, strict=True)), (x,))

    inputs = (x, *(getattr(layer, name) for name in names))
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("apply_act", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_timms_layers(kind, apply_act, training):
    """Their checkpoints, values, gradients and running variance."""
    layers = pytest.importorskip("timm.layers", exc_type=ImportError)
    options = {"groups": 2} if kind == "S0" else {}
    theirs = getattr(layers, f"EvoNorm2d{kind}")(8, apply_act=apply_act, **options)
    ours = KINDS[kind](8, apply_act=apply_act).train(training)
    randomized(theirs).train(training)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 8, 5, 5) * 2 + 1
    results = []
    for layer in (ours, theirs):
        own = x.clone().requires_grad_()
        y = layer(own)
        y.square().sum().backward()
        gradients = [p.grad for p in layer.parameters()]
        results.append([y, own.grad, *gradients, *layer.buffers()])
    for found, expected in zip(*results, strict=True):  # float32, sums of up to 200 terms
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5 * expected.abs().max().item())


@pytest.mark.filterwarnings("ignore:var.*degrees of freedom:UserWarning")
@pytest.mark.parametrize("shape", [(0, 4, 2, 2), (2, 4, 0, 3)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_empty(kind, shape):
    layer, x = KINDS[kind](4), torch.empty(shape, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert not any(p.grad.any() for p in layer.parameters())
    assert all(torch.equal(t, torch.ones(4)) for t in layer.buffers())


def test_groups_are_told_by_their_size_too():
    assert dk.EvoNorm2dS0(8, group_size=2).groups == 4
    assert dk.EvoNorm2dS0(64).groups == 32


def test_the_running_variance():
    layer, x = dk.EvoNorm2dB0(3, momentum=0.25), torch.randn(4, 3, 2, 2)
    layer(x)
    torch.testing.assert_close(layer.running_var, 0.75 + 0.25 * x.transpose(0, 1).flatten(1).var(1))
    before = layer.running_var.clone()
    layer(torch.randn(1, 3, 1, 1)).sum().backward()
    layer.eval()(x)
    assert torch.equal(layer.running_var, before), "of one value, and in eval mode"
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_memory_format(kind):
    x = torch.randn(2, 4, 3, 5).contiguous(memory_format=torch.channels_last)
    assert KINDS[kind](4)(x).is_contiguous(memory_format=torch.channels_last)


def test_bad_input():
    for make, words in (
        (lambda: dk.EvoNorm2dB0(0), "num_channels: got 0, expected a positive int"),
        (lambda: dk.EvoNorm2dB0(4, apply_act=1), "apply_act: got 1 of type int, expected a bool"),
        (lambda: dk.EvoNorm2dB0(4, eps=-1.0), "eps: got -1.0, expected a float of at least 0"),
        (lambda: dk.EvoNorm2dB0(4, momentum=None), "momentum: got None of type NoneType, expected a float"),
        (lambda: dk.EvoNorm2dS0(8), "groups: got 32, expected a divisor of num_channels, 8"),
        (lambda: dk.EvoNorm2dS0(8, group_size=3), "group_size: got 3, expected a divisor of num_channels, 8"),
        (lambda: dk.EvoNorm2dS0(8, 2, backend="cudnn"), "backend: got 'cudnn'"),
        (lambda: dk.EvoNorm2dB0(4)(torch.ones(2, 4)), r"x: got shape \(2, 4\), expected \(N, 4, H, W\)"),
        (lambda: dk.EvoNorm2dS0(4, 2)(torch.ones(2, 3, 1, 1)), r"x: got shape \(2, 3, 1, 1\), expected \(N, 4, H, W\)"),
        (lambda: dk.EvoNorm2dB0(4)(torch.ones(2, 4, 1, 1).int()), "x: got dtype torch.int32"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{words}"):
            make()
