"""Transitions of a state, each against its formula in numpy, against differences, and against large samples."""

import math

import kalman_oracle as oracle
import numpy as np
import pytest
import torch
from test_kalman import arrays, close
from torch import nn

from divnorm_kernels import BatchNorm2d, KalmanNorm2d, KalmanState, add_states, propagate, transition

C = 4


def state(channels=C, dtype=torch.float64):
    return KalmanState(torch.randn(channels, dtype=dtype), torch.rand(channels, dtype=dtype) + 0.1)


def weighted(layer, groups=1):
    """The expected moments of a convolution or a linear layer."""

    def moments(mean, variance):
        weight = layer.weight.detach().double().numpy()
        first, second = mean, mean**2 + variance
        return oracle.convolved(first, second, weight, *arrays(layer.bias), groups)

    return moments


def flattened(layer):
    """Those of a linear layer that has several features for each channel."""
    return lambda mean, variance: weighted_by(layer, np.repeat(mean, 3), np.repeat(variance, 3))


def weighted_by(layer, mean, variance):
    weight = layer.weight.detach().numpy()
    return weight @ mean + layer.bias.detach().numpy(), weight**2 @ variance


def rectified(mean, variance):
    first, second = oracle.rectified(mean, variance)
    return first, second - first**2


def largest_of_two(mean, variance):
    """Its moments are known: 1/sqrt(pi), and 1 - 1/pi."""
    return mean + np.sqrt(variance / math.pi), variance * (1 - 1 / math.pi)


def largest_of_three(mean, variance):
    """Likewise: 3 / (2 sqrt(pi)), and 1 + (2 sqrt(3) - 9) / (4 pi)."""
    return mean + 1.5 * np.sqrt(variance / math.pi), variance * (1 + (2 * math.sqrt(3) - 9) / (4 * math.pi))


def normalized(layer, mean, variance):
    """By given moments."""

    def moments(m, v):
        weight, bias = arrays(layer.weight, layer.bias)
        scale = weight / np.sqrt((v if variance is None else variance) + layer.eps)
        return (m - (m if mean is None else mean)) * scale + bias, v * scale**2

    return moments


def normalized_in_groups(layer):
    def moments(m, v):
        own = m.reshape(2, 2).mean(1)
        spread = (v.reshape(2, 2) + (m.reshape(2, 2) - own[:, None]) ** 2).mean(1)
        return normalized(layer, np.repeat(own, 2), np.repeat(spread, 2))(m, v)

    return moments


def randomized(module):
    """In float64, with numbers that are not those of the start."""
    module = module.double()
    for t in (*module.parameters(), *module.buffers()):
        if t.is_floating_point():
            nn.init.uniform_(t, 0.5, 1.5)
    return module


def dropped(mean, variance):
    """The mean of x b / (1 - q), b one with probability 1 - q, and its second moment less the mean's square."""
    return mean, (mean**2 + variance) / 0.7 - mean**2


