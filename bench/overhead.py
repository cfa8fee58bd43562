"""What a call costs beyond its work: a tensor of a few kilobytes, forward alone."""

from __future__ import annotations

from statistics import median
from time import perf_counter

import torch
from torch import nn

import divnorm_kernels

SHAPE = (2, 8, 8, 8)
CALLS = 50
ROUNDS = 200


def call_overhead(device: str = "cpu") -> dict[str, float]:
    """Median microseconds of a forward call on 4 kilobytes, layer by layer, interleaved; with gradients on."""
    x = torch.randn(SHAPE, device=device, requires_grad=True)
    layers = {
        "DivisiveNorm2d": divnorm_kernels.DivisiveNorm2d(SHAPE[1]),
        "BatchNorm2d": nn.BatchNorm2d(SHAPE[1]),
        "GroupNorm": nn.GroupNorm(2, SHAPE[1]),
    }
    for layer in layers.values():
        layer.to(device)(x)  # compiles what is compiled on first use
    taken = {name: [] for name in layers}
    for _ in range(ROUNDS):
        for name, layer in layers.items():
            begin = perf_counter()
            for _ in range(CALLS):
                layer(x)
            if device != "cpu":
                torch.cuda.synchronize()
            taken[name].append(1e6 * (perf_counter() - begin) / CALLS)
    return {name: median(samples) for name, samples in taken.items()}
