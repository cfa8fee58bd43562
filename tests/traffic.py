"""Bytes that the CUDA kernels move, counted on the emulated device: ``python tests/traffic.py`` prints a table.

The least that a call can move is the operator's limit: forward reads x and writes y, backward reads x and dy and writes
dx. The maps (mean and rstd, which forward returns and backward reads), the parameters and the partial sums of their
gradients come on top and are counted apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from emulated import HOPPER, backend, module
from torch import Tensor

from divnorm_kernels import fields
from divnorm_kernels.backends import cuda
from divnorm_kernels.checks import compute_dtype
from divnorm_kernels.norm import Norm


@dataclass(frozen=True)
class Moved:
    """What one direction of a call moved, in bytes."""

    strategy: str
    least: int
    activations: int
    maps: int
    elsewhere: int


def _count(call: Callable[[], None], activations: tuple[Tensor, ...], maps: Tensor) -> tuple[int, int, int]:
    module().forget_traffic()
    for t in (*activations, maps):
        module().watch(t.data_ptr(), t.numel() * t.element_size())
    call()
    of_activations = sum(sum(module().traffic_of(t.data_ptr())) for t in activations)
    return of_activations, sum(module().traffic_of(maps.data_ptr())), sum(module().traffic_elsewhere())


def moved(x: Tensor, **options: Any) -> tuple[Moved, Moved]:
    """Forward and backward of a call with weight, bias, a sigma that learns and l1; inside `emulated.backend`."""
    g = fields.geometry(Norm(**{"window": 3} | options), tuple(x.shape))
    compute, size = compute_dtype(x), x.numel() * x.element_size()
    calls = cuda.calls_for(g, x)
    weight, bias, dweight, dbias = (torch.ones(x.shape[1], dtype=compute) for _ in range(4))
    sigma, dsigma, l1, dl1 = (torch.ones((), dtype=compute) for _ in range(4))
    y, dy, dx = torch.empty_like(x), torch.randn_like(x), torch.empty_like(x)
    maps = torch.empty(g.kept_shape(False), dtype=compute)
    scratch = [torch.empty(count, dtype=torch.uint8) for count in calls.scratch_bytes]

    def call(function: Callable[..., None], *more: Tensor) -> None:
        function(calls, *(t.data_ptr() for t in (x, maps, weight, bias, sigma, *more)))

    def forward() -> None:
        call(module().forward, y, l1, scratch[0])

    def backward() -> None:
        call(module().backward, dy, dl1, dx, dweight, dbias, dsigma, scratch[1])

    return (
        Moved(calls.strategies[0], 2 * size, *_count(forward, (x, y), maps)),
        Moved(calls.strategies[1], 3 * size, *_count(backward, (x, dy, dx), maps)),
    )


def main() -> None:
    """Counts ResNet-50's stages, two samples each, as they are cut for an H200."""
    from rich.console import Console
    from rich.table import Table

    output = Table(
        "x", "dtype", "format", "direction", "strategy", "x, y, dy, dx", "maps", "rest", title="bytes / least"
    )
    with backend():
        cuda.device_of = lambda x: HOPPER
        for shape in ((2, 64, 56, 56), (2, 256, 56, 56), (2, 512, 28, 28), (2, 1024, 14, 14), (2, 2048, 7, 7)):
            for dtype in (torch.bfloat16, torch.float32):
                for memory_format in (torch.contiguous_format, torch.channels_last):
                    x = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
                    for direction, m in zip(("forward", "backward"), moved(x, window=5), strict=True):
                        shares = (f"{part / m.least:.3f}" for part in (m.activations, m.maps, m.elsewhere))
                        names = (str(dtype)[6:], str(memory_format)[6:], direction, m.strategy)
                        output.add_row("x".join(map(str, shape)), *names, *shares)
    Console(width=140).print(output)


if __name__ == "__main__":
    main()
