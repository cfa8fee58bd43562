"""Norms that take in what follows them: where, where not, and that nothing else changes."""

import copy
import pickle
import warnings

import pytest
import torch
from test_architectures import MODELS, ran, randomized, timm, torchvision
from torch import nn

import divnorm_kernels as dk
from divnorm_kernels import convert_norm
from divnorm_kernels.convert import fuse


class Net(nn.Module):
    """A norm and an activation that are called one after the other, and each once."""

    def __init__(self, act=None):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), act or nn.SiLU()

    def forward(self, x):
        """As an activation's block does."""
        return self.act(self.norm(self.conv(x)))


class Twice(Net):
    def forward(self, x):
        """The norm's output goes elsewhere too."""
        y = self.norm(self.conv(x))
        return self.act(y) + y


class InTraining(Net):
    def forward(self, x):
        """The activation follows in training alone."""
        y = self.norm(self.conv(x))
        return self.act(y) if self.training else y


class Called(Net):
    def forward(self, x):
        """The activation has another use."""
        return self.act(self.norm(self.act(self.conv(x))))


class Looking(Net):
    def forward(self, x):
        """No recording tells what follows."""
        y = self.norm(self.conv(x))
        return self.act(y) if x.sum() > 0 else y


class TwoNames(Net):
    def __init__(self):
        super().__init__()
        self.conv2, self.norm2, self.act2 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), self.act

    def forward(self, x):
        """To a recording both activations are the first."""
        return self.act2(self.norm2(self.conv2(self.act(self.norm(self.conv(x))))))


class Keeping(Net):
    def forward(self, x):
        """Keeps what it saw."""
        self.seen = self.norm(self.conv(x))
        return self.act(self.seen)


class Logging(Net):
    def __init__(self):
        super().__init__()
        self.log = []

    def forward(self, x):
        """The same, in a list."""
        self.log.append(self.norm(self.conv(x)))
        return self.act(self.log[-1])


def converted(model, to="bn", **options):
    lines = []
    return convert_norm(model, to, inplace=False, report=lines.append, fuse=True, **options), lines


def same(fused, model):
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    for training in (True, False):
        found, expected = (copy.deepcopy(m).double().train(training)(x) for m in (fused, model))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("act", "activation"),
    [
        (nn.ReLU(inplace=True), "relu"),
        (nn.SiLU(), "silu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
    ],
    ids=str,
)
def test_an_activation_behind_a_norm(act, activation):
    for model in (Net(act), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), act)):
        fused, lines = converted(model)
        (norm,) = [m for m in fused.modules() if isinstance(m, dk.BatchNorm2d)]
        assert norm.activation == activation
        assert type(list(fused.children())[-1]) is nn.Identity
        assert type(list(model.children())[-1]) is type(act), "the model itself is as it was"
        assert lines[-1].endswith(f"with {type(act).__name__}")
        assert list(fused.state_dict()) == list(model.state_dict())
        same(fused, model)


def hooked(model):
    list(model.modules())[2].register_forward_hook(lambda *args: None)
    return model


def act_hooked(model):
    model.act.register_forward_hook(lambda *args: None)
    return model


def shared():
    model = nn.Sequential(Net(), Net())
    model[1].norm = model[0].norm
    model[1].conv = nn.Conv2d(4, 4, 3)
    return model


LEFT = {
    "another use of y": Twice,
    "in training alone": InTraining,
    "another use of the activation": Called,
    "a condition": Looking,
    "an activation of two names": TwoNames,
    "an attribute": Keeping,
    "a list": Logging,
    "a hook on the norm": lambda: hooked(Net()),
    "a hook on the activation": lambda: act_hooked(Net()),
    "a norm in two places": shared,
    "a subclass of an activation": lambda: Net(type("Own", (nn.ReLU,), {})()),
    "an activation that is none of these": lambda: Net(nn.Softplus()),
}


@pytest.mark.parametrize("name", LEFT)
def test_is_left(name):
    model = LEFT[name]()
    fused, lines = converted(model)
    assert all(m.activation is None for m in fused.modules() if isinstance(m, dk.NormalizationLayer))
    assert not any(" with " in line for line in lines)
    assert lines[-1].startswith("fuse: nothing behind the new layers")
    assert not any(isinstance(m, nn.Identity) for m in fused.modules())
    same(fused, model)


def test_without_fuse_nothing_is_taken_in():
    fused = convert_norm(Net(), "bn", report=None)
    assert fused.norm.activation is None
    assert type(fused.act) is nn.SiLU


