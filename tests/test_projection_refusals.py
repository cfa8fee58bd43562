"""What projections of weights refuse."""

import math

import pytest
import torch
from torch import nn

from divnorm_kernels.weights import normalize, project

BARE = nn.Linear(2, 2)
OPTIMIZER = torch.optim.SGD(BARE.parameters(), lr=0.1)
ZERO = nn.Linear(2, 2)
nn.init.zeros_(ZERO.weight)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((BARE, BARE), {}, "optimizer: got Linear, expected a torch.optim.Optimizer"),
        ((OPTIMIZER, [BARE]), {}, "model: got list, expected a torch.nn.Module"),
        ((OPTIMIZER, BARE, "final"), {}, "to: got 'final' of type str, expected a positive number or \"initial\""),
        ((OPTIMIZER, BARE, 0.0), {}, 'to: got 0.0, expected a positive number or "initial"'),
        ((OPTIMIZER, BARE, math.inf), {}, 'to: got inf, expected a positive number or "initial"'),
        ((OPTIMIZER, BARE), {"every": 0}, "every: got 0, expected a positive int"),
        ((OPTIMIZER, BARE), {"dim": 0.5}, "dim: got 0.5 of type float, expected an int or None"),
        ((OPTIMIZER, BARE), {"dim": 2}, "dim: got 2, expected None or 0 to 1 for weight"),
        ((OPTIMIZER, BARE), {"affine": "both"}, "affine: got 'both' of type str, expected a number from 0 to 1"),
        ((OPTIMIZER, BARE), {"affine": 1.5}, "affine: got 1.5, expected a number from 0 to 1"),
        ((OPTIMIZER, BARE), {"affine": "joint"}, "affine: got 'joint' for a model without normalization layers"),
        ((OPTIMIZER, BARE), {"skip": 3}, "skip: got int, expected names and modules"),
        ((OPTIMIZER, BARE), {"skip": [3]}, "skip: got an entry of type int, expected a name or a module"),
        ((OPTIMIZER, BARE), {"skip": "head"}, "skip: got 'head', expected names and modules of the model"),
        ((OPTIMIZER, BARE), {"skip": ZERO}, "skip: got a Linear, expected names and modules of the model"),
        ((OPTIMIZER, BARE), {"skip": "weight"}, "optimizer: got one that has no weight of the model but those to skip"),
        ((OPTIMIZER, ZERO), {}, "optimizer: got one that has no weight of the model but those to skip"),
        (
            (torch.optim.SGD(ZERO.parameters(), lr=0.1), ZERO),
            {},
            "to: got 'initial' for weight, which is zero and has no direction; skip it",
        ),
    ],
)
def test_bad_arguments(arguments, options, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        project(*arguments, **options)
    assert not OPTIMIZER._optimizer_step_post_hooks
    assert not list(BARE.buffers())


def test_norms_kept_for_another_dim():
    model = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    project(optimizer, model)
    message = r"^dim: got 0, shape \(3, 1\) for weight, expected that of the norms kept, \(\)"
    with pytest.raises(ValueError, match=message):
        project(torch.optim.SGD(model.parameters(), lr=0.1), model, dim=0)


def test_one_projection_a_weight():
    """Two would count in one place, and the end of one would take the norms of the other."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    projection = project(optimizer, model, skip="0")
    with pytest.raises(ValueError, match=r"^optimizer: got one that projects 1.weight already, expected `remove\(\)`"):
        project(optimizer, model, every=2)
    assert len(optimizer._optimizer_step_post_hooks) == 1
    project(optimizer, model, skip="1")
    projection.remove()
    project(optimizer, model, 1.0, skip="0").apply()
    torch.testing.assert_close(model[1].weight.norm().item(), 1.0)


def test_a_weight_that_is_parametrized_later():
    model = nn.Linear(2, 2)
    projection = project(torch.optim.SGD(model.parameters(), lr=0.1), model)
    normalize(model, "ws")
    with pytest.raises(RuntimeError, match=r"^weight: is projected, but no parameter any more; parametrize"):
        projection.apply()
