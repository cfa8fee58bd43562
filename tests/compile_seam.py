"""Compiles the seam's Triton kernels ahead of time, as `compile_triton` does those of the plain call.

``python compile_seam.py ARCH SHARE`` takes one in SHARE specializations and prints one JSON object a kernel.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from typing import Any

import torch
from compile_triton import BATCH, NAMES, STAGE, TARGETS, Recorder, nvidia_report

from divnorm_kernels.backends.triton import launch
from divnorm_kernels.fields import geometry
from divnorm_kernels.norm import Norm
from divnorm_kernels.seam import triton as backend
from divnorm_kernels.seam import triton_kernels, triton_plans

KERNELS = ("statistics_kernel", "normalize_kernel", "sums_kernel", "gradient_kernel")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
GROUPS = {"window": "all", "groups": 32}


@dataclass(frozen=True)
class Specialization:
    """A call with weight and bias; where ``l1``, with that and its gradient; ``wide`` asks for 64-bit offsets, and
    ``width`` is what x moves at a time, in bytes.
    """

    name: str
    shape: tuple[int, ...]
    options: dict[str, Any]
    dtype: torch.dtype = F32
    channels_last: bool = False
    residual: bool = False
    l1: bool = False
    wide: bool = False
    width: int = 16


SPECIALIZATIONS = [
    Specialization("batch norm, TLU, residual", STAGE, BATCH | {"activation": "tlu"}, F32, residual=True, l1=True),
    Specialization("layer norm, l1, wide", STAGE, {"window": "all"}, F32, l1=True, wide=True),
    Specialization("layer norm, GELU, residual", STAGE, {"window": "all", "activation": "gelu"}, BF16, True, True),
    Specialization("group norm, SiLU", STAGE, GROUPS | {"activation": "silu"}, F16, True, width=4),
    Specialization(
        "features, TLU, residual", (4096, 768), {"window": "all", "activation": "tlu"}, residual=True, l1=True
    ),
]


def compiled(arch: str, call: Specialization) -> list[tuple[Any, dict[str, Any], dict[str, Any]]]:
    """The kernels that a call launches, in both directions, with their options and arguments."""
    target, device = TARGETS[arch]
    found: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []
    before = {name: getattr(triton_kernels, name) for name in KERNELS}
    for name, kernel in before.items():
        setattr(triton_kernels, name, Recorder(kernel, target, found))
    triton_plans.device_of, int32, launch._INT32 = lambda _: device, launch._INT32, 1 if call.wide else launch._INT32

    g = geometry(Norm(**call.options), call.shape)
    g.cache.clear()
    x = torch.empty(call.shape, dtype=call.dtype, device="meta")
    if call.channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    affine = torch.empty(g.affine_size, device="meta")
    residual, threshold = x if call.residual else None, affine if g.norm.activation == "tlu" else None
    scale = torch.empty((), device="meta") if call.l1 else None
    backend.statistics(g, x)
    rows = torch.empty((2, *g.maps_shape[1:]), device="meta")
    backend.normalize(g, x, rows, affine, affine, call.l1, residual, threshold)
    backend.sums(g, x, scale, x, rows, affine, affine, (True, True, threshold is not None), residual, threshold)
    backend.gradient(g, x, scale, x, rows, rows, affine, affine, residual, threshold, (True, call.residual))
    launch._INT32 = int32
    for name, kernel in before.items():
        setattr(triton_kernels, name, kernel)
    return found


def main(arch: str, share: int) -> None:
    """Prints the reports."""
    for call in SPECIALIZATIONS[::share]:
        layout = "channels_last" if call.channels_last else "contiguous"
        for kernel, options, arguments in compiled(arch, call):
            known = {"name": f"{call.name}, {NAMES[call.dtype]}, {layout}", "kernel": kernel.metadata.name}
            known |= {"warps": options["num_warps"], "shared": kernel.metadata.shared, "width": call.width}
            known |= {"smooth": call.options.get("activation") not in (None, "relu", "tlu")}
            # two tiles before a loop, one in it; of a single channel statistics have no loop
            read = {"statistics_kernel": int(arguments.get("CHANNELS", 1) > 1), "normalize_kernel": 1}
            tensors = read.get(kernel.metadata.name, 2) + (arguments.get("residual") is not None)
            known |= {"expected_copies": 3 * tensors}
            known |= {"atomics": len(re.findall(r"\b(?:atom|red)\.", kernel.asm["ptx"]))}
            print(json.dumps(known | nvidia_report(kernel)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
