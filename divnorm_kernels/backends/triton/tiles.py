"""Which tiles a call is computed in: a table kept as data (``tiles.json``), and what follows from it for a shape.

The first row of the table that matches the device, the direction and the size of an element decides:

- ``single``: the most elements, maps included, that one program holds of a row, ``single_narrow`` where its moves are
  narrower than 16 bytes; ``single_whole``: the same where the fields cover everything and there are no maps;
  ``elements_per_warp`` of them to a warp;
- ``looped``: the most positions of the rows that one program each goes through in a loop, twice. There must be
  ``looped_rows`` a multiprocessor, and those at work at once take no more than ``looped_share`` of the second-level
  cache, from which they are read the second time; ``looped_tile`` elements are a tile, ``looped_warps`` a program;
- ``tile``, ``apply``: the elements of a tile in the first and the second pass over all other rows, ``window`` the
  positions of one in the window sums, ``warps`` the warps of their programs;
- ``registers``: the most registers of a thread, but where rows are held;
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
from .schema import Strategy

VECTOR_BYTES = 16
SEGMENT_BYTES = 128
"""The shortest run of neighbouring bytes that reads at full speed."""
MOST_WARPS = 16
"""Of a program that holds a row."""
MOST_STAGED_WARPS = 8
"""Of other programs: with more, too few are at work at once for one to compute while another waits for memory."""
WARPS_PER_MULTIPROCESSOR = 32
"""Where programs hold rows: how many warps there are work for."""
FEWEST_TILES, MOST_TILES = 2, 8
"""The tiles of an item of the second pass: the next ones are on their way while one is computed."""
FEWEST_PROGRAMS = 2
"""Where the first pass has fewer programs a multiprocessor than this, each takes more channels at once."""
POSITIONS_PER_WARP = 256
"""Positions whose window sums one warp holds, at most while there are warps."""
MOST_REGISTERS, REGISTER_FILE = 255, 1 << 16
CROWDED_REGISTERS = 168
"""Of a thread of the programs of four warps that a multiprocessor has three of, where four of them would spill."""
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

    ``channels`` and ``pixels`` are the tile of the first pass, or of a whole row that is held.
    """

    strategy: Strategy
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
    channel_blocks: int
    """The blocks of channels that an item of the second pass takes."""
    items: int
    """The most programs that share the rows where these are held."""
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


def choose(
    g: Geometry, device: Device, direction: str, element_size: int, channels_last: bool, residual: bool = False
) -> Tiles:
    """The tiles for one direction of a call, which reads a residual or none, from the table."""
    return _tiles(row_for(device, direction, element_size), g, device, direction, element_size, channels_last, residual)


