"""Which backends ``backend=None`` tries, best first: a table kept as data (``preference.json``).

The first row that matches the device, the size of an element and the kind of fields decides. ``measured`` says whether
a benchmark stands behind a row. Rows that none stands behind follow a rule: windows go to the CUDA kernels, which read
x once where a row of it fits the shared memory of a cluster, as the Triton kernels do only for small ones; whole fields
go to the Triton kernels, whose statistics stay in registers where the CUDA kernels' pass through shared memory.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from ..constant import constant
from ..fields import Geometry

ROWS: list[dict[str, Any]] = json.loads((files(__package__) / "preference.json").read_text())["rows"]
_CPU = ("cpu", "cuda", "triton")


def order(g: Geometry, x: Tensor) -> tuple[str, ...]:
    """The backends to try for a call, best first; one of them may refuse it."""
    if not x.is_cuda:
        return _CPU
    return _ranked(x.device.index, x.element_size(), "whole" if g.whole else "windows")


@constant
def _ranked(index: int, element_size: int, fields: str) -> tuple[str, ...]:
    return _order(arch(index), element_size, fields)


@cache
def arch(index: int) -> str:
    """What ``preference.json`` names a device of this machine."""
    if torch.version.hip is not None:
        return "hip"
    return "sm_{}{}".format(*torch.cuda.get_device_capability(index))


@cache
def _order(arch: str, element_size: int, fields: str) -> tuple[str, ...]:
    wanted = {"arch": arch, "bytes": element_size, "fields": fields}
    for row in ROWS:
        if all(row[key] in ("any", value) for key, value in wanted.items()):
            return tuple(row["order"])
    raise LookupError(f"preference.json has no row for {arch}, {element_size} bytes, {fields}")
