"""What layers in plain PyTorch share: half types that are rounded once, one node to `torch.fx`, and no decay."""

import copy

import pytest
import torch

import divnorm_kernels as dk

EVERY = {
    "EvoNorm2dB0": (lambda: dk.EvoNorm2dB0(4), (2, 4, 5, 5)),
    "EvoNorm2dS0": (lambda: dk.EvoNorm2dS0(4, 2), (2, 4, 5, 5)),
    "DyT": (lambda: dk.DyT(4), (8, 4)),
    "Derf": (lambda: dk.Derf(4), (8, 4)),
    "StandardizedReLU": (dk.StandardizedReLU, (64, 64)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", EVERY)
def test_half_types_are_rounded_once(name, dtype):
    """Computed in float32: what a float64 layer gives of the same numbers, to half an ulp and float32's errors."""
    make, shape = EVERY[name]
    layer, x = make(), (torch.randn(shape) * 3).to(dtype)
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    y = layer(x)
    assert y.dtype == dtype
    expected = copy.deepcopy(layer).double()(x.double())
    torch.testing.assert_close(y.double(), expected, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_one_node_and_no_decay(name):
    layer = EVERY[name][0]()
    graph = torch.fx.symbolic_trace(torch.nn.Sequential(layer)).graph
    assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "output"]
    decayed, kept = dk.no_decay_groups(layer, 0.1)
    assert (len(decayed["params"]), len(kept["params"])) == (0, len(list(layer.parameters())))
