"""Prepared calls: what they serve and what they leave alone, and that nothing of it is to be seen but the time."""

import contextlib
import gc

import pytest
import torch
from hostile import Subclass
from hypothesis import given
from oracle import Call, evaluate
from strategies import calls
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import divnorm_kernels as dk
from divnorm_kernels import divisive_norm, functional
from divnorm_kernels.norm import Norm
from divnorm_kernels.prepared import prepared

SHAPE = (2, 4, 5, 6)
FAST = "PreparedFunctionBackward"


def call(x, weight=None, bias=None, sigma=1.0, *flags, norm=None, backend="cpu", form=None):
    """What a prepared call of a window answers."""
    return prepared(norm or Norm(3), backend, form)(x, weight, bias, sigma, *flags)


def storage_resized(t, bytes_):
    t.untyped_storage().resize_(bytes_)
    return t


class Wrapped:
    """An x that a transformation of torch.func has left behind."""

    def __new__(cls, x):
        kept = []
        torch.func.vmap(lambda t: kept.append(t) or t)(x.unsqueeze(0))
        return kept[0]


X = torch.randn(SHAPE)
SERVED = {
    "contiguous": lambda: (X,),
    "channels_last": lambda: (X.contiguous(memory_format=torch.channels_last),),
    "parameters": lambda: (X, torch.ones(4), torch.nn.Parameter(torch.zeros(4)), torch.tensor(0.5)),
    "half types beside float32": lambda: (X.bfloat16(), torch.ones(4), torch.zeros(4).bfloat16(), 2),
    "a view from the middle of a storage": lambda: (torch.randn(3, *SHAPE)[1],),
    "a feature": lambda: (torch.randn(3, 7), torch.ones(7)),
    "l1": lambda: (X, None, None, 1.0, True),
}
LEFT = {
    "no tensor": lambda: ([1.0],),
    "x a subclass": lambda: (X.as_subclass(Subclass),),
    "weight a subclass": lambda: (X, torch.ones(4).as_subclass(Subclass)),
    "sigma a subclass": lambda: (X, None, None, torch.ones(()).as_subclass(Subclass)),
    "x negated": lambda: (torch._neg_view(X),),
    "bias negated": lambda: (X, None, torch._neg_view(torch.ones(4))),
    "a zero that nobody wrote": lambda: (torch._efficientzerotensor(SHAPE),),
    "x freed": lambda: (storage_resized(X.clone(), 0),),
    "x cut short": lambda: (storage_resized(X.clone(), 4 * X.numel() - 4),),
    "x cut short behind an offset": lambda: (storage_resized(torch.randn(3, *SHAPE)[1], 4 * X.numel()),),
    "weight cut short": lambda: (X, storage_resized(torch.ones(4), 12)),
    "x sparse": lambda: (X.to_sparse(),),
    "x on meta": lambda: (X.to("meta"),),
    "x nested": lambda: (torch.nested.nested_tensor([X[0], X[1]]),),
    "x fake": lambda: (FakeTensorMode().from_tensor(X),),
    "x functional": lambda: (torch._to_functional_tensor(X),),
    "x batched and left behind": lambda: (Wrapped(X),),
    "x with gaps": lambda: (torch.randn(2, 4, 5, 12)[..., ::2],),
    "x turned": lambda: (torch.randn(2, 4, 6, 5).transpose(2, 3),),
    "weight with gaps": lambda: (X, torch.ones(8)[::2]),
    "weight of another length": lambda: (X, torch.ones(5)),
    "weight of two dimensions": lambda: (X, torch.ones(1, 4)),
    "weight of another dtype": lambda: (X, torch.ones(4).double()),
    "weight of half precision": lambda: (X, torch.ones(4).half()),
    "weight a number": lambda: (X, 1.0),
    "sigma NaN": lambda: (X, None, None, float("nan")),
    "sigma an int that no float holds": lambda: (X, None, None, 10**400),
    "sigma a bool": lambda: (X, None, None, True),
    "sigma per channel": lambda: (X, None, None, torch.ones(4)),
    "sigma of one dimension": lambda: (X, None, None, torch.ones(1, 1)),
    "x of integers": lambda: (X.int(),),
    "x empty": lambda: (torch.randn(0, 4, 5, 6),),
    "x of too many dimensions": lambda: (torch.randn(1, 1, 1, 1, 1, 2),),
    "l1 by a number": lambda: (X, None, None, 1.0, 1),
}


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def compiling():
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = False


