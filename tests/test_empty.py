"""No samples, or an extent of zero: an empty result and zero gradients from every layer, as from torch.nn's."""

import itertools

import pytest
import torch
from torch import nn

import divnorm_kernels as dk

BATCH = {"momentum": 0.1, "track_running_stats": True}
TORCHS = {
    "BatchNorm1d": ((3,), BATCH, [(0, 3), (0, 3, 4), (2, 3, 0)]),
    "BatchNorm2d": ((3,), BATCH, [(0, 3, 2, 2), (2, 3, 0, 2), (2, 3, 2, 0)]),
    "BatchNorm3d": ((3,), BATCH, [(0, 3, 2, 2, 2), (2, 3, 0, 2, 1)]),
    "InstanceNorm1d": ((3,), {"affine": True, **BATCH}, [(0, 3, 4), (2, 3, 0), (3, 0)]),
    "InstanceNorm2d": ((3,), {"affine": True, **BATCH}, [(0, 3, 4, 4), (0, 3, 1, 1), (2, 3, 0, 4), (3, 4, 0)]),
    "InstanceNorm3d": ((3,), {"affine": True}, [(0, 3, 4, 4, 2), (2, 3, 0, 4, 2), (3, 4, 0, 2)]),
    "GroupNorm": ((2, 4), {}, [(0, 4), (0, 4, 3), (2, 4, 0), (0, 4, 2, 3), (0, 4, 3, 1, 2, 3), (1, 4, 0, 1, 2, 3)]),
    "LayerNorm": (((3,),), {}, [(0, 3), (2, 0, 3), (0, 2, 1, 2, 3)]),
    "RMSNorm": (((3,),), {}, [(0, 3), (2, 0, 3), (0, 2, 1, 2, 3)]),
}
DIVISIVE = {
    "DivisiveNorm1d": ((3,), {"window": 4}, [(0, 3, 5), (2, 3, 0)]),
    "DivisiveNorm2d": ((3, (3, "all")), {"edges": "zero"}, [(0, 3, 5, 5), (2, 3, 0, 5), (2, 3, 5, 0)]),
    "DivisiveNorm3d": ((3,), {}, [(0, 3, 5, 5, 5), (2, 3, 5, 0, 5)]),
    "DivisiveNormFeatures": ((3, 2), {}, [(0, 3), (2, 0, 3), (0, 2, 1, 1, 1, 3)]),
    "LocalContrastNorm2d": ((3,), {}, [(0, 3, 5, 5), (2, 3, 0, 5)]),
    "PositionalNorm2d": ((3,), {}, [(0, 3, 5, 5), (2, 3, 0, 5)]),
}
CALLS = [
    (name, shape, training, backend)
    for name, (_, _, shapes) in {**TORCHS, **DIVISIVE}.items()
    for shape, training, backend in itertools.product(shapes, (True, False), (None, "reference"))
]


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize(("name", "shape", "training", "backend"), CALLS, ids=str)
def test_an_empty_result_and_zero_gradients(name, shape, training, backend, learn_sigma):
    arguments, options, _ = {**TORCHS, **DIVISIVE}[name]
    own = {"sigma": 0.5, "learn_sigma": learn_sigma, "l1_weight": 0.1, "backend": backend}
    layer = getattr(dk, name)(*arguments, **options, **own).train(training)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    (y.sum() + dk.l1_penalty(layer)).backward()
    assert x.grad.shape == x.shape
    for parameter in layer.parameters():
        assert parameter.grad.abs().max() == 0
    assert layer.l1 is None or layer.l1 == 0
    if "Instance" in name and shape[0] == 0:  # torch.nn's fail: a mean over no samples would be tracked
        assert layer.running_mean is None or layer.running_mean.abs().max() == 0
    elif name in TORCHS:
        torchs = getattr(nn, name)(*arguments, **options).train(training)
        assert torchs(x.detach()).shape == y.shape
        for key, value in torchs.named_buffers():
            if "Batch" in name or key != "num_batches_tracked":
                assert torch.equal(layer.get_buffer(key), value), key
