"""The layers that torch.nn has too: its values, gradients, buffers and checkpoints, and what they add."""

import copy
import re

import pytest
import torch
from torch import nn

import divnorm_kernels as dk
from divnorm_kernels import divisive_norm, l1_penalty

EPS = 1e-3
LAYERS = {
    "BatchNorm1d, features": (dk.BatchNorm1d, nn.BatchNorm1d, (6,), (8, 6)),
    "BatchNorm1d": (dk.BatchNorm1d, nn.BatchNorm1d, (6,), (4, 6, 9)),
    "BatchNorm2d": (dk.BatchNorm2d, nn.BatchNorm2d, (6,), (4, 6, 5, 7)),
    "BatchNorm3d": (dk.BatchNorm3d, nn.BatchNorm3d, (6,), (2, 6, 3, 4, 5)),
    "LayerNorm": (dk.LayerNorm, nn.LayerNorm, (7,), (3, 4, 7)),
    "LayerNorm of images": (dk.LayerNorm, nn.LayerNorm, ((6, 5, 7),), (3, 6, 5, 7)),
    "RMSNorm": (dk.RMSNorm, nn.RMSNorm, ((4, 7),), (3, 2, 4, 7)),
    "GroupNorm": (dk.GroupNorm, nn.GroupNorm, (3, 6), (3, 6, 5, 7)),
    "GroupNorm, features": (dk.GroupNorm, nn.GroupNorm, (3, 6), (3, 6)),
    "GroupNorm, four dimensions": (dk.GroupNorm, nn.GroupNorm, (2, 4), (2, 4, 2, 3, 2, 3)),
    "InstanceNorm1d": (dk.InstanceNorm1d, nn.InstanceNorm1d, (6,), (3, 6, 9)),
    "InstanceNorm1d, no batch": (dk.InstanceNorm1d, nn.InstanceNorm1d, (6,), (6, 9)),
    "InstanceNorm2d": (dk.InstanceNorm2d, nn.InstanceNorm2d, (6,), (3, 6, 5, 7)),
    "InstanceNorm3d": (dk.InstanceNorm3d, nn.InstanceNorm3d, (6,), (2, 6, 3, 4, 5)),
}
RUNNING = {name: row for name, row in LAYERS.items() if "Batch" in name or "Instance" in name}
AFFINE = {"BatchNorm2d": {"affine": False}, "LayerNorm": {"elementwise_affine": False}}


def pair(name, **options):
    """Our layer and torch's with the same random parameters."""
    ours, theirs, arguments, _ = LAYERS[name]
    if "Instance" in name:
        options = {"affine": True, **options}
    reference = theirs(*arguments, eps=EPS, dtype=torch.float64, **options)
    for p in reference.parameters():
        nn.init.normal_(p)
    layer = ours(*arguments, eps=EPS, dtype=torch.float64, **options)
    layer.load_state_dict(reference.state_dict())
    return layer, reference


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients_are_torchs(name):
    layer, reference = pair(name)
    x = (torch.randn(LAYERS[name][3], dtype=torch.float64) + 3).requires_grad_()
    dy = torch.randn_like(x)
    y, expected = layer(x), reference(x)
    close(y, expected)
    got = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    wanted = torch.autograd.grad(expected, [x, *reference.parameters()], dy)
    for gradient, want in zip(got, wanted, strict=True):
        close(gradient, want)


@pytest.mark.parametrize("name", LAYERS)
def test_constructors_and_checkpoints_are_torchs(name):
    ours, theirs, arguments, _ = LAYERS[name]
    layer, reference = ours(*arguments), theirs(*arguments)
    assert list(layer.state_dict()) == list(reference.state_dict())
    reference.load_state_dict(layer.state_dict())
    layer.load_state_dict(reference.state_dict())
    assert layer.eps == (None if "RMS" in name else pytest.approx(reference.eps, rel=1e-12))
    positional = (
        (*arguments, EPS) if "RMS" in name else (*arguments, EPS, *((0.2, True, True) if name in RUNNING else ()))
    )
    assert list(ours(*positional).state_dict()) == list(theirs(*positional).state_dict())
    meta = ours(*arguments, device="meta", dtype=torch.float64)
    assert {(t.device.type, t.dtype) for t in meta.parameters()} <= {("meta", torch.float64)}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name", RUNNING)
