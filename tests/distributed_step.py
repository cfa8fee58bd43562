"""Two processes against one on the joined batch: ``python distributed_step.py FOLDER`` runs both and compares.

Run by the tests in a process of its own. The processes meet over gloo, by a file in the folder.
"""

from __future__ import annotations

import copy
import sys

import distributed_tensors
import distributed_weights
import pytest
import torch
import torch.multiprocessing
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from divnorm_kernels import (
    BatchNorm2d,
    DivisiveNorm2d,
    GroupNorm,
    KalmanNorm2d,
    KalmanState,
    convert_sync,
    l1_penalty,
)

WORLD = 2
SIZES = (3, 5)
"""Samples of each process: they differ, so that merging by counts matters."""


def network(batch_norm: bool) -> nn.Module:
    """Every kind of layer: windows, whole fields and, where it is to be synchronized, over the batch."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 8, 3),
        DivisiveNorm2d(8, 3, sigma=0.5, learn_sigma=True, l1_weight=0.1, activation="relu"),
        nn.Conv2d(8, 8, 3),
        BatchNorm2d(8, sigma=0.5, l1_weight=0.1, activation="relu") if batch_norm else GroupNorm(2, 8),
        nn.Conv2d(8, 4, 3),
    ]
    return nn.Sequential(*layers)


def batch(rank: int | None) -> Tensor:
    """A process' samples, or those of all."""
    x = torch.randn(sum(SIZES), 3, 9, 9, generator=torch.Generator().manual_seed(1)) * 2 + 5
    return x if rank is None else x.split(SIZES)[rank]


