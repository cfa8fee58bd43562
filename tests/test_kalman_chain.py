"""Models of Kalman norms, wired: values and gradients by the formulas, and what states must not do."""

import math

import pytest
import torch
from resnets import BasicBlock, Bottleneck, ResNet
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import divnorm_kernels as dk
from divnorm_kernels import KalmanState, kalman_chain


def sequence(*behind):
    """Every transition between two norms that a network of this kind has."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)),
        nn.ReLU(),
        nn.Sequential(nn.Dropout(0.0), nn.Identity()),
        nn.Conv2d(6, 2, 1, bias=False),
        nn.BatchNorm2d(2, affine=False),
        *behind,
    )


def blocks():
    """One whose other branch has no norm, and one that calls it otherwise."""
    plain = BasicBlock(4, 4)
    plain.downsample = nn.Conv2d(4, 4, 1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), plain, BasicBlock(4, 6, shortcut="shortcut"))


MODELS = {
    "sequence": sequence,
    "basic": ResNet,
    "bottleneck": lambda: ResNet(Bottleneck, stages=1),
    "blocks": blocks,
}


def drawn(name, dtype=torch.float64):
    model = MODELS[name]().to(dtype)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d) and m.affine:
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.uniform_(m.bias, -0.5, 0.5)
    return model, torch.randn(2, 3, 12, 12, dtype=dtype)


def by_the_formulas(module, x, state, p=0.9):
    """A batch norm's model as a Kalman chain, from the names of its modules; y and its state."""
    if isinstance(module, nn.BatchNorm2d):
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        if state is not None and (state[1] / variance).mean() < 100:
            m, v = state
            gap = p * (1 - p) * (mean - m) ** 2
            mean, variance = p * m + (1 - p) * mean, p * v + (1 - p) * variance + gap
        y = (x - mean.view(1, -1, 1, 1)) / (variance + module.eps).sqrt().view(1, -1, 1, 1)
        if module.affine:
            y = y * module.weight.view(1, -1, 1, 1) + module.bias.view(1, -1, 1, 1)
        return y, (mean, variance)
    if isinstance(module, nn.Sequential):
        for child in module:
            x, state = by_the_formulas(child, x, state, p)
        return x, state
    if isinstance(module, ResNet):
        names = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2"]
        for name in names[: 4 + module.stages]:
            x, state = by_the_formulas(getattr(module, name), x, state, p)
        return module.fc(x.mean((2, 3))), None
    if isinstance(module, BasicBlock | Bottleneck):
        names = "conv1 bn1 relu conv2 bn2" + (" relu conv3 bn3" if isinstance(module, Bottleneck) else "")
        y, own = x, state
        for name in names.split():
            y, own = by_the_formulas(getattr(module, name), y, own, p)
        other = module._modules.get("downsample") or module._modules.get("shortcut")
        if other is not None:
            x, state = by_the_formulas(other, x, state, p)
        return by_the_formulas(module.relu, y + x, (own[0] + state[0], own[1] + state[1]), p)
    y = F.relu(x) if isinstance(module, nn.ReLU) else module(x)  # a copy, where the module writes in place
    return y, None if state is None else moved(module, *state)


def moved(module, mean, variance):
    if isinstance(module, nn.ReLU):
        s = variance.sqrt()
        t = mean / s
        density, above = torch.exp(-t * t / 2) / math.sqrt(2 * math.pi), (1 + torch.erf(t / math.sqrt(2))) / 2
        first = mean * above + s * density
        return first, (mean**2 + variance) * above + mean * s * density - first**2
    if isinstance(module, nn.Conv2d):
        # a convolution of a picture with one number in each channel
        size = [1, -1, *module.kernel_size]
        convolved = [
            F.conv2d(t.view(1, -1, 1, 1).expand(size), weight, groups=module.groups).flatten()
            for t, weight in ((mean, module.weight), (variance, module.weight**2))
        ]
        return convolved[0] + (0 if module.bias is None else module.bias), convolved[1]
    if isinstance(module, nn.AvgPool2d):
        return mean, variance / 4
    if isinstance(module, nn.MaxPool2d):  # of four normals, by their distribution function
        x = torch.linspace(-10, 10, 4001, dtype=torch.float64)
        density = 4 * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi) * torch.special.ndtr(x) ** 3
        largest = torch.trapezoid(x * density, x)
        return mean + largest * variance.sqrt(), variance * torch.trapezoid((x - largest) ** 2 * density, x)
    return mean, variance


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def gradients(model, y):
    return torch.autograd.grad(y.square().sum() + y.sum(), list(model.parameters()))


@pytest.mark.parametrize("p", [0.05, 0.9])
@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_the_formulas(name, p):
    model, x = drawn(name)
    expected = by_the_formulas(model, x, None, p)[0]
    wanted = gradients(model, expected)
    chain = kalman_chain(model, p)
    assert chain is model
    y = chain(x)
    close(y, expected)
    for found, t in zip(gradients(chain, y), wanted, strict=True):
        close(found, t)