AROUND = {
    "a dispatch mode": Watching,
    "a function mode": lambda: torch.device("cpu"),
    "forward-mode differentiation": forward_ad.dual_level,
    "export": compiling,
}


@pytest.mark.parametrize("name", SERVED)
def test_what_is_usual_is_served(name):
    arguments = SERVED[name]()
    found = call(*arguments)
    assert found is not NotImplemented
    y = found[0] if len(arguments) > 4 else found
    x, weight, bias, sigma = (*arguments, *(None, None, 1.0)[len(arguments) - 1 :])[:4]
    expected = dk.reference.divisive_norm(x, weight, bias, window=3, sigma=sigma)
    torch.testing.assert_close(y, expected)
    assert (y.stride(), y.dtype) == (x.stride(), x.dtype)


@pytest.mark.parametrize("name", LEFT)
def test_what_is_unusual_is_left_alone(name):
    assert call(*LEFT[name]()) is NotImplemented


@pytest.mark.parametrize("name", AROUND)
def test_who_wants_to_see_is_left_to_see(name):
    with AROUND[name]():
        assert call(X) is NotImplemented
    assert call(X) is not NotImplemented


def test_transformations_and_recorders_are_left_to_see():
    seen = []

    def function(x):
        seen.append(call(X))
        return x * 2

    torch.func.vmap(function)(torch.ones(2))
    torch.jit.trace(function, torch.ones(2), check_trace=False)
    assert seen == [NotImplemented] * 2


def test_the_reference_and_refusals_are_left_alone():
    assert call(X, backend="reference") is NotImplemented
    assert call(X, norm=Norm(3, groups=3)) is NotImplemented
    assert call(X, norm=Norm((3, 3, 3))) is NotImplemented


@pytest.mark.parametrize("requires", [(), ("x",), ("weight",), ("bias",), ("sigma",)])
def test_which_calls_are_in_a_graph(requires):
    tensors = {"x": X.clone(), "weight": torch.ones(4), "bias": torch.zeros(4), "sigma": torch.ones(())}
    for name in requires:
        tensors[name].requires_grad_()
    y = divisive_norm(**tensors, window=3)
    assert (y.grad_fn is None) == (not requires)
    assert not requires or y.grad_fn.name() == FAST
    with torch.no_grad():
        assert divisive_norm(**tensors, window=3).grad_fn is None


