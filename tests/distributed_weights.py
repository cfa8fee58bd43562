"""Projected and parametrized weights under FSDP2 against one process; `distributed_step` runs `compare_all`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

from divnorm_kernels import LayerNorm
from divnorm_kernels.weights import effective_rates, fold, normalize, project


def network(prepare: Callable[[nn.Module], Any] = lambda layer: layer) -> nn.Sequential:
    """Rows that two processes share unequally, one alone at the end; the same in every process."""
    torch.manual_seed(0)
    layers = [
        nn.Linear(6, 5),
        LayerNorm(5),
        nn.ReLU(),
        nn.Linear(5, 7),
        nn.RMSNorm(7),
        nn.Linear(7, 3),
        nn.Linear(3, 1),
    ]
    for layer in layers:
        if isinstance(layer, nn.Linear):
            prepare(layer)
    return nn.Sequential(*layers)


def sharded(model: nn.Sequential, world: int) -> nn.Sequential:
    """A copy, of which each process holds a part."""
    model = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (world,))
    for layer in (*(layer for layer in model[:-1] if list(layer.parameters())), model):  # the last one is the root's
        fully_shard(layer, mesh=mesh)
    return model


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Steps whose gradient is the same in every process, and so their average."""
    for seed in steps:
        generator = torch.Generator().manual_seed(seed)
        x, dy = torch.randn(4, 6, generator=generator), torch.randn(4, 1, generator=generator)
        optimizer.zero_grad()
        (model(x) * dy).sum().backward()
        optimizer.step()


def compare(model: nn.Module, expected: nn.Module) -> None:
    """Everything in the state, to the rounding of float32 in a few steps."""
    state, wanted = model.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    for name, value in state.items():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def projected(world: int, **options: Any) -> None:
    """Steps, effective rates, and a run that goes on from what was saved."""

    def start(seed: int) -> tuple[nn.Sequential, torch.optim.Optimizer, Any]:
        whole = network()
        with torch.no_grad():
            whole[0].weight.mul_(1 + seed)
        model = sharded(whole, world)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, optimizer, project(optimizer, model, skip="5", **options)

    expected = network()
    plain = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
    once = project(plain, expected, skip="5", **options)
    model, optimizer, projection = start(0)
    for each in ((expected, plain), (model, optimizer)):
        run(*each, range(3))
    compare(model, expected)
    with torch.no_grad():
        model(torch.ones(2, 6))  # which leaves the root's own parameters gathered
    rates = effective_rates(model, optimizer)
    assert list(rates) == list(effective_rates(expected, plain))
    for name, rate in effective_rates(expected, plain).items():
        torch.testing.assert_close(rates[name], rate)
    once.apply()
    with torch.no_grad():
        model(torch.ones(2, 6))
    with CommDebugMode() as communication:
        projection.apply()
    if options.get("dim") is None:
        assert communication.get_total_counts() == (2 if options.get("affine") == "joint" else 1)
    resumed, other, _ = start(1)
    resumed.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for each in ((expected, plain), (resumed, other)):
        run(*each, range(3, 6))
    compare(resumed, expected)


def parametrized(world: int, kind: str, **options: Any) -> None:
    """Steps of weights that are computed from what is sharded."""
    expected = network(lambda layer: normalize(layer, kind, **options))
    model = sharded(expected, world)
    for each in (expected, model):
        run(each, torch.optim.SGD(each.parameters(), lr=0.1), range(3))
    compare(model, expected)


def folded(world: int) -> None:
    """What is sharded cannot be folded, and says so before anything is."""
    for kind in ("ws", "wn"):
        model = sharded(network(lambda layer, kind=kind: normalize(layer, kind)), world)
        before = list(model.state_dict())
        with pytest.raises(ValueError, match=r"^model: got DTensors in 0, expected plain ones; fold before"):
            fold(model)
        assert list(model.state_dict()) == before


def compare_all(world: int) -> None:
    """All of the above, in one process of ``world``."""
    projected(world)
    projected(world, affine="joint", every=2)
    projected(world, affine=0.1, to=2.0)
    for dim in (0, 1):
        projected(world, dim=dim)
    for kind, options in (("wn", {}), ("bwn", {}), ("bwn", {"shared": True}), ("ws", {}), ("sws", {})):
        parametrized(world, kind, **options)
    folded(world)
