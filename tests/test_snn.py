"""Self-normalizing networks: their fixed point, what norms leave behind, and what takes whose place."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import divnorm_kernels as dk
from divnorm_kernels import to_snn

SCALE, ALPHA = 1.0507009873554805, 1.6732632423543773
"""The paper's lambda and alpha for the fixed point (0, 1)."""


def randomized(model, *shape):
    """Of random parameters and running statistics, in eval mode."""
    for p in model.parameters():
        nn.init.normal_(p, 0.5)
    for _ in range(2):
        model(2 * torch.randn(shape, dtype=next(model.parameters()).dtype) + 1)
    return model.eval()


def quiet(model, **options):
    return to_snn(model, inplace=False, report=None, **options)


def selu(z):
    return SCALE * np.where(z > 0, z, ALPHA * np.expm1(np.minimum(z, 0)))


def moment(f, deviation=1.0):
    """E f(z) for normal z of a deviation, by Gauss's quadrature on either side of zero."""
    nodes, weights = np.polynomial.legendre.leggauss(200)
    z = np.concatenate([8 * nodes - 8, 8 * nodes + 8])
    return (np.tile(8 * weights, 2) * np.exp(-(z**2) / 2) * f(deviation * z)).sum() / math.sqrt(2 * math.pi)


def off(layers, activation, n):
    """By how much mean and mean square behind any activation are not 0 and 1, at most, on normal numbers."""
    x, found = torch.randn(64, n), []
    for layer in layers:
        x = layer(x)
        if isinstance(layer, activation):
            found.append((x.mean().abs().item(), abs(x.square().mean().item() - 1)))
    assert len(found) == 32
    return np.max(found, 0)


def test_the_fixed_point():
    """Mean 0 and variance 1 through 32 layers of n units, and not with ReLU.

    The mean square of a layer is f(q), q that of its input, but for the units that are drawn: their mean is off by
    1 / sqrt(n), their mean square by sqrt(k / n), k the variance of SELU's square, which later layers multiply by the
    slope of f at 1: in all by sqrt(k / n / (1 - slope^2)). The bounds are five of these.
    """
    n, step = 512, 1e-4
    k = moment(lambda z: selu(z) ** 4) - 1
    slope = (moment(lambda z: selu(z) ** 2, 1 + step) - moment(lambda z: selu(z) ** 2, 1 - step)) / (4 * step)
    assert moment(selu) == pytest.approx(0, abs=1e-12)
    assert moment(lambda z: selu(z) ** 2) == pytest.approx(1, abs=1e-12)
    bounds = np.array([5 / math.sqrt(n), 5 * math.sqrt(k / n / (1 - slope**2))])
    torch.manual_seed(0)
    network = nn.Sequential(
        *(m for _ in range(32) for m in (nn.Linear(n, n, bias=False), nn.BatchNorm1d(n), nn.ReLU()))
    )
    to_snn(network, init=True, report=None)
    assert (off(network, nn.SELU, n) < bounds).all()
    with_relu = [nn.ReLU() if isinstance(m, nn.SELU) else m for m in network]
    assert (off(with_relu, nn.ReLU, n) > bounds).all()