def test_running_statistics_are_torchs(name, momentum):
    layer, reference = pair(name, momentum=momentum, track_running_stats=True)
    for step in range(3):
        x = torch.randn(LAYERS[name][3], dtype=torch.float64) * (step + 1) + step
        close(layer(x), reference(x))
        close(layer.running_mean, reference.running_mean)
        close(layer.running_var, reference.running_var)
    assert layer.num_batches_tracked == reference.num_batches_tracked
    layer.eval()
    reference.eval()
    x.requires_grad_()
    close(layer(x), reference(x))
    close(*(torch.autograd.grad(module(x).square().sum(), x)[0] for module in (layer, reference)))
    close(layer.running_mean, reference.running_mean)
    layer.reset_running_stats()
    assert layer.running_mean.abs().max() == 0
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_running_statistics_of_a_half_model(dtype):
    layer, x = dk.BatchNorm2d(3, momentum=None, dtype=dtype), torch.randn(8, 3, 9, 9).to(dtype)
    for _ in range(2):
        layer(x)
    expected = x.float().var((0, 2, 3))
    torch.testing.assert_close(layer.running_var.float(), expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("name", RUNNING)
def test_without_running_statistics_eval_mode_takes_the_batchs(name):
    layer, reference = pair(name, track_running_stats=False)
    x = torch.randn(LAYERS[name][3], dtype=torch.float64)
    close(layer.eval()(x), reference.eval()(x))


@pytest.mark.parametrize("name", AFFINE)
def test_without_parameters(name):
    layer, reference = pair(name, **AFFINE[name])
    assert not list(layer.parameters())
    x = torch.randn(LAYERS[name][3], dtype=torch.float64)
    close(layer(x), reference(x))


def test_layer_norm_without_bias():
    layer, reference = pair("LayerNorm", bias=False)
    assert list(layer.state_dict()) == ["weight"]
    x = torch.randn(3, 4, 7, dtype=torch.float64)
    close(layer(x), reference(x))


@pytest.mark.parametrize("name", LAYERS)
def test_sigma_penalty_and_relu(name):
    """What the paper adds, on top of the layer without it."""
    ours, _, arguments, shape = LAYERS[name]
    affine = {"affine": True} if "Instance" in name else {}
    plain = ours(*arguments, sigma=0.7, **affine)
    layer = ours(*arguments, sigma=0.7, learn_sigma=True, l1_weight=0.1, activation="relu", **affine)
    for p, q in zip(layer.named_parameters(), plain.named_parameters(), strict=False):
        assert p[0] == q[0]
    with torch.no_grad():
        for module in (plain, layer):
            torch.manual_seed(0)
            for key, p in sorted(module.named_parameters()):
                if key != "sigma":
                    p.normal_()
    x = torch.randn(shape)
    torch.testing.assert_close(layer(x), plain(x).relu())
    assert plain.eps == pytest.approx(0.49)
    assert plain.l1 is None
    assert layer.l1 > 0
    loss = l1_penalty(layer) + layer(x).square().mean()
    loss.backward()
    assert layer.sigma.grad is not None
    assert layer.sigma.grad != 0
    assert layer.sigma.item() == pytest.approx(0.7)
    layer.eval()
    layer(x)
    assert layer.l1 is None
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_penalty_is_the_mean_of_centred_magnitudes():
    x = torch.randn(4, 6, 5, 7)
    for layer, mean in (
        (dk.BatchNorm2d(6, l1_weight=1.0), x.mean((0, 2, 3), keepdim=True)),
        (dk.GroupNorm(1, 6, l1_weight=1.0), x.mean((1, 2, 3), keepdim=True)),
        (dk.LayerNorm((6, 5, 7), l1_weight=1.0), x.mean((1, 2, 3), keepdim=True)),
        (dk.InstanceNorm2d(6, l1_weight=1.0), x.mean((2, 3), keepdim=True)),
        (dk.RMSNorm(7, l1_weight=1.0), 0),
    ):
        layer(x)
        torch.testing.assert_close(layer.l1, (x - mean).abs().mean())


def test_eval_mode_of_a_learned_sigma_differentiates_it():
    layer = dk.BatchNorm2d(3, sigma=0.5, learn_sigma=True, activation="relu", dtype=torch.float64)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    layer(x)
    layer.eval()
    fixed = dk.BatchNorm2d(3, sigma=0.5, activation="relu", dtype=torch.float64).eval()
    fixed.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "sigma"})
    close(layer(x), fixed(x))
    (gradient,) = torch.autograd.grad(layer(x).sum(), layer.sigma)
    step = 1e-6
    with torch.no_grad():
        layer.sigma.add_(step)
        above = layer(x).sum()
        layer.sigma.sub_(2 * step)
        below = layer(x).sum()
    torch.testing.assert_close(gradient.squeeze(0), (above - below) / (2 * step), rtol=1e-5, atol=1e-7)


