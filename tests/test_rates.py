"""Effective learning rates: their values, and that equal ones turn weights alike."""

import numpy as np
import pytest
import torch
from projected import Operations, network, norm
from torch import nn

from divnorm_kernels.weights import effective_rates, normalize


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)])
@pytest.mark.parametrize(("kind", "power"), [(torch.optim.SGD, 2), (torch.optim.AdamW, 1), (torch.optim.RMSprop, 1)])
def test_effective_rates(kind, power, rate):
    model = network(dtype=torch.float64)
    normalize(model[7], "wn")
    groups = [{"params": model[:4].parameters()}, {"params": model[4:8].parameters(), "lr": 0.5}]
    optimizer = kind(groups, lr=rate)
    with Operations():
        rates = effective_rates(model, optimizer)
    names = ["0.weight", "4.weight", "7.parametrizations.weight.original1"]
    assert list(rates) == names
    for name, lr in zip(names, (0.1, 0.5, 0.5), strict=True):
        wanted = lr / norm(model.get_parameter(name).detach().numpy()) ** power
        np.testing.assert_allclose(rates[name].numpy(), wanted, rtol=1e-7 if isinstance(rate, torch.Tensor) else 1e-10)


@pytest.mark.parametrize(
    ("kind", "options", "power"),
    [
        (torch.optim.SGD, {}, 2),
        (torch.optim.Adam, {"eps": 0.0}, 1),
        (torch.optim.RMSprop, {"eps": 0.0}, 1),
        (torch.optim.Adamax, {"eps": 0.0}, 1),
        (torch.optim.NAdam, {"eps": 0.0}, 1),
    ],
)
def test_equal_effective_rates_turn_alike(kind, options, power):
    """Of a weight whose scale changes nothing, three times as large with the learning rate that makes up for it."""
    v, dy = (torch.randn(6, dtype=torch.float64) for _ in range(2))
    directions = []
    for scale in (1.0, 3.0):
        model = nn.Linear(6, 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            model.weight.copy_(v * scale)
        optimizer = kind(model.parameters(), lr=0.05 * scale**power, **options)
        rate = effective_rates(model, optimizer)["weight"]
        torch.testing.assert_close(rate, 0.05 / v.norm() ** power)
        for _ in range(4):
            optimizer.zero_grad()
            (model.weight / model.weight.norm() * dy).sum().backward()
            optimizer.step()
        directions.append(model.weight.detach() / model.weight.detach().norm())
    torch.testing.assert_close(*directions, rtol=1e-10, atol=1e-10)
    assert (directions[0] - v / v.norm()).abs().max() > 0.01


BARE = nn.Linear(2, 2)
OPTIMIZER = torch.optim.SGD(BARE.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([BARE], OPTIMIZER), "model: got list, expected a torch.nn.Module"),
        ((BARE, 0.1), "optimizer: got float, expected a torch.optim.Optimizer"),
        ((BARE, OPTIMIZER, 3), "power: got 3, expected 1 or 2"),
        ((BARE, torch.optim.LBFGS(BARE.parameters())), "power: got None for LBFGS, expected 1 or 2"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        effective_rates(*arguments)