def in_passes(
    g: Geometry, device: Device, direction: str, element_size: int, channels_last: bool, residual: bool
) -> Tiles:
    """The tiles of passes that are launches of their own, each over all rows at once; no more warps than they fill."""
    row = row_for(device, direction, element_size)
    launches = dict.fromkeys(("single", "single_narrow", "single_whole", "looped"), 0) | {"ordered": False}
    launches["cache_share"] = 1 << 40  # all rows are one chunk
    tiles = _tiles({**row, **launches}, g, device, direction, element_size, channels_last, residual)
    largest = max(tiles.channels * tiles.pixels, tiles.apply_channels * tiles.apply_pixels)
    return replace(tiles, warps=max(1, min(tiles.warps, largest // row["elements_per_warp"])))


def candidates(
    g: Geometry, device: Device, direction: str, element_size: int, channels_last: bool, residual: bool = False
) -> Iterator[Tiles]:
    """What autotuning chooses from: the table's choice first, then variations of its row."""
    row = row_for(device, direction, element_size)
    variations: list[dict[str, Any]] = [{}, {"ordered": not row["ordered"]}, {"single": 0, "single_narrow": 0}]
    variations += [{"tile": 2 * row["tile"], "warps": 2 * row["warps"]}, {"apply": row["apply"] // 2}]
    variations += [{"elements_per_warp": row["elements_per_warp"] // 2}, {"cache_share": row["cache_share"] / 2}]
    variations += [{"programs": 2 * row["programs"]}, {"looped": 0}]
    arguments = g, device, direction, element_size, channels_last, residual
    found = [_tiles({**row, **change}, *arguments) for change in variations]
    yield from dict.fromkeys(found)


def _tiles(
    row: dict[str, Any],
    g: Geometry,
    device: Device,
    direction: str,
    element_size: int,
    channels_last: bool,
    residual: bool,
) -> Tiles:
    per_group, pixels = g.channels // g.groups, prod(g.spatial)
    rows, programs = g.batch * g.groups, row["programs"] * device.multiprocessors
    widest, longest = power_of_two(per_group), power_of_two(pixels)
    whole_row = widest * longest
    narrow = bool((per_group if channels_last else pixels) * element_size % VECTOR_BYTES)  # takes more addresses
    smooth = g.norm.activation not in (None, "relu", "tlu")
    # in backward a residual brings two more tiles, its own and its gradient's, and a threshold the sums of its gradient
    crowded = direction == "backward" and (residual or g.norm.activation == "tlu")
    if g.whole:
        # beside the largest rows there are no registers for a slope
        held, limit = whole_row, row["single_whole"] // (2 if smooth and direction == "backward" else 1)
    else:
        held, limit = whole_row + longest, row["single_narrow" if narrow else "single"]
    shared = max(2, min(widest, 8))  # channels that share what a program keeps of a position
    single = not g.over_batch and held <= limit
    tiles = Tiles(
        strategy=Strategy.SINGLE if single else Strategy.STAGED,
        ordered=row["ordered"],
        warps=row["warps"],
        registers=row["registers"],
        channels=widest,
        pixels=longest,
        window=max(32, min(row["window"], MERGE_BLOCK if g.whole else longest)),
        apply_channels=1,
        apply_pixels=1,
        splits=1,
        channel_blocks=1,
        items=programs,
        chunk_samples=_chunk(row, g, device, direction, element_size, residual),
    )
    if single:
        wanted = max(whole_row // row["elements_per_warp"], 0 if g.whole else longest // POSITIONS_PER_WARP)
        warps = max(1, min(MOST_WARPS, wanted))
        registers = None if row["registers"] is None else most_registers(warps)
        # the partial sums of features' parameters are as many as the programs
        share = row["programs"] if g.features else max(1, WARPS_PER_MULTIPROCESSOR // warps)
        return replace(tiles, warps=warps, registers=registers, items=share * device.multiprocessors)

    # half of a looped tile of a half type would move 8 bytes at a time
    looped = _looped(row, g, device, direction, element_size, residual) and not (crowded and element_size == 2)
    shortest, fewest = max(1, SEGMENT_BYTES // element_size), FEWEST_PROGRAMS * device.multiprocessors
    if looped:
        tile, apply, warps = row["looped_tile"], row["looped_tile"], row["looped_warps"]
    else:
        tile, apply, warps = row["tile"], row["apply"], row["warps"]
    # one chunk begins while the one before ends
    at_once = rows if g.over_batch or g.features else min(rows, 2 * tiles.chunk_samples * g.groups)
    if narrow:
        tile, apply = tile // 2, apply // 2
    # merges take registers beside those of a tile, most in forward, whose statistics are three numbers a position; so
    # does a smooth activation, in backward in either pass; of single channels a tile holds half of what it may
    smooth = smooth and not looped and per_group > 1
    if (g.whole and (direction == "forward" or element_size == 4)) or (smooth and direction == "backward"):
        tile //= 2
    if g.whole and element_size == 4:
        apply //= 2
    if smooth or g.features:
        apply //= 2  # the maps of features are as large as x and take registers like it
    if residual and looped and direction == "forward" and element_size == 4:
        apply //= 2  # on their way are tiles of x and of the residual: 128 KiB, where some have 99
    if crowded:
        # but no thread moves less than 16 bytes, of single channels that of half a tile
        least = 32 * warps * VECTOR_BYTES // element_size * (2 if per_group == 1 else 1)
        tile, apply = (min(size, max(size // 2, least)) for size in (tile, apply))
    if channels_last:
        channels = min(widest, tile, max(shortest, tile // 8))
        positions = tile // channels
        floor = max(1, min(4, longest))
    else:
        positions = tile // shared
        floor = min(shortest, longest)
    positions = min(positions, longest)
    if not looped:
        while positions > floor and at_once * -(-pixels // positions) < programs:
            positions //= 2
        while warps < MOST_STAGED_WARPS and tile // positions < widest and at_once * -(-pixels // positions) < fewest:
            warps, tile = 2 * warps, 2 * tile
    channels = min(widest, tile // positions)

    registers = row["registers"]
    if registers is not None:
        registers = min(max(registers, CROWDED_REGISTERS * crowded), most_registers(warps))
    neighbours_are_channels = channels_last or g.features
    parameters, repeats = second_pass(g)
    if neighbours_are_channels:
        apply_channels = min(power_of_two(parameters), apply, max(shortest, apply // 16))
        apply_pixels = min(power_of_two(repeats), apply // apply_channels)
    else:
        apply_pixels = min(power_of_two(repeats), apply // shared)
        apply_channels = min(power_of_two(parameters), apply // apply_pixels)
    blocks, channel_blocks = -(-repeats // apply_pixels), -(-parameters // apply_channels)
    if looped:
        each = blocks * channel_blocks
    else:
        share = (1 if g.features else at_once) * blocks * channel_blocks // programs
        # every piece of the positions has partial sums of its own
        each = max(FEWEST_TILES, share if g.features else min(share, MOST_TILES), -(-blocks // programs))
    return replace(
        tiles,
        strategy=Strategy.LOOPED if looped else Strategy.STAGED,
        ordered=row["ordered"] and not looped,
        warps=warps,
        registers=registers,
        channels=channels,
        pixels=positions,
        window=max(tiles.window, longest) if looped and not g.whole else tiles.window,
        apply_channels=apply_channels,
        apply_pixels=apply_pixels,
        splits=-(-blocks // each),
        channel_blocks=1 if neighbours_are_channels else max(1, min(channel_blocks, each // blocks)),
    )


def second_pass(g: Geometry) -> tuple[int, int]:
    """(channels, positions) of a row in the second pass, where features stand as channels of one row."""
    return (g.spatial[0], g.batch) if g.features else (g.channels // g.groups, prod(g.spatial))


def deviations_apart(g: Geometry, backward: bool) -> bool:
    """Whether the mean of abs(v) over the channels takes a pass of its own: the squares alone are told before mu is."""
    return not backward and g.norm.p == 1 and g.summation is not None and g.suppression is not None


def steps_apart(g: Geometry, backward: bool) -> int:
    """The steps of a schedule from a chunk's statistics to its second pass.

    One for the window sums of each field, or for a merge, and one for the pass itself: what an item waits for was begun
    in the step before. A pass for the deviations takes one more, and has a merge of its own.
    """
    fields = sum(field is not None for field in (g.summation, g.suppression))
    apart = deviations_apart(g, backward)
    return (1 + apart if g.whole else fields) + apart + 1 if fields else 0


def _bytes(g: Geometry, direction: str, element_size: int, residual: bool) -> int:
    """What a direction reads of a sample, twice."""
    return max(1, (1 if direction == "forward" else 2 + residual) * g.channels * prod(g.spatial) * element_size)


def _looped(
    row: dict[str, Any], g: Geometry, device: Device, direction: str, element_size: int, residual: bool
) -> bool:
    """Whether one program goes through each row that none holds."""
    rows = g.batch * g.groups
    if g.over_batch or g.features or not steps_apart(g, direction == "backward") or prod(g.spatial) > row["looped"]:
        return False
    at_work = min(rows, device.multiprocessors) * _bytes(g, direction, element_size, residual) // g.groups
    return rows >= row["looped_rows"] * device.multiprocessors and at_work <= row["looped_share"] * device.cache


def _chunk(row: dict[str, Any], g: Geometry, device: Device, direction: str, element_size: int, residual: bool) -> int:
    """The samples of a chunk: all of them where they fit the cache together."""
    sample = _bytes(g, direction, element_size, residual)
    share, at_work = int(row["cache_share"] * device.cache), 1 + steps_apart(g, direction == "backward")
    return g.batch if g.batch * sample <= share else max(1, share // (at_work * sample))
