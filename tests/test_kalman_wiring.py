"""What wiring a model for Kalman normalization keeps, what it refuses, and networks of other libraries."""

import copy
import pickle

import pytest
import torch
from resnets import BasicBlock, Preactivated, ResNet, Scaled
from test_architectures import timm
from test_kalman_chain import MODELS, close, drawn, sequence
from torch import nn

import divnorm_kernels as dk
from divnorm_kernels import KalmanNorm2d, KalmanState, convert_norm, kalman_chain, transition


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_the_very_ones_and_checkpoints_load_both_ways(name):
    model, x = drawn(name)
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    keys = list(model.state_dict())
    untouched = copy.deepcopy(model)
    kalman_chain(model)
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert before.keys() == after.keys()
    assert all(after[key] is t for key, t in before.items())
    assert list(model.state_dict()) == keys
    model(x)
    untouched.load_state_dict(model.state_dict())
    assert torch.equal(untouched.eval()(x), model.eval()(x))
    model.load_state_dict(untouched.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", MODELS)
def test_copies_and_pickles(name, copied):
    model, x = drawn(name)
    chain = kalman_chain(model)
    other = copied(chain)
    assert type(other) is type(chain)
    assert torch.equal(other(x), chain(x))
    before = chain.state_dict()["1.running_mean" if name in ("sequence", "blocks") else "bn1.running_mean"].clone()
    other(x + 1)
    assert before.equal(chain.state_dict()["1.running_mean" if name in ("sequence", "blocks") else "bn1.running_mean"])


def test_a_copy_leaves_the_model_as_it_was():
    model, _ = drawn("basic")
    kinds = [type(m) for m in model.modules()]
    chain = kalman_chain(model, inplace=False)
    assert isinstance(chain, ResNet)
    assert isinstance(chain.layer1[0], BasicBlock)
    assert [type(m) for m in model.modules()] == kinds
    assert sum(isinstance(m, KalmanNorm2d) for m in chain.modules()) == kinds.count(nn.BatchNorm2d)


def test_options_modes_and_hooks_go_along():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4, eps=1e-3, momentum=None),
        nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4, track_running_stats=False).eval(),
        dk.BatchNorm2d(4, bias=False, backend="reference"),
    )
    seen = []
    handle = model[1].register_forward_hook(lambda module, inputs, outputs: seen.append(module))
    kalman_chain(model, 0.3)
    shown = [str(model[i]) for i in (1, 3, 4)]
    assert shown == [
        "KalmanNorm2d(4, prior_weight=0.3, eps=0.001, momentum=None)",
        "KalmanNorm2d(4, prior_weight=0.3, track_running_stats=False)",
        "KalmanNorm2d(4, prior_weight=0.3, bias=False, backend='reference')",
    ]
    assert [model[i].training for i in (1, 3, 4)] == [True, False, True]
    model(torch.randn(2, 3, 4, 4))
    handle.remove()
    model(torch.randn(2, 3, 4, 4))
    assert seen == [model[1]]


class Unknown(nn.Module):
    def forward(self, x):
        return x + 1


class Known(Unknown):
    """Which a test registers."""


def test_behind_the_last_norm_anything_may_stand():
    model = sequence(nn.Flatten(0), nn.Linear(2 * 2 * 3 * 3, 2), Unknown(), nn.LogSoftmax(0)).double()
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    close(kalman_chain(model)(x).exp().sum(), torch.tensor(1.0, dtype=torch.float64))


def test_a_registered_module_between_norms():
    @transition.register
    def _(module: Known, state: KalmanState) -> KalmanState:
        return KalmanState(state.mean + 1, state.variance)

    known = kalman_chain(nn.Sequential(nn.BatchNorm2d(3), Known(), nn.BatchNorm2d(3)))
    x = torch.randn(2, 3, 4, 4)
    _, state = known[0](x)
    y, _ = known[2](known[0](x)[0] + 1, KalmanState(state.mean + 1, state.variance))
    torch.testing.assert_close(known(x), y)