CHAINS = {
    "BatchNorm2d": (lambda: [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)], (4, 3, 5, 5)),
    "of ours": (lambda: [nn.Conv2d(3, 8, 3), dk.BatchNorm2d(8, eps=0.5, learn_sigma=True)], (4, 3, 5, 5)),
    "l1": (lambda: [nn.Conv2d(3, 8, 3), dk.BatchNorm2d(8, p=1, affine=False)], (4, 3, 5, 5)),
    "variance": (lambda: [nn.Conv1d(4, 8, 3, groups=2), dk.VarianceNorm1d(8)], (4, 4, 9)),
    "top-k": (lambda: [nn.Conv3d(2, 8, 1), dk.TopKBatchNorm3d(8, k=3)], (4, 2, 2, 2, 2)),
    "transposed": (lambda: [nn.ConvTranspose2d(4, 8, 3, groups=2), nn.BatchNorm2d(8)], (4, 4, 5, 5)),
    "Linear": (lambda: [nn.Linear(5, 8, bias=False), nn.BatchNorm1d(8, affine=False)], (4, 5)),
    "running InstanceNorm": (
        lambda: [nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, track_running_stats=True)],
        (4, 3, 5, 5),
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_norm_in_eval_mode_goes_into_the_layer_before_it(name):
    make, shape = CHAINS[name]
    model = randomized(nn.Sequential(*make()).double(), *shape)
    x = torch.randn(shape, dtype=torch.float64)
    expected = model(x)
    found = quiet(model)
    assert type(found[1]) is nn.Identity
    np.testing.assert_allclose(found(x).detach(), expected.detach(), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(model(x).detach(), expected.detach(), rtol=0, atol=0, err_msg="the model is as it was")


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: [nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)], (4, 3, 5, 5)),
        (lambda: [nn.Linear(5, 8), nn.LayerNorm(8)], (4, 2, 5)),
        (lambda: [nn.Linear(5, 8, bias=False), nn.RMSNorm(8)], (4, 2, 5)),
    ],
    ids=["GroupNorm", "LayerNorm", "RMSNorm"],
)
def test_weight_and_bias_of_other_norms_go_there(make, shape):
    model = randomized(nn.Sequential(*make()).double(), *shape)
    x = torch.randn(shape, dtype=torch.float64)
    expected, dims = model[0](x), (1, 1) if x.dim() == 4 else ()
    weight, bias = (getattr(model[1], name, None) for name in ("weight", "bias"))
    expected = expected * weight.view(-1, *dims) + (0 if bias is None else bias.view(-1, *dims))
    np.testing.assert_allclose(quiet(model)(x).detach(), expected.detach(), rtol=1e-10, atol=1e-10)


def test_an_optimizer_goes_on_with_the_same_parameters():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    weight, bias = model[0].weight, model[1].bias
    to_snn(model, report=None)
    assert model[0].weight is weight
    assert model[0].bias is bias


def test_a_bias_that_is_made_is_beside_the_weight():
    """Where the norm has none, or one of another dtype or device; it learns where the layer does."""
    makes = {
        "frozen": lambda: [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, affine=False)],
        "bfloat16": lambda: [nn.Conv2d(3, 8, 3, bias=False, dtype=torch.bfloat16), nn.BatchNorm2d(8)],
        "meta": lambda: [nn.Conv2d(3, 8, 3, bias=False, device="meta"), nn.BatchNorm2d(8)],
    }
    for name, make in makes.items():
        model = nn.Sequential(*make()).requires_grad_(name != "frozen")
        layer = to_snn(model, report=None)[0]
        assert (layer.bias.dtype, layer.bias.device) == (layer.weight.dtype, layer.weight.device)
        assert layer.bias.requires_grad == (name != "frozen")


def test_what_init_leaves_of_norms():
    """A bias where there is none, and nothing is folded into weights that are drawn anew."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
    )
    nn.init.constant_(model[1].bias, 2.0)
    biases, lines = (model[1].bias, model[2].bias), []
    to_snn(model, init=True, report=lines.append)
    assert lines[0] == "0: with the bias of 1"
    assert [line.split(": ")[1] for line in lines[1:]] == ["BatchNorm2d -> Identity"] * 3
    assert (model[0].bias is biases[0], model[2].bias is biases[1]) == (True, True)
    assert not model[0].bias.any()


def test_a_norm_without_state_leaves_the_layer_before_it_alone():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.InstanceNorm2d(8))
    to_snn(model, report=None)
    assert list(model.state_dict()) == ["0.weight"]


class Shared(nn.Module):
    """A convolution that is called twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.conv(self.norm(self.conv(x)))


class Around(nn.Module):
    """Calls a convolution of another module, which calls it too."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def forward(self, x):
        return self.inner(x) + self.inner[0](x)


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


def in_two_places():
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.BatchNorm1d(4), nn.Sequential(layer))


def hooked():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[0].register_forward_hook(lambda module, args, y: 2 * y)
    return model


class Standardized(nn.Linear):
    """Has its own use for its weight."""

    def forward(self, x):
        return F.linear(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)


class Reading(nn.Module):
    """Has another use for the convolution's weight."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.conv(x)) * self.conv.weight.norm()


