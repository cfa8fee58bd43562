"""Fusing looks at every course of the code: flags that are set later, conditions, parts of an `nn.Sequential`."""

import copy

import pytest
import torch
from test_architectures import timm, torchvision
from test_convert_fuse import Net, converted, same
from torch import nn

import divnorm_kernels as dk
from divnorm_kernels.convert import courses


class Flagged(Net):
    def __init__(self, **flags):
        super().__init__()
        for name, value in flags.items():
            setattr(self, name, value)


class MayAct(Flagged):
    def forward(self, x):
        """A flag says whether the activation follows."""
        y = self.norm(self.conv(x))
        return self.act(y) if self.acts else y


class OfTheClass(Flagged):
    acts = True

    def forward(self, x):
        """The flag is the class's until somebody sets it."""
        y = self.norm(self.conv(x))
        return self.act(y) if self.acts else y


class MayTap(Flagged):
    def forward(self, x):
        """Two flags together give the norm's output another use."""
        y = self.norm(self.conv(x))
        return self.act(y) + y if self.first and self.second else self.act(y)


class Once(Flagged):
    def forward(self, x):
        """Sets a flag before it reads it again."""
        y = self.norm(self.conv(x))
        if self.fresh:
            self.fresh = False
            if not self.fresh:
                return y
        return self.act(y)


class Many(Flagged):
    def forward(self, x):
        """More courses than anybody looks at."""
        y = self.act(self.norm(self.conv(x)))
        return y * sum(getattr(self, f"flag{i}") for i in range(6))


MAY_CHANGE = {
    "a flag": (lambda: MayAct(acts=True), {"acts": False}),
    "a flag that is off": (lambda: MayAct(acts=False), {"acts": True}),
    "a flag of the class": (OfTheClass, {"acts": False}),
    "two flags": (lambda: MayTap(first=False, second=False), {"first": True, "second": True}),
    "a flag that a call sets": (lambda: Once(fresh=True), {}),
    "too many flags": (lambda: Many(**{f"flag{i}": True for i in range(6)}), {}),
}


@pytest.mark.parametrize("name", MAY_CHANGE)
def test_a_flag_that_is_set_later_changes_what_it_changed_before(name):
    make, flags = MAY_CHANGE[name]
    model = make()
    fused, _ = converted(model)
    assert fused.norm.activation is None
    for flag, value in flags.items():
        setattr(model, flag, value)
        setattr(fused, flag, value)
    same(fused, model)


class MaySkip(Flagged):
    def forward(self, x):
        """Flags and a condition that change nothing between norm and activation, or have neither called."""
        y = self.conv(x)
        if self.normed:
            y = self.act(self.norm(y))
        if self.doubled or y.sum() > 0:
            y = 2 * y
        return y


@pytest.mark.parametrize("flags", [(True, True), (True, False), (False, True)])
def test_flags_that_do_not_matter(flags):
    model = MaySkip(normed=True, doubled=False)
    fused, _ = converted(model)
    assert fused.norm.activation == "silu"
    for m in (model, fused):
        m.normed, m.doubled = flags
    same(fused, model)


class Around(nn.Module):
    """Something with a norm and an activation in it, which `forward` of the subclasses also calls in parts."""

    def __init__(self):
        super().__init__()
        self.inner, self.tapped = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()), False


class Sliced(Around):
    def forward(self, x):
        """By a slice."""
        return self.inner[:2](x) + self.inner(x)


class Rebuilt(Around):
    def forward(self, x):
        """By another container of the same modules."""
        return nn.Sequential(*list(self.inner.children())[:2])(x) + self.inner(x)


class Iterated(Around):
    def forward(self, x):
        """One after the other, behind a condition that no recording knows."""
        if x.shape[1] != 3:
            raise ValueError("channels")
        kept = []
        for layer in self.inner:
            x = layer(x)
            kept.append(x)
        return kept[1] + kept[2]


class Failing(Around):
    def forward(self, x):
        """And then what no recording goes through."""
        return self.inner[:2](x) + float(self.inner(x).detach().sum())


class Tapping(Around):
    def forward(self, x):
        """Where a flag says so."""
        return self.inner(x) + (self.inner[1](x) if self.tapped else 0)


@pytest.mark.parametrize("kind", [Sliced, Rebuilt, Iterated, Failing, Tapping])
def test_parts_that_are_called_from_around_stay(kind):
    model = kind()
    fused, _ = converted(nn.Sequential(model))
    assert fused[0].inner[1].activation is None
    for m in (model, fused[0]):
        m.tapped = True
    same(fused[0], model)


def test_blocks_that_are_called_in_parts_from_around_stay():
    class Tap(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (torchvision("resnet18").layer1[0] for _ in range(2))

        def forward(self, x):
            """One block whole, of the other its first norm too."""
            return self.first(x) + self.second(x) + self.second.bn1(x)

    model = Tap()
    fused, lines = converted(model)
    assert "first: BasicBlock -> TorchvisionBasicBlock" in lines
    assert type(fused.second).__name__ == "BasicBlock"
    assert fused.second.bn1.activation is None
    x = torch.randn(2, 64, 5, 5, dtype=torch.float64)
    expected, found = (copy.deepcopy(m).double().eval()(x) for m in (model, fused))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_looking_is_no_new_class_and_no_call():
    made = []

    class Registered(nn.Module):
        def __init_subclass__(cls):
            made.append(cls)

    class Own(Registered):
        def __init__(self):
            super().__init__()
            self.norm, self.act, self.on = nn.BatchNorm2d(3), nn.ReLU(), True

        @property
        def off(self):
            """No flag: what it says follows from one."""
            return not self.on

        def forward(self, x):
            """Reads both."""
            y = self.norm(x)
            return self.act(y) if self.on or self.off else y

    model = Own()
    assert courses.followers(model) == {"act": ["norm"]}
    assert made == [Own]
    assert model.on


MODELS = {
    "torchvision resnet18": lambda: torchvision("resnet18"),
    "timm resnet10t": lambda: timm("resnet10t"),
    "timm seresnet50": lambda: timm("seresnet50", layers=(1, 1, 1, 1)),
    "timm efficientnet_b0": lambda: timm("efficientnet_b0"),
    "timm regnetx_002": lambda: timm("regnetx_002"),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_report_names_every_layer_that_takes_something_in(name):
    """In a line of its own, or in the one about its replacement, where the old layer had the activation."""
    fused, lines = converted(MODELS[name]())
    taken = [path for path, m in fused.named_modules() if isinstance(m, dk.NormalizationLayer) and m.activation]
    said = [line.partition(": ")[0] for line in lines if ": with " in line or "activation=" in line]
    assert taken
    assert sorted(said) == sorted(taken)


def test_the_report_says_where_a_residual_comes_in():
    block = torchvision("resnet18").layer1[0]
    lines = converted(block)[1]
    assert lines[-3:] == [
        "model: BasicBlock -> TorchvisionBasicBlock",
        "bn1: with ReLU",
        "bn2: with the residual and ReLU",
    ]