class Own(nn.Module):
    """A container that nobody knows."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(x)


class Between(nn.Sequential):
    """A sequence with a forward of its own."""

    def forward(self, x):
        return super().forward(x) + 1


def norms(between):
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), between, nn.BatchNorm2d(4))


REFUSED = {
    "unknown between": (lambda: norms(Unknown()), TypeError, "model.2: got Unknown between two norms"),
    "unknown inside": (lambda: norms(nn.Sequential(Unknown())), TypeError, "model.2: got Sequential between two norms"),
    "unknown container": (lambda: norms(Own()), TypeError, "model.2: got Own with batch norms, expected a Sequential"),
    "its own sequence": (lambda: norms(Between(nn.BatchNorm2d(4))), TypeError, "model.2: got Between with batch norms"),
    "preactivated": (lambda: norms(Preactivated(4, 4)), TypeError, "model.2: got Preactivated, whose forward"),
    "scaled": (lambda: norms(Scaled(4, 4)), TypeError, "model.2: got Scaled, whose forward does not"),
    "scaled in a network": (lambda: ResNet(Scaled), TypeError, "model: got ResNet, whose forward does not"),
    "network first": (lambda: norms(ResNet()), TypeError, "model.2: got ResNet in front of a norm"),
    "across processes": (lambda: norms(nn.SyncBatchNorm(4)), TypeError, "model.2: got SyncBatchNorm(4"),
    "synchronised": (lambda: norms(dk.convert_sync(dk.BatchNorm2d(4))), TypeError, "model.2: got BatchNorm2d(4)"),
    "more than a norm": (lambda: norms(dk.BatchNorm2d(4, p=1)), TypeError, "model.2: got BatchNorm2d(4, p=1)"),
    "lazy": (lambda: norms(nn.LazyBatchNorm2d()), TypeError, "model.2: got LazyBatchNorm2d, which is lazy"),
    "without norms": (lambda: nn.Sequential(nn.ReLU()), ValueError, "model: got Sequential without batch norms"),
    "a norm": (lambda: nn.BatchNorm2d(4), TypeError, "model: got BatchNorm2d, expected a container"),
    "no module": (lambda: torch.relu, TypeError, "model: got builtin_function_or_method, expected a torch.nn.Module"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_stays_as_it_was(name):
    make, error, message = REFUSED[name]
    model = make()
    kinds = [type(m) for m in model.modules()] if isinstance(model, nn.Module) else None
    with pytest.raises(error) as raised:
        kalman_chain(model)
    assert str(raised.value).startswith(message)
    assert kinds is None or [type(m) for m in model.modules()] == kinds


def test_bad_options():
    with pytest.raises(ValueError, match=r"^prior_weight: got 2, expected a number from 0 to 1"):
        kalman_chain(sequence(), 2)
    with pytest.raises(TypeError, match=r"^inplace: got None of type NoneType, expected a bool"):
        kalman_chain(sequence(), inplace=None)


def test_what_has_random_numbers_leaves_the_generator_alone_and_hooks_are_not_called():
    model, called = ResNet(), []
    model.layer1.register_forward_hook(lambda *_: called.append(1))
    before = torch.get_rng_state()
    kalman_chain(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert not called


def test_wired_twice_it_is_the_same():
    model, x = drawn("basic")
    once = kalman_chain(model)(x)
    assert torch.equal(kalman_chain(model)(x), once)


def test_convert_norm_leaves_a_chain_as_it_is():
    model, x = drawn("sequence")
    expected = kalman_chain(model)(x)
    with pytest.warns(UserWarning, match="left as it is: KalmanNorm2d"):
        convert_norm(model, "dn", window=3, report=None)
    assert torch.equal(model(x), expected)


def shallow(block):
    resnet = pytest.importorskip("torchvision.models.resnet", exc_type=ImportError)
    return resnet.ResNet(getattr(resnet, block), [1, 1, 1, 1], num_classes=5)


SMALL = {"channels": (8, 16, 24, 32), "layers": (1, 1, 1, 1)}
LIBRARIES = {
    "torchvision, basic": lambda: shallow("BasicBlock"),
    "torchvision, bottlenecks": lambda: shallow("Bottleneck"),
    "timm resnet10t": lambda: timm("resnet10t", **SMALL),
    "timm resnet26d": lambda: timm("resnet26d", **SMALL),
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_libraries_resnets(name):
    model = LIBRARIES[name]().eval()
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    chain = kalman_chain(model)
    assert not [m for m in chain.modules() if type(m) is nn.BatchNorm2d]
    assert torch.equal(chain(x), expected)
    chain.train()
    y = chain(x)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in chain.parameters())
    if hasattr(chain, "set_grad_checkpointing"):
        before = [p.grad for p in chain.parameters()]
        chain.zero_grad()
        chain.set_grad_checkpointing()
        chain(x).sum().backward()
        for p, wanted in zip(chain.parameters(), before, strict=True):
            torch.testing.assert_close(p.grad, wanted)