class ReadingAround(Around):
    """Has one for that of another module's."""

    def forward(self, x):
        return self.inner(x) * self.inner[0].weight.norm()


def with_a_forward_of_its_own(path):
    """On the instance: the container's calls the layer twice."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    layer, norm = model
    model.get_submodule(path).forward = (lambda x: 2 * x) if path else (lambda x: layer(norm(layer(x))))
    return model


LEFT = {
    "read": (Reading, "norm"),
    "read from around": (ReadingAround, "inner.1"),
    "with a forward set on it": (lambda: with_a_forward_of_its_own("0"), "1"),
    "in a container with a forward set on it": (lambda: with_a_forward_of_its_own(""), "1"),
    "a linear layer of images": (lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm2d(4)), "1"),
    "over the width": (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.LayerNorm(4)), "1"),
    "called twice": (Shared, "norm"),
    "called from around": (Around, "inner.1"),
    "in two places": (in_two_places, "1"),
    "tied": (tied, "1"),
    "hooked": (hooked, "1"),
    "of a subclass": (lambda: nn.Sequential(Standardized(4, 4), nn.BatchNorm1d(4)), "1"),
    "before": (lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)), "0"),
    "behind another": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.BatchNorm1d(4)), "2"),
    "of every element": (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.LayerNorm((4, 5, 5))), "1"),
    "parametrized": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.BatchNorm1d(4)),
        "1",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_folded_is_named_and_changes_no_weight(name):
    make, path = LEFT[name]
    model = make()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.warns(UserWarning, match=f"^to_snn: lost what these do to a channel: {path}$"):
        to_snn(model, report=None)
    after = dict(model.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in after.items())


def test_activations_and_dropout_are_torchs():
    dropouts = [nn.Dropout(0.3), nn.Dropout2d(0.2)]
    shared = nn.ReLU(inplace=True)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), dk.BatchNorm2d(8, activation="relu"), shared, *dropouts, shared, nn.GELU()
    )
    lines = []
    to_snn(model, report=lines.append)
    kinds = [nn.Conv2d, nn.Sequential, nn.SELU, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.SELU, nn.GELU]
    assert [type(m) for m in model] == kinds
    assert model[2] is model[5]
    assert (model[2].inplace, model[3].p, model[4].p) == (True, 0.3, 0.2)
    assert lines[0] == "0: with what 1 does to a channel"
    assert lines[2:] == [
        "2: ReLU -> SELU",
        "3: Dropout -> AlphaDropout",
        "4: Dropout2d -> FeatureAlphaDropout",
        "1.activation: ReLU -> SELU",
    ]
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    np.testing.assert_allclose(model[1](x), selu(x.numpy()), rtol=1e-10, atol=1e-10)
    assert torch.equal(model[1](x), F.selu(x))
    torch.manual_seed(1)
    dropped = model[3](x)
    torch.manual_seed(1)
    assert torch.equal(dropped, F.alpha_dropout(x, 0.3, training=True))
    torch.manual_seed(1)
    dropped = model[4](x)
    torch.manual_seed(1)
    assert torch.equal(dropped, F.feature_alpha_dropout(x, 0.2, training=True))
    assert torch.equal(model.eval()[3](x), x)


def test_a_thresholded_linear_unit_becomes_selu_too():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), dk.FilterResponseNorm2d(8))
    x = torch.randn(2, 3, 5, 5)
    expected = F.selu(model[0](x))  # the norm's weight is one and its bias zero
    with pytest.warns(UserWarning, match="not carried over: threshold of FilterResponseNorm2d -> Sequential"):
        torch.testing.assert_close(quiet(model)(x), expected)
    assert model[1].activation == "tlu", "the model is as it was"


def test_alpha_dropout_keeps_the_moments():
    """Of standard normal numbers, N of them: mean to 5 / sqrt(N), mean square to five deviations of its average."""
    n, p = 1 << 18, 0.1
    torch.manual_seed(0)
    layer = to_snn(nn.Dropout(p), report=None)
    y = layer(torch.randn(n, dtype=torch.float64))
    assert abs(y.mean()) < 5 / math.sqrt(n)
    assert abs(y.square().mean() - 1) < 5 * (y.square().std() / math.sqrt(n))


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        (nn.Linear(200, 300), 200),
        (nn.Conv2d(40, 30, 5, groups=2), 20 * 25),
        (nn.ConvTranspose1d(60, 90, 5, groups=3), 20 * 5),
    ],
    ids=["Linear", "Conv2d", "ConvTranspose1d"],
)
def test_lecun_normal_weights(layer, inputs):
    """Variance 1 / inputs, to five deviations of the average of N squares, sqrt(2 / N)."""
    to_snn(layer, init=True, report=None)
    square = layer.weight.square().mean().item() * inputs
    assert abs(square - 1) < 5 * math.sqrt(2 / layer.weight.numel())
    assert not layer.bias.any()
    kurtosis = layer.weight.pow(4).mean().item() * inputs**2
    assert abs(kurtosis - 3) < 5 * math.sqrt(96 / layer.weight.numel()), "normal, not uniform (9/5)"


def test_weights_stay_without_init_and_parametrized_ones_with():
    hooks = nn.utils.spectral_norm(nn.Linear(4, 4))
    model = nn.Sequential(nn.Linear(3, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), hooks)
    state = copy.deepcopy(model.state_dict())
    to_snn(model, report=None)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    with pytest.warns(UserWarning, match="^to_snn: not initialized, for parametrized: 1, 2$"):
        to_snn(model, init=True, report=None)
    assert not torch.equal(model[0].weight, state["0.weight"])
    assert all(torch.equal(t, state[f"1.{name}"]) for name, t in model[1].state_dict().items())
    assert torch.equal(model[2].weight_orig, state["2.weight_orig"])


def test_an_activation_with_a_forward_set_on_it_stays():
    model = nn.Sequential(nn.ReLU())
    model[0].forward = torch.tanh
    assert type(to_snn(model, report=None)[0]) is nn.ReLU


def test_hooks_and_modes_stay():
    seen = []
    model = nn.Sequential(nn.ReLU(), nn.Dropout(0.5)).eval()
    handle = model[0].register_forward_hook(lambda module, args, y: seen.append(type(module)))
    to_snn(model, report=None)
    assert not any(m.training for m in model)
    model(torch.ones(1))
    handle.remove()
    model(torch.ones(1))
    assert seen == [nn.SELU]


@pytest.mark.filterwarnings("error:to_snn:UserWarning")
def test_fused_resnet_blocks():
    """Of torchvision's classes again, whose modules take one tensor, with every norm in the convolution before it."""
    models = pytest.importorskip("torchvision.models", exc_type=ImportError)
    model = models.resnet18(num_classes=4).double()
    expected = quiet(model)
    dk.convert_norm(model, "bn", fuse=True, report=None)
    to_snn(model, report=None)
    assert not any(isinstance(m, dk.NormalizationLayer | nn.ReLU | nn.BatchNorm2d) for m in model.modules())
    assert sum(isinstance(m, nn.SELU) for m in model.modules()) == 9
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    np.testing.assert_allclose(model(x).detach(), expected(x).detach(), rtol=1e-10, atol=1e-10)


def test_bad_input():
    with pytest.raises(TypeError, match=r"^model: got int, expected a torch\.nn\.Module"):
        to_snn(3)
    with pytest.raises(TypeError, match=r"^init: got 'lecun' of type str, expected a bool"):
        to_snn(nn.ReLU(), init="lecun")
    with pytest.raises(TypeError, match=r"^inplace: got None of type NoneType, expected a bool"):
        to_snn(nn.ReLU(), inplace=None)
    lazy = nn.Sequential(nn.ReLU(), nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"^model: got LazyLinear \(1\), expected it to have run once"):
        to_snn(lazy)
    assert type(lazy[0]) is nn.ReLU