def test_layers_that_are_not_replaced_take_in_nothing():
    model = nn.Sequential(Net(), nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    fused, _ = converted(model, only="1.*")
    assert type(fused[0].act) is nn.SiLU
    assert fused[1][1].activation == "relu"


def test_looking_at_code_changes_nothing():
    class Counting(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.seen = {}

        def forward(self, x):
            """Counts, draws and keeps."""
            self.calls += 1
            self.last = torch.rand(1)
            self.seen["calls"] = int(self.calls)
            return self.act(self.norm(self.conv(x)))

    model = Counting()
    state = torch.random.get_rng_state()
    convert_norm(model, "bn", report=None, fuse=True)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (model.calls, model.seen) == (0, {})
    assert not hasattr(model, "last")
    assert model.norm.activation == "silu"


def test_fused_blocks_convert_on():
    """To what adds no residual as the library's blocks, to others fused, and an error leaves them fused."""
    model = torchvision("resnet18").double().eval()
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    fused, _ = converted(model)
    for to, kind in ((nn.BatchNorm2d, "BasicBlock"), ("bn", "TorchvisionBasicBlock"), ("none", "BasicBlock")):
        again = convert_norm(fused, to, inplace=False, report=None)
        assert type(again.layer1[0]).__name__ == kind
        expected = convert_norm(model, to, inplace=False, report=None)
        torch.testing.assert_close(again(x), expected(x), rtol=1e-9, atol=1e-9)
    assert type(convert_norm(fused, "gn", inplace=False, report=None).layer1[0]).__name__ == "TorchvisionBasicBlock"
    with pytest.raises(TypeError):
        convert_norm(fused, "bn", report=None, nonsense=1)
    assert type(fused.layer1[0]).__name__ == "TorchvisionBasicBlock"
    torch.testing.assert_close(fused(x), model(x), rtol=1e-9, atol=1e-9)


def test_fused_blocks_under_autocast():
    """The shortcut may be of another dtype than the convolution's result, whose dtype the sum has."""
    model = torchvision("resnet18").eval()
    fused, _ = converted(model)
    h = torch.randn(2, 64, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = fused.layer1(h), model.layer1(h)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)


RESNETS = {
    "torchvision resnet18": (lambda: torchvision("resnet18"), "TorchvisionBasicBlock", 17),
    "torchvision resnet50": (lambda: torchvision("resnet50"), "TorchvisionBottleneck", 49),
    "timm resnet10t": (lambda: timm("resnet10t"), "TimmBasicBlock", 11),
    "timm resnet26": (lambda: timm("resnet26"), "TimmBottleneck", 25),
    "ResNet": (MODELS["ResNet"][0], "TransformersBasicLayer", 5),
}


@pytest.mark.parametrize("name", RESNETS)
def test_blocks_of_resnets(name):
    """Norm, residual and activation at once, behind every convolution of a block but those of shortcuts."""
    make, kind, times = RESNETS[name]
    model = randomized(make())
    fused, _ = converted(model)
    taken = [m for m in fused.modules() if isinstance(m, dk.BatchNorm2d) and m.activation == "relu"]
    assert len(taken) == times
    blocks = [m for m in fused.modules() if type(m).__name__ == kind]
    assert blocks
    assert all(isinstance(block, type(block).__mro__[1]) for block in blocks)
    assert list(fused.state_dict()) == list(model.state_dict())
    plain = convert_norm(model, "bn", inplace=False, report=None)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for training in (True, False):
        pair = [copy.deepcopy(m).double().train(training) for m in (fused, plain)]
        found, expected = (ran(m, [x]) for m in pair)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            ran(pickle.loads(pickle.dumps(pair[0])), [x]), ran(pair[1], [x]), rtol=1e-9, atol=1e-9
        )
    gradients = [torch.autograd.grad(ran(m, [x]).square().sum(), list(m.parameters())) for m in pair]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7 * expected.abs().max().item())


def test_a_block_with_something_between_is_left():
    """An attention behind the last norm, and a place for a dropout behind the second; the first is taken in."""
    model = timm("seresnet50", layers=(1, 1, 1, 1))
    fused, _ = converted(model)
    block = fused.layer1[0]
    assert type(block).__name__ == "Bottleneck"
    assert (block.bn1.activation, block.bn2.activation, block.bn3.activation) == ("relu", None, None)
    same(fused, model)


def test_what_timms_layers_apply_themselves_is_taken_in():
    model = timm("efficientnet_b0")
    fused, lines = converted(model)
    assert fused.bn1.activation == "silu"
    assert fused.bn1.followed_by == ()
    assert "bn1: with SiLU" in lines


def test_an_error_leaves_the_model_as_it_was(monkeypatch):
    model = torchvision("resnet18")
    model.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    before = [(name, module) for name, module in model.named_modules()]
    kinds = [type(module) for _, module in before]

    def broken(model, path, *rest):
        real(model, path, *rest)
        if path == "features":
            raise KeyboardInterrupt

    real = fuse._fuse_pairs
    monkeypatch.setattr(fuse, "_fuse_pairs", broken)
    with pytest.raises(KeyboardInterrupt):
        convert_norm(model, "bn", report=None, fuse=True)
    assert [(name, module) for name, module in model.named_modules()] == before
    assert [type(module) for _, module in before] == kinds


