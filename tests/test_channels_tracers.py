"""Windows over channels under what looks at a call before a kernel runs: compilers, recorders, torch.func, autocast."""

import math

import pytest
import torch
from channel_layers import BACKENDS, LEARNING, close, double

import divnorm_kernels as dk
from divnorm_kernels import Exponential, channel_norm


@pytest.mark.parametrize("make", LEARNING, ids=["lrn", "exp"])
def test_compiled_it_is_one_operator(make):
    layer = make()
    x = torch.randn(2, 6, 4, 5, requires_grad=True)
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    y, expected = compiled(x), layer(x)
    assert torch.equal(y, expected)
    assert sum("channel_forward" in target for target in graphs[0]) == 1
    for leaf in (x, *layer.parameters()):
        got, want = (torch.autograd.grad(t.sum(), leaf, retain_graph=True)[0] for t in (y, expected))
        torch.testing.assert_close(got, want)
    traced = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(traced(x).sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])


def test_the_operators_are_registered_as_torch_wants():
    x, dy = torch.randn(2, 6, 4, requires_grad=True), torch.randn(2, 6, 4)
    learned = torch.tensor([1.0, 0.3, 0.7, 0.8], requires_grad=True)
    nan = math.nan
    operators = torch.ops.divnorm_kernels
    for box in ([1, 2], []):
        pool = (box, False, [nan, 0.2, nan, 0.5], None)
        torch.library.opcheck(operators.channel_forward, (x, learned, *pool))
        torch.library.opcheck(operators.channel_forward, (x, None, box, True, [1.0, 0.2, 0.5, 0.5], None))
        torch.library.opcheck(operators.channel_backward, (dy, x.detach(), learned.detach(), [True, True], *pool))


@pytest.mark.parametrize(
    "make", [*LEARNING, lambda: dk.LocalResponseNorm(5), lambda: dk.ExponentialNorm(learnable=False)]
)
def test_compiled_for_any_sizes_and_numbers(make):
    """Where compilers take sizes and floats for variables."""
    torch.compiler.reset()
    layer = make()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")
    for shape in ((2, 6, 5, 5), (3, 4, 2, 7)):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), layer(x))


def test_compiled_with_floats_that_change():
    torch.compiler.reset()

    def call(x, alpha, scale):
        return channel_norm(x, Exponential(scale), alpha=alpha)

    compiled, x = torch.compile(call, fullgraph=True, backend="eager"), torch.randn(2, 6, 5)
    for alpha, scale in ((0.1, 2.0), (0.2, 3.0), (0.3, 4.0)):
        torch.testing.assert_close(compiled(x, alpha, scale), call(x, alpha, scale))


@pytest.mark.filterwarnings("ignore")
def test_recorded_for_any_number_of_channels():
    layer, x = dk.LocalResponseNorm(5, 0.5), torch.randn(2, 6, 5, 5)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({1: torch.export.Dim("C", min=2, max=64)},)).module()
    traced = torch.jit.trace(layer, x)
    for channels in (2, 3, 9):
        x = torch.randn(2, channels, 5, 5)
        torch.testing.assert_close(exported(x), layer(x))
        torch.testing.assert_close(traced(x), layer(x))


@pytest.mark.filterwarnings("ignore")
def test_exported_it_is_plain_torch():
    for layer in (dk.LocalResponseNorm(4, 0.5), dk.ExponentialNorm()):
        x = torch.randn(2, 6, 4, 5)
        exported = torch.export.export(layer, (x,))
        assert not any("divnorm" in str(node.target) for node in exported.graph.nodes)
        torch.testing.assert_close(exported.module()(x), layer(x))
        torch.testing.assert_close(torch.jit.trace(layer, x)(x), layer(x))


def test_transforms_of_torch_func():
    x = double(3, 6, 4)

    def call(x):
        return channel_norm(x, 3, alpha=0.5)

    close(torch.func.vmap(lambda row: call(row.unsqueeze(0)).squeeze(0))(x), call(x))
    tangent = double(3, 6, 4)
    y, slope = torch.func.jvp(call, (x,), (tangent,))
    close(y, call(x))
    torch.testing.assert_close(
        slope, (call(x + 1e-5 * tangent) - call(x - 1e-5 * tangent)) / 2e-5, rtol=1e-8, atol=1e-8
    )
    close((slope * y).sum(), (torch.func.vjp(call, x)[1](y)[0] * tangent).sum())


@pytest.mark.parametrize("backend", BACKENDS)
def test_under_autocast_it_computes_in_its_own_dtype(backend):
    x = torch.randn(2, 6, 4)
    expected = channel_norm(x, Exponential(2.0), alpha=3.0, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        y = channel_norm(x, Exponential(2.0), alpha=3.0, backend=backend)
    assert torch.equal(y, expected)


def test_transformations_take_the_reference():
    x = torch.randn(2, 6, 4)
    with pytest.raises(RuntimeError, match=r"^backend: got 'cpu', which neither torch.func nor"):
        torch.func.grad(lambda x: channel_norm(x, 3, backend="cpu").sum())(x)


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        ("x: got shape (3,)", {"x": torch.ones(3)}),
        ("box: got [1, 6]", {"box": [1, 6]}),
        ("box: got [1]", {"box": [1]}),
        ("scalars: got 3", {"scalars": [1.0, 0.1, 0.5]}),
        ("learned: got None where scalars has a NaN", {"learned": None}),
        ("learned: got shape (3,)", {"learned": torch.ones(3)}),
        ("learned: got dtype torch.float64", {"learned": torch.ones(4, dtype=torch.float64)}),
        ("dy: got shape (1, 6, 4)", {"dy": torch.ones(1, 6, 4)}),
        ("dy: got dtype torch.float64", {"dy": torch.ones(2, 6, 4, dtype=torch.float64)}),
        ("needs: got [True]", {"needs": [True]}),
        ("backend: got 'reference', which is no kernel", {"backend": "reference"}),
    ],
)
def test_the_operators_refuse(message, changed):
    given = {
        "dy": torch.ones(2, 6, 4),
        "x": torch.ones(2, 6, 4),
        "learned": torch.ones(4),
        "needs": [True, True],
        "box": [1, 1],
        "squared": False,
        "scalars": [math.nan, 0.1, 0.5, 0.0],
        "backend": None,
    }
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        torch.ops.divnorm_kernels.channel_backward(**given | changed)
    assert str(caught.value).startswith(message)
