"""How the seam's Triton kernels are launched: the items of a pass, the table that says so, the scratch memory."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

from torch import Tensor

from ..backends.triton.launch import Plan, device_of, planned
from ..backends.triton.schema import FINISH_COLUMNS, Header
from ..backends.triton.stages import Order, Schedule
from ..backends.triton.tiles import Tiles, in_passes, second_pass
from ..fields import Geometry
from ..layout import channels_last_strides
from . import triton_kernels as kernels

_CONSTANTS = {"CHANNEL_UNIT", "PIXEL_UNIT", "OVER_BATCH", "CHANNELS_LAST", "INDEX"}
_OF_STATISTICS = _CONSTANTS | {"CHANNELS", "PIXELS", "WINDOW"}
_OF_BACKWARD = _CONSTANTS | {"SUBTRACT_MEAN", "FEATURES", "ACTIVATION", "APPLY_CHANNELS", "APPLY_PIXELS"}
_OF_NORMALIZE = _OF_BACKWARD | {"WINDOW"}


def statistics(g: Geometry, x: Tensor) -> Iterator[Plan]:
    """Mean and variance; merged, but where a row is one tile."""
    tiles = _tiles(g, x, "forward", False)
    each = -(-prod(g.spatial) // tiles.pixels)
    buffer = g.batch * g.groups * each
    direct = each == 1 and not g.over_batch
    merge = {} if direct else {"finish": _map_rows(g), "scratch": 3 * buffer}
    yield _plan(kernels.statistics_kernel, _OF_STATISTICS, g, x, tiles, buffer, each, {Header.BUFFER: buffer}, **merge)


def normalize(g: Geometry, x: Tensor, with_l1: bool) -> Iterator[Plan]:
    """The values, and in a launch behind theirs l1."""
    tiles = _tiles(g, x, "forward", False)
    items, each = _items(g, tiles)
    l1 = {"finish": 1, "scratch": items} if with_l1 else {}
    yield _plan(kernels.normalize_kernel, _OF_NORMALIZE, g, x, tiles, items, each, _pieces(g, tiles), **l1)


def sums(g: Geometry, x: Tensor, affine: bool) -> Iterator[Plan]:
    """The sums of rows and, where ``affine``, of parameters."""
    tiles = _tiles(g, x, "backward", True)  # sums of parameters beside those of rows take registers as a residual does
    items, each = _items(g, tiles)
    entries = (each // tiles.splits if g.features else each) * (g.batch if g.over_batch else 1)
    of_rows, pieces = 3 * entries * _map_rows(g), tiles.splits * (1 if g.features else g.batch)
    matrix = pieces * g.affine_size if affine else 0
    head = {
        Header.PARTIALS: of_rows,
        Header.PARTIALS_BIAS: of_rows + matrix,
        Header.PARTIALS_THRESHOLD: of_rows + 2 * matrix,
        Header.PARTIAL_ROWS: pieces,
        Header.PARTIAL_COLUMNS: g.affine_size,
    }
    merged = [_map_rows(g), *([g.affine_size] if affine else [])]
    merge = {
        "finish": sum(-(-columns // FINISH_COLUMNS) for columns in merged),
        "scratch": of_rows + matrix * (3 if g.norm.activation == "tlu" else 2),
    }
    yield _plan(kernels.sums_kernel, _OF_BACKWARD, g, x, tiles, items, each, head | _pieces(g, tiles), **merge)


def gradient(g: Geometry, x: Tensor, residual: bool) -> Iterator[Plan]:
    """The gradients of x and of a residual."""
    tiles = _tiles(g, x, "backward", residual)
    yield _plan(kernels.gradient_kernel, _OF_BACKWARD, g, x, tiles, *_items(g, tiles), _pieces(g, tiles))


def _tiles(g: Geometry, x: Tensor, direction: str, residual: bool) -> Tiles:
    return in_passes(g, device_of(x.device), direction, x.element_size(), channels_last_strides(x), residual)


def _map_rows(g: Geometry) -> int:
    return prod(g.maps_shape[1:3])


def _items(g: Geometry, tiles: Tiles) -> tuple[int, int]:
    """The items of a pass like the second of forward and backward: all, and those of a row."""
    channels = -(-second_pass(g)[0] // (tiles.apply_channels * tiles.channel_blocks))
    each = channels * tiles.splits
    return each * (1 if g.features else g.batch * g.groups), each


def _pieces(g: Geometry, tiles: Tiles) -> dict[Header, int]:
    """How such a pass cuts a row."""
    return {
        Header.SPLITS: tiles.splits,
        Header.SPLIT_BLOCKS: -(-second_pass(g)[1] // (tiles.apply_pixels * tiles.splits)),
        Header.CHANNEL_BLOCKS: tiles.channel_blocks,
    }


def _plan(
    kernel: Any,
    taken: set[str],
    g: Geometry,
    x: Tensor,
    tiles: Tiles,
    items: int,
    each: int,
    head: dict[Header, int],
    finish: int = 0,
    scratch: int = 0,
) -> Plan:
    """A launch of ``items``, ``each`` of them for a row, and where ``finish`` says so one of as many that merge."""
    head = {
        Header.BATCH: g.batch,
        Header.GROUPS: g.groups,
        Header.FINISH: items,
        Header.STATISTICS_TILES: each,
        Header.RSTD: _map_rows(g),
        **head,
    }
    table = tuple(head.get(entry, 0) for entry in Header)
    order = Order(((0, items),), 1, finish, 0, scratch)
    return planned(kernel, g, x, channels_last_strides(x), tiles, Schedule(table, order), taken)
