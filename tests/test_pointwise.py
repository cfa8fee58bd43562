"""What stands in a norm's place without statistics: formulas, gradients by differences, and a standardized ReLU."""

import math

import numpy as np
import pytest
import torch

import divnorm_kernels as dk

erf = np.vectorize(math.erf)
TOKENS, IMAGES = ((3, 5, 4), -1, (4,)), ((3, 4, 2, 5), 1, (4, 1, 1))


def randomized(layer):
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    return layer


def by_numpy(layer, x, form):
    x = x.detach().numpy()
    weight, bias = (t.detach().numpy().reshape(form) for t in (layer.weight, layer.bias))
    if isinstance(layer, dk.DyT):
        return np.tanh(layer.alpha.item() * x) * weight + bias
    return erf(layer.alpha.item() * x + layer.shift.item()) * weight + bias


@pytest.mark.parametrize(("shape", "dim", "form"), [TOKENS, IMAGES], ids=["tokens", "images"])
@pytest.mark.parametrize("kind", [dk.DyT, dk.Derf])
def test_formula_and_gradients(kind, shape, dim, form):
    layer = randomized(kind(4, dim=dim, dtype=torch.float64))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    np.testing.assert_allclose(layer(x).detach(), by_numpy(layer, x, form), rtol=1e-10, atol=1e-10)
    names = [name for name, _ in layer.named_parameters()]

    def call(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    inputs = (x, *layer.parameters())
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("kind", [dk.DyT, dk.Derf])
def test_where_they_start(kind):
    layer, x = kind(4), torch.randn(2, 4)
    expected = {"alpha": [0.5], "weight": [1.0] * 4, "bias": [0.0] * 4} | ({"shift": [0.0]} if kind is dk.Derf else {})
    assert {name: p.tolist() for name, p in layer.named_parameters()} == expected
    torch.testing.assert_close(layer(x), (torch.tanh if kind is dk.DyT else torch.erf)(x / 2))
    assert kind(4, alpha=0.25).alpha.item() == 0.25


def test_bad_input():
    for make, words in (
        (lambda: dk.DyT("4"), "num_channels: got '4' of type str, expected a positive int"),
        (lambda: dk.DyT(4, alpha=None), "alpha: got None of type NoneType, expected a float"),
        (lambda: dk.Derf(4, dim=1.0), "dim: got 1.0 of type float, expected an int"),
        (lambda: dk.Derf(4)(torch.ones(2, 3)), r"x: got shape \(2, 3\), expected 4 channels in dimension -1"),
        (lambda: dk.DyT(4, dim=1)(torch.ones(4)), r"x: got shape \(4,\), expected 4 channels in dimension 1"),
        (lambda: dk.DyT(4)([1.0]), "x: got list, expected a Tensor"),
        (lambda: dk.StandardizedReLU()(torch.ones(4).int()), "x: got dtype torch.int32"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{words}"):
            make()


def test_isru_is_the_operator():
    """DyISRU: a group for each channel, a window of one position, and sigma the root of beta."""
    x, beta = torch.randn(3, 4, 5, dtype=torch.float64), 0.7
    layer = dk.DivisiveNorm1d(4, None, 1, groups=4, sigma=beta**0.5, learn_sigma=True, dtype=torch.float64)
    torch.nn.init.normal_(layer.weight)
    expected = x.numpy() / np.sqrt(beta + x.numpy() ** 2) * layer.weight.detach().numpy()[:, None]
    np.testing.assert_allclose(layer(x).detach(), expected, rtol=1e-10, atol=1e-10)


def test_the_standardized_relu_keeps_the_moments_of_normal_numbers():
    """By Gauss's quadrature on either side of the kink."""
    nodes, weights = np.polynomial.legendre.leggauss(100)
    z = torch.from_numpy(np.concatenate([6 * nodes - 6, 6 * nodes + 6]))
    density = torch.from_numpy(np.tile(6 * weights, 2)) * torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    y = dk.StandardizedReLU()(z)
    assert (density * y).sum().item() == pytest.approx(0, abs=1e-10)
    assert (density * y.square()).sum().item() == pytest.approx(1, abs=1e-10)
    expected = math.sqrt(2 * math.pi / (math.pi - 1)) * (np.maximum(z.numpy(), 0) - 1 / math.sqrt(2 * math.pi))
    np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-10)
