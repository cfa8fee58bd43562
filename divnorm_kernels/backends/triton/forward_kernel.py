"""The forward kernel: SPEC's equations on the stages of `divnorm_kernels.backends.triton.stages`."""

import triton
import triton.language as tl

from . import schema
from .device import (
    IN_FLIGHT,
    activation_base,
    activation_offsets,
    buffer_at,
    channel_block,
    finite,
    locate,
    map_offsets,
    map_values,
    rstd_maps,
    second_pass,
    signal,
    stage_counter,
    stage_entry,
    take_item,
    wait_for,
    wait_for_stage_before,
)
from .epilogue import (
    activated,
    parameters,
    with_residual,
)
from .finish import (
    sum_partials,
)
from .forward_maps import (
    maps_item,
    merge_positions,
    powers,
    store_row,
    window_item,
)


@triton.jit
def _over_channels(values, per_group, CHANNELS: tl.constexpr):
    """The mean over the channels of a group."""
    total = tl.sum(values, 0)
    if CHANNELS > 1:
        total = tl.div_rn(total, per_group.to(tl.float32))
    return total


@triton.jit
def _single(
    x, y, weight, bias, sigma, sigma_value, residual, threshold, maps, scratch, table, item, per_group, pixels,
    P: tl.constexpr, SUBTRACT_MEAN: tl.constexpr,
    SUMMATION: tl.constexpr, SUPPRESSION: tl.constexpr, WHOLE: tl.constexpr, FEATURES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, L1: tl.constexpr,
    ACTIVATION: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Every ``ITEMS``-th row from ``item`` on, each held on chip from its one read to its write."""
    groups = tl.cast(tl.load(table + schema.Header.GROUPS), INDEX)
    rows = tl.load(table + schema.Header.BATCH) * groups
    c = tl.cast(tl.arange(0, CHANNELS), INDEX)
    p = tl.cast(tl.arange(0, PIXELS), INDEX)
    inside = p < pixels
    inside_c = c < per_group
    mask = inside_c[:, None] & inside[None, :]
    at = activation_offsets(c, p, groups * per_group, pixels, CHANNELS_LAST)
    DEVIATIONS: tl.constexpr = P == 1 and SUMMATION  # in a sweep of their own
    total = tl.zeros([PIXELS], tl.float32)
    for row in range(item, rows, tl.load(table + schema.Header.ITEMS)):
        base = activation_base(row, groups, per_group, pixels, CHANNELS_LAST)
        values = tl.load(x + base + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        mean = tl.zeros([PIXELS], tl.float32)
        if SUMMATION:
            mean = _over_channels(values, per_group, CHANNELS)
        centred = tl.where(mask, values - mean[None, :], 0.0)
        variance = _over_channels(powers(centred, P), per_group, CHANNELS)
        if WHOLE:
            rest = finite(_over_channels(centred, per_group, CHANNELS)) if SUMMATION else mean
            mu, left, variance = merge_positions(mean, rest, variance, inside, pixels.to(tl.float32))
            mu += left
            if DEVIATIONS:
                deviation = _over_channels(tl.where(mask, tl.abs(values - mu), 0.0), per_group, CHANNELS)
                variance = tl.div_rn(tl.sum(deviation, 0), pixels.to(tl.float32))
            rstd = store_row(maps, table, sigma, sigma_value, row, mu, variance, P, SUMMATION, SUPPRESSION)
        else:
            tl.debug_barrier()  # the row before has been read to its end
            variances = buffer_at(scratch, table, schema.Buffer.VARIANCE, item, pixels)
            tl.store(buffer_at(scratch, table, schema.Buffer.MEAN, item, pixels) + p, mean, mask=inside)
            if not DEVIATIONS:
                tl.store(variances + p, variance, mask=inside)
            for stage in range(tl.load(table + schema.Header.STAGES)):
                tl.debug_barrier()
                entry = stage_entry(table, stage)
                if DEVIATIONS and tl.load(entry + schema.Column.KIND) == schema.Kind.DEVIATIONS:
                    mu = tl.load(maps + row * pixels + p, mask=inside, other=0.0)[None, :]
                    deviation = _over_channels(tl.where(mask, tl.abs(values - mu), 0.0), per_group, CHANNELS)
                    tl.store(variances + p, deviation, mask=inside)
                else:
                    window_item(
                        scratch, maps, table, sigma, sigma_value, entry, item, row, pixels, p, inside,
                        P, SUPPRESSION, INDEX,
                    )  # fmt: skip
            tl.debug_barrier()
            map_at = map_offsets(row, c, p, pixels, False, WHOLE, False)
            mu, rstd = map_values(maps, rstd_maps(maps, table), map_at, inside[None, :], SUMMATION, SUPPRESSION)
        if FEATURES:
            scale, shift, tau = parameters(weight, bias, threshold, p, inside, 0)
        else:
            scale, shift, tau = parameters(weight, bias, threshold, (row % groups) * per_group + c, inside_c, 1)
        centred = values - mu
        numerator = centred if SUBTRACT_MEAN else values
        result = with_residual(numerator * rstd * scale + shift, residual, base, at, mask, "evict_first")
        tl.store(y + base + at, activated(result, tau, ACTIVATION).to(y.dtype.element_ty), mask=mask)
        if L1:
            total += tl.sum(tl.where(mask, tl.abs(centred), 0.0), 0)
    if L1:
        tl.store(scratch + tl.load(table + schema.Header.PARTIALS) + item, tl.sum(total, 0))


@triton.jit
def apply(
    x, y, weight, bias, residual, threshold, maps, scratch, table, row, tile, tiles, per_group, pixels,
    SUBTRACT_MEAN: tl.constexpr, SUMMATION: tl.constexpr, SUPPRESSION: tl.constexpr, WHOLE: tl.constexpr,
    OVER_BATCH: tl.constexpr, FEATURES: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr,
    L1: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """The second pass: normalizes blocks of channels at a piece of the positions."""
    groups = tl.cast(tl.load(table + schema.Header.GROUPS), INDEX)
    base, channels, positions, first_channels, first, blocks, count = second_pass(
        table, row, tile, per_group, pixels, FEATURES, CHANNELS_LAST, INDEX, CHANNELS, PIXELS
    )
    rstds = rstd_maps(maps, table)
    total = tl.zeros([PIXELS], tl.float32)
    c, inside_c, channel = channel_block(first_channels, row, groups, per_group, channels, FEATURES, INDEX, CHANNELS)
    scale, shift, tau = parameters(weight, bias, threshold, channel, inside_c, 1)
    for block in tl.range(0, count, num_stages=IN_FLIGHT):
        if not (CHANNELS_LAST or FEATURES):
            c, inside_c, channel = channel_block(
                first_channels + block // blocks, row, groups, per_group, channels, FEATURES, INDEX, CHANNELS
            )
            scale, shift, tau = parameters(weight, bias, threshold, channel, inside_c, 1)
        p = (first + block % blocks) * PIXELS + tl.cast(tl.arange(0, PIXELS), INDEX)
        inside = p < positions
        mask = inside_c[:, None] & inside[None, :]
        map_at = map_offsets(row % groups if OVER_BATCH else row, c, p, pixels, FEATURES, WHOLE, OVER_BATCH)
        mu, rstd = map_values(maps, rstds, map_at, mask if FEATURES else inside[None, :], SUMMATION, SUPPRESSION)
        at = activation_offsets(c, p, pixels if FEATURES else groups * per_group, pixels, CHANNELS_LAST or FEATURES)
        values = tl.load(x + base + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        centred = values - mu
        numerator = centred if SUBTRACT_MEAN else values
        result = with_residual(numerator * rstd * scale + shift, residual, base, at, mask, "evict_first")
        result = activated(result, tau, ACTIVATION).to(y.dtype.element_ty)
        tl.store(y + base + at, result, mask=mask, eviction_policy="evict_first")
        if L1:
            total += tl.sum(tl.where(mask, tl.abs(centred), 0.0), 0)
    if L1:
        at = tl.load(table + schema.Header.PARTIALS) + row * tiles + tile
        tl.store(scratch + at, tl.sum(total, 0))


@triton.jit
def _stage_item(
    x, y, weight, bias, sigma, sigma_value, residual, threshold, maps, scratch, table, entry, row, tile, tiles,
    per_group, pixels, P: tl.constexpr, SUBTRACT_MEAN: tl.constexpr,
    SUMMATION: tl.constexpr, SUPPRESSION: tl.constexpr, WHOLE: tl.constexpr, OVER_BATCH: tl.constexpr,
    FEATURES: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, L1: tl.constexpr,
    ACTIVATION: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, WINDOW: tl.constexpr,
    APPLY_CHANNELS: tl.constexpr, APPLY_PIXELS: tl.constexpr,
):  # fmt: skip
    """An item of the stage at ``entry``."""
    kind = tl.load(entry + schema.Column.KIND)
    if kind == schema.Kind.APPLY:
        apply(
            x, y, weight, bias, residual, threshold, maps, scratch, table, row, tile, tiles, per_group, pixels,
            SUBTRACT_MEAN, SUMMATION, SUPPRESSION, WHOLE, OVER_BATCH, FEATURES, CHANNELS_LAST, INDEX, L1, ACTIVATION,
            APPLY_CHANNELS, APPLY_PIXELS,
        )  # fmt: skip
    elif SUMMATION or SUPPRESSION:
        maps_item(
            x, sigma, sigma_value, maps, scratch, table, entry, kind, row, tile, tiles, per_group, pixels,
            P, SUMMATION, SUPPRESSION, WHOLE, OVER_BATCH, CHANNELS_LAST, INDEX, CHANNELS, PIXELS, WINDOW,
        )  # fmt: skip


@triton.jit(do_not_specialize=["first", "channel_units", "pixel_units"])
def forward_kernel(
    x, y, weight, bias, sigma, sigma_value, residual, threshold, maps, l1, numel, scratch, counters, table, first,
    channel_units, pixel_units,
    CHANNEL_UNIT: tl.constexpr, PIXEL_UNIT: tl.constexpr, P: tl.constexpr, SUBTRACT_MEAN: tl.constexpr,
    STRATEGY: tl.constexpr, ORDERED: tl.constexpr, SUMMATION: tl.constexpr, SUPPRESSION: tl.constexpr,
    WHOLE: tl.constexpr, OVER_BATCH: tl.constexpr, FEATURES: tl.constexpr, ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    WINDOW: tl.constexpr, APPLY_CHANNELS: tl.constexpr, APPLY_PIXELS: tl.constexpr,
):  # fmt: skip
    """One item of the forward schedule.

    ``x``, ``y`` and ``residual`` are dense and of one layout; ``maps`` receives mean and rstd; ``l1``, where wanted,
    the mean of abs(v) over ``numel`` elements. ``channel_units * CHANNEL_UNIT`` is the number of channels in a group
    and ``pixel_units * PIXEL_UNIT`` that of positions: so the compiler knows what both are divisible by.
    """
    L1: tl.constexpr = l1 is not None
    per_group = tl.cast(channel_units, INDEX) * CHANNEL_UNIT
    pixels = tl.cast(pixel_units, INDEX) * PIXEL_UNIT
    item = take_item(counters, first, ORDERED)
    finish = tl.load(table + schema.Header.FINISH)
    if item >= finish:
        if L1:
            if ORDERED:
                wait_for(counters + 1, tl.load(table + schema.Header.AWAITED))
            count = tl.load(table + schema.Header.PARTIAL_COLUMNS)
            total = sum_partials(scratch + tl.load(table + schema.Header.PARTIALS), count, WINDOW)
            tl.store(l1, tl.div_rn(total, numel))
    elif STRATEGY == schema.Strategy.SINGLE:
        _single(
            x, y, weight, bias, sigma, sigma_value, residual, threshold, maps, scratch, table, item, per_group, pixels,
            P, SUBTRACT_MEAN, SUMMATION, SUPPRESSION, WHOLE, FEATURES, CHANNELS_LAST, INDEX, L1, ACTIVATION,
            CHANNELS, PIXELS,
        )  # fmt: skip
        if ORDERED:
            signal(counters + 1)
    elif STRATEGY == schema.Strategy.LOOPED:
        row = tl.cast(item, table.dtype.element_ty)
        for stage in range(tl.load(table + schema.Header.STAGES)):
            entry = stage_entry(table, stage)
            tiles = tl.load(entry + schema.Column.TILES)
            for tile in range(tiles):
                _stage_item(
                    x, y, weight, bias, sigma, sigma_value, residual, threshold, maps, scratch, table, entry, row, tile,
                    tiles, per_group, pixels, P, SUBTRACT_MEAN, SUMMATION, SUPPRESSION, WHOLE, OVER_BATCH, FEATURES,
                    CHANNELS_LAST, INDEX, L1, ACTIVATION, CHANNELS, PIXELS, WINDOW, APPLY_CHANNELS, APPLY_PIXELS,
                )  # fmt: skip
            tl.debug_barrier()  # what the stage has stored can be read
    else:
        place, stage, chunk = locate(table, item)
        if (chunk >= 0) & (chunk < tl.load(table + schema.Header.CHUNKS)):
            if ORDERED:
                wait_for_stage_before(table, counters, chunk, stage)
            entry = stage_entry(table, stage)
            tiles = tl.load(entry + schema.Column.TILES)
            tile = place % tiles
            row = chunk * tl.load(entry + schema.Column.ROWS) + place // tiles
            if row < tl.load(entry + schema.Column.ALL_ROWS):
                _stage_item(
                    x, y, weight, bias, sigma, sigma_value, residual, threshold, maps, scratch, table, entry, row, tile,
                    tiles, per_group, pixels, P, SUBTRACT_MEAN, SUMMATION, SUPPRESSION, WHOLE, OVER_BATCH, FEATURES,
                    CHANNELS_LAST, INDEX, L1, ACTIVATION, CHANNELS, PIXELS, WINDOW, APPLY_CHANNELS, APPLY_PIXELS,
                )  # fmt: skip
            if ORDERED:
                signal(stage_counter(table, counters, chunk, stage))