def step(model: nn.Module, x: Tensor, share: float) -> None:
    """One step of gradient descent on a loss whose mean over the samples counts ``share``."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (model(x).square().mean() * share).backward()
        optimizer.step()


def compare(model: nn.Module, expected: nn.Module) -> None:
    """Parameters and buffers, to the rounding of float32."""
    wanted = expected.state_dict()
    for name, value in model.state_dict().items():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def data_parallel(rank: int, batch_norm: bool) -> None:
    """DDP against one process; the gradients of two are averaged, so each weighs its share of the samples."""
    expected = network(batch_norm)
    step(expected, batch(None), 1.0)
    model = convert_sync(network(batch_norm))
    step(DistributedDataParallel(model), batch(rank), WORLD * SIZES[rank] / sum(SIZES))
    compare(model, expected)


def fully_sharded(rank: int) -> None:
    """FSDP2 against one process."""
    expected = network(True)
    step(expected, batch(None), 1.0)
    model = convert_sync(network(True))
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    step(model, batch(rank), WORLD * SIZES[rank] / sum(SIZES))
    compare(model, expected)


def synchronized(rank: int) -> None:
    """Values, gradients, penalty and running statistics of one layer, in float64 and on numbers far from zero."""
    x = (batch(None).double() + 1e4).requires_grad_()
    dy = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    residual = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    for options in (
        {},
        {"affine": False, "activation": "relu"},
        {"learn_sigma": True, "l1_weight": 0.3},
        {"subtract_mean": False, "learn_sigma": True, "l1_weight": 0.3, "activation": "tlu"},
    ):
        layer = BatchNorm2d(3, sigma=0.7, dtype=torch.float64, **options)
        across = convert_sync(copy.deepcopy(layer))
        (torch.sum(layer(x, residual) * dy) + l1_penalty(layer)).backward()
        own, own_dy = (t.detach().split(SIZES)[rank].requires_grad_() for t in (x, dy))
        added = residual.split(SIZES)[rank]
        y = across(own, added)
        # every process adds the same penalty: of the sum of the losses it is half
        (torch.sum(y * own_dy) + l1_penalty(across) / WORLD).backward()
        torch.testing.assert_close(y, layer(x, residual).split(SIZES)[rank])
        torch.testing.assert_close(own.grad, x.grad.split(SIZES)[rank])
        for p, q in zip(across.parameters(), layer.parameters(), strict=True):
            distributed.all_reduce(p.grad)
            torch.testing.assert_close(p.grad, q.grad)
        assert across.l1 is None or torch.allclose(across.l1, layer.l1)
        across(own)  # the layer has been called twice
        torch.testing.assert_close(across.running_mean, layer.running_mean)
        torch.testing.assert_close(across.running_var, layer.running_var)
        x.grad = None
    with pytest.raises(ValueError, match=r"^p: got 1 in a layer of convert_sync, expected 2"):
        convert_sync(BatchNorm2d(3, p=1))(own.float())


def to_the_last_digit(rank: int) -> None:
    """float64 is float64 throughout: the factor of the unbiased variance, sums and counts."""
    layer = BatchNorm2d(3, sigma=1.0, learn_sigma=True, momentum=1.0, dtype=torch.float64)
    across = convert_sync(copy.deepcopy(layer))
    x = batch(None).double() * 1e-4 + 1
    y, own = layer(x), across(x.split(SIZES)[rank])
    torch.testing.assert_close(own, y.split(SIZES)[rank], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(across.running_mean, layer.running_mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(across.running_var, layer.running_var, rtol=1e-12, atol=0)


def unequal(rank: int) -> None:
    """Processes without values: one of the two, and both; and one value per channel in all."""
    for sigma, learn_sigma in ((0.5, False), (0.5, True), (0.0, False)):
        layer = BatchNorm2d(3, sigma=sigma, learn_sigma=learn_sigma, l1_weight=0.1)
        across = convert_sync(copy.deepcopy(layer))

        x = torch.empty(0, 3, 4, 4, requires_grad=True)
        y = across(x)
        (y.sum() + l1_penalty(across)).backward()
        assert y.shape == x.grad.shape == x.shape
        assert across.l1 == 0
        assert all(p.grad.abs().max() == 0 for p in across.parameters())
        assert torch.equal(across.running_mean, layer.running_mean)
        assert torch.equal(across.running_var, layer.running_var)
        assert across.num_batches_tracked == 1

        with pytest.raises(ValueError, match=r"^x: got 1 value per channel in all processes"):
            across(torch.ones(1 if rank == 0 else 0, 3, 1, 1))
        assert torch.equal(across.running_var, layer.running_var)

        values = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(3)).requires_grad_()
        own = (values if rank == 0 else values[:0]).detach().requires_grad_()
        expected, got = layer(values), across(own)
        torch.testing.assert_close(got, expected if rank == 0 else expected[:0])
        (expected.square().sum() + l1_penalty(layer)).backward()
        (got.square().sum() + l1_penalty(across) / WORLD).backward()
        torch.testing.assert_close(own.grad, values.grad if rank == 0 else values.grad[:0])
        torch.testing.assert_close(across.running_mean, layer.running_mean)
        torch.testing.assert_close(across.running_var, layer.running_var)


def kalman(rank: int) -> None:
    """Moments of both processes' batches meet the prior."""
    layer = KalmanNorm2d(3, dtype=torch.float64)
    across = convert_sync(copy.deepcopy(layer))
    x = batch(None).double().requires_grad_()
    own = x.detach().split(SIZES)[rank].requires_grad_()
    prior = KalmanState(torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    (y, state), (own_y, own_state) = layer(x, prior), across(own, prior)
    torch.testing.assert_close(own_y, y.split(SIZES)[rank])
    torch.testing.assert_close(own_state, state)
    (y.square().sum() + state.mean.sum()).backward()
    (own_y.square().sum() + own_state.mean.sum() / WORLD).backward()
    torch.testing.assert_close(own.grad, x.grad.split(SIZES)[rank])


def main(rank: int, folder: str) -> None:
    """All comparisons, in one process of the two."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    synchronized(rank)
    to_the_last_digit(rank)
    unequal(rank)
    kalman(rank)
    for batch_norm in (False, True):
        data_parallel(rank, batch_norm)
    fully_sharded(rank)
    distributed_tensors.compare_all(rank, WORLD)
    distributed_weights.compare_all(WORLD)
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(main, (sys.argv[1],), WORLD)
    print("equal")
