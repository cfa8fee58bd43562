"""Compiles the Triton kernels of channel normalization ahead of time, as `compile_triton` does those of the operator.

``python compile_channels.py ARCH SHARE`` takes one in SHARE specializations and prints one JSON object a kernel.
"""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import dataclass
from typing import Any

import torch
from compile_triton import TARGETS, Recorder, nvidia_report

from divnorm_kernels.channels import triton as backend
from divnorm_kernels.channels import triton_kernel
from divnorm_kernels.channels.pool import Pool

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LEARNED = (math.nan,) * 4


@dataclass(frozen=True)
class Specialization:
    """A call; ``width``: the bytes that x moves at a time."""

    shape: tuple[int, ...]
    pool: Pool
    dtype: torch.dtype
    channels_last: bool = False
    wide: bool = False
    width: int = 16


SPECIALIZATIONS = [
    Specialization((64, 256, 28, 28), Pool((2, 2), False, (1.0, 2e-5, 0.75, 0.0)), BF16),
    Specialization((64, 64, 56, 56), Pool((2, 2), False, (2.0, 2e-5, 0.5, 0.0)), F16, True, width=8),
    Specialization((64, 1024, 16, 16), Pool((300, 20), True, LEARNED), F32, wide=True),
    Specialization((64, 4096), Pool(None, True, LEARNED), F32),
    Specialization((64, 512, 14, 14), Pool(None, False, LEARNED), BF16, width=8),
    Specialization((64, 99, 9, 9), Pool(None, True, (1.0, 0.1, 1.0, 0.8)), F32, True, width=4),
]


def compiled(arch: str, call: Specialization) -> list[tuple[Any, dict[str, Any], dict[str, Any]]]:
    """The kernels that forward and backward of a call launch, on tensors without memory: no number can be asked for."""
    found: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []
    before = triton_kernel.forward_kernel, triton_kernel.backward_kernel, backend._INT32
    recorders = (Recorder(kernel, TARGETS[arch][0], found) for kernel in before[:2])
    triton_kernel.forward_kernel, triton_kernel.backward_kernel = recorders
    backend._INT32 = 1 if call.wide else before[2]
    x = torch.empty(call.shape, dtype=call.dtype, device="meta")
    if call.channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    learned = torch.empty(4, device="meta") if any(call.pool.learns) else None
    backend.forward(call.pool, x, learned)
    backend.backward(call.pool, x, x, learned, (True, learned is not None))
    triton_kernel.forward_kernel, triton_kernel.backward_kernel, backend._INT32 = before
    return found


def main(arch: str, share: int) -> None:
    """Prints the reports."""
    for call in SPECIALIZATIONS[::share]:
        for kernel, options, _ in compiled(arch, call):
            ptx = kernel.asm["ptx"]
            known = {"name": f"{call.pool} on {call.shape}", "kernel": kernel.metadata.name, "width": call.width}
            known |= {"warps": options["num_warps"], "shared": kernel.metadata.shared}
            known |= {"beta": None if call.pool.learns[2] else call.pool.scalars[2]}
            for what, instruction in (("powers", "ex2"), ("roots", "rsqrt"), ("atomics", "(?:atom|red)")):
                known[what] = len(re.findall(rf"\b{instruction}\.", ptx))
            print(json.dumps(known | nvidia_report(kernel)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
