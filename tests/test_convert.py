"""Replacing a model's normalization: which layers, what they carry over, what is said."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import divnorm_kernels as dk
from divnorm_kernels import convert_norm


def images(norm=nn.BatchNorm2d):
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm(8), nn.Sequential(nn.ReLU(), nn.Conv2d(8, 4, 3), norm(4)))


def randomized(model):
    for p in model.parameters():
        nn.init.normal_(p)
    for _ in range(2):
        model(torch.randn(4, 3, 9, 9) * 2 + 1)
    return model


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("norm", "name", "kind"),
    [
        (nn.BatchNorm2d, "bn", dk.BatchNorm2d),
        (lambda c: nn.GroupNorm(1, c), "ln", dk.GroupNorm),
        (lambda c: nn.GroupNorm(c, c), "in", dk.GroupNorm),
        (lambda c: nn.InstanceNorm2d(c, affine=True), "in", dk.InstanceNorm2d),
        (lambda c: nn.GroupNorm(2, c), partial(dk.GroupNorm, 2), dk.GroupNorm),
    ],
    ids=["bn", "ln", "group to in", "in", "partial"],
)
def test_the_same_layer_of_ours_computes_the_same(norm, name, kind, training):
    model = randomized(images(norm)).train(training)
    twin = convert_norm(model, name, inplace=False, report=None)
    assert isinstance(twin[1], kind)
    assert not isinstance(model[1], kind), "the model itself is as it was"
    assert twin.training == training
    x = torch.randn(4, 3, 9, 9)
    torch.testing.assert_close(twin(x), copy.deepcopy(model)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:convert_norm. not carried over:UserWarning")
def test_tokens():
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8, eps=1e-3), nn.Linear(8, 4), nn.RMSNorm(4))
    for p in model.parameters():
        nn.init.normal_(p)
    x = torch.randn(2, 5, 6)
    ln = convert_norm(model, "ln", only=nn.LayerNorm, inplace=False, report=None)
    torch.testing.assert_close(ln(x), model(x), rtol=1e-4, atol=1e-5)
    assert type(ln[1]) is dk.LayerNorm
    assert type(ln[3]) is nn.RMSNorm
    rms = convert_norm(model, "rms", only=nn.RMSNorm, inplace=False, report=None)
    torch.testing.assert_close(rms(x), model(x), rtol=1e-4, atol=1e-5)
    windows = convert_norm(model, "dn", window=3, inplace=False, report=None)
    expected = dk.divisive_norm(model[0](x).view(-1, 8), model[1].weight, model[1].bias, window=3).view(2, 5, 8)
    torch.testing.assert_close(windows[1](model[0](x)), expected)
    batch = convert_norm(model, "bn", only="1", inplace=False, report=None)
    reference = nn.BatchNorm1d(8, eps=1e-3)
    reference.load_state_dict({"weight": model[1].weight, "bias": model[1].bias}, strict=False)
    got = batch[1](model[0](x))
    torch.testing.assert_close(got, reference(model[0](x).view(-1, 8)).view(2, 5, 8), rtol=1e-4, atol=1e-5)
    back = convert_norm(batch, "ln", only="1", report=None)
    torch.testing.assert_close(back(x), ln(x), rtol=1e-4, atol=1e-5)


NAMES = {
    "bn-s": (dk.BatchNorm2d, {"sigma": 1.0, "l1_weight": 0.0}),
    "bn*": (dk.BatchNorm2d, {"sigma": 1.0, "l1_weight": 0.01}),
    "ln*": (dk.GroupNorm, {"sigma": 1.0, "num_groups": 1}),
    "gn": (dk.GroupNorm, {"num_groups": 8, "sigma": 1e-5**0.5}),
    "in": (dk.InstanceNorm2d, {"affine": True}),
    "rms": (dk.DivisiveNorm2d, {"window": None, "norm_window": "all"}),
    "dn": (dk.DivisiveNorm2d, {"window": 5, "sigma": 1.0, "l1_weight": 0.0}),
    "dn*": (dk.DivisiveNorm2d, {"l1_weight": 0.01}),
    "dn-mean-only": (dk.DivisiveNorm2d, {"norm_window": None}),
}


@pytest.mark.parametrize("name", NAMES)
def test_names(name):
    model = convert_norm(images(), name, report=None)
    kind, attributes = NAMES[name]
    assert type(model[1]) is kind
    assert {key: getattr(model[1], key) for key in attributes} == attributes
    model(torch.randn(2, 3, 9, 9)).sum().backward()
    assert not any(type(m) is nn.BatchNorm2d for m in model.modules())


@pytest.mark.parametrize("shape", [(8, 5, 6), (5, 6), (2, 3, 2, 3, 2)], ids=str)
def test_layer_norm_over_several_dimensions_keeps_every_weight(shape):
    model = nn.LayerNorm(shape)
    for p in model.parameters():
        nn.init.normal_(p)
    x = torch.randn(3, *shape)
    torch.testing.assert_close(convert_norm(model, "ln", report=None)(x), model(x), rtol=1e-4, atol=1e-5)
    if len(shape) > 4:
        with pytest.raises(ValueError, match="to: got 'dn' for a layer over"):
            convert_norm(model, "dn", report=None)


def test_what_cannot_be_replaced_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.BatchNorm2d(8), nn.LayerNorm(8))
    layers = list(model)
    with pytest.raises(ValueError, match="to: got 'gn' for a layer over the last dimension"):
        convert_norm(model, "gn", report=None)
    assert list(model) == layers


def test_layers_take_x_by_torchs_name():
    x = torch.randn(2, 8, 3, 3)
    for layer, name in ((nn.BatchNorm2d(8), "bn"), (nn.GroupNorm(2, 8), "gn"), (nn.InstanceNorm2d(8), "in")):
        torch.testing.assert_close(convert_norm(layer, name, report=None)(input=x), layer.train()(input=x))
    assert torch.equal(convert_norm(nn.RMSNorm(3), "rms", report=None)(x=x), dk.RMSNorm(3)(x))


def test_none_and_options():
    assert type(convert_norm(images(), "none", report=None)[1]) is nn.Identity
    layer = convert_norm(images(), "dn*", window=3, sigma=0.5, l1_weight=0.005, affine=False, report=None)[1]
    assert (layer.window, layer.sigma, layer.l1_weight, layer.weight) == (3, 0.5, 0.005, None)


DENSE = {
    "dn": ({"window": 4, "sigma": 0.5}, {"window": 4, "sigma": 0.5}),
    "dn-mean-only": ({"window": 4}, {"window": 4, "norm_window": None}),
    "rms": ({"eps": 0.25}, {"window": None, "norm_window": "all", "sigma": 0.5}),
    "ln": ({"eps": 0.25}, {"window": "all", "sigma": 0.5}),
}


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("shape", [(6, 9), (6, 9, 5)], ids=str)
def test_a_batch_norm_of_features_or_sequences_becomes_one_of_both(name, shape):
    options, of_the_operator = DENSE[name]
    layer, x = convert_norm(nn.BatchNorm1d(9), name, report=None, **options), torch.randn(shape)
    expected = dk.divisive_norm(x, layer.weight, layer.bias, **of_the_operator)
    for again in (layer, convert_norm(copy.deepcopy(layer), name, report=None)):
        torch.testing.assert_close(again(x), expected)


def test_instance_norm_in_the_place_of_features_is_refused():
    layer = convert_norm(nn.BatchNorm1d(9), "in", report=None)
    x = torch.randn(6, 9, 5)
    torch.testing.assert_close(layer(x), nn.InstanceNorm1d(9)(x))
    with pytest.raises(ValueError, match=r"^x: got shape \(9, 9\), expected \(N, C, L\)"):
        layer(torch.randn(9, 9))


def test_what_is_carried_over():
    model = randomized(images()).double().eval()
    model[1].weight.requires_grad_(False)
    old = copy.deepcopy(model[1])
    for to in ("bn*", "dn", "bn"):  # there and back
        convert_norm(model, to, report=None)
        assert torch.equal(model[1].weight, old.weight)
        assert torch.equal(model[1].bias, old.bias)
        assert model[1].weight.dtype == torch.float64
        assert not model[1].weight.requires_grad
        assert model[1].bias.requires_grad
        assert not model[1].training
    running = convert_norm(nn.Sequential(old), "bn", report=None)[0]
    for name in ("running_mean", "running_var", "num_batches_tracked", "eps"):
        assert getattr(running, name) == pytest.approx(getattr(old, name))
    meta = convert_norm(nn.Sequential(nn.BatchNorm2d(4, device="meta")), "dn", report=None)
    assert meta[0].weight.is_meta


def test_statistics_across_processes_stay_so():
    layer = convert_norm(nn.SyncBatchNorm(4), "bn", report=None)
    assert isinstance(layer, dk.BatchNorm2d)
    assert layer.sync
    assert convert_norm(layer, "bn*", report=None).sync
    assert not convert_norm(nn.BatchNorm2d(4), "bn", report=None).sync


def test_only():
    for only in (nn.GroupNorm, (nn.GroupNorm, nn.LayerNorm), "2.*", lambda name, module: name == "2.0"):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.GroupNorm(2, 4)))
        convert_norm(model, "dn", only=only, report=None)
        assert [type(m) for m in (model[1], model[2][0])] == [nn.BatchNorm2d, dk.DivisiveNorm]


def test_a_shared_layer_stays_shared():
    shared = nn.BatchNorm2d(4)
    model = convert_norm(nn.ModuleList([shared, nn.Sequential(shared)]), "dn", report=None)
    assert model[0] is model[1][0]


def test_a_layer_itself():
    assert type(convert_norm(nn.BatchNorm2d(4), "dn", report=None)) is dk.DivisiveNorm2d


def test_report(capsys):
    convert_norm(images(), "dn", only="1", window=3)
    assert capsys.readouterr().out == "1: BatchNorm2d -> DivisiveNorm2d(8, window=3)\n"
    lines = []
    convert_norm(images(), "none", report=lines.append)
    assert lines == ["1: BatchNorm2d -> Identity", "2.2: BatchNorm2d -> Identity"]


def test_bad_targets():
    with pytest.raises(ValueError, match="to: got 'weight norm', expected a class, a partial, or one of 'bn', 'l1bn'"):
        convert_norm(images(), "weight norm")
    with pytest.raises(TypeError, match=r"model: got int, expected a torch\.nn\.Module"):
        convert_norm(3, "dn")
    with pytest.raises(TypeError, match="to: got 3 of type int, expected a str, a class or a partial"):
        convert_norm(images(), 3)
    with pytest.raises(ValueError, match="to: got 'gn' for a layer over the last dimension, expected one of 'ln'"):
        convert_norm(nn.LayerNorm(4), "gn")


CONTRACT = [
    dk.BatchNorm2d,
    dk.DivisiveNorm2d,
    dk.LocalContrastNorm2d,
    dk.PositionalNorm2d,
    dk.InstanceNorm2d,
    partial(dk.GroupNorm, 4),
    partial(dk.DivisiveNorm2d, window=3, sigma=0.5, learn_sigma=True),
    partial(dk.BatchNorm2d, sigma=1.0, l1_weight=0.1),
]


@pytest.mark.parametrize("norm_layer", CONTRACT, ids=lambda layer: getattr(layer, "__name__", "partial"))
def test_timms_contract(norm_layer):
    """A class or a partial, called with the number of features and keywords, device and dtype among them."""
    layer = norm_layer(8, device="meta", dtype=torch.float64)
    assert {(t.device.type, t.dtype) for t in layer.parameters()} <= {("meta", torch.float64)}
    assert norm_layer(8)(torch.randn(2, 8, 5, 5)).shape == (2, 8, 5, 5)
