"""Which tiles a call is computed in: a table kept as data (``tiles.json``), and what follows from it for a shape.

The first row of the table that matches the device, the direction and the size of an element decides:

- ``single``: the most elements, maps included, that one program holds of a row; ``single_whole``: the same where the
  fields cover everything and there are no maps; ``elements_per_warp`` of them to a warp;
- ``tile``, ``apply``: the elements of a tile in the first and the second pass over x, ``window`` the positions of one
  in the window sums, ``warps`` the warps of their programs, ``registers`` the most registers of a thread in them;
- ``programs``: the programs per multiprocessor that a pass is split into at least, where it can be;
- ``cache_share``: the part of the second-level cache for the chunks of x, and of dy, that are at work;
- ``ordered``: whether one launch does all stages, its programs waiting for each other, or each stage is a launch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.resources import files
from math import prod
from typing import Any

from ...fields import Geometry

CHUNKS_AT_WORK = 3
"""Chunks between their first and their second pass."""
VECTOR_BYTES = 16
SEGMENT_BYTES = 128
"""The shortest run of neighbouring bytes that reads at full speed."""
MOST_WARPS = 16
WARPS_PER_MULTIPROCESSOR = 32
"""Where each row takes one program: how many warps there are work for."""
FEWEST_PROGRAMS = 2
"""Where the first pass has fewer programs a multiprocessor than this, each takes more channels at once."""
POSITIONS_PER_WARP = 256
"""Positions whose window sums one warp holds, at most while there are warps."""
MOST_REGISTERS, REGISTER_FILE = 255, 1 << 16
MERGE_BLOCK = 256
"""Tiles of a row whose statistics are merged at once."""

ROWS: list[dict[str, Any]] = json.loads((files(__package__) / "tiles.json").read_text())["rows"]


@dataclass(frozen=True)
class Device:
    """What the choice depends on: the table's name of the device, its multiprocessors and second-level cache."""

    arch: str
    family: str
    multiprocessors: int
    cache: int


@dataclass(frozen=True)
class Tiles:
    """How one direction of a call is cut; extents of tiles are powers of two.

    ``channels`` and ``pixels`` are the tile of the first pass, or where ``single`` holds of a whole row.
    """

    single: bool
    ordered: bool
    warps: int
    registers: int | None
    """The most registers of a thread; ``None`` leaves them to the compiler."""
    channels: int
    pixels: int
    window: int
    apply_channels: int
    apply_pixels: int
    splits: int
    items: int
    """The most programs that share the rows where each takes one."""
    chunk_samples: int


def power_of_two(number: int) -> int:
    """The smallest power of two that is not less than ``number``."""
    return 1 << max(0, number - 1).bit_length()


