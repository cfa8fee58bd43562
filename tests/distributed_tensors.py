"""DTensors against plain tensors in one process: the function, every layer, and torch's SequenceParallel.

`distributed_step` runs `compare_all` in each of its two processes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_citizens import LAYERS
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

from divnorm_kernels import (
    GDN,
    BatchNorm2d,
    DivisiveNorm2d,
    DivisiveNormFeatures,
    ExponentialNorm,
    InstanceNorm2d,
    LayerNorm,
    LocalResponseNorm,
    RMSNorm,
    convert_sync,
    divisive_norm,
    l1_penalty,
)

ROWS = {
    "LayerNorm": lambda **options: LayerNorm(6, **options),
    "RMSNorm": lambda **options: RMSNorm(6, sigma=0.7, **options),
    "DivisiveNormFeatures": lambda **options: DivisiveNormFeatures(6, 3, **options),
}
OPTIONS: tuple[dict[str, Any], ...] = ({}, {"learn_sigma": True, "l1_weight": 0.3, "activation": "relu"})


def whole(t: Tensor) -> Tensor:
    """The plain tensor."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(whole(found), whole(expected), rtol=1e-4, atol=1e-5)


def made(make: Callable[..., nn.Module], **options: Any) -> nn.Module:
    """A layer with parameters off their initial values, the same in every process."""
    torch.manual_seed(0)
    layer = make(**options)
    for p in layer.parameters():
        p.data.add_(torch.rand_like(p) * 0.5)
    return layer


def compare(layer: nn.Module, across: nn.Module, x: Tensor, cut: DTensor) -> dict[Any, int]:
    """Values, gradients, penalty and buffers of ``across`` on ``cut`` against ``layer`` on ``x``.

    Returns what forward communicated.
    """
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    own, cut = x.clone().requires_grad_(), cut.detach().requires_grad_()
    with CommDebugMode() as communication:
        found = across(cut)
    expected = layer(own)
    close(found, expected)
    whole_dy = distribute_tensor(dy, cut.device_mesh, [Replicate()] * cut.device_mesh.ndim)
    penalty = () if layer.l1 is None else (l1_penalty(across),)
    sum(penalty, (found * whole_dy).sum()).backward()
    ((expected * dy).sum() + l1_penalty(layer)).backward()
    close(cut.grad, own.grad)
    for p, q in zip(across.parameters(), layer.parameters(), strict=True):
        close(p.grad, q.grad)
        assert all(place.is_replicate() for place in p.grad.placements), "a gradient that is still to be added up"
    for p, q in zip(across.buffers(), layer.buffers(), strict=True):
        close(p, q)
    return communication.get_comm_counts()


def distributed(t: Tensor, mesh: DeviceMesh, *placements: Any) -> DTensor:
    """``t`` as it is placed; of a pending sum each process has a share."""
    if placements == (Partial(),):
        return DTensor.from_local(t / mesh.size(), mesh, placements)
    return distribute_tensor(t, mesh, placements)


def function(mesh: DeviceMesh) -> None:
    """The function and two derivatives, cut along the batch where x is and no statistics go over it."""
    generator = torch.Generator().manual_seed(4)
    tensors = [torch.randn(shape, generator=generator) for shape in ((3, 4, 5, 6), (4,), (4,), ())]
    forms = (
        {"window": 3},
        {"window": "all", "activation": "relu"},
        {"window": 3, "return_l1": True},
        {"window": 3, "return_l1": True, "backend": "reference"},
        {"window": "all", "groups": 4, "over_batch": True},
    )
    for placement in (Replicate(), Shard(0), Shard(2), Partial()):
        for options in forms:
            outcomes = []
            for cut in (False, True):
                leaves = [t.clone() for t in tensors]
                if cut:
                    places = (placement, *[Replicate()] * 3)
                    leaves = [distributed(t, mesh, p) for t, p in zip(tensors, places, strict=True)]
                x, weight, bias, sigma = leaves = [t.requires_grad_() for t in leaves]
                out = divisive_norm(x, weight, bias, sigma=sigma, **options)
                y, l1 = out if isinstance(out, tuple) else (out, 0.0)
                first = torch.autograd.grad(y.square().sum() + l1, leaves, create_graph=True)
                second = torch.autograd.grad(sum(t.square().sum() for t in first), leaves)
                outcomes.append([y, l1, *first, *second])
            for have, want in zip(*reversed(outcomes), strict=True):
                close(have, want)
            kept = placement == Shard(0) and "over_batch" not in options
            assert outcomes[1][0].placements == ((Shard(0),) if kept else (Replicate(),))


