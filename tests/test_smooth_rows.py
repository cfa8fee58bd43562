"""Smooth activations of the CPU kernels on tensors that are larger than the copies they are made in."""

import pytest
import torch
from oracle import Call, check

from divnorm_kernels import divisive_norm

CASES = {
    "planes in parts, of which some are kept": ((1, 6, 150, 151), {"window": "all", "groups": 2}),
    "over the batch": ((3, 4, 90, 91), {"window": "all", "groups": 4, "over_batch": True}),
    "parameters along the row": ((3, 9001), {"window": "all"}),
    "more channels than a copy has numbers": ((1, 4501, 3, 3), {"window": 3}),
    "those, of whole fields": ((2, 4501, 3, 3), {"window": "all"}),
    "an odd number of channels, by two threads": ((4, 1001, 9, 9), {"window": "all"}),
    "small planes": ((5, 12, 7, 7), {"window": "all", "groups": 3}),
    "those, over the batch": ((40, 5, 7, 7), {"window": "all", "groups": 5, "over_batch": True}),
    "small planes of many samples over the batch": ((40, 12, 5, 5), {"window": "all", "groups": 3, "over_batch": True}),
    "tiles of several rows": ((2, 9, 70, 33), {"window": 5}),
    "groups side by side": ((2, 12, 40, 33), {"window": 3, "groups": 3}),
    "features": ((700, 37), {"window": 4}),
}
NEAR, FAR = 1.0, 40.0
"""Sizes of the numbers: within what is calculated quickly, and some of them beyond."""


def cpu(*args, **kwargs):
    return divisive_norm(*args, backend="cpu", **kwargs)


def check_case(shape, options, dtype):
    """In every layout: the activation alone, and with numbers that are far, a penalty and a residual."""
    generator = torch.Generator().manual_seed(0)
    for layout in (torch.contiguous_format, torch.channels_last) if len(shape) == 4 else (torch.contiguous_format,):
        for size, dl1, residual in ((NEAR, 0.0, False), (FAR, 2.0, True)):
            x, dy, added = (
                torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout) for _ in range(3)
            )
            parameters = torch.float64 if dtype == torch.float64 else torch.float32
            weight, bias = (torch.randn(shape[1], generator=generator).to(parameters) * s for s in (1, size))
            sigma = torch.tensor(0.8, dtype=parameters)
            check(cpu, Call(x, weight, bias, sigma, dy, dl1, options, added if residual else None))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, activation, dtype):
    shape, options = CASES[name]
    check_case(shape, options | {"activation": activation}, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{"window": "all", "groups": 10}, {"window": 3}], ids=["whole", "windows"])
def test_written_past_the_cache(options, dtype):
    """8 MiB and more are, in rows that are whole lines of the cache and in rows that are not."""
    for shape in ((2, 40, 240, 240), (2, 40, 240, 241)):
        check_case(shape, options | {"activation": "silu"}, dtype)
