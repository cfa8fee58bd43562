"""The forward kernel's way to the maps: channel statistics, merges and window sums."""

import triton
import triton.language as tl

from . import schema
from .device import (
    C_1,
    IN_FLIGHT,
    activation_base,
    activation_offsets,
    buffer_at,
    field_count,
    finite,
    map_offsets,
    reciprocal_scale,
    sigma_at,
    window_sum,
)


@triton.jit
def channel_statistics(
    x, base, p, inside, groups, per_group, pixels, P: tl.constexpr, SUMMATION: tl.constexpr, WHOLE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean, mean squared distance from it, and under ``WHOLE`` what rounding left of the mean, over the channels of a
    group at every position; merged chunk by chunk.

    Without a summation field the distance is from zero. For p = 1 it is not squared, and waits for mu where there is
    one.
    """
    mean = tl.zeros(p.shape, tl.float32)
    rest = tl.zeros(p.shape, tl.float32)
    squares = tl.zeros(p.shape, tl.float32)
    if CHANNELS == 1:  # all that a group has, as the tiles are cut: nothing to merge, and no division a number
        at = activation_offsets(tl.cast(tl.arange(0, 1), INDEX), p, groups * per_group, pixels, CHANNELS_LAST)
        values = tl.load(x + base + at, mask=inside[None, :], other=0.0, eviction_policy="evict_last")
        only = tl.sum(values.to(tl.float32), 0)
        if SUMMATION:
            mean = only
        else:
            squares = powers(only, P)
    else:
        for begin in tl.range(0, per_group, CHANNELS, num_stages=IN_FLIGHT):
            c = tl.cast(begin + tl.arange(0, CHANNELS), INDEX)
            mask = (c < per_group)[:, None] & inside[None, :]
            at = activation_offsets(c, p, groups * per_group, pixels, CHANNELS_LAST)
            values = tl.load(x + base + at, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
            if SUMMATION:
                count = tl.minimum(per_group - begin, CHANNELS).to(tl.float32)
                together = begin + count
                chunk_mean = tl.div_rn(tl.sum(values, 0), count)
                centred = tl.where(mask, values - chunk_mean[None, :], 0.0)
                delta = chunk_mean - mean
                share = tl.div_rn(count, together)
                # about an infinite mean there is no step
                step = tl.where(delta - delta == 0.0, delta * share, chunk_mean)
                moved = mean + step
                if WHOLE:
                    further = tl.div_rn(tl.sum(centred, 0), count) - rest
                    delta += further
                    rest = step - (moved - mean) + rest + further * share
                mean = moved
                if P == 2:
                    squares += tl.sum(centred * centred, 0) + delta * tl.div_rn(begin * count, together) * delta
            else:
                squares += tl.sum(powers(values, P), 0)
        squares = tl.div_rn(squares, per_group.to(tl.float32))
    return mean, squares, finite(rest)


@triton.jit
def merge_positions(mean, rest, variance, inside, count):
    """Mean, what rounding left of it, and variance over positions, from those over the channels at each.

    Far from zero the rounding of means, times distances between them, would be most of the variance's error.
    """
    together = tl.div_rn(tl.sum(tl.where(inside, mean, 0.0), 0), count)
    centred = mean - together + rest
    left = finite(tl.div_rn(tl.sum(tl.where(inside, centred, 0.0), 0), count))
    centred -= left
    variance = tl.div_rn(tl.sum(tl.where(inside, variance + centred * centred, 0.0), 0), count)
    return together, left, variance


@triton.jit
def powers(value, P: tl.constexpr):
    """abs(value)^p."""
    return value * value if P == 2 else tl.abs(value)


@triton.jit
def _rstd(table, sigma, sigma_value, map_row, q, P: tl.constexpr):
    """1/s at a row of the maps."""
    group = map_row % tl.load(table + schema.Header.GROUPS)
    return reciprocal_scale(sigma_value if sigma is None else sigma_at(table, sigma, group), q, P)


@triton.jit
def store_row(
    maps, table, sigma, sigma_value, map_row, mean, variance,
    P: tl.constexpr, SUMMATION: tl.constexpr, SUPPRESSION: tl.constexpr,
):  # fmt: skip
    """Stores the maps of a row whose fields cover everything; returns rstd. For p = 1 ``variance`` is mean abs(v)."""
    rstd = 1.0
    if SUMMATION:
        tl.store(maps + map_row, mean)
    if SUPPRESSION:
        if P == 1:
            variance *= C_1
        rstd = _rstd(table, sigma, sigma_value, map_row, variance, P)
        tl.store(maps + tl.load(table + schema.Header.RSTD) + map_row, rstd)
        kept = tl.load(table + schema.Header.VARIANCE)
        if kept > 0:
            tl.store(maps + kept + map_row, variance if P == 2 else variance * variance)
    return rstd


@triton.jit
def merge_whole(
    scratch, table, row, per_tile, pixels,
    P: tl.constexpr, OVER_BATCH: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Mean and variance of everything from those of the tiles, of one row or of a group's rows in all samples.

    The sweeps ``FIRST`` to ``LAST`` over the tiles: two for the mean, and a third for the variance about it, which for
    p = 1 is mean abs(v).
    """
    groups = tl.load(table + schema.Header.GROUPS)
    tiles = tl.load(table + schema.Header.STATISTICS_TILES)
    entries = tiles
    if OVER_BATCH:
        entries = tiles * tl.load(table + schema.Header.BATCH)
    samples = entries // tiles
    mean = 0.0
    left = 0.0
    variance = 0.0
    for sweep in tl.static_range(FIRST, LAST + 1):
        total = tl.zeros([BLOCK], tl.float32)
        for begin in range(0, entries, BLOCK):
            entry = begin + tl.arange(0, BLOCK)
            tile = entry % tiles
            at = (row + (entry // tiles) * groups) * tiles + tile
            mask = entry < entries
            if sweep < 2 or P == 2:
                value = tl.load(buffer_at(scratch, table, schema.Buffer.MEAN, 0, 0) + at, mask=mask, other=0.0)
                if sweep > 0:
                    rest = tl.load(buffer_at(scratch, table, schema.Buffer.FIRST, 0, 0) + at, mask=mask, other=0.0)
                    value = value - mean + rest - left
            if sweep == 2:
                spread = tl.load(buffer_at(scratch, table, schema.Buffer.VARIANCE, 0, 0) + at, mask=mask, other=0.0)
                value = spread + value * value if P == 2 else spread
            count = tl.minimum(pixels - tile * per_tile, per_tile)
            total += tl.where(mask, value * count.to(tl.float32), 0.0)
        average = tl.div_rn(tl.sum(total, 0), pixels.to(tl.float32) * samples.to(tl.float32))
        if sweep == 0:
            mean = average
        elif sweep == 1:
            left = finite(average)
        else:
            variance = average
    return mean + left, variance


@triton.jit
def _batch_average(scratch, table, row, pixels, p, inside, buffer):
    """The mean over the samples of a buffer at every position of a group."""
    batch = tl.load(table + schema.Header.BATCH)
    groups = tl.load(table + schema.Header.GROUPS)
    mean = tl.zeros(p.shape, tl.float32)
    for sample in range(batch):
        at = buffer_at(scratch, table, buffer, row + sample * groups, pixels)
        mean += tl.load(at + p, mask=inside, other=0.0)
    return tl.div_rn(mean, batch.to(tl.float32))


@triton.jit
def _merge_batch(scratch, table, row, pixels, p, inside):
    """Mean and variance over the samples at every position of a group, into the first sample's place."""
    batch = tl.load(table + schema.Header.BATCH)
    groups = tl.load(table + schema.Header.GROUPS)
    mean = _batch_average(scratch, table, row, pixels, p, inside, schema.Buffer.MEAN)
    variance = tl.zeros(p.shape, tl.float32)
    for sample in range(batch):
        at = buffer_at(scratch, table, schema.Buffer.MEAN, row + sample * groups, pixels)
        centred = tl.load(at + p, mask=inside, other=0.0) - mean
        at = buffer_at(scratch, table, schema.Buffer.VARIANCE, row + sample * groups, pixels)
        variance += tl.load(at + p, mask=inside, other=0.0) + centred * centred
    tl.store(buffer_at(scratch, table, schema.Buffer.MEAN, row, pixels) + p, mean, mask=inside)
    variance = tl.div_rn(variance, batch.to(tl.float32))
    tl.store(buffer_at(scratch, table, schema.Buffer.VARIANCE, row, pixels) + p, variance, mask=inside)


@triton.jit
def window_item(
    scratch, maps, table, sigma, sigma_value, entry, row, map_row, pixels, p, inside,
    P: tl.constexpr, SUPPRESSION: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """One window sum and what becomes of it; ``row`` is the place in the scratch buffers."""
    total = window_sum(scratch, table, entry, row, pixels, p, inside, INDEX)
    epilogue = tl.load(entry + schema.Column.EPILOGUE)
    if epilogue == schema.Epilogue.STORE:
        target = buffer_at(scratch, table, tl.load(entry + schema.Column.TARGET), row, pixels)
        tl.store(target + p, total, mask=inside)
    elif epilogue == schema.Epilogue.MEAN:
        mu = tl.div_rn(total, field_count(table, p, False, INDEX))
        tl.store(maps + map_row * pixels + p, mu, mask=inside)
        if SUPPRESSION and P == 2:
            mean = tl.load(buffer_at(scratch, table, schema.Buffer.MEAN, row, pixels) + p, mask=inside, other=0.0)
            at = buffer_at(scratch, table, schema.Buffer.VARIANCE, row, pixels)
            variance = tl.load(at + p, mask=inside, other=0.0)
            tl.store(at + p, variance + (mean - mu) * (mean - mu), mask=inside)
    else:
        q = tl.div_rn(total, field_count(table, p, True, INDEX))
        rstd = _rstd(table, sigma, sigma_value, map_row, q if P == 2 else C_1 * q, P)
        tl.store(maps + tl.load(table + schema.Header.RSTD) + map_row * pixels + p, rstd, mask=inside)


@triton.jit
def _statistics(
    x, scratch, table, row, tile, tiles, per_group, pixels,
    P: tl.constexpr, SUMMATION: tl.constexpr, WHOLE: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """The first pass over x, at a tile of the positions of a row."""
    groups = tl.cast(tl.load(table + schema.Header.GROUPS), INDEX)
    first = tl.cast(tile, INDEX) * PIXELS
    p = first + tl.cast(tl.arange(0, PIXELS), INDEX)
    inside = p < pixels
    base = activation_base(row, groups, per_group, pixels, CHANNELS_LAST)
    mean, variance, rest = channel_statistics(
        x, base, p, inside, groups, per_group, pixels, P, SUMMATION, WHOLE, CHANNELS_LAST, INDEX, CHANNELS
    )
    if WHOLE:
        count = tl.minimum(pixels - first, PIXELS).to(tl.float32)
        together, left, spread = merge_positions(mean, rest, variance, inside, count)
        at = row * tiles + tile
        tl.store(buffer_at(scratch, table, schema.Buffer.MEAN, 0, 0) + at, together)
        tl.store(buffer_at(scratch, table, schema.Buffer.FIRST, 0, 0) + at, left)
        if P == 2 or not SUMMATION:
            tl.store(buffer_at(scratch, table, schema.Buffer.VARIANCE, 0, 0) + at, spread)
    else:
        tl.store(buffer_at(scratch, table, schema.Buffer.MEAN, row, pixels) + p, mean, mask=inside)
        if P == 2 or not SUMMATION:
            tl.store(buffer_at(scratch, table, schema.Buffer.VARIANCE, row, pixels) + p, variance, mask=inside)


@triton.jit
def _deviations(
    x, maps, scratch, table, row, tile, tiles, per_group, pixels,
    WHOLE: tl.constexpr, OVER_BATCH: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Mean abs(v) over the channels of a group, under ``WHOLE`` over the positions too, at a tile of these in a row."""
    groups = tl.cast(tl.load(table + schema.Header.GROUPS), INDEX)
    first = tl.cast(tile, INDEX) * PIXELS
    p = first + tl.cast(tl.arange(0, PIXELS), INDEX)
    inside = p < pixels
    base = activation_base(row, groups, per_group, pixels, CHANNELS_LAST)
    map_row = row % groups if OVER_BATCH else row
    mu = tl.load(maps + map_offsets(map_row, p, p, pixels, False, WHOLE, OVER_BATCH), mask=inside[None, :], other=0.0)
    deviation = tl.zeros([PIXELS], tl.float32)
    for begin in tl.range(0, per_group, CHANNELS, num_stages=IN_FLIGHT):
        c = tl.cast(begin + tl.arange(0, CHANNELS), INDEX)
        mask = (c < per_group)[:, None] & inside[None, :]
        at = activation_offsets(c, p, groups * per_group, pixels, CHANNELS_LAST)
        values = tl.load(x + base + at, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        deviation += tl.sum(tl.where(mask, tl.abs(values - mu), 0.0), 0)
    deviation = tl.div_rn(deviation, per_group.to(tl.float32))
    if WHOLE:
        count = tl.minimum(pixels - first, PIXELS).to(tl.float32)
        to = buffer_at(scratch, table, schema.Buffer.VARIANCE, 0, 0) + row * tiles + tile
        tl.store(to, tl.div_rn(tl.sum(deviation, 0), count))
    else:
        tl.store(buffer_at(scratch, table, schema.Buffer.VARIANCE, row, pixels) + p, deviation, mask=inside)


@triton.jit
def maps_item(
    x, sigma, sigma_value, maps, scratch, table, entry, kind, row, tile, tiles, per_group, pixels,
    P: tl.constexpr, SUMMATION: tl.constexpr, SUPPRESSION: tl.constexpr, WHOLE: tl.constexpr, OVER_BATCH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """An item of the stages that lead to the maps."""
    if kind == schema.Kind.STATISTICS:
        _statistics(
            x, scratch, table, row, tile, tiles, per_group, pixels,
            P, SUMMATION, WHOLE, CHANNELS_LAST, INDEX, CHANNELS, PIXELS,
        )  # fmt: skip
    elif P == 1 and SUMMATION and kind == schema.Kind.DEVIATIONS:
        _deviations(
            x, maps, scratch, table, row, tile, tiles, per_group, pixels,
            WHOLE, OVER_BATCH, CHANNELS_LAST, INDEX, CHANNELS, PIXELS,
        )  # fmt: skip
    elif WHOLE:
        if P == 2:
            mean, variance = merge_whole(scratch, table, row, PIXELS, pixels, P, OVER_BATCH, WINDOW, 0, 2)
            store_row(maps, table, sigma, sigma_value, row, mean, variance, P, SUMMATION, SUPPRESSION)
        elif SUMMATION and tl.load(entry + schema.Column.SOURCE) == schema.Buffer.MEAN:
            mean, _ = merge_whole(scratch, table, row, PIXELS, pixels, P, OVER_BATCH, WINDOW, 0, 1)
            store_row(maps, table, sigma, sigma_value, row, mean, 0.0, P, SUMMATION, False)
        else:
            _, deviation = merge_whole(scratch, table, row, PIXELS, pixels, P, OVER_BATCH, WINDOW, 2, 2)
            store_row(maps, table, sigma, sigma_value, row, 0.0, deviation, P, False, SUPPRESSION)
    else:
        p = tl.cast(tile, INDEX) * WINDOW + tl.cast(tl.arange(0, WINDOW), INDEX)
        inside = p < pixels
        if OVER_BATCH:
            if kind == schema.Kind.MERGE:
                if P == 2:
                    _merge_batch(scratch, table, row, pixels, p, inside)
                else:
                    buffer = tl.load(entry + schema.Column.SOURCE)
                    average = _batch_average(scratch, table, row, pixels, p, inside, buffer)
                    tl.store(buffer_at(scratch, table, buffer, row, pixels) + p, average, mask=inside)
            else:
                window_item(
                    scratch, maps, table, sigma, sigma_value, entry, row, row, pixels, p, inside, P, SUPPRESSION, INDEX
                )
        else:
            window_item(
                scratch, maps, table, sigma, sigma_value, entry, row, row, pixels, p, inside, P, SUPPRESSION, INDEX
            )