@pytest.mark.parametrize(
    ("to", "kind", "options"),
    [
        ("l1bn", dk.BatchNorm2d, {"p": 1, "subtract_mean": True, "momentum": 0.01}),
        ("vn", dk.VarianceNorm2d, {"p": 2, "subtract_mean": False, "momentum": 0.01}),
        ("frn", dk.FilterResponseNorm2d, {"activation": "tlu"}),
        ("l1bn-s", dk.BatchNorm2d, {"p": 1, "sigma": 1.0}),
    ],
)
def test_names(to, kind, options):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, 1e-4, momentum=0.01))
    model(torch.randn(4, 3, 9, 9))
    expected = ["convert_norm: not carried over"] if to == "frn" else []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        new = convert_norm(model, to, inplace=False, report=None)[1]
    assert [str(w.message)[: len(expected[0])] if expected else str(w.message) for w in warned] == expected
    assert type(new) is kind
    assert {name: getattr(new, name) for name in options} == options
    if kind is not dk.FilterResponseNorm2d:
        assert torch.equal(new.running_var, model[1].running_var)
    if to == "l1bn":
        assert new.sigma == pytest.approx(1e-4), "eps stays, which p=1 adds to the deviation itself"
        back = convert_norm(new, "bn", report=None)
        assert (back.p, back.eps) == (2, pytest.approx(1e-4))


class Around(nn.Module):
    """Calls what stands in a child too."""

    def __init__(self, tap):
        super().__init__()
        self.inner, self.tap = nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 1)), tap

    def forward(self, x):
        """The child, and one of its own."""
        return self.inner(x) + (self.inner[self.tap](x) if self.tap is not None else 0)


@pytest.mark.parametrize("tap", [0, 1, 2, None])
def test_what_is_called_from_around_stays(tap):
    model, x = Around(tap).eval(), torch.randn(1, 2, 3, 3)
    expected = model(x)
    convert_norm(nn.Sequential(model), "bn", fuse=True, report=None)
    torch.testing.assert_close(model(x), expected)
    assert (model.inner[0].activation == "relu") == (tap in (2, None))


def test_an_activation_with_something_of_its_own_stays():
    for change in (
        lambda m: setattr(m, "forward", torch.square),
        lambda m: m.register_buffer("kept", torch.ones(1)),
    ):
        model = nn.Sequential(nn.BatchNorm2d(2), nn.ReLU()).eval()
        change(model[1])
        x, keys = torch.randn(1, 2, 3, 3), list(model.state_dict())
        expected = model(x)
        convert_norm(model, "bn", fuse=True, report=None)
        torch.testing.assert_close(model(x), expected)
        assert list(model.state_dict()) == keys


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_transformers_activations(activation):
    transformers = pytest.importorskip("transformers")
    options = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}
    model = transformers.ResNetModel(transformers.ResNetConfig(hidden_act=activation, **options)).eval()
    x = torch.randn(1, 3, 32, 32)
    expected = model(x).last_hidden_state
    convert_norm(model, "bn", fuse=True, report=None)
    torch.testing.assert_close(model(x).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
    taken = [m.activation for m in model.modules() if isinstance(m, dk.BatchNorm2d)]
    assert activation in taken


def test_names_in_other_places():
    tokens = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    x = torch.randn(5, 2, 3)
    for to, options in (("l1bn", {"p": 1}), ("vn", {"subtract_mean": False})):
        new = convert_norm(tokens, to, inplace=False, report=None)
        assert {name: getattr(new[1], name) for name in options} == options
        assert new(x).shape == (5, 2, 4)
    with pytest.raises(ValueError, match="to: got 'frn' for a layer over the last dimension"):
        convert_norm(tokens, "frn", report=None)
    group = convert_norm(nn.GroupNorm(2, 4), "frn", report=None)
    assert group(torch.randn(2, 4, 5, 5)).shape == (2, 4, 5, 5)
    assert group(torch.randn(2, 4, 5)).shape == (2, 4, 5)


def test_a_threshold_goes_along():
    old = dk.FilterResponseNorm2d(4)
    new = convert_norm(old, "dn", report=None)
    assert new.threshold is old.threshold
    assert new.activation == "tlu"
    with pytest.warns(UserWarning, match="not carried over: threshold of"):
        convert_norm(dk.DivisiveNorm2d(4, 3, activation="tlu"), nn.BatchNorm2d, report=None)
    silu = convert_norm(dk.BatchNorm2d(4, activation="silu"), nn.BatchNorm2d, report=None)
    assert type(silu[1]) is nn.SiLU
