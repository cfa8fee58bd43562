"""convert_norm by the names of layers that are no call of the operator: EvoNorm, DyT, Derf, ISRU, and weights."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import divnorm_kernels as dk
from divnorm_kernels import convert_norm


def images(norm=nn.BatchNorm2d):
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), norm(8), nn.ReLU(), nn.Conv2d(8, 4, 3), norm(4))


PLACES = {
    "images": (lambda: nn.BatchNorm2d(8), (2, 8, 5, 5), 1),
    "groups": (lambda: nn.GroupNorm(2, 8), (2, 8, 5, 5), 1),
    "features": (lambda: nn.BatchNorm1d(8), (5, 8), 1),
    "sequences": (lambda: nn.BatchNorm1d(8), (5, 8, 3), 1),
    "tokens": (lambda: nn.LayerNorm(8), (2, 5, 8), -1),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["dyt", "derf", "isru"])
def test_layers_without_statistics(name, place):
    make, shape, dim = PLACES[place]
    old, x = make().double(), torch.randn(shape, dtype=torch.float64)
    for p in old.parameters():
        nn.init.normal_(p)
    new = convert_norm(old, name, report=None, **({"sigma": 0.5} if name == "isru" else {"alpha": 2.0}))
    assert new.weight is old.weight
    assert new.bias is old.bias
    inside = {
        "dyt": lambda: torch.tanh(2 * x),
        "derf": lambda: torch.erf(2 * x),
        "isru": lambda: x / (x * x + 0.25).sqrt(),
    }
    weight, bias = (
        t.movedim(-1, dim) if dim == -1 else t.view(-1, *[1] * (x.dim() - 2)) for t in (old.weight, old.bias)
    )
    np.testing.assert_allclose(new(x).detach(), (inside[name]() * weight + bias).detach(), rtol=1e-10, atol=1e-10)


def test_a_layer_norm_of_images_hands_over_no_weights():
    old = nn.LayerNorm((8, 5, 5))
    with pytest.warns(UserWarning, match="not carried over: weight, bias of LayerNorm -> DyT"):
        new = convert_norm(old, "dyt", report=None)
    assert new(torch.ones(2, 8, 5, 5)).shape == (2, 8, 5, 5)


@pytest.mark.parametrize(("name", "kind"), [("evo-b0", dk.EvoNorm2dB0), ("evo-s0", dk.EvoNorm2dS0)])
def test_evonorm(name, kind):
    model = images()
    model(torch.randn(4, 3, 9, 9))
    running, weight = model[1].running_var.clone(), model[1].weight
    convert_norm(model, name, report=None)
    assert [type(m) for m in model] == [nn.Conv2d, kind, nn.ReLU, nn.Conv2d, kind]
    assert model[1].weight is weight
    if name == "evo-b0":
        assert torch.equal(model[1].running_var, running)
    else:
        assert (model[1].groups, convert_norm(nn.BatchNorm2d(8), name, report=None, groups=2).groups) == (8, 2)
    for place in (nn.BatchNorm1d(8), nn.LayerNorm(8), nn.BatchNorm3d(8)):
        with pytest.raises(
            ValueError, match=f"^to: got '{name}' for a {type(place).__name__}, expected one for images"
        ):
            convert_norm(place, name, report=None)


@pytest.mark.filterwarnings("error:convert_norm:UserWarning")
def test_options_that_evonorm_has_too():
    b0 = convert_norm(nn.BatchNorm2d(8, momentum=0.01), "evo-b0", report=None)
    assert (b0.momentum, b0.eps) == (0.01, 1e-3)
    assert convert_norm(nn.BatchNorm2d(8, momentum=0.01), "evo-b0", report=None, momentum=0.5).momentum == 0.5
    s0 = convert_norm(nn.GroupNorm(2, 8, eps=1e-3), "evo-s0", report=None)
    assert (s0.groups, s0.eps) == (2, 1e-3)
    assert convert_norm(nn.GroupNorm(2, 8), "evo-s0", report=None, groups=4).groups == 4
    s0 = convert_norm(dk.BatchNorm2d(8, sigma=0.5, backend="reference"), "evo-s0", report=None)
    assert (s0.groups, s0.eps, s0.backend) == (8, 0.25, "reference")
    assert convert_norm(dk.BatchNorm2d(8), "evo-s0", report=None).eps == 1e-5


def test_options_that_evonorm_has_not():
    across = dk.BatchNorm2d(8)
    dk.convert_sync(across)
    for old in (nn.SyncBatchNorm(8), across):
        with pytest.warns(UserWarning, match="not carried over: statistics across processes of .*BatchNorm"):
            convert_norm(old, "evo-b0", report=None)
    with pytest.warns(UserWarning, match="not carried over: momentum=None of BatchNorm2d -> EvoNorm2dB0"):
        convert_norm(nn.BatchNorm2d(8, momentum=None), "evo-b0", report=None)


@pytest.mark.parametrize("name", ["wn", "none", "dyt", "evo-s0"])
def test_a_thresholded_linear_unit_becomes_a_relu_and_says_so(name):
    """But where it goes, for EvoNorm has its own."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), dk.FilterResponseNorm2d(8))
    nn.init.constant_(model[1].threshold, 0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        convert_norm(model, name, report=None)
    messages = [str(w.message) for w in caught]
    if name == "evo-s0":
        assert not any("threshold" in m or "tlu" in m for m in messages)
        assert type(model[1]) is dk.EvoNorm2dS0
        return
    assert any(m.startswith("convert_norm: not carried over: ") and "threshold" in m for m in messages)
    assert type(model[1][-1]) is nn.ReLU


@pytest.mark.parametrize(("name", "kind"), [("evo-b0", dk.EvoNorm2dB0), ("evo-s0", dk.EvoNorm2dS0)])
def test_evonorm_has_no_activation_behind(name, kind):
    """What the old norm applied itself goes; a module behind it goes with ``fuse`` alone."""
    assert type(convert_norm(dk.BatchNorm2d(8, activation="relu"), name, report=None)) is kind
    layers = pytest.importorskip("timm.layers", exc_type=ImportError)
    theirs = layers.BatchNormAct2d(8, drop_layer=nn.Dropout)
    found = convert_norm(theirs, name, report=None)
    assert [type(m) for m in found] == [kind, nn.Dropout]
    lines = []
    model = convert_norm(images(), name, fuse=True, report=lines.append)
    assert (type(model[1]), type(model[2])) == (kind, nn.Identity)
    assert lines[-1] == "1: with ReLU"
    assert not hasattr(model[1], "activation"), "it has its own"
    kept = convert_norm(dk.BatchNorm2d(8, activation="relu"), name, report=None, apply_act=False)
    assert [type(m) for m in kept] == [kind, nn.ReLU]


def test_evonorm_leaves_residuals_to_resnet_blocks():
    models = pytest.importorskip("torchvision.models", exc_type=ImportError)
    model = models.resnet18(num_classes=4)
    convert_norm(model, "evo-s0", fuse=True, report=None)
    assert sum(isinstance(m, dk.EvoNorm2dS0) for m in model.modules()) == 20
    assert type(model.layer1[0]) is models.resnet.BasicBlock
    assert isinstance(model.layer1[0].relu, nn.ReLU)
    assert isinstance(model.relu, nn.Identity)
    assert model(torch.randn(1, 3, 32, 32)).isfinite().all()


def test_statistics_that_never_move_are_no_evonorms():
    ops = pytest.importorskip("torchvision.ops", exc_type=ImportError)
    with pytest.warns(UserWarning, match="left as it is: FrozenBatchNorm2d .* has statistics that never move"):
        convert_norm(nn.Sequential(ops.FrozenBatchNorm2d(4)), "evo-b0", report=None)


def trained(model, *shape):
    for p in model.parameters():
        nn.init.normal_(p, 0.5)
    model(2 * torch.randn(shape, dtype=torch.float64) + 1)
    return model.eval()


def rows(layer, dim):
    """The weight as a row for each output."""
    return layer.weight.detach().movedim(dim, 0).flatten(1)


def test_weight_norm_is_the_same_function_in_eval_mode():
    chain = [
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 3),
        nn.BatchNorm2d(4),
    ]
    model = trained(nn.Sequential(*chain).double(), 4, 3, 6, 6)
    x, lines = torch.randn(4, 3, 6, 6, dtype=torch.float64), []
    expected, bias = model(x), model[1].bias
    convert_norm(model, "wn", report=lines.append)
    np.testing.assert_allclose(model(x).detach(), expected.detach(), rtol=1e-10, atol=1e-10)
    assert model[0].bias is bias
    for path, dim in ((0, 0), (3, 1)):
        gain = model[path].parametrizations.weight.original0
        np.testing.assert_allclose(rows(model[path], dim).norm(dim=1), gain.detach().flatten().abs(), rtol=1e-10)
    assert lines == [
        "1: BatchNorm2d -> Identity",
        "4: BatchNorm2d -> Identity",
        "0: Conv2d by 'wn'",
        "3: ConvTranspose2d by 'wn'",
    ]


