"""Autograd over the kernels: gradcheck, double backward, what is saved, and DivisiveNormFunction itself."""

import numpy
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from divnorm_kernels import DivisiveNormFunction, divisive_norm
from divnorm_kernels.backends import select
from divnorm_kernels.fields import geometry
from divnorm_kernels.norm import Norm

CASES = [
    ((2, 4, 4, 5), {"window": 3}),
    ((2, 4, 4, 5), {"window": (2, "all"), "norm_window": 4, "groups": 2, "edges": "zero"}),
    ((3, 4, 6), {"window": 3, "norm_window": None}),
    ((2, 2, 3, 3, 3), {"window": None, "norm_window": 2}),
    ((3, 9), {"window": 4, "norm_window": 3}),
    ((3, 4, 3, 3), {"window": 3, "over_batch": True, "groups": 4}),
]


def inputs_for(shape, groups):
    shapes = (shape, shape[1], shape[1])
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    return [*tensors, (torch.rand(groups, dtype=torch.float64) + 0.5).requires_grad_()]


@pytest.mark.parametrize(("shape", "options"), CASES, ids=str)
def test_first_and_second_derivatives(shape, options):
    def call(x, weight, bias, sigma):
        return divisive_norm(x, weight, bias, sigma=sigma, return_l1=True, backend="cpu", **options)

    inputs = inputs_for(shape, options.get("groups", 1))
    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs)


def test_channels_last_derivatives():
    x = torch.randn(2, 4, 4, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    assert gradcheck(lambda x: divisive_norm(x, window=3, backend="cpu", return_l1=True), (x,))


def test_function_is_what_the_call_runs():
    x, weight, bias, sigma = inputs_for((2, 4, 5, 5), 1)
    g = geometry(Norm(3), tuple(x.shape))
    y, l1, _ = DivisiveNormFunction.apply(x, weight, bias, sigma, None, None, g, select("cpu", g, x), True)
    expected = divisive_norm(x, weight, bias, window=3, sigma=sigma, return_l1=True)
    assert torch.equal(y, expected[0])
    assert torch.equal(l1, expected[1])
    assert y.grad_fn.name() == "DivisiveNormFunctionBackward"
    assert expected[0].grad_fn.name() == "PreparedFunctionBackward"


DEPENDENT = {
    "residual": lambda h: {"residual": h * 1.5, "activation": "silu"},
    "residual, itself": lambda h: {"residual": h, "activation": "relu"},
    "weight": lambda h: {"weight": h.mean((0, 2, 3))},
    "bias": lambda h: {"bias": h.mean((0, 2, 3)), "activation": "gelu"},
    "sigma": lambda h: {"sigma": h.square().mean()},
    "threshold": lambda h: {"threshold": h.mean((0, 2, 3)), "activation": "tlu"},
}


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
@pytest.mark.parametrize("name", DEPENDENT)
def test_inputs_that_come_from_one_another(name, backend):
    """The gradient that can be differentiated is the plain one; gradgradcheck alone would not see another."""
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64, requires_grad=True)
    h = x * 1.25
    loss = divisive_norm(h, window=3, backend=backend, **DEPENDENT[name](h)).square().sum()
    (plain,) = torch.autograd.grad(loss, x, retain_graph=True)
    (again,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.testing.assert_close(again, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_saves_x_two_maps_and_the_parameters_it_reads(activation):
    """The bias decides where a ReLU passes, and nothing else."""
    saved = []
    x, weight, bias, sigma = inputs_for((2, 6, 5, 7), 2)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        divisive_norm(x, weight, bias, window=3, sigma=sigma, groups=2, activation=activation)
    read = [(6,), (6,)] if activation else [(6,)]
    assert [t.shape for t in saved] == [x.shape, *read, (2,), (2, 2, 2, 5, 7)]
    assert saved[0].data_ptr() == x.data_ptr(), "x is saved as it is, not copied"


def test_penalty_alone_and_output_alone():
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    for pick in (lambda y, l1: y.square().sum(), lambda y, l1: l1):
        native = torch.autograd.grad(pick(*divisive_norm(x, window=3, return_l1=True)), x)
        slow = torch.autograd.grad(pick(*divisive_norm(x, window=3, return_l1=True, backend="reference")), x)
        torch.testing.assert_close(native, slow, rtol=1e-12, atol=1e-14)


def test_second_derivatives_with_a_number_of_numpys():
    """A float to ``isinstance``, of a type of its own."""

    def second(sigma):
        x = torch.tensor([[[0.3, -1.0, 2.0, 0.5, 1.0]]], requires_grad=True)
        y = divisive_norm(x, window=3, sigma=sigma)
        (dx,) = torch.autograd.grad((y * torch.arange(5.0)).sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    assert torch.equal(second(numpy.float64(1.0)), second(1.0))


def test_gradient_penalty_trains():
    """The use of double backward: the norm of an input gradient as a loss."""
    x, weight, bias, _ = inputs_for((2, 4, 6, 6), 1)
    results = []
    for backend in ("cpu", "reference"):
        y = divisive_norm(x, weight, bias, window=3, backend=backend)
        (dx,) = torch.autograd.grad(y.tanh().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), (x, weight, bias)))
    for native, slow in zip(*results, strict=True):
        torch.testing.assert_close(native, slow, rtol=1e-10, atol=1e-12)


def test_in_place_change_of_a_saved_input_is_noticed():
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    inner = x * 1
    y = divisive_norm(inner, window=3)
    inner.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_in_place_change_of_the_bias_counts_where_it_is_read(mixed, create_graph):
    x = torch.randn(2, 4, 5, 5).bfloat16() if mixed else torch.randn(2, 4, 5, 5)
    weight = torch.randn(4, dtype=x.dtype, requires_grad=True)
    for activation in (None, "relu"):
        bias = torch.randn(4, requires_grad=True)
        y = divisive_norm(x, weight, bias, window=3, activation=activation)
        with torch.no_grad():
            bias.add_(1)
        if activation is not None:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(y.float().sum(), bias)
            continue
        (dbias,) = torch.autograd.grad(y.float().sum(), bias, create_graph=create_graph)
        torch.testing.assert_close(dbias, torch.full((4,), 50.0))
        assert dbias.dtype == bias.dtype