CONV = {
    "1d": nn.Conv1d(C, 6, 3),
    "2d, grouped": nn.Conv2d(C, 6, (3, 2), stride=2, padding=1, groups=2, bias=False),
    "2d, depthwise": nn.Conv2d(C, 2 * C, 3, groups=C),
    "3d": nn.Conv3d(C, 2, (1, 2, 3), dilation=2),
}
CONV = {name: layer.double() for name, layer in CONV.items()}
LINEAR, WIDE = nn.Linear(C, 5).double(), nn.Linear(3 * C, 5).double()
BATCH, INSTANCE, GROUP = (randomized(layer) for layer in (nn.BatchNorm2d(C), nn.InstanceNorm1d(C), nn.GroupNorm(2, C)))
INSTANCE.weight, INSTANCE.bias = (nn.Parameter(torch.rand(C, dtype=torch.float64)) for _ in range(2))
FROZEN = randomized(nn.BatchNorm1d(C)).eval()
OURS, KALMAN = randomized(BatchNorm2d(C, sigma=0.3)), randomized(KalmanNorm2d(C)).eval()
CASES = {
    **{f"convolution {name}": (layer, weighted(layer, layer.groups)) for name, layer in CONV.items()},
    "linear": (LINEAR, weighted(LINEAR)),
    "linear, flattened": (nn.Sequential(nn.Flatten(), WIDE), flattened(WIDE)),
    "relu": (nn.ReLU(), rectified),
    "average": (nn.AvgPool2d((2, 3)), lambda m, v: (m, v / 6)),
    "average 1d": (nn.AvgPool1d(3), lambda m, v: (m, v / 3)),
    "average 3d": (nn.AvgPool3d(2), lambda m, v: (m, v / 8)),
    "average, divided": (nn.AvgPool2d(2, divisor_override=3), lambda m, v: (4 / 3 * m, 4 / 9 * v)),
    "largest of two": (nn.MaxPool2d((1, 2)), largest_of_two),
    "largest of three": (nn.MaxPool1d(3), largest_of_three),
    "identity": (nn.Identity(), lambda m, v: (m, v)),
    "dropout": (nn.Dropout(0.3), dropped),
    "dropout of channels": (nn.Dropout2d(0.3), dropped),
    "dropout of all": (nn.Dropout(1.0), lambda m, v: (0 * m, 0 * v)),
    "dropout, eval": (nn.Dropout(0.3).eval(), lambda m, v: (m, v)),
    "batch": (BATCH, normalized(BATCH, None, None)),
    "batch, eval": (FROZEN, normalized(FROZEN, *arrays(FROZEN.running_mean, FROZEN.running_var))),
    "batch of ours": (OURS, normalized(OURS, None, None)),
    "Kalman, eval": (KALMAN, normalized(KALMAN, *arrays(KALMAN.running_mean, KALMAN.running_var))),
    "instance": (INSTANCE, normalized(INSTANCE, None, None)),
    "group": (GROUP, normalized_in_groups(GROUP)),
    "convolution of relu": (
        nn.Sequential(nn.ReLU(), CONV["1d"]),
        lambda m, v: oracle.convolved(*oracle.rectified(m, v), *arrays(CONV["1d"].weight, CONV["1d"].bias), 1),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_moments_and_their_gradients(name):
    module, expected = CASES[name]
    given = state()
    found = propagate(module, given)
    for t, wanted in zip(found, expected(*arrays(*given)), strict=True):
        close(t, wanted)

    def call(mean, variance, *parameters):
        named = dict(zip(names, parameters, strict=True))
        return tuple(torch.func.functional_call(Propagating(module), named, (KalmanState(mean, variance),)))

    names = [f"module.{name}" for name, _ in module.named_parameters()]
    inputs = [t.detach().requires_grad_() for t in (*given, *module.parameters())]
    assert torch.autograd.gradcheck(call, inputs)


class Propagating(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, given):
        return propagate(self.module, given)


SAMPLED = {
    "relu": (nn.ReLU(), ()),
    "convolution": (CONV["2d, grouped"], (9, 9)),
    "linear": (LINEAR, ()),
    "average": (nn.AvgPool2d(2), (8, 8)),
    "largest of nine": (nn.MaxPool2d(3), (9, 9)),
    "dropout": (nn.Dropout(0.3), ()),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_a_large_sample_has_nearly_these_moments(name):
    """Six deviations of a mean of n independent values, and of their variance, whose kurtosis is 9 or less."""
    module, extents = SAMPLED[name]
    if isinstance(module, nn.Conv2d):
        module = nn.Conv2d(C, 6, 3, stride=3, groups=2).double()  # no edges, and no two outputs of one input
    torch.manual_seed(1)
    given = state()
    size = (40_000 // max(1, math.prod(extents)), *extents)
    exact, found = propagate(module, given), propagate(module, given, sample=size)
    n = math.prod(size) // {"convolution": 9, "average": 4, "largest of nine": 9}.get(name, 1)
    torch.testing.assert_close(found.mean, exact.mean, rtol=0, atol=6 * (exact.variance.max() / n).sqrt().item())
    torch.testing.assert_close(found.variance, exact.variance, rtol=6 * math.sqrt(8 / n), atol=0)


def test_a_sample_is_what_the_module_makes_of_normal_numbers():
    """With edges, as many numbers as told, by a generator or torch's own."""
    module, given = nn.Sequential(nn.ReLU(), nn.Conv2d(C, 3, 3, padding=1).double()), state()
    generator = torch.Generator().manual_seed(3)
    first = propagate(module, given, sample=(2, 5, 6), generator=generator)
    normal = torch.randn(2, C, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    y = module(normal * given.variance.view(1, -1, 1, 1).sqrt() + given.mean.view(1, -1, 1, 1))
    for found, wanted in zip(first, (y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)), strict=True):
        close(found, wanted.detach())
    again = propagate(module, given, sample=(2, 5, 6), generator=torch.Generator().manual_seed(3))
    assert all(map(torch.equal, first, again))
    other = propagate(module, given, sample=(2, 5, 6), generator=generator)
    assert not torch.equal(first.mean, other.mean)
    torch.manual_seed(3)
    assert torch.equal(first.mean, propagate(module, given, sample=(2, 5, 6)).mean)
    mean = given.mean.clone().requires_grad_()
    propagate(module, KalmanState(mean, given.variance), sample=(2, 5, 6)).mean.sum().backward()
    assert mean.grad.all()


def test_of_rectified_normals_nothing_cancels():
    """In float32, where m^2 is far more than v, and as far as can be where nearly nothing is left above 0.

    There density and distribution function have errors of t^2 roundings. The mean is a difference of t^-2 of its terms,
    the variance one of t^-2 of the mean's.
    """
    t = torch.linspace(-9, 60, 70, dtype=torch.float64)
    exact = propagate(nn.ReLU(), KalmanState(t, torch.ones_like(t)))
    found = propagate(nn.ReLU(), KalmanState(t.float(), torch.ones(70)))
    below = t.clamp(max=0)
    for part, wanted, power in zip(found, exact, (4, 6), strict=True):
        bound = torch.finfo(torch.float32).eps * (8 + 2 * below**power)
        assert ((part.double() - wanted).abs() <= bound * wanted).all()


@pytest.mark.parametrize("module", [nn.ReLU(), nn.MaxPool2d(3)], ids=lambda module: type(module).__name__)
def test_without_variance_the_mean_goes_through(module):
    mean = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64, requires_grad=True)
    variance = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    found = propagate(module, KalmanState(mean, variance))
    close(found.mean, mean.detach().clamp(min=0) if isinstance(module, nn.ReLU) else mean.detach())
    assert not found.variance.any()
    for gradient in torch.autograd.grad(found.mean.sum() + found.variance.sum(), [mean, variance]):
        assert gradient.isfinite().all()


def test_sums():
    first, second = state(), state()
    found = add_states(first, second)
    close(found.mean, first.mean + second.mean)
    close(found.variance, first.variance + second.variance)
    with pytest.raises(ValueError, match=r"^second: got a mean of shape \(3,\), expected \(4,\)"):
        add_states(first, state(3))


@pytest.mark.parametrize("module", [nn.Conv2d(C, 3, 3), nn.Linear(C, 3)], ids=lambda module: type(module).__name__)
def test_autocast_and_half_weights_leave_states_in_their_dtype(module):
    given = state(dtype=torch.float32)
    expected = propagate(module, given)
    with torch.autocast("cpu", torch.bfloat16):
        found = propagate(module, given)
    assert all(map(torch.equal, found, expected))
    assert propagate(module.bfloat16(), given).mean.dtype == torch.float32


class Doubling(nn.Module):
    def forward(self, x):
        return 2 * x


def test_other_modules_are_unknown_until_they_are_registered():
    given = state()
    with pytest.raises(TypeError, match=r"^module: got Doubling, which has no transition"):
        propagate(nn.Sequential(nn.ReLU(), Doubling()), given)

    @transition.register
    def _(module: Doubling, state: KalmanState) -> KalmanState:
        return KalmanState(2 * state.mean, 4 * state.variance)

    close(propagate(Doubling(), given).variance, 4 * given.variance)
    sampled = propagate(nn.SiLU(), given, sample=(1000,))  # which a sample does not need
    assert sampled.variance.shape == (C,)


BAD = {
    "no module": (lambda: propagate(torch.relu, state()), TypeError, "module: got builtin_function_or_method"),
    "no state": (lambda: propagate(nn.ReLU(), None), TypeError, "state: got NoneType, expected a pair"),
    "other channels": (lambda: propagate(CONV["1d"], state(3)), ValueError, "state: got 3 channels, expected 4"),
    "odd features": (lambda: propagate(LINEAR, state(3)), ValueError, "state: got 3 channels, expected a divisor of"),
    "no sizes": (lambda: propagate(nn.ReLU(), state(), sample=3), TypeError, "sample: got 3, expected (N, *S)"),
    "empty": (lambda: propagate(nn.ReLU(), state(), sample=()), TypeError, "sample: got (), expected (N, *S)"),
    "no size": (lambda: propagate(nn.ReLU(), state(), sample=(0,)), ValueError, "sample: got 0, expected a positive"),
    "nothing to draw": (
        lambda: propagate(nn.ReLU(), state(), generator=torch.Generator()),
        ValueError,
        "generator: got one without sample",
    ),
    "transposed": (lambda: propagate(nn.ConvTranspose2d(C, 3, 2), state()), TypeError, "module: got ConvTranspose2d"),
    "samples flattened": (lambda: propagate(nn.Flatten(0), state()), TypeError, "module: got Flatten(0)"),
    "more than a norm": (
        lambda: propagate(BatchNorm2d(C, activation="relu"), state()),
        TypeError,
        "module: got BatchNorm2d(4, activation='relu'), which does more",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value).startswith(message)
