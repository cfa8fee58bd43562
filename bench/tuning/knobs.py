"""What tuning may change, as data: the entries of the backends' tables, and the values to try."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from torch import Tensor

from divnorm_kernels.backends import cuda
from divnorm_kernels.backends.cuda import table as strategies
from divnorm_kernels.backends.triton import tiles
from divnorm_kernels.fields import Geometry
from divnorm_kernels.layout import channels_last_strides

from .calls import DIRECTIONS
from .tables import Row


@dataclass(frozen=True)
class Tunable:
    """A backend's table: the module with its ``ROWS`` and ``row_for``, and the file's name."""

    table: ModuleType
    file: str
    device: Callable[[Tensor], Any]
    """What ``row_for`` needs to know of a tensor's device."""
    cut: Callable[[Geometry, Tensor, str], object]
    """How one direction of a call is cut under the present table; rows that cut it alike need not be compared."""
    knobs: dict[str, tuple[Any, ...]]
    """Entries of a row in the order in which they are tuned, those that decide most first, with the values to try."""


def _strategies_device(x: Tensor) -> strategies.Device:
    return cuda.device_of(x.device.index)


RESIDENT = (
    "cluster",
    "blocks",
    "threads",
    "bytes_per_thread",
    "slice_channels",
    "stretch_bytes",
    "window_rounds",
    "finish_inside",
)
DECIDES = {
    "pipelined": ("pipeline", "cluster", "threads", "stretch_bytes", "window_rounds", "finish_inside"),
    "cluster-resident": RESIDENT,
    "single-block": RESIDENT,
    "two-pass": (
        "stretch_bytes",
        "window_rounds",
        "staged_threads",
        "tile_bytes",
        "tile_positions",
        "row_positions",
        "items",
        "cache_share",
    ),
}
"""The entries of a row that tell how a call is cut by each strategy, once it is taken."""


def _strategy(g: Geometry, x: Tensor, direction: str) -> tuple[str, Row]:
    taken = cuda.strategies(replace(g, cache={}), x)[DIRECTIONS.index(direction)]
    row = strategies.row_for(_strategies_device(x), direction, x.element_size())
    return taken, {entry: row[entry] for entry in DECIDES[taken]}


def _tiles_device(x: Tensor) -> tiles.Device:
    from divnorm_kernels.backends.triton.launch import device_of  # brings triton, which takes a second

    return device_of(x.device)


def _tiles(g: Geometry, x: Tensor, direction: str) -> tiles.Tiles:
    return tiles.choose(g, _tiles_device(x), direction, x.element_size(), channels_last_strides(x))


TUNABLE = {
    "cuda": Tunable(
        strategies,
        "strategies.json",
        _strategies_device,
        _strategy,
        {
            "pipeline": (0, 8192, 12288, 16384, 24576, 32768),
            "blocks": (1, 2, 3, 4),
            "cluster": (0, 4, 8, 16),
            "threads": (128, 192, 256),
            "bytes_per_thread": (32, 64, 128, 256),
            "slice_channels": (8, 16, 32, 64, 128),
            "stretch_bytes": (128, 256, 512),
            "window_rounds": (1, 2, 4, 8, 16),
            "tile_bytes": (12288, 24576, 49152),
            "staged_threads": (64, 128),
            "items": (5, 10, 20, 40),
            "row_positions": (1024, 4096, 16384),
            "cache_share": (0.05, 0.1, 0.2, 0.4),
            "finish_inside": (0, 8, 16, 32),
        },
    ),
    "triton": Tunable(
        tiles,
        "tiles.json",
        _tiles_device,
        _tiles,
        {
            "single": (0, 2304, 4608, 9216, 18432),
            "single_narrow": (0, 2304, 4608, 9216),
            "single_whole": (4096, 8192, 16384, 32768),
            "elements_per_warp": (128, 256, 512, 1024),
            "looped": (0, 200, 800, 1600),
            "looped_rows": (0.2, 0.4, 0.8),
            "looped_share": (0.5, 1.0, 2.0),
            "looped_tile": (2048, 4096, 8192),
            "looped_warps": (8, 16),
            "ordered": (True, False),
            "tile": (1024, 2048, 4096, 8192),
            "warps": (2, 4, 8),
            "apply": (1024, 2048, 4096, 8192),
            "registers": (96, 128, 168, 255),
            "programs": (2, 4, 8, 16),
            "window": (256, 512, 1024),
            "cache_share": (0.25, 0.5, 0.75),
        },
    ),
}
KEYS = ("arch", "direction", "bytes")
"""What a row is for."""


def row_of(tunable: Tunable, x: Tensor, direction: str) -> Row:
    """The row that decides for a direction of a call, made out to x's device and size of an element alone."""
    device = tunable.device(x)
    row = tunable.table.row_for(device, direction, x.element_size())
    return {**row, "arch": device.arch, "direction": direction, "bytes": x.element_size()}