def behind(mesh: DeviceMesh) -> None:
    """Residuals and thresholds, cut as x is or otherwise, in the function and in layers of both forms."""
    generator = torch.Generator().manual_seed(7)
    tensors = [torch.randn(shape, generator=generator) for shape in ((3, 4, 5, 6), (3, 4, 5, 6), (4,))]
    options = {"window": 3, "activation": "tlu", "p": 1, "return_l1": True}
    for places in ((Shard(0), Shard(0)), (Shard(0), Replicate()), (Replicate(), Shard(2)), (Shard(0), Partial())):
        outcomes = []
        for cut in (False, True):
            leaves = [t.clone() for t in tensors]
            if cut:
                placements = (*places, Replicate())
                leaves = [distributed(t, mesh, p) for t, p in zip(tensors, placements, strict=True)]
            x, residual, threshold = leaves = [t.requires_grad_() for t in leaves]
            y, l1 = divisive_norm(x, residual=residual, threshold=threshold, **options)
            outcomes.append([y, l1, *torch.autograd.grad(y.square().sum() + l1, leaves)])
        for have, want in zip(*reversed(outcomes), strict=True):
            close(have, want)
    for make in (
        lambda: DivisiveNorm2d(4, 3, activation="tlu"),
        lambda: BatchNorm2d(4, activation="tlu"),
        lambda: BatchNorm2d(4, p=1, activation="silu").eval(),
        lambda: LayerNorm(6, activation="tlu"),
        lambda: DivisiveNormFeatures(6, 3, activation="gelu"),
    ):
        layer = made(make)
        across = distribute_module(copy.deepcopy(layer), mesh)
        own, added = (t.clone().requires_grad_() for t in tensors[:2])
        cut, cut_added = (distributed(t, mesh, Shard(0)).requires_grad_() for t in tensors[:2])
        expected, found = layer(own, added), across(cut, cut_added)
        close(found, expected)
        for have, want in zip(
            torch.autograd.grad(found.square().sum(), [cut, cut_added, *across.parameters()]),
            torch.autograd.grad(expected.square().sum(), [own, added, *layer.parameters()]),
            strict=True,
        ):
            close(have, want)
        with pytest.raises(ValueError, match=r"^residual: got a Tensor beside an x that is a DTensor"):
            across(cut, tensors[1])


def layers(mesh: DeviceMesh) -> None:
    """Every layer, in training and where that differs in evaluating; also on fewer samples than processes."""
    for name, (make, shape) in LAYERS.items():
        running = name.startswith(("BatchNorm", "InstanceNorm"))
        tracking = {"track_running_stats": True} if name.startswith("InstanceNorm") else {}
        for options in OPTIONS:
            layer = made(make, **options, **tracking)
            for placement, samples in ((Replicate(), 3), (Shard(0), 3), (Shard(0), 1)):
                x = torch.randn(samples, *shape[1:], generator=torch.Generator().manual_seed(2))
                for training in (True, False) if running else (True,):
                    if training and name == "BatchNorm1d" and samples == 1:
                        continue  # one value per channel, which raises
                    own, across = (copy.deepcopy(layer).train(training) for _ in range(2))
                    distribute_module(across, mesh)
                    compare(own, across, x, distributed(x, mesh, placement))


def followed(mesh: DeviceMesh) -> None:
    """A layer that something follows, as those that `convert_norm` makes."""
    layer = made(lambda: DivisiveNorm2d(4, 3))
    layer.act, layer.followed_by = nn.SiLU(), ("act",)
    x = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(6))
    compare(layer, distribute_module(copy.deepcopy(layer), mesh), x, distributed(x, mesh, Shard(0)))


def running_statistics(mesh: DeviceMesh) -> None:
    """Whether the buffers are DTensors or plain, with a momentum and as an average of all batches."""
    for make in (BatchNorm2d, lambda *args, **options: InstanceNorm2d(*args, **options, track_running_stats=True)):
        for momentum in (0.3, None):
            for plain in (False, True):
                layer = made(lambda momentum=momentum, make=make: make(4, momentum=momentum, affine=True))
                across = copy.deepcopy(layer)
                buffers = dict(across.named_buffers())
                distribute_module(across, mesh)
                for name, buffer in buffers.items() if plain else ():
                    setattr(across, name, buffer)
                for seed in range(2):
                    x = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(seed)) + 2
                    for model in (layer, across):
                        model.zero_grad()
                    compare(layer, across, x, distributed(x, mesh, Shard(0)))
                assert isinstance(across.running_var, DTensor) != plain


