"""What float32 can represent is represented: no intermediate number overflows or vanishes before the result does."""

import pytest
import torch
from oracle import Call, evaluate

from divnorm_kernels import divisive_norm
from divnorm_kernels.reference import divisive_norm as reference

FORMATS = [torch.contiguous_format, torch.channels_last]


def cpu(*args, **kwargs):
    return divisive_norm(*args, backend="cpu", **kwargs)


FUNCTIONS = [cpu]

CASES = {
    "windows": ((3, 10, 9, 7), {"window": 3, "norm_window": (4, 2)}),
    "ReLU": ((3, 10, 9, 7), {"window": 5, "activation": "relu"}),
    "zero edges": ((2, 6, 5, 8), {"window": 3, "groups": 2, "edges": "zero"}),
    "no mean": ((2, 6, 5, 8), {"window": None, "norm_window": 3}),
    "over the batch": ((3, 6, 5, 8), {"window": 3, "over_batch": True}),
    "whole": ((3, 10, 9, 7), {"window": "all"}),
    "whole, ReLU": ((3, 10, 9, 7), {"window": "all", "groups": 5, "activation": "relu"}),
    "whole, no mean": ((3, 10, 9, 7), {"window": None, "norm_window": "all"}),
    "whole, over the batch": ((3, 10, 9, 7), {"window": "all", "groups": 10, "over_batch": True}),
    "one position": ((3, 40, 1, 1), {"window": "all"}),
    "features": ((5, 70), {"window": 9, "norm_window": 6}),
    "whole features": ((5, 70), {"window": "all"}),
}


def laid_out(t, memory_format):
    return t.contiguous(memory_format=memory_format) if t.dim() == 4 else t


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("dtype", "exponent"), [(torch.float32, 50), (torch.bfloat16, 50), (torch.float64, 400)])
@pytest.mark.parametrize("name", CASES)
def test_a_power_of_two_changes_no_bits(name, dtype, exponent, memory_format, function):
    """With k x and k sigma y is what it was, and gradients are those of x over k: exactly, for k a power of two."""
    shape, options = CASES[name]
    x, dy = (laid_out(torch.randn(shape), memory_format).to(dtype) for _ in range(2))
    parameters = [torch.randn(shape[1], dtype=torch.promote_types(dtype, torch.float32)) for _ in range(2)]
    sigma = torch.rand(options.get("groups", 1), dtype=parameters[0].dtype) + 0.5
    plain = evaluate(function, Call(x, *parameters, sigma, dy, 3.0, options))
    for k in (2.0**-exponent, 2.0**exponent):
        scaled = evaluate(function, Call(x * k, *parameters, sigma * k, dy, 3.0 / k, options))
        for name, power in (("y", 0), ("l1", 1), ("dx", -1), ("dweight", 0), ("dbias", 0), ("dsigma", -1)):
            assert torch.equal(scaled[name], plain[name] * k**power), name


@pytest.mark.parametrize("function", [*FUNCTIONS, reference])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("sigma", [1e-13, 1e-19, 1e-22, 1e-30, 1e-37])
@pytest.mark.parametrize("name", CASES)
def test_a_sigma_whose_square_vanishes_still_counts(name, sigma, memory_format, function):
    """Over zeros s is sigma, of which float32 cannot hold the square under 1e-23 at all and under 1e-19 exactly."""
    shape, options = CASES[name]
    x, dy = (laid_out(t, memory_format) for t in (torch.zeros(shape), torch.rand(shape) - 0.5))
    call = Call(x, None, torch.ones(shape[1]), torch.tensor(sigma), dy, 0.0, options)
    want, got = evaluate(reference, call.in_double()), evaluate(function, call)
    assert torch.equal(got["y"], torch.ones(shape))
    assert (got["dx"].double() - want["dx"]).abs().max() < 1e-5 / sigma
    assert got["dsigma"] == 0


@pytest.mark.parametrize("function", [*FUNCTIONS, reference])
@pytest.mark.parametrize("sigma", [1e-13, 1e-30])
def test_the_gradient_at_zero_with_a_small_sigma(sigma, function):
    x, dy = torch.zeros(1, 1, 3), torch.tensor([[[1.0, 0, 0]]])
    dx = evaluate(function, Call(x, None, None, sigma, dy, 0.0, {"window": 3}))["dx"]
    assert torch.allclose(dx, torch.tensor([0.5 / sigma, -0.5 / sigma, 0]), rtol=1e-6)


def test_the_gradient_to_differentiate_is_the_kernels():
    x = torch.zeros(1, 1, 3, requires_grad=True)
    y = divisive_norm(x, window=3, sigma=1e-30, backend="cpu")
    (dx,) = torch.autograd.grad(y, x, torch.tensor([[[1.0, 0, 0]]]), create_graph=True)
    assert torch.allclose(dx, torch.tensor([5e29, -5e29, 0]), rtol=1e-6)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("channels", [1, 12])
def test_deviations_whose_squares_are_nearly_lost(channels, memory_format, function):
    """Of squares around 1e-39 float32 keeps some 20 bits; smaller ones are the limit of the definition itself."""
    x = torch.tensor([0, 4e-20, 0]).expand(1, channels, 1, 3).contiguous(memory_format=memory_format)
    y = function(x, window=(1, 3), sigma=0.0)
    expected = reference(x.double(), window=(1, 3), sigma=0.0)
    assert torch.allclose(y.double(), expected, rtol=1e-5, atol=0)