def test_gradients_flow_through_the_states():
    """Differences of a weight that stands before a state."""
    model, x = drawn("sequence")
    chain = kalman_chain(model)

    def call(weight):
        return torch.func.functional_call(chain, {"0.weight": weight}, (x,))

    assert torch.autograd.gradcheck(call, model[0].weight.detach().clone().requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("name", MODELS)
def test_in_eval_mode_it_is_the_batch_norms_model_and_computes_no_state(name, monkeypatch):
    model, x = drawn(name)
    model(x)
    chain = kalman_chain(model, inplace=False)
    monkeypatch.setattr("divnorm_kernels.kalman.carriers.transition", None)
    assert torch.equal(chain.eval()(x), model.eval()(x))


@pytest.mark.parametrize("name", MODELS)
def test_nothing_stays_from_call_to_call(name):
    chain, x = drawn(name)
    kalman_chain(chain)
    first = chain(x)
    held = [value for m in chain.modules() for value in vars(m).values() if isinstance(value, torch.Tensor | tuple)]
    assert not [value for value in held if isinstance(value, torch.Tensor | KalmanState)]
    chain(3 * x + 5)
    assert torch.equal(chain(x), first)


def test_a_frozen_norm_hands_on_its_averages():
    model, x = drawn("sequence")
    kalman_chain(model)
    model(x)
    model[1].eval()
    state = KalmanState(model[1].running_mean.clone(), model[1].running_var.clone())
    y = model(x)
    between = nn.Sequential(model[2], *model[3][:2])
    a, state = model[1](model[0](x))
    b, state = model[3][2](between(a), dk.propagate(between, state))
    b, _ = model[7](model[6](F.relu(b)), dk.propagate(nn.Sequential(model[4], model[6]), state))
    close(y, b)


def test_containers_may_be_called_with_a_state():
    model, _ = drawn("sequence")
    kalman_chain(model)
    inner = model[3]
    features = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    prior = KalmanState(torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64))
    alone = inner(features)
    y, state = inner(features, None)
    assert torch.equal(y, alone)
    assert state.mean.shape == (6,)
    assert not torch.equal(inner(features, prior)[0], alone)
    assert not torch.equal(model[2:4](features, prior)[0], model[2:4](features))  # a slice is a chain too


def test_one_graph_under_torch_compile():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(2), BasicBlock(4, 4))
    chain = kalman_chain(model.double())
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(chain, backend=counter, fullgraph=True)
    for shift in (0, 1):
        expected = chain(x + shift)
        y = compiled(x + shift)
        close(y, expected)
        for found, wanted in zip(gradients(chain, y), gradients(chain, expected), strict=True):
            close(found, wanted)
    assert counter.frame_count == 1


def test_a_compiled_part_goes_on_handing_states_on():
    model, x = drawn("sequence")
    expected = kalman_chain(model)(x)
    model[3] = torch.compile(model[3], backend="eager")
    close(model(x), expected)


def test_checkpointed_parts_have_the_same_gradients():
    model, x = drawn("basic")
    chain = kalman_chain(model)
    found = []
    for run in (lambda part, *given: part(*given), lambda *given: checkpoint(*given, use_reentrant=False)):
        y, _ = chain.layer2(*run(chain.layer1, *chain.bn1(chain.conv1(x))))
        found.append(torch.autograd.grad(y.square().sum(), [chain.conv1.weight, *chain.layer1.parameters()]))
    close(*found)


def replica(module):
    """As `torch.nn.parallel.replicate` makes it: parameters are tensors of another device, buffers are copies."""
    made = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        made._modules[name] = None if child is None else replica(child)
    for name, t in module._parameters.items():
        setattr(made, name, None if t is None else t * 1)
    for name, t in module._buffers.items():
        made._buffers[name] = None if t is None else t.clone()
    return made


@pytest.mark.parametrize("name", MODELS)
def test_replicas(name):
    model, x = drawn(name)
    chain = kalman_chain(model)
    expected = chain(x)
    y = replica(chain)(x)
    close(y, expected)
    for found, wanted in zip(gradients(chain, y), gradients(chain, expected), strict=True):
        close(found, wanted)


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (7, TypeError, "prior: got int, expected a pair of mean and variance"),
        ((torch.zeros(3), 1.0), TypeError, "prior: got float for the variance, expected a Tensor"),
    ],
)
def test_a_chain_takes_pairs(state, error, message):
    chain = kalman_chain(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    x, pair = torch.randn(2, 3, 6, 6), (torch.zeros(3), torch.ones(3))
    for got, want in zip(chain(x, pair)[1], chain(x, KalmanState(*pair))[1], strict=True):
        assert torch.equal(got, want)
    with pytest.raises(error, match=message):
        chain(x, state)