def test_scaled_weight_standardization_takes_gain_and_bias():
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).double(), 4, 3, 6, 6)
    before, old = copy.deepcopy(model[0]), model[1]
    weight, bias = old.weight.detach().clone(), old.bias
    convert_norm(model, "sws", report=None, gamma="relu", eps=0.0)
    v = before.weight.detach().flatten(1).numpy()
    gamma = np.sqrt(2 * np.pi / (np.pi - 1))
    centred = (v - v.mean(1, keepdims=True)) / v.std(1, keepdims=True) / np.sqrt(v.shape[1])
    expected = weight.numpy()[:, None] * gamma * centred
    np.testing.assert_allclose(rows(model[0], 0), expected, rtol=1e-10, atol=1e-10)
    assert model[0].bias is bias


def test_gains_that_groups_of_a_transposed_convolution_share():
    """Have no place for the norm's weight, its bias goes to the layer."""
    model = nn.Sequential(nn.ConvTranspose2d(4, 8, 3, groups=2), nn.BatchNorm2d(8))
    nn.init.constant_(model[1].weight, 2.0)
    with pytest.warns(UserWarning, match="not carried over: weight of BatchNorm2d -> Identity"):
        convert_norm(model, "sws", report=None)
    assert model[0].parametrizations.weight.original0.flatten().tolist() == [1.0] * 4
    assert model[0].bias is not None


