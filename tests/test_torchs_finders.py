"""Torch's code that looks for torch's normalization layers by type or attribute, and what it makes of ours."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

import divnorm_kernels as dk

PAIRS = {
    "BatchNorm1d": (dk.BatchNorm1d, nn.BatchNorm1d, (5, 4, 6)),
    "BatchNorm2d": (dk.BatchNorm2d, nn.BatchNorm2d, (5, 4, 3, 3)),
    "BatchNorm3d": (dk.BatchNorm3d, nn.BatchNorm3d, (5, 4, 2, 3, 3)),
}
MORE = ({"activation": "relu"}, {"l1_weight": 0.1}, {"learn_sigma": True})
"""What torch's layers have not."""


def shaken(model):
    """Parameters off their initial values."""
    for p in model.parameters():
        p.data.add_(torch.rand_like(p))
    return model


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("name", PAIRS)
def test_update_bn(name, momentum):
    ours, theirs, shape = PAIRS[name]
    batches = [torch.randn(shape) * 2 + i for i in range(3)]
    layers = [make(4, momentum=momentum) for make in (ours, theirs)]
    for layer in layers:
        layer(batches[2])  # what there was before is forgotten
        update_bn(batches, nn.Sequential(layer).eval())
        assert layer.momentum == momentum
        assert not layer.training
    for have, want in zip(layers[0].buffers(), layers[1].buffers(), strict=True):
        torch.testing.assert_close(have, want)


def test_update_bn_with_a_learned_sigma_and_a_penalty():
    layer, reference = dk.BatchNorm2d(4, learn_sigma=True, l1_weight=0.1, activation="relu"), nn.BatchNorm2d(4)
    batches = [torch.randn(5, 4, 3, 3) + i for i in range(3)]
    for model in (layer, reference):
        update_bn(batches, model)
    torch.testing.assert_close(layer.running_mean, reference.running_mean)
    torch.testing.assert_close(layer.running_var, reference.running_var)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", PAIRS)
def test_convert_sync_batchnorm(name, affine):
    ours, _, shape = PAIRS[name]
    x = torch.randn(shape)
    model = shaken(nn.Sequential(ours(4, sigma=0.5, momentum=0.3, affine=affine)))
    model(x)
    model.eval()
    expected, parameters = model(x), list(model.parameters())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(converted[0], nn.SyncBatchNorm)
    assert converted[0].momentum == 0.3
    torch.testing.assert_close(converted(x), expected)
    assert len(parameters) == 2 * affine
    assert all(p is q for p, q in zip(converted.parameters(), parameters, strict=True))


@pytest.mark.parametrize("options", MORE, ids=str)
def test_convert_sync_batchnorm_shows_what_it_loses(options):
    """NaN, and not the numbers of another layer; `convert_sync` keeps all of it."""
    x = torch.randn(5, 4, 3, 3)
    layer = dk.BatchNorm2d(4, sigma=0.5, **options).eval()
    expected = layer(x)
    assert dk.convert_sync(layer) is layer
    assert torch.equal(layer(x), expected)
    assert layer.sync
    assert nn.SyncBatchNorm.convert_sync_batchnorm(layer)(x).isnan().all()


def test_frozen_by_type():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), dk.BatchNorm2d(4, activation="relu"), dk.DivisiveNorm2d(4))
    x = torch.randn(2, 3, 6, 6)
    model(x)
    before = copy.deepcopy(model[1].state_dict())
    frozen = [m.eval() for m in model.modules() if isinstance(m, _BatchNorm)]
    assert frozen == [model[1]]
    y = model[:2](x)
    torch.testing.assert_close(
        y, nn.functional.batch_norm(model[0](x), before["running_mean"], before["running_var"]).relu()
    )
    assert all(torch.equal(value, before[name]) for name, value in model[1].state_dict().items())


NORMS = {
    "plain": lambda: dk.LayerNorm(8),
    "relu": lambda: dk.LayerNorm(8, activation="relu"),
    "learned sigma": lambda: dk.LayerNorm(8, sigma=0.5, learn_sigma=True),
    "penalty": lambda: dk.LayerNorm(8, l1_weight=0.1),
    "no bias": lambda: dk.LayerNorm(8, bias=False),
    "features": lambda: dk.DivisiveNormFeatures(8, 3),
    "mean only": lambda: dk.DivisiveNormFeatures(8, 3, None),
}
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


@pytest.fixture
def by_modules():
    """Runs a model in its modules alone, not by what torch computes in their place."""

    def run(model, *arguments, **options):
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return model(*arguments, **options)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)

    return run


def encoder(layers, make=None, replaced="after", **options):
    """An encoder, or a layer of one, with other norms; put in before the encoder is made of it, or after."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options)
    for step in ("before", "after"):
        if step == "after" and layers:
            model = nn.TransformerEncoder(model, layers)
        if step == replaced and make is not None:
            for layer in model.layers if layers and step == "after" else [model]:
                layer.norm1, layer.norm2 = make(), make()
    return shaken(model).eval()


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("name", NORMS)
@torch.no_grad()
def test_an_encoder_layer_calls_its_norms(name, norm_first, by_modules):
    model, x = encoder(0, NORMS[name], norm_first=norm_first), torch.randn(2, 5, 8)
    torch.testing.assert_close(model(x), by_modules(model, x), rtol=1e-5, atol=1e-5)
    if name == "plain":
        torch.testing.assert_close(model(x), encoder(0, norm_first=norm_first)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("replaced", ["before", "after"])
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@torch.no_grad()
def test_an_encoder_with_padding(name, replaced, by_modules):
    """It decides when it is made whether to hand on nested tensors, by the norms of then."""
    model, x = encoder(2, NORMS[name], replaced), torch.randn(2, 5, 8)
    found, expected = (
        run(x, src_key_padding_mask=PADDING)[~PADDING] for run in (model, lambda *a, **kw: by_modules(model, *a, **kw))
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