def test_local_layers():
    x = torch.randn(3, 6, 11, 12)
    layer = dk.LocalContrastNorm2d(6, 5, sigma=0.5)
    assert torch.equal(layer(x), divisive_norm(x, layer.weight, layer.bias, window=5, groups=6, sigma=0.5))
    layer = dk.PositionalNorm2d(6)
    expected = nn.functional.layer_norm(x.movedim(1, -1), (6,)).movedim(-1, 1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, row in LAYERS.items() if len(row[3]) == 4 and "RMS" not in name])
def test_channels_last_goes_through(name):
    layer = LAYERS[name][0](*LAYERS[name][2])
    x = torch.randn(LAYERS[name][3]).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert dx.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, LAYERS[name][1](*LAYERS[name][2])(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parameters", ["x's", torch.float32])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rms_norms_default_epsilon_is_torchs(dtype, parameters):
    """That of the dtype it computes in: .01 squared is far above float32's, and far below bfloat16's."""
    options = {"dtype": dtype if parameters == "x's" or dtype == torch.float64 else parameters}
    for size in (0.01, 1e-4, 1e-8):
        x = (torch.randn(5, 16) * size).to(dtype)
        y, expected = dk.RMSNorm(16, **options)(x), nn.RMSNorm(16, **options)(x)
        torch.testing.assert_close(y, expected, rtol=4 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny)
    pair_of = torch.tensor([[0.01, -0.01]], dtype=dtype)
    torch.testing.assert_close(dk.RMSNorm(2, **options)(pair_of), pair_of.sign(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("layer", [dk.BatchNorm1d(3), dk.InstanceNorm1d(3)], ids=lambda layer: type(layer).__name__)
def test_one_value_per_channel_cannot_be_trained_on(layer):
    x = torch.ones(1, 3, 1)
    with pytest.raises(ValueError, match=r"x: got shape \(1, 3, 1\), expected more than 1 value per channel"):
        layer(x)


def test_eps_is_sigma_squared():
    layer = dk.BatchNorm2d(3, eps=0.25)
    assert layer.sigma == 0.5
    layer.eps = 4.0
    assert layer.sigma == 2.0
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(layer(x), nn.BatchNorm2d(3, eps=4.0)(x))
    with pytest.raises(AttributeError, match="eps: sigma is learned"):
        dk.BatchNorm2d(3, learn_sigma=True).eps = 1.0


BAD = {
    "both": (lambda: dk.LayerNorm(3, eps=1e-5, sigma=1.0), ValueError, "eps: got 1e-05 beside sigma 1.0, expected one"),
    "eps": (lambda: dk.GroupNorm(1, 3, eps=-1.0), ValueError, "eps: got -1.0, expected a float of at least 0"),
    "sigma": (lambda: dk.GroupNorm(1, 3, sigma="1"), TypeError, "sigma: got '1' of type str, expected a float"),
    "num_groups": (lambda: dk.GroupNorm(2, 3), ValueError, "num_groups: got 2, expected a divisor of the 3 channels"),
    "shape": (lambda: dk.LayerNorm(()), ValueError, "normalized_shape: got (), expected at least one"),
    "activation": (
        lambda: dk.BatchNorm2d(3, activation="selu"),
        ValueError,
        "activation: got 'selu', expected",
    ),
    "learned nothing": (lambda: dk.RMSNorm(3, learn_sigma=True), ValueError, "sigma: got None with learn_sigma=True"),
    "rank": (lambda: dk.BatchNorm2d(3)(torch.ones(2, 3)), ValueError, "x: got 2 dimensions, expected 4"),
    "ranks": (lambda: dk.BatchNorm1d(3)(torch.ones(2, 3, 4, 5)), ValueError, "x: got 4 dimensions, expected 2 or 3"),
    "channels": (lambda: dk.BatchNorm1d(3)(torch.ones(2, 4)), ValueError, "x: got 4 channels, expected num_features"),
    "trailing": (lambda: dk.LayerNorm(3)(torch.ones(2, 4)), ValueError, "x: got shape (2, 4), expected (..., 3)"),
    "second": (lambda: dk.GroupNorm(1, 3)(torch.ones(2, 4)), ValueError, "x: got shape (2, 4), expected (N, 3, ...)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=re.escape(message)):
        call()