def test_a_bias_of_another_dtype_learns_all_the_same():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, dtype=torch.float64))
    convert_norm(model, "sws", report=None)
    assert (model[0].bias.dtype, model[0].bias.requires_grad) == (torch.float32, True)


def test_a_norm_whose_affine_part_is_no_number_a_channel_says_so():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LayerNorm((4, 5, 5)))
    with pytest.warns(UserWarning, match="not carried over: weight, bias of LayerNorm -> Identity"):
        convert_norm(model, "wn", report=None)
    assert type(model[1]) is nn.Identity


@pytest.mark.parametrize("name", ["wn", "sws"])
def test_norms_that_follow_no_weights_of_their_own_stay(name):
    encoder = nn.TransformerEncoderLayer(8, 2, 16)
    for model in (nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)), encoder, nn.BatchNorm2d(4)):
        keys = list(model.state_dict())
        with pytest.warns(UserWarning, match="left as it is: .* has no convolution or linear layer before it"):
            assert convert_norm(model, name, report=None) is model
        assert list(model.state_dict()) == keys


def test_options_of_weights_are_checked_first():
    model = images()
    with pytest.raises(ValueError, match=r"^gamma: got 2.0 for 'wn'"):
        convert_norm(model, "wn", gamma=2.0)
    with pytest.raises(TypeError, match="window"):
        convert_norm(model, "sws", window=3)
    assert type(model[1]) is nn.BatchNorm2d


def test_suffixes_are_for_families_with_sigma():
    for name in ("evo-s0*", "wn-s", "dyt*", "isru-s"):
        with pytest.raises(ValueError, match=r"^to: got"):
            convert_norm(images(), name)