def sequence_parallel(rank: int, mesh: DeviceMesh) -> None:
    """Rows cut along the sequence: nothing is communicated in forward but the penalty, whatever each process holds."""
    for make in ROWS.values():
        for options in OPTIONS:
            for length in (5, 4):
                x = torch.randn(3, length, 6, generator=torch.Generator().manual_seed(3))
                layer = made(make, **options)
                across = copy.deepcopy(layer)
                parallelize_module(nn.ModuleDict({"norm": across}), mesh, {"norm": SequenceParallel()})
                communicated = compare(layer, across, x, distributed(x, mesh, Shard(1)))
                names = {str(operator).rpartition(".")[2] for operator, times in communicated.items() if times}
                assert names == ({"all_reduce"} if options else set())
                for placement in (Replicate(), Shard(0)):  # which are cut along the sequence on their way
                    close(across(distributed(x, mesh, placement)), layer(x))
    own = x.chunk(2, 1)[rank]  # each process' tensor, as a model hands it over
    close(across(own).redistribute(placements=[Replicate()]).chunk(2, 1)[rank], layer(x).chunk(2, 1)[rank])


def two_dimensional(mesh: DeviceMesh) -> None:
    """A mesh of batch and sequence, rows of more than one dimension, and of strides of their own."""
    x = torch.randn(3, 4, 2, 6, generator=torch.Generator().manual_seed(5))
    for placements in ((Shard(0), Shard(1)), (Shard(1), Shard(1)), (Replicate(), Shard(1)), (Shard(1), Replicate())):
        layer = made(lambda: LayerNorm((2, 6), sigma=0.7, learn_sigma=True, l1_weight=0.3))
        across = copy.deepcopy(layer)
        distribute_module(across, mesh)
        compare(layer, across, x, distributed(x.transpose(0, 1).contiguous().transpose(0, 1), mesh, *placements))


def refused(mesh: DeviceMesh) -> None:
    """What would be wrong: pieces of channels and rows, and parameters whose gradients nobody would add up."""
    image, rows = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 6)
    channels = r"^x: got a DTensor sharded along channels \(dimension {}\), expected one that is sharded along {} or"
    with pytest.raises(ValueError, match=channels.format(1, "the batch")):
        divisive_norm(distributed(image, mesh, Shard(1)), window=3)
    for training in (True, False):
        with pytest.raises(ValueError, match=channels.format(1, "the batch")):
            BatchNorm2d(4).train(training)(distributed(image, mesh, Shard(1)))
    for make in ROWS.values():
        with pytest.raises(ValueError, match=channels.format(2, "leading dimensions")):
            make()(distributed(rows, mesh, Shard(2)))
        with pytest.raises(ValueError, match=r"^x: got shape \(2, 4, 4, 4\), expected \((N, )?\.\.\., 6"):
            make()(distributed(image, mesh, Shard(0)))
    cut = distributed(image, mesh, Shard(0))
    with pytest.raises(ValueError, match=r"^weight: got a Parameter beside an x that is sharded, expected a DTensor"):
        DivisiveNorm2d(4)(cut)
    with torch.no_grad():
        close(DivisiveNorm2d(4)(cut), DivisiveNorm2d(4)(image))
    other = init_device_mesh("cpu", (1, mesh.size()))
    with pytest.raises(ValueError, match=r"^weight: got a DTensor on DeviceMesh.*, expected it on that of x, Device"):
        distribute_module(DivisiveNorm2d(4), other)(cut)
    with pytest.raises(ValueError, match=r"^x: got a DTensor in a layer of convert_sync, expected a Tensor"):
        convert_sync(BatchNorm2d(4))(cut)


def over_channels(mesh: DeviceMesh, layer: nn.Module) -> None:
    """A layer that learns, and looks at the channels of a position, on an x cut along the batch or within an image."""
    generator = torch.Generator().manual_seed(9)
    image = torch.randn((3, 4, 5, 6), generator=generator)
    across = distribute_module(copy.deepcopy(layer), mesh)
    with pytest.raises(ValueError, match=r"^x: got a DTensor sharded along channels"):
        across(distributed(image, mesh, Shard(1)))
    for placement in (Replicate(), Shard(0), Shard(2), Partial()):
        outcomes = []
        for module, x in ((layer, image.clone()), (across, distributed(image, mesh, placement))):
            y = module(x.requires_grad_())
            outcomes.append([y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])])
        for want, have in zip(*outcomes, strict=True):
            close(have, want)


def compare_all(rank: int, world: int) -> None:
    """All of the above, in one process of ``world``."""
    mesh = init_device_mesh("cpu", (world,))
    function(mesh)
    behind(mesh)
    layers(mesh)
    followed(mesh)
    running_statistics(mesh)
    sequence_parallel(rank, mesh)
    for shape in ((1, world), (world, 1)):
        two_dimensional(init_device_mesh("cpu", shape))
    for layer in (GDN(4, window=3), ExponentialNorm(), LocalResponseNorm(3, 0.5, learnable=True)):
        over_channels(mesh, layer)
    refused(mesh)
