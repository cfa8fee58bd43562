"""What the forward and the backward kernel share: the table, the order of items, addresses, sums over windows."""

import torch
import triton
import triton.language as tl

from . import schema

_ENUMS = (
    schema.Strategy,
    schema.Activation,
    schema.Header,
    schema.FieldColumn,
    schema.Column,
    schema.Kind,
    schema.Buffer,
    schema.Epilogue,
)
_LAYOUT = tl.constexpr(str([*([*map(repr, e)] for e in _ENUMS), schema.FINISH_ROWS, schema.FINISH_COLUMNS]))
"""Named in `stage_entry`, so that code compiled for another table is not taken from the cache."""
_AXES = tl.constexpr(schema.AXES)
_AXIS_NUMBERS = tl.constexpr(len(schema.FieldColumn))
_COLUMNS = tl.constexpr(len(schema.Column))
_STAGES_AT = tl.constexpr(int(schema.STAGES_AT))
_MOST_STAGES = tl.constexpr(schema.MOST_STAGES)

C_1 = tl.constexpr(1.2533141373155003)
"""sqrt(pi/2), by which p = 1 makes mean abs(v) of a normal v its deviation."""

IN_FLIGHT = tl.constexpr(1 if torch.version.hip else 3)
"""The tiles of x that a loop has at work: those behind the first are on their way into shared memory.

On AMD GPUs the addresses of more tiles than one spill registers.
"""


@triton.jit
def take_item(counters, first, ORDERED: tl.constexpr):
    """The program's item. Taken from a counter, every item of lower number is under way already."""
    return tl.atomic_add(counters, 1, sem="relaxed") if ORDERED else first + tl.program_id(0)


@triton.jit
def stage_entry(table, stage):
    """Where the table describes a stage."""
    tl.static_assert(_LAYOUT != "")
    return table + _STAGES_AT + stage * _COLUMNS


@triton.jit
def locate(table, item):
    """``(place, stage, chunk)`` of an item; steps at either end name chunks that are none."""
    step_items = tl.load(table + schema.Header.STEP_ITEMS)
    place = item % step_items
    stage = tl.arange(0, _MOST_STAGES)
    begins = tl.load(
        table + _STAGES_AT + stage * _COLUMNS + schema.Column.BEGIN,
        mask=stage < tl.load(table + schema.Header.STAGES),
        other=2147483647,
    )
    found = tl.sum((begins <= place).to(tl.int32), 0) - 1
    entry = stage_entry(table, found)
    place -= tl.load(entry + schema.Column.BEGIN)
    return place, found, item // step_items - tl.load(entry + schema.Column.LAG)


@triton.jit
def wait_for(counter, count):
    """Returns once ``counter`` has reached ``count``; what was stored before the signals can be read from then on."""
    while tl.atomic_add(counter, 0, sem="relaxed") < count:  # an acquire empties the multiprocessor's cache
        pass
    while tl.atomic_add(counter, 0, sem="acquire") < count:  # one whose value nobody reads, Triton 3.6 leaves out
        pass
    tl.debug_barrier()


@triton.jit
def signal(counter):
    """Counts this program's item as done, after everything that the program has stored."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release")


@triton.jit
def stage_counter(table, counters, chunk, stage):
    """The counter of a chunk's finished items of a stage; the last stage has one counter for all chunks."""
    stage_count = tl.load(table + schema.Header.STAGES)
    return counters + tl.where(stage == stage_count - 1, 1, 2 + chunk * stage_count + stage)


@triton.jit
def wait_for_stage_before(table, counters, chunk, stage):
    """Returns once the chunk has been through the stage before ``stage``."""
    if stage > 0:
        count = tl.load(stage_entry(table, stage - 1) + schema.Column.COUNT)
        wait_for(stage_counter(table, counters, chunk, stage - 1), count)


