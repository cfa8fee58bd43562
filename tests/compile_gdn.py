"""Compiles the Triton kernels of generalized divisive normalization ahead of time, as `compile_triton` does others.

``python compile_gdn.py ARCH SHARE`` takes one in SHARE specializations and prints one JSON object a kernel.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from compile_triton import TARGETS, Recorder, nvidia_report

from divnorm_kernels.gdn import triton as backend
from divnorm_kernels.gdn import triton_kernels
from divnorm_kernels.gdn.form import Form

KERNELS = ("forward_kernel", "slope_kernel", "dgamma_kernel", "dx_kernel")
F32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Specialization:
    """A call; ``allowed`` is what torch's products may round to."""

    allowed: str
    dtype: torch.dtype
    channels_last: bool
    shape: tuple[int, ...] = (8, 192, 64, 64)


SPECIALIZATIONS = [
    Specialization("ieee", BF16, True),
    Specialization("tf32", F32, False),
]


class ByName(Recorder):
    """Takes a kernel's constants by their names, and what is compiled once."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **named: Any) -> None:
            if not self.compiled:
                constants = [named.pop(parameter.name) for parameter in self.kernel.params[len(arguments) :]]
                self._compile(*arguments, *constants, **named)

        return launch


@contextmanager
def recorded(arch: str) -> Iterator[list[tuple[Any, dict[str, Any], dict[str, Any]]]]:
    """What the backend's launches are compiled to."""
    found: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []
    before = {name: getattr(triton_kernels, name) for name in KERNELS}
    for name, kernel in before.items():
        setattr(triton_kernels, name, ByName(kernel, TARGETS[arch][0], found))
    yield found
    for name, kernel in before.items():
        setattr(triton_kernels, name, kernel)


def main(arch: str, share: int) -> None:
    """Prints the reports."""
    for call in SPECIALIZATIONS[::share]:
        torch.backends.cuda.matmul.fp32_precision = call.allowed
        x = torch.empty(call.shape, dtype=call.dtype, device="meta")
        if call.channels_last:
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        beta, gamma = (torch.empty((call.shape[1],) * rank, device="meta") for rank in (1, 2))
        form = Form(False, False, "")
        with recorded(arch) as found:
            backend.forward(form, x, beta, gamma)
            backend.backward(form, x, x, None, beta, gamma, (True, True, True))
        for kernel, options, arguments in found:
            known = {"name": f"{call}", "kernel": kernel.metadata.name, "precision": arguments["PRECISION"]}
            known |= {"allowed": call.allowed, "warps": options["num_warps"]}
            print(json.dumps(known | nvidia_report(kernel)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