def most_registers(warps: int) -> int:
    """The most registers that a thread of a program can have on an NVIDIA GPU."""
    return min(MOST_REGISTERS, REGISTER_FILE // (32 * warps))


def row_for(device: Device, direction: str, element_size: int) -> dict[str, Any]:
    """The first matching row of the table."""
    wanted = {"arch": (device.arch, device.family), "direction": (direction,), "bytes": (element_size,)}
    for row in ROWS:
        if all(row[key] == "any" or row[key] in values for key, values in wanted.items()):
            return row
    raise LookupError(f"tiles.json has no row for {device}, {direction}, {element_size} bytes")


def choose(g: Geometry, device: Device, direction: str, element_size: int, channels_last: bool) -> Tiles:
    """The tiles for one direction of a call, from the table."""
    return _tiles(row_for(device, direction, element_size), g, device, direction, element_size, channels_last)


def candidates(g: Geometry, device: Device, direction: str, element_size: int, channels_last: bool) -> Iterator[Tiles]:
    """What autotuning chooses from: the table's choice first, then variations of its row."""
    row = row_for(device, direction, element_size)
    variations: list[dict[str, Any]] = [{}, {"ordered": not row["ordered"]}, {"single": 0}]
    variations += [{"tile": 2 * row["tile"], "warps": 2 * row["warps"]}, {"apply": row["apply"] // 2}]
    variations += [{"elements_per_warp": row["elements_per_warp"] // 2}, {"cache_share": row["cache_share"] / 2}]
    variations += [{"programs": 2 * row["programs"]}]
    found = [_tiles({**row, **change}, g, device, direction, element_size, channels_last) for change in variations]
    yield from dict.fromkeys(found)


def _tiles(
    row: dict[str, Any], g: Geometry, device: Device, direction: str, element_size: int, channels_last: bool
) -> Tiles:
    per_group, pixels = g.channels // g.groups, prod(g.spatial)
    rows, programs = g.batch * g.groups, row["programs"] * device.multiprocessors
    widest, longest = power_of_two(per_group), power_of_two(pixels)
    whole_row = widest * longest
    held, limit = (whole_row, row["single_whole"]) if g.whole else (whole_row + longest, row["single"])
    shared = max(2, min(widest, 8))  # channels that share what a program keeps of a position
    tiles = Tiles(
        single=not g.over_batch and held <= limit,
        ordered=row["ordered"],
        warps=row["warps"],
        registers=row["registers"],
        channels=widest,
        pixels=longest,
        window=max(32, min(row["window"], MERGE_BLOCK if g.whole else longest)),
        apply_channels=1,
        apply_pixels=1,
        splits=1,
        items=programs,
        chunk_samples=_chunk(row, g, device, direction, element_size),
    )
    if tiles.single:
        wanted = max(whole_row // row["elements_per_warp"], 0 if g.whole else longest // POSITIONS_PER_WARP)
        warps = max(1, min(MOST_WARPS, wanted))
        registers = None if row["registers"] is None else most_registers(warps)
        # the partial sums of features' parameters are as many as the programs
        share = row["programs"] if g.features else max(1, WARPS_PER_MULTIPROCESSOR // warps)
        return replace(tiles, warps=warps, registers=registers, items=share * device.multiprocessors)

    shortest, fewest = max(1, SEGMENT_BYTES // element_size), FEWEST_PROGRAMS * device.multiprocessors
    tile, apply = row["tile"], row["apply"]
    neighbours = per_group if channels_last else pixels
    if (neighbours * element_size) % VECTOR_BYTES:
        tile, apply = tile // 2, apply // 2  # narrow loads need more registers for addresses
    if g.features:
        apply //= 2  # the maps are as large as x and take registers like it
    if channels_last:
        channels = min(widest, tile, max(shortest, tile // 8))
        positions = tile // channels
        floor = max(1, min(4, longest))
    else:
        positions = tile // shared
        floor = min(shortest, longest)
    positions = min(positions, longest)
    while positions > floor and rows * -(-pixels // positions) < programs:
        positions //= 2
    warps = row["warps"]
    while warps < MOST_WARPS and tile // positions < widest and rows * -(-pixels // positions) < fewest:
        warps, tile, apply = 2 * warps, 2 * tile, 2 * apply
    channels = min(widest, tile // positions)

    neighbours_are_channels = channels_last or g.features
    parameters, repeats = (g.spatial[0], g.batch) if g.features else (per_group, pixels)
    if neighbours_are_channels:
        apply_channels = min(power_of_two(parameters), apply, max(shortest, apply // 16))
        apply_pixels = min(power_of_two(repeats), apply // apply_channels)
    else:
        apply_pixels = min(power_of_two(repeats), apply // shared)
        apply_channels = min(power_of_two(parameters), apply // apply_pixels)
    blocks = -(-repeats // apply_pixels)
    pieces = (1 if g.features else rows) * -(-parameters // apply_channels)
    return replace(
        tiles,
        warps=warps,
        registers=None if row["registers"] is None else min(row["registers"], most_registers(warps)),
        channels=channels,
        pixels=positions,
        apply_channels=apply_channels,
        apply_pixels=apply_pixels,
        splits=max(1, min(blocks, programs // pieces)),
    )


def _chunk(row: dict[str, Any], g: Geometry, device: Device, direction: str, element_size: int) -> int:
    """The samples of a chunk: all of them where they fit the cache together."""
    tensors = 1 if direction == "forward" else 2
    sample = max(1, tensors * g.channels * prod(g.spatial) * element_size)
    share = int(row["cache_share"] * device.cache)
    return g.batch if g.batch * sample <= share else max(1, share // (CHUNKS_AT_WORK * sample))