@contextlib.contextmanager
def without_prepared_calls():
    """What divisive_norm does where no prepared call serves it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("prepared", "_prepared"):
            patch.setattr(functional, name, lambda *_: lambda *_: NotImplemented)
        yield


@given(calls())
def test_results_are_the_same_without_them(call: Call):
    """Bit by bit, gradients and all."""
    found = evaluate(divisive_norm, call)
    with without_prepared_calls():
        expected = evaluate(divisive_norm, call)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if value is not None:
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0, equal_nan=True, msg=name)


def graph(**options):
    """Leaves and y of a call that is in a graph."""
    leaves = [torch.randn(SHAPE, requires_grad=True), *(torch.randn(4, requires_grad=True) for _ in range(2))]
    y = divisive_norm(*leaves, window=3, **options)
    assert y.grad_fn.name() == FAST
    return leaves, y


def expected_gradients(leaves, dy, **options):
    y = dk.reference.divisive_norm(*leaves, window=3, **options)
    return torch.autograd.grad(y, leaves, dy)


GRADIENTS = {
    "as x": lambda dy: dy,
    "channels_last": lambda dy: dy.contiguous(memory_format=torch.channels_last),
    "expanded": lambda dy: dy[:1, :1, :1, :1].expand(SHAPE),
    "negated": lambda dy: torch._neg_view(dy),
    "sparse": lambda dy: dy.to_sparse(),
    "a subclass": lambda dy: dy.as_subclass(Subclass),
}


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_of_every_kind(name, activation):
    leaves, y = graph(activation=activation)
    dy = torch.randn(SHAPE)
    found = torch.autograd.grad(y, leaves, GRADIENTS[name](dy))
    given = GRADIENTS[name](dy)
    expected = expected_gradients(leaves, given.to_dense() if given.is_sparse else given, activation=activation)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hook", [lambda t: t.clone(), lambda t: t.double(), lambda t: t.as_subclass(Subclass)])
def test_hooks_on_what_is_saved(hook):
    """What comes back may be of another place, and of another kind."""
    with torch.autograd.graph.saved_tensors_hooks(hook, lambda t: torch.Tensor.to(t, torch.float32)):
        leaves, y = graph()
    dy = torch.randn(SHAPE)
    for f, e in zip(torch.autograd.grad(y, leaves, dy), expected_gradients(leaves, dy), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)


def test_maps_come_back_with_gaps():
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: torch.stack([t, t], -1)[..., 0]):
        leaves, y = graph()
    dy = torch.randn(SHAPE)
    for f, e in zip(torch.autograd.grad(y, leaves, dy), expected_gradients(leaves, dy), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)


def test_a_saved_input_that_was_changed_is_an_error():
    leaves, y = graph()
    with torch.no_grad():
        leaves[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_checkpoint():
    layer, x = dk.DivisiveNorm2d(4, 3), torch.randn(SHAPE, requires_grad=True)
    for dy in (torch.randn(SHAPE), torch.randn(1).expand(SHAPE)):  # the latter is for Python's way
        (dx,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False), x, dy)
        assert torch.equal(dx, torch.autograd.grad(layer(x), x, dy)[0])


def test_a_compiled_backward():
    """Compilers of backward read its Python."""
    leaves, y = graph()
    dy = torch.randn(SHAPE)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        y.backward(dy)
    for leaf, e in zip(leaves, expected_gradients(leaves, dy), strict=True):
        torch.testing.assert_close(leaf.grad, e, rtol=1e-4, atol=1e-5)


def test_an_error_in_a_kernel_is_an_exception(monkeypatch):
    def broken(*_):
        raise RuntimeError("the kernel is tired")

    x = torch.randn(2, 3, 4, requires_grad=True)
    calls = dk.prepared.module.Call(Norm(3), None, None, broken)
    with pytest.raises(RuntimeError, match="the kernel is tired"):
        calls(x, None, None, 1.0)
    with pytest.raises(TypeError, match="a call takes x, weight, bias, sigma"):
        calls(x)
    with pytest.raises(RuntimeError, match="not called by a Call"):
        dk.autograd.PreparedFunction.apply(x, None, None, 1.0)


STEPS = {"windows": (lambda: dk.DivisiveNorm2d(4, 3), SHAPE), "rows": (lambda: dk.LayerNorm((5, 6)), SHAPE)}


@pytest.mark.parametrize("name", STEPS)
def test_what_a_step_makes(name, torchs_defaults):
    """Forward: y and the maps. Backward: a gradient each. Nothing is filled, copied or looked at twice."""
    make, shape = STEPS[name]
    layer, x, dy = make(), torch.randn(shape, requires_grad=True), torch.randn(shape)
    inputs = [x, *layer.parameters()]
    for _ in range(2):
        torch.autograd.grad(layer(x), inputs, dy)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y = layer(x)
    assert names_of(profile) == ["PreparedFunction", "aten::empty_like", "aten::empty_like"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.grad(y, inputs, dy)
    made = [event for event in names_of(profile) if event.startswith("aten::")]
    assert made == ["aten::empty_like"] * 3


def names_of(profile) -> list[str]:
    """The operators that ran, but for what empty_like does itself."""
    inside = {"aten::empty_strided"}
    found = [event.name for event in profile.events() if event.name not in inside and not event.name.startswith("[")]
    return found


@contextlib.contextmanager
def whenever_objects_go(function):
    """Calls ``function`` wherever Python looks for garbage: at any object that is made."""
    busy = []

    def callback(phase, info):
        if phase == "start" and not busy:
            busy.append(True)
            try:
                function()
            finally:
                busy.clear()

    thresholds = gc.get_threshold()
    gc.callbacks.append(callback)
    gc.set_threshold(1)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(callback)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_calls_in_the_middle_of_calls(requires_grad):
    """Of more positions, so that what the outer call would keep its maps in is too small for the inner one."""
    x = torch.randn(SHAPE, requires_grad=requires_grad)
    large = torch.randn(1, 2, 4000, requires_grad=True)
    expected = divisive_norm(x, window=3, return_l1=True)
    held, inner = [], divisive_norm(large, window=3)

    def between():
        assert torch.equal(divisive_norm(large, window=3), inner)
        with torch.no_grad():
            assert torch.equal(divisive_norm(large, window=3), inner)
        held.append(bytearray(1000))

    with whenever_objects_go(between):
        for _ in range(200):
            found = divisive_norm(x, window=3, return_l1=True)
            assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
    assert held
    assert all(not any(b) for b in held), "written into what others have"
