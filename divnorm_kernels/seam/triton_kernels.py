"""The seam's Triton kernels: a pass over x each, the second launch of a kernel merges what its first has summed up.

Passes are cut as those of `divnorm_kernels.backends.triton`, and the table says how, but it has no stages: a row has
``STATISTICS_TILES`` items, items from ``FINISH`` on merge, and ``RSTD`` is the number of map rows.
"""

import triton
import triton.language as tl

from ..backends.triton import schema
from ..backends.triton.device import (
    IN_FLIGHT,
    activation_base,
    activation_offsets,
    buffer_at,
    channel_block,
    map_values,
    second_pass,
    sign,
)
from ..backends.triton.epilogue import parameters, passed, stopped, with_residual
from ..backends.triton.finish import sum_columns, sum_partials
from ..backends.triton.forward_kernel import apply
from ..backends.triton.forward_maps import channel_statistics, merge_positions, merge_whole


@triton.jit(do_not_specialize=["first", "channel_units", "pixel_units"])
def statistics_kernel(
    x, mean, variance, scratch, table, first, channel_units, pixel_units,
    CHANNEL_UNIT: tl.constexpr, PIXEL_UNIT: tl.constexpr, OVER_BATCH: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    INDEX: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Mean and variance of the rows; without ``scratch``, where a row is one tile, there is nothing to merge.

    For x and the units see `divnorm_kernels.backends.triton.forward_kernel`.
    """
    per_group = tl.cast(channel_units, INDEX) * CHANNEL_UNIT
    pixels = tl.cast(pixel_units, INDEX) * PIXEL_UNIT
    item = first + tl.program_id(0)
    if item >= tl.load(table + schema.Header.FINISH):
        if scratch is not None:
            row = item - tl.load(table + schema.Header.FINISH)
            together, spread = merge_whole(scratch, table, row, PIXELS, pixels, 2, OVER_BATCH, WINDOW, 0, 2)
            tl.store(mean + row, together)
            tl.store(variance + row, spread)
    else:
        groups = tl.cast(tl.load(table + schema.Header.GROUPS), INDEX)
        tiles = tl.load(table + schema.Header.STATISTICS_TILES)
        row = item // tiles
        begin = tl.cast(item % tiles, INDEX) * PIXELS
        p = begin + tl.cast(tl.arange(0, PIXELS), INDEX)
        inside = p < pixels
        base = activation_base(row, groups, per_group, pixels, CHANNELS_LAST)
        means, variances, rests = channel_statistics(
            x, base, p, inside, groups, per_group, pixels, 2, True, True, CHANNELS_LAST, INDEX, CHANNELS
        )
        count = tl.minimum(pixels - begin, PIXELS).to(tl.float32)
        together, left, spread = merge_positions(means, rests, variances, inside, count)
        if scratch is None:
            tl.store(mean + row, together + left)
            tl.store(variance + row, spread)
        else:
            tl.store(buffer_at(scratch, table, schema.Buffer.MEAN, 0, 0) + item, together)
            tl.store(buffer_at(scratch, table, schema.Buffer.FIRST, 0, 0) + item, left)
            tl.store(buffer_at(scratch, table, schema.Buffer.VARIANCE, 0, 0) + item, spread)


@triton.jit(do_not_specialize=["first", "channel_units", "pixel_units"])
def normalize_kernel(
    x, y, weight, bias, residual, threshold, rows, l1, numel, scratch, table, first, channel_units, pixel_units,
    CHANNEL_UNIT: tl.constexpr, PIXEL_UNIT: tl.constexpr, SUBTRACT_MEAN: tl.constexpr, OVER_BATCH: tl.constexpr,
    FEATURES: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr,
    WINDOW: tl.constexpr, APPLY_CHANNELS: tl.constexpr, APPLY_PIXELS: tl.constexpr,
):  # fmt: skip
    """Makes y by mean and 1/s of the rows; ``l1``, where wanted, is the mean of abs(v) over ``numel`` elements."""
    L1: tl.constexpr = l1 is not None
    item = first + tl.program_id(0)
    if item >= tl.load(table + schema.Header.FINISH):
        if L1:
            count = tl.load(table + schema.Header.FINISH)
            tl.store(l1, tl.div_rn(sum_partials(scratch, count, WINDOW), numel))
    else:
        tiles = tl.load(table + schema.Header.STATISTICS_TILES)
        apply(
            x, y, weight, bias, residual, threshold, rows, scratch, table, item // tiles, item % tiles, tiles,
            tl.cast(channel_units, INDEX) * CHANNEL_UNIT, tl.cast(pixel_units, INDEX) * PIXEL_UNIT,
            SUBTRACT_MEAN, True, True, True, OVER_BATCH, FEATURES, CHANNELS_LAST, INDEX, L1, ACTIVATION,
            APPLY_CHANNELS, APPLY_PIXELS,
        )  # fmt: skip


@triton.jit
def _places(
    block, blocks, first_channels, first, row, groups, per_group, pixels, channels, positions,
    OVER_BATCH: tl.constexpr, FEATURES: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Of a tile: channels and positions, which of them exist, and where they lie in a row of x and in the rows."""
    c, inside_c, channel = channel_block(
        first_channels + block // blocks, row, groups, per_group, channels, FEATURES, INDEX, CHANNELS
    )
    p = (first + block % blocks) * PIXELS + tl.cast(tl.arange(0, PIXELS), INDEX)
    at = activation_offsets(c, p, pixels if FEATURES else groups * per_group, pixels, CHANNELS_LAST or FEATURES)
    map_row = row % groups if OVER_BATCH else row
    rows_at = p[None, :] if FEATURES and not OVER_BATCH else map_row + p[None, :] * 0
    return channel, inside_c, p, p < positions, at, rows_at


@triton.jit
def _store_sums(
    scratch, row, tile, p, mask, groups, each, splits, entries, map_rows, pull, product, signs,
    OVER_BATCH: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Stores what an item has summed up of a row, of features at the samples ``p``, as an entry of its map row."""
    part = tile // splits if FEATURES else tile
    if OVER_BATCH:
        at = ((p if FEATURES else row // groups) * each + part) * map_rows + row % groups
    else:
        at = part * map_rows + (p if FEATURES else row)
    tl.store(scratch + at, pull, mask=mask)
    tl.store(scratch + entries * map_rows + at, product, mask=mask)
    tl.store(scratch + 2 * entries * map_rows + at, signs, mask=mask)


@triton.jit(do_not_specialize=["first", "channel_units", "pixel_units"])
def sums_kernel(
    x, dy, weight, bias, residual, threshold, rows, dweight, dbias, dthreshold, sums, scratch,
    L1: tl.constexpr, table, first, channel_units, pixel_units,
    CHANNEL_UNIT: tl.constexpr, PIXEL_UNIT: tl.constexpr, SUBTRACT_MEAN: tl.constexpr, OVER_BATCH: tl.constexpr,
    FEATURES: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr,
    APPLY_CHANNELS: tl.constexpr, APPLY_PIXELS: tl.constexpr,
):  # fmt: skip
    """The gradients of the parameters and what those of the rows are made of.

    ``sums``, (3, map rows), are merged from what ``scratch`` begins with, (3, entries, map rows): an entry is an item
    of a row, over the batch of any sample's. Absent are gradients that nobody wants.
    """
    CHANNELS: tl.constexpr = APPLY_CHANNELS
    PIXELS: tl.constexpr = APPLY_PIXELS
    THRESHOLD: tl.constexpr = dthreshold is not None
    AFFINE: tl.constexpr = dweight is not None or dbias is not None or THRESHOLD
    per_group = tl.cast(channel_units, INDEX) * CHANNEL_UNIT
    pixels = tl.cast(pixel_units, INDEX) * PIXEL_UNIT
    groups = tl.cast(tl.load(table + schema.Header.GROUPS), INDEX)
    tiles = tl.load(table + schema.Header.STATISTICS_TILES)
    splits = tl.load(table + schema.Header.SPLITS)
    map_rows = tl.load(table + schema.Header.RSTD)
    each = tiles // splits if FEATURES else tiles  # of a sample; a feature's splits are of the samples
    entries = each * tl.load(table + schema.Header.BATCH) if OVER_BATCH else each
    item = first + tl.program_id(0)
    finish = tl.load(table + schema.Header.FINISH)
    if item >= finish:
        block = item - finish
        columns = tl.load(table + schema.Header.PARTIAL_COLUMNS)
        blocks = tl.cdiv(columns, schema.FINISH_COLUMNS) if AFFINE else 0
        if block >= blocks:
            for which in tl.static_range(3):
                sum_columns(
                    scratch + which * entries * map_rows, sums + which * map_rows, entries, map_rows, block - blocks,
                    schema.FINISH_ROWS, schema.FINISH_COLUMNS,
                )  # fmt: skip
        elif AFFINE:
            pieces = tl.load(table + schema.Header.PARTIAL_ROWS)
            if dweight is not None:
                at = scratch + tl.load(table + schema.Header.PARTIALS)
                sum_columns(at, dweight, pieces, columns, block, schema.FINISH_ROWS, schema.FINISH_COLUMNS)
            if dbias is not None:
                at = scratch + tl.load(table + schema.Header.PARTIALS_BIAS)
                sum_columns(at, dbias, pieces, columns, block, schema.FINISH_ROWS, schema.FINISH_COLUMNS)
            if THRESHOLD:
                at = scratch + tl.load(table + schema.Header.PARTIALS_THRESHOLD)
                sum_columns(at, dthreshold, pieces, columns, block, schema.FINISH_ROWS, schema.FINISH_COLUMNS)
    else:
        row = item // tiles
        tile = item % tiles
        base, channels, positions, first_channels, begin, blocks, count = second_pass(
            table, row, tile, per_group, pixels, FEATURES, CHANNELS_LAST, INDEX, CHANNELS, PIXELS
        )
        pull = tl.zeros([PIXELS], tl.float32)
        product = tl.zeros([PIXELS], tl.float32)
        signs = tl.zeros([PIXELS], tl.float32)
        of_weight = tl.zeros([CHANNELS, PIXELS], tl.float32)
        of_bias = tl.zeros([CHANNELS, PIXELS], tl.float32)
        of_threshold = tl.zeros([CHANNELS, PIXELS], tl.float32)
        for block in tl.range(0, count, num_stages=IN_FLIGHT):
            channel, inside_c, p, inside, at, rows_at = _places(
                block, blocks, first_channels, begin, row, groups, per_group, pixels, channels, positions,
                OVER_BATCH, FEATURES, CHANNELS_LAST, INDEX, CHANNELS, PIXELS,
            )  # fmt: skip
            mask = inside_c[:, None] & inside[None, :]
            mean, rstd = map_values(rows, rows + map_rows, rows_at, inside[None, :], True, True)
            scale, lift, tau = parameters(weight, bias, threshold, channel, inside_c, 1)
            values = tl.load(x + base + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
            upstream = tl.load(dy + base + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
            centred = tl.where(mask, values - mean, 0.0)
            numerator = centred if SUBTRACT_MEAN else values
            normalized = numerator * rstd
            value = with_residual(normalized * scale + lift, residual, base, at, mask, "evict_first")
            if THRESHOLD:
                of_threshold += stopped(upstream, value, tau)
            upstream = passed(upstream, value, tau, mask, ACTIVATION)
            gradient = upstream * scale
            if FEATURES:  # the positions are samples
                pull = tl.sum(gradient, 0)
                product = tl.sum(gradient * numerator, 0)
                if L1:
                    signs = tl.sum(sign(centred), 0)
                _store_sums(
                    scratch, row, tile, p, inside, groups, each, splits, entries, map_rows, pull, product, signs,
                    OVER_BATCH, FEATURES,
                )  # fmt: skip
            else:
                pull += tl.sum(gradient, 0)
                product += tl.sum(gradient * numerator, 0)
                if L1:
                    signs += tl.sum(sign(centred), 0)
            if AFFINE:
                of_weight += tl.where(mask, upstream * normalized, 0.0)
                of_bias += upstream
                if block % blocks == blocks - 1:
                    piece = (row // groups) * splits + tile % splits
                    to = scratch + piece * tl.load(table + schema.Header.PARTIAL_COLUMNS) + channel
                    tl.store(to + tl.load(table + schema.Header.PARTIALS), tl.sum(of_weight, 1), mask=inside_c)
                    tl.store(to + tl.load(table + schema.Header.PARTIALS_BIAS), tl.sum(of_bias, 1), mask=inside_c)
                    if THRESHOLD:
                        thresholds = to + tl.load(table + schema.Header.PARTIALS_THRESHOLD)
                        tl.store(thresholds, tl.sum(of_threshold, 1), mask=inside_c)
                        of_threshold = tl.zeros([CHANNELS, PIXELS], tl.float32)
                    of_weight = tl.zeros([CHANNELS, PIXELS], tl.float32)
                    of_bias = tl.zeros([CHANNELS, PIXELS], tl.float32)
        if not FEATURES:
            _store_sums(
                scratch, row, tile, 0, None, groups, each, splits, entries, map_rows,
                tl.sum(pull, 0), tl.sum(product, 0), tl.sum(signs, 0), OVER_BATCH, FEATURES,
            )  # fmt: skip


@triton.jit(do_not_specialize=["first", "channel_units", "pixel_units"])
def gradient_kernel(
    x, dy, dx, dresidual, weight, bias, residual, threshold, rows, slopes, l1_scale,
    table, first, channel_units, pixel_units,
    CHANNEL_UNIT: tl.constexpr, PIXEL_UNIT: tl.constexpr, SUBTRACT_MEAN: tl.constexpr, OVER_BATCH: tl.constexpr,
    FEATURES: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr,
    APPLY_CHANNELS: tl.constexpr, APPLY_PIXELS: tl.constexpr,
):  # fmt: skip
    """Makes dx and dresidual, absent where nobody wants them; ``slopes`` as in `divnorm_kernels.seam.backends`."""
    CHANNELS: tl.constexpr = APPLY_CHANNELS
    PIXELS: tl.constexpr = APPLY_PIXELS
    per_group = tl.cast(channel_units, INDEX) * CHANNEL_UNIT
    pixels = tl.cast(pixel_units, INDEX) * PIXEL_UNIT
    groups = tl.cast(tl.load(table + schema.Header.GROUPS), INDEX)
    tiles = tl.load(table + schema.Header.STATISTICS_TILES)
    map_rows = tl.load(table + schema.Header.RSTD)
    item = first + tl.program_id(0)
    row = item // tiles
    base, channels, positions, first_channels, begin, blocks, count = second_pass(
        table, row, item % tiles, per_group, pixels, FEATURES, CHANNELS_LAST, INDEX, CHANNELS, PIXELS
    )
    of_l1 = 0.0 if l1_scale is None else tl.load(l1_scale)
    for block in tl.range(0, count, num_stages=IN_FLIGHT):
        channel, inside_c, _, inside, at, rows_at = _places(
            block, blocks, first_channels, begin, row, groups, per_group, pixels, channels, positions,
            OVER_BATCH, FEATURES, CHANNELS_LAST, INDEX, CHANNELS, PIXELS,
        )  # fmt: skip
        mask = inside_c[:, None] & inside[None, :]
        mean, rstd = map_values(rows, rows + map_rows, rows_at, inside[None, :], True, True)
        slope, shift = map_values(slopes, slopes + map_rows, rows_at, inside[None, :], True, True)
        scale, lift, tau = parameters(weight, bias, threshold, channel, inside_c, 1)
        values = tl.load(x + base + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        upstream = tl.load(dy + base + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        centred = values - mean
        normalized = (centred if SUBTRACT_MEAN else values) * rstd
        value = with_residual(normalized * scale + lift, residual, base, at, mask, "evict_first")
        upstream = passed(upstream, value, tau, mask, ACTIVATION)
        if dresidual is not None:
            rounded = upstream.to(dresidual.dtype.element_ty)
            tl.store(dresidual + base + at, rounded, mask=mask, eviction_policy="evict_first")
        if dx is not None:
            result = (upstream * scale - slope * centred) * rstd - shift
            if l1_scale is not None:
                result += of_l1 * sign(centred)
            tl.store(dx + base + at, result.to(dx.dtype.element_ty), mask=mask, eviction_policy="evict_first")
