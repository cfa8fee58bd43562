"""Which strategy and tiles a call takes: a table kept as data (``strategies.json``).

The first row that matches the device, the direction and the size of an element decides. The compiled module does the
arithmetic (``csrc/cuda/strategy.cpp``): of the clusters of blocks whose shared memory holds a row of x (a group of a
sample), the smallest that fills nine tenths of the device takes it, a single block where that does, or else the
largest; where none holds it, the two-pass kernels.

- ``cluster``: the most blocks of a cluster; 0 sends every call through the two-pass kernels;
- ``blocks``: the blocks that are to share a multiprocessor, so that one loads while another computes;
- ``threads``: the most threads of a block, and ``bytes_per_thread`` the bytes of x that make it one thread more;
- ``slice_channels``: a contiguous row is split by channels while each block has this many left, then by positions;
- ``stretch_bytes``: the shortest run of neighbouring bytes that a split by positions leaves;
- ``window_rounds``: windows are summed one by one while a thread has at most this many for each block of positions, as
  long as the window, that it could go through instead;
- ``staged_threads``, ``tile_bytes``, ``tile_positions``: the blocks and the largest tiles of the two-pass kernels;
- ``row_positions``: the largest map that one block sums by itself in them;
- ``items``: the pieces per multiprocessor that their work is split into at least, where it can be;
- ``cache_share``: the part of the second-level cache for the chunk of x (and dy) between its two passes;
- ``finish_inside``: the last blocks of a kernel that holds rows on chip that make the sums over partial sums (the
  parameters' gradients, l1) at its end, where they are few enough; 0 leaves them to a launch behind it;
- ``pipeline``: bytes of a slot of the pipelined kernels' ring, in which a chunk of x (and of dy, and of a residual)
  comes and goes; 0 leaves these kernels out. Where there are clusters they take the rows that they can hold beside a
  chunk of the next one, split by positions as far as ``stretch_bytes`` allows, one block of at most ``threads`` threads
  that compute to a multiprocessor. Chunks move sixteen bytes at a time: where these do not come out even, and for
  tensors at other addresses, the kernels of ``blocks`` and ``cluster`` remain.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import torch

ROWS: list[dict[str, Any]] = json.loads((files(__package__) / "strategies.json").read_text())["rows"]


@dataclass(frozen=True)
class Device:
    """A GPU: compute capability, multiprocessors, bytes of second-level cache and of shared memory."""

    capability: tuple[int, int]
    multiprocessors: int
    cache_bytes: int
    shared_bytes: int
    """Of a multiprocessor."""
    block_shared_bytes: int
    """The most that a block can have."""

    @property
    def arch(self) -> str:
        """The table's name of the device, as the compiler's: ``sm_90``."""
        return "sm_{}{}".format(*self.capability)

    def facts(self) -> dict[str, Any]:
        """What the compiled module is told."""
        return {
            "multiprocessors": self.multiprocessors,
            "cache_bytes": self.cache_bytes,
            "shared_bytes": self.shared_bytes,
            "block_shared_bytes": self.block_shared_bytes,
            "clusters": self.capability >= (9, 0),
        }


@cache
def device(index: int) -> Device:
    """The GPU of this number."""
    properties = torch.cuda.get_device_properties(index)
    return Device(
        (properties.major, properties.minor),
        properties.multi_processor_count,
        properties.L2_cache_size,
        properties.shared_memory_per_multiprocessor,
        properties.shared_memory_per_block_optin,
    )


def row_for(device: Device, direction: str, element_size: int) -> dict[str, Any]:
    """The first matching row of the table."""
    wanted = {"arch": device.arch, "direction": direction, "bytes": element_size}
    for row in ROWS:
        if all(row[key] in ("any", value) for key, value in wanted.items()):
            return row
    raise LookupError(f"strategies.json has no row for {device.arch}, {direction}, {element_size} bytes")