@triton.jit
def activation_base(row, groups, per_group, pixels, CHANNELS_LAST: tl.constexpr):
    """Where a row begins in x, int64."""
    row = tl.cast(row, tl.int64)
    if CHANNELS_LAST:
        base = (row // groups) * (groups * per_group) * pixels + (row % groups) * per_group
    else:
        base = row * per_group * pixels
    return base


@triton.jit
def activation_offsets(c, p, channels, pixels, CHANNELS_LAST: tl.constexpr):
    """A tile (channel, position) within a row of x; ``channels`` counts those of all groups."""
    return p[None, :] * channels + c[:, None] if CHANNELS_LAST else c[:, None] * pixels + p[None, :]


@triton.jit
def second_pass(
    table, row, tile, per_group, pixels,
    FEATURES: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """What an item of the second pass works on: blocks of channels, each at the same piece of the positions of a row.
    Only one where neighbours in memory are channels, so that their parameters stay in registers.

    Returns where the row begins in x, the number of channels within the group and of positions, the first block of
    channels and of positions, the blocks of positions, and the tiles: those of a block of channels follow each other.
    """
    groups = tl.cast(tl.load(table + schema.Header.GROUPS), INDEX)
    splits = tl.load(table + schema.Header.SPLITS)
    blocks = tl.cast(tl.load(table + schema.Header.SPLIT_BLOCKS), INDEX)
    channel_blocks = tl.cast(tl.load(table + schema.Header.CHANNEL_BLOCKS), INDEX)
    channels = pixels if FEATURES else per_group
    positions = tl.cast(tl.load(table + schema.Header.BATCH), INDEX) if FEATURES else pixels
    first = tl.cast(tile % splits, INDEX) * blocks
    blocks = tl.minimum(blocks, tl.cdiv(positions, PIXELS) - first)
    first_channels = tl.cast(tile // splits, INDEX) * channel_blocks
    tiles = tl.minimum(channel_blocks, tl.cdiv(channels, CHANNELS) - first_channels) * blocks
    base = activation_base(row, groups, per_group, pixels, CHANNELS_LAST)
    return base, channels, positions, first_channels, first, blocks, tiles


@triton.jit
def channel_block(
    block, row, groups, per_group, channels, FEATURES: tl.constexpr, INDEX: tl.constexpr, CHANNELS: tl.constexpr
):
    """The channels of a block within the group, which of them exist, and their place among all channels."""
    c = block * CHANNELS + tl.cast(tl.arange(0, CHANNELS), INDEX)
    return c, c < channels, c if FEATURES else (row % groups) * per_group + c


@triton.jit
def reciprocal_scale(sigma, q, P: tl.constexpr):
    """1/s, at most 1/abs(sigma): s is no less than abs(sigma), also where sigma^2 underflows. A NaN stays one.

    Correctly rounded operations, which flush no small number to zero and know no divisor that is too large.
    """
    if P == 1:
        found = tl.div_rn(1.0, tl.abs(sigma) + q)
    else:
        rstd = tl.div_rn(1.0, tl.sqrt_rn(sigma * sigma + q))
        most = tl.div_rn(1.0, tl.abs(sigma))
        found = tl.where(rstd > most, most, rstd)
    return found


@triton.jit
def sign(value):
    """-1, 0 or 1; 0 for a NaN, as in torch."""
    return tl.where(value > 0, 1.0, tl.where(value < 0, -1.0, 0.0))


@triton.jit
def finite(value):
    """The value where it is finite, else 0."""
    return tl.where(value - value == 0.0, value, 0.0)


@triton.jit
def sigma_at(table, sigma, group):
    """The group's sigma, float32."""
    one = tl.load(table + schema.Header.SIGMAS) == 1
    return tl.load(sigma + tl.where(one, 0, group)).to(tl.float32)


@triton.jit
def field_count(table, p, SUPPRESSION: tl.constexpr, INDEX: tl.constexpr):
    """What the average over the field around each position divides by, float32."""
    entries = table + schema.Header.FIELDS + (_AXES * _AXIS_NUMBERS if SUPPRESSION else 0)
    count = tl.full(p.shape, 1.0, tl.float32)
    for axis in tl.static_range(_AXES):
        at = entries + axis * _AXIS_NUMBERS
        extent = tl.cast(tl.load(at + schema.FieldColumn.EXTENT), INDEX)
        stride = tl.cast(tl.load(at + schema.FieldColumn.STRIDE), INDEX)
        lo = tl.cast(tl.load(at + schema.FieldColumn.LO), INDEX)
        hi = tl.cast(tl.load(at + schema.FieldColumn.HI), INDEX)
        divisor = tl.cast(tl.load(at + schema.FieldColumn.DIVISOR), INDEX)
        i = (p // stride) % extent
        inside = tl.minimum(i + hi, extent - 1) - tl.maximum(i - lo, 0) + 1
        count *= tl.where(divisor > 0, divisor, inside).to(tl.float32)
    return count


@triton.jit
def window_sum(scratch, table, entry, row, pixels, p, inside, INDEX: tl.constexpr):
    """The sums over the windows of a stage around the positions ``p``, in a row of its source buffer.

    A window is cut into blocks of the topmost level, what is left into blocks of the level below, and so on down to
    single positions. No sum is a difference of others, so that nothing drifts and nothing outside a window enters.
    """
    extent = tl.cast(tl.load(entry + schema.Column.EXTENT), INDEX)
    stride = tl.cast(tl.load(entry + schema.Column.STRIDE), INDEX)
    lo = tl.cast(tl.load(entry + schema.Column.LO), INDEX)
    hi = tl.cast(tl.load(entry + schema.Column.HI), INDEX)
    levels = tl.load(entry + schema.Column.LEVELS)
    radix = tl.cast(tl.load(entry + schema.Column.RADIX), INDEX)
    size = tl.cast(tl.load(entry + schema.Column.SIZE), INDEX)
    most = tl.load(entry + schema.Column.BOUND)
    source = tl.load(entry + schema.Column.SOURCE)
    blocks = tl.load(table + schema.Header.LEVELS)
    i = (p // stride) % extent
    line = p - i * stride
    end = tl.minimum(i + hi + 1, extent)
    outer_stride = tl.cast(tl.load(entry + schema.Column.OUTER_STRIDE), INDEX)
    outer_extent = tl.cast(tl.load(entry + schema.Column.OUTER_EXTENT), INDEX)
    outer_lo = tl.cast(tl.load(entry + schema.Column.OUTER_LO), INDEX)
    outer_i = (p // outer_stride) % outer_extent
    total = tl.zeros(p.shape, tl.float32)
    for outer in range(tl.load(entry + schema.Column.OUTER_BOUND)):
        step = tl.cast(outer, INDEX) - outer_lo
        within = inside & (outer_i + step >= 0) & (outer_i + step < outer_extent)
        line_sum = tl.zeros(p.shape, tl.float32)
        start = tl.maximum(i - lo, 0)
        block = size
        blocks_at_most = most
        for below in range(levels + 1):
            buffer = tl.where(below == levels, source, blocks + levels - below - 1)
            values = buffer_at(scratch, table, buffer, row, pixels) + step * outer_stride
            count = (end - start) // block
            for j in range(blocks_at_most):
                at = line + (start + j * block) * stride
                line_sum += tl.load(values + at, mask=within & (j < count), other=0.0)
            start += count * block
            block = block // radix
            blocks_at_most = tl.load(entry + schema.Column.RADIX) - 1
        total += line_sum
    return total


@triton.jit
def buffer_at(scratch, table, buffer, row, pixels):
    """Where a row begins in a scratch buffer."""
    return scratch + buffer * tl.load(table + schema.Header.BUFFER) + row * pixels


@triton.jit
def map_offsets(map_row, c, p, pixels, FEATURES: tl.constexpr, WHOLE: tl.constexpr, OVER_BATCH: tl.constexpr):
    """Where the map values of a tile (channel, position) lie; broadcasts against the tile.

    Features are passed over as channels of one row, with the samples as positions.
    """
    if FEATURES:
        sample = (p * 0 if OVER_BATCH else p)[None, :]
        at = sample + c[:, None] * 0 if WHOLE else sample * pixels + c[:, None]
    else:
        at = map_row + p[None, :] * 0 if WHOLE else map_row * pixels + p[None, :]
    return at


@triton.jit
def rstd_maps(maps, table):
    """Where rstd begins in the maps."""
    return maps + tl.load(table + schema.Header.RSTD)


@triton.jit
def map_values(means, rstds, at, mask, SUMMATION: tl.constexpr, SUPPRESSION: tl.constexpr):
    """The mean and rstd at the offsets ``at``; zeros and ones where a field is absent."""
    mean = tl.zeros(at.shape, tl.float32)
    rstd = tl.full(at.shape, 1.0, tl.float32)
    if SUMMATION:
        mean = tl.load(means + at, mask=mask, other=0.0)
    if SUPPRESSION:
        rstd = tl.load(rstds + at, mask=mask, other=0.0)
    return mean, rstd


@triton.jit
def parameter(values, at, mask, absent: tl.constexpr):
    """A parameter at the offsets ``at``, float32; ``absent`` where there is none."""
    if values is None:
        found = tl.full(at.shape, absent, tl.float32)
    else:
        found = tl.load(values + at, mask=mask, other=0.0).to(tl.float32)
    return found
