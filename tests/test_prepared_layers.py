"""Layers by prepared calls: one node whatever the shape of x, and options and parameters that may change."""

import copy
import pickle

import pytest
import torch

import divnorm_kernels as dk
from divnorm_kernels import divisive_norm

SHAPE = (2, 4, 5, 6)
FAST = "PreparedFunctionBackward"
X = torch.randn(SHAPE)
LAYERS = {
    "DivisiveNorm2d": (lambda: dk.DivisiveNorm2d(4, 3), SHAPE),
    "DivisiveNormFeatures": (lambda: dk.DivisiveNormFeatures(6, 3), (2, 5, 6)),
    "LayerNorm": (lambda: dk.LayerNorm((5, 6)), SHAPE),
    "RMSNorm": (lambda: dk.RMSNorm(6), SHAPE),
    "GroupNorm": (lambda: dk.GroupNorm(2, 4), SHAPE),
    "GroupNorm, no positions": (lambda: dk.GroupNorm(2, 4), (3, 4)),
    "a learned sigma": (lambda: dk.DivisiveNorm2d(4, 3, groups=2, learn_sigma=True), SHAPE),
    "a penalty": (lambda: dk.DivisiveNorm2d(4, 3, l1_weight=0.5), SHAPE),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_one_node(name):
    """Also where their x has other shapes than the operator's: no view stands before or behind."""
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.grad_fn.name() == FAST
    reached = {type(node).__name__ for node, _ in y.grad_fn.next_functions if node is not None}
    assert reached == {"AccumulateGrad"}
    dy, inputs = torch.randn(shape), [x, *layer.parameters()]
    found = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    layer.backend = "reference"
    expected = torch.autograd.grad(layer(x), inputs, dy, create_graph=True)
    for f, e, p in zip(found, expected, inputs, strict=True):
        assert f.shape == p.shape
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)
    again = torch.autograd.grad(y, inputs, dy, create_graph=True)  # by the reference, in the layer's shapes
    for f, e in zip(again, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)
        assert f.shape == e.shape


def test_a_subclass_with_a_weight_of_its_own_making():
    class Centred(dk.DivisiveNorm2d):
        """Its parameter is what weight has beyond one."""

        @property
        def weight(self):
            return self._parameters["weight"] + 1

    layer = dk.DivisiveNorm2d(4, 3)
    layer.__class__ = Centred
    assert torch.equal(layer(X), divisive_norm(X, torch.full((4,), 2.0), torch.zeros(4), window=3))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_of_a_layer(copied):
    layer = dk.DivisiveNorm2d(4, 3)
    layer(X)
    assert torch.equal(copied(layer)(X), layer(X))


def test_options_of_a_layer_may_change():
    layer = dk.DivisiveNorm2d(4, 3, bias=False)
    for name, value in (
        ("window", 5), ("norm_window", 3), ("groups", 2), ("edges", "zero"), ("activation", "relu"), ("sigma", 0.25),
        ("eps", 0.5), ("backend", "reference"), ("backend", "cpu"),
    ):  # fmt: skip
        layer(X)
        setattr(layer, name, value)
        sigma = layer.sigma
        options = {o: getattr(layer, o) for o in ("window", "norm_window", "groups", "edges", "activation")}
        expected = dk.reference.divisive_norm(X, layer.weight, sigma=sigma, **options)
        torch.testing.assert_close(layer(X), expected, msg=name)
    with pytest.raises(ValueError, match="window: got 0, expected a positive int"):
        layer.window = 0
    with pytest.raises(ValueError, match="backend: got 'quick'"):
        layer.backend = "quick"
    layer.num_channels, layer.weight = 2, torch.nn.Parameter(torch.ones(2))
    assert layer(X[:, :2]).shape == (2, 2, 5, 6)
    with pytest.raises(ValueError, match="x: got 4 channels, expected num_channels, 2"):
        layer(X)


@pytest.mark.parametrize("row", [(1, 6), (2, 3), (6,)])
def test_rows_that_look_like_the_operators(row):
    """Parameters have the row's shape, in first and second derivatives."""
    layer = dk.LayerNorm(row)
    x = torch.randn(1, *row[1:] if row == (1, 6) else row, requires_grad=True)
    inputs = [x, layer.weight, layer.bias]
    found = torch.autograd.grad(layer(x), inputs, torch.ones_like(x), create_graph=True)
    expected = torch.autograd.grad(torch.nn.functional.layer_norm(x, row, *inputs[1:]), inputs, torch.ones_like(x))
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)


def test_parameters_of_another_shape():
    layer, x = dk.LayerNorm((2, 3)), torch.randn(4, 2, 3, requires_grad=True)
    layer.bias = torch.nn.Parameter(torch.zeros(6))  # as many numbers
    layer(x).square().sum().backward()
    assert layer.bias.grad.shape == (6,)
    layer, x = dk.LayerNorm(8), torch.randn(4, 16)
    layer.weight = torch.nn.Parameter(torch.ones(2, 4))
    for rows in (x[:, :8].contiguous(), x[:, ::2]):
        with pytest.raises(ValueError, match=r"weight: got shape \(2, 4\), expected \(8,\)"):
            layer(rows)


def test_no_sigma():
    """Is RMSNorm's alone, and is the smallest that torch's layer takes."""
    layer, theirs, x = dk.RMSNorm(7, eps=0.1), torch.nn.RMSNorm(7, eps=0.1), torch.randn(4, 7) * 1e-4
    layer.eps = theirs.eps = None
    torch.testing.assert_close(layer(x), theirs(x))
    layer = dk.DivisiveNorm2d(4, 3)
    layer.sigma = None
    with pytest.raises(TypeError, match="sigma: got None of type NoneType, expected a float or a Tensor"):
        layer(X)


def test_a_shape_given_as_a_list():
    layer = dk.LayerNorm(8)
    layer.normalized_shape, layer.weight, layer.bias = [4], torch.nn.Parameter(torch.ones(4)), None
    torch.testing.assert_close(layer(torch.ones(2, 4)), torch.zeros(2, 4))


def test_recorders_see_nothing_but_the_layer():
    graph = torch.fx.symbolic_trace(torch.nn.Sequential(dk.RMSNorm(4))).graph
    assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "output"]
