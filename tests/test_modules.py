"""The layers: what they compute, and torch.nn's manners."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from divnorm_kernels import (
    BatchNorm2d,
    DivisiveNorm1d,
    DivisiveNorm2d,
    DivisiveNorm3d,
    DivisiveNormFeatures,
    FilterResponseNorm2d,
    divisive_norm,
    l1_penalty,
)

OPTIONS = {"sigma": 0.5, "edges": "zero"}
LAYERS = [
    (lambda **kw: DivisiveNorm1d(6, 4, **OPTIONS, **kw), (3, 6, 11), {"window": 4}),
    (
        lambda **kw: DivisiveNorm2d(6, (3, 5), 2, groups=2, **OPTIONS, **kw),
        (3, 6, 7, 8),
        {"window": (3, 5), "norm_window": 2, "groups": 2},
    ),
    (
        lambda **kw: DivisiveNorm3d(6, norm_window=None, **OPTIONS, **kw),
        (2, 6, 3, 4, 5),
        {"window": 5, "norm_window": None},
    ),
    (lambda **kw: DivisiveNormFeatures(9, 4, **OPTIONS, **kw), (3, 9), {"window": 4}),
]


@pytest.mark.parametrize(("make", "shape", "options"), LAYERS, ids=["1d", "2d", "3d", "features"])
def test_is_one_call_of_the_operator(make, shape, options):
    layer, x = make(), torch.randn(shape)
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    assert torch.equal(layer(x), divisive_norm(x, layer.weight, layer.bias, **OPTIONS, **options))
    assert torch.equal(make(affine=False)(x), divisive_norm(x, **OPTIONS, **options))
    reference = divisive_norm(x, **OPTIONS, **options, backend="reference")
    assert torch.equal(make(affine=False, backend="reference")(x), reference)


def test_windows_may_come_as_lists():
    layer, x = DivisiveNorm2d(6, [3, "all"], norm_window=[2, 5]), torch.randn(2, 6, 7, 8)
    assert (layer.window, layer.norm_window) == ((3, "all"), (2, 5))
    assert DivisiveNormFeatures(9, window=[4]).window == (4,)
    expected = divisive_norm(x, window=(3, "all"), norm_window=(2, 5))
    assert torch.equal(layer(x), expected)
    assert torch.equal(divisive_norm(x, window=[3, "all"], norm_window=[2, 5]), expected)


def test_defaults_are_the_papers():
    layer = DivisiveNorm2d(4)
    x = torch.randn(2, 4, 9, 9)
    assert torch.equal(layer(x), divisive_norm(x, window=5, norm_window="same", sigma=1.0, edges="valid"))
    assert {name: p.shape for name, p in layer.named_parameters()} == {"weight": (4,), "bias": (4,)}


def test_learned_sigma_learns():
    layer = DivisiveNorm2d(4, sigma=2.0, learn_sigma=True)
    assert layer.sigma.item() == 2.0
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.randn(8, 4, 9, 9)
    before = layer(x).square().mean()
    before.backward()
    optimizer.step()
    assert layer.sigma.item() > 2.0, "a larger sigma makes the outputs smaller"
    assert layer(x).square().mean() < before


def test_reset_parameters_restores_the_start():
    layer = DivisiveNorm2d(4, sigma=2.0, learn_sigma=True)
    start = {name: value.clone() for name, value in layer.state_dict().items()}
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(7)
    layer.reset_parameters()
    assert all(torch.equal(value, start[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_state_dict_round_trip(learn_sigma):
    source, target = (DivisiveNorm2d(4, learn_sigma=learn_sigma) for _ in range(2))
    with torch.no_grad():
        for p in source.parameters():
            p.normal_()
    assert set(source.state_dict()) == {"weight", "bias"} | ({"sigma"} if learn_sigma else set())
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(source(x), target(x))


def test_state_dict_fits_torchs_layers_both_ways():
    norm, group = DivisiveNorm2d(4), nn.GroupNorm(2, 4)
    norm.load_state_dict(group.state_dict())
    group.load_state_dict(norm.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(copied):
    layer = DivisiveNorm2d(4, 3, sigma=0.5, learn_sigma=True, l1_weight=0.1)
    x = torch.randn(2, 4, 6, 6)
    layer(x)  # the penalty of this call has a graph, which cannot be copied
    twin = copied(layer)
    assert torch.equal(layer(x), twin(x))
    assert twin.l1 is not None
    assert twin.weight.data_ptr() != layer.weight.data_ptr()
    assert repr(twin) == repr(layer)


def test_repr_shows_what_was_set():
    layer = DivisiveNorm2d(4, 3)
    layer.sigma, layer.window, layer.activation = 0.25, 5, "relu"
    assert repr(layer) == repr(DivisiveNorm2d(4, 5, sigma=0.25, activation="relu"))


def test_repr_is_a_call_that_makes_the_layer():
    for text in (
        "DivisiveNorm2d(4, window=5)",
        "DivisiveNorm2d(4, window=(3, 'all'), norm_window=None, groups=2, sigma=0.5, learn_sigma=True)",
        "DivisiveNorm1d(4, window=None, norm_window=3, affine=False, edges='zero', l1_weight=0.01, backend='cpu')",
        "DivisiveNormFeatures(9, window=4)",
    ):
        assert repr(eval(text)) == text


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_eps_of_a_learned_sigma_is_no_number(device):
    """And is in no printed layer, which shows what sigma starts from, with or without memory."""
    norm = BatchNorm2d(4, sigma=0.5, learn_sigma=True, device=device)
    assert math.isnan(norm.eps)
    assert norm.initial_sigma == 0.5
    assert repr(norm) == "BatchNorm2d(4, sigma=0.5, learn_sigma=True)"
    response = FilterResponseNorm2d(4, sigma=0.5, learn_sigma=True, device=device)
    assert (response.eps.device.type, response.eps.shape, response.eps.requires_grad) == (device, (1,), True)
    assert repr(response) == "FilterResponseNorm2d(4, sigma=0.5, learn_sigma=True)"


def test_penalty_is_kept_in_training_only():
    layer = DivisiveNorm2d(4, l1_weight=0.1)
    x = torch.randn(2, 4, 6, 6)
    layer(x)
    assert torch.equal(layer.l1, divisive_norm(x, window=5, return_l1=True)[1])
    layer.eval()
    layer(2 * x)
    assert layer.l1 is None, "a penalty of an earlier training call would be added to a validation loss"
    unweighted = DivisiveNorm2d(4)
    unweighted(x)
    assert unweighted.l1 is None


def test_l1_penalty_sums_over_the_model_and_trains():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        DivisiveNorm2d(4, l1_weight=0.1),
        nn.Sequential(nn.ReLU(), DivisiveNorm2d(4, 3, l1_weight=0.01), DivisiveNorm2d(4)),
    )
    x = torch.randn(2, 3, 9, 9)
    model(x)
    expected = 0.1 * model[1].l1 + 0.01 * model[2][1].l1
    torch.testing.assert_close(l1_penalty(model), expected)
    (from_penalty,) = torch.autograd.grad(l1_penalty(model), model[0].weight)
    assert from_penalty.abs().sum() > 0


def test_l1_penalty_of_a_model_without_one_is_zero():
    model = nn.Linear(3, 3)
    assert l1_penalty(model).item() == 0
    (l1_penalty(model) + model(torch.ones(1, 3)).sum()).backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_l1_penalty_of_a_model_without_one_lies_where_the_model_does(dtype):
    with torch.device("meta"):
        penalty = l1_penalty(nn.Linear(3, 3, device="cpu", dtype=dtype))
        assert l1_penalty(nn.ReLU()).device.type == "cpu"
    assert penalty.device.type == "cpu"
    assert penalty.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert l1_penalty(nn.Linear(3, 3, device="meta")).device.type == "meta"


def test_device_and_dtype_reach_the_parameters():
    layer = DivisiveNorm2d(4, learn_sigma=True, device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float64)}


def test_half_model_and_mixed_model():
    x = torch.randn(2, 4, 9, 9).bfloat16()
    assert DivisiveNorm2d(4).bfloat16()(x).dtype == torch.bfloat16
    assert DivisiveNorm2d(4)(x).dtype == torch.bfloat16, "float32 parameters with half activations"


def test_a_small_network_trains_with_the_layer():
    model = nn.Sequential(
        nn.Conv2d(1, 8, 5), DivisiveNorm2d(8, sigma=0.5, l1_weight=1e-3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 2)
    )
    x = torch.randn(64, 1, 12, 12)
    target = (x[:, 0, :6].mean((1, 2)) > x[:, 0, 6:].mean((1, 2))).long()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x), target)
        losses.append(loss.item())
        optimizer.zero_grad()
        (loss + l1_penalty(model)).backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]
