"""The backward kernel: SPEC's gradients on the stages of `divnorm_kernels.backends.triton.stages`."""

import triton
import triton.language as tl

from . import schema
from .backward_maps import (
    channel_sums,
    gradient_buffers,
    gradient_maps,
    input_gradient,
    l1_slope,
    maps_item,
    sigma_partial,
    store_sources,
    whole_rstd,
    whole_shift,
    whole_sources,
    window_item,
)
from .device import (
    IN_FLIGHT,
    activation_base,
    activation_offsets,
    channel_block,
    locate,
    map_offsets,
    map_values,
    rstd_maps,
    second_pass,
    sign,
    signal,
    stage_counter,
    stage_entry,
    take_item,
    wait_for,
    wait_for_stage_before,
)
from .epilogue import (
    parameters,
    passed,
    stopped,
    with_residual,
)
from .finish import (
    sum_columns,
    sum_sigma,
)


@triton.jit
def _single(
    x, dy, dx, dresidual, weight, bias, sigma, residual, threshold, maps, scratch, dl1, numel, table, item, per_group,
    pixels, P: tl.constexpr, SUBTRACT_MEAN: tl.constexpr,
    SUMMATION: tl.constexpr, SUPPRESSION: tl.constexpr, WHOLE: tl.constexpr, FEATURES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, AFFINE: tl.constexpr, THRESHOLD: tl.constexpr,
    SIGMA: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
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
    slope = l1_slope(dl1, numel)
    weights = scratch + tl.load(table + schema.Header.PARTIALS)
    biases = scratch + tl.load(table + schema.Header.PARTIALS_BIAS)
    thresholds = scratch + tl.load(table + schema.Header.PARTIALS_THRESHOLD)
    rstds = rstd_maps(maps, table)
    of_a, of_shift = gradient_buffers(scratch, table, WHOLE)
    feature_weight = tl.zeros([PIXELS], tl.float32)
    feature_bias = tl.zeros([PIXELS], tl.float32)
    feature_threshold = tl.zeros([PIXELS], tl.float32)
    for row in range(item, rows, tl.load(table + schema.Header.ITEMS)):
        base = activation_base(row, groups, per_group, pixels, CHANNELS_LAST)
        channel = (row % groups) * per_group + c
        partial_at = (row // groups) * (groups * per_group) + channel
        values = tl.load(x + base + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        upstream = tl.load(dy + base + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        map_at = map_offsets(row, c, p, pixels, False, WHOLE, False)
        mu, rstd = map_values(maps, rstds, map_at, inside[None, :], SUMMATION, SUPPRESSION)
        mu = tl.reshape(mu, [PIXELS])
        rstd = tl.reshape(rstd, [PIXELS])
        if FEATURES:
            scale, lift, tau = parameters(weight, bias, threshold, p, inside, 0)
        else:
            scale, lift, tau = parameters(weight, bias, threshold, channel, inside_c, 1)
        normalized = (values - mu[None, :] if SUBTRACT_MEAN else values) * rstd[None, :]
        value = with_residual(normalized * scale + lift, residual, base, at, mask, "evict_first")
        if THRESHOLD:
            held = stopped(upstream, value, tau)
            if FEATURES:
                feature_threshold += tl.sum(held, 0)
            else:
                tl.store(thresholds + partial_at, tl.sum(held, 1), mask=inside_c)
        upstream = passed(upstream, value, tau, mask, ACTIVATION)
        if dresidual is not None:
            tl.store(dresidual + base + at, upstream.to(dresidual.dtype.element_ty), mask=mask)
        gradient = upstream * scale
        centred, p1, p2, slopes, signs = channel_sums(
            values, gradient, mu, mask, dl1 is not None, P, SUBTRACT_MEAN, SUPPRESSION
        )
        if SIGMA:
            partial = sigma_partial(table, sigma, row % groups, p2, rstd, inside, P)
            tl.store(scratch + tl.load(table + schema.Header.PARTIALS_SIGMA) + row, partial)
        count = per_group.to(tl.float32)
        if WHOLE:
            row_rstd = whole_rstd(maps, table, row, SUPPRESSION)
            count *= pixels.to(tl.float32)
            a, shift, mean = whole_sources(
                p1, p2, slopes, signs, row_rstd, slope, inside, count, P, SUBTRACT_MEAN, SUPPRESSION
            )
            shift = whole_shift(a, shift, mean, row_rstd, SUMMATION, SUPPRESSION)
        else:
            tl.debug_barrier()  # the row before has been read to its end
            store_sources(
                scratch, table, item, pixels, p, inside, count, p1, p2, slopes, signs, rstd, slope,
                P, SUBTRACT_MEAN, SUMMATION, SUPPRESSION, INDEX,
            )  # fmt: skip
            for stage in range(tl.load(table + schema.Header.STAGES)):
                tl.debug_barrier()
                entry = stage_entry(table, stage)
                window_item(scratch, table, entry, item, pixels, p, inside, count, SUMMATION, INDEX)
            tl.debug_barrier()
            map_at = map_offsets(item, c, p, pixels, False, WHOLE, False)
            a, shift = gradient_maps(of_a, of_shift, map_at, inside[None, :], SUMMATION, SUPPRESSION)
        result = input_gradient(gradient, centred, rstd[None, :], a, shift, P, SUPPRESSION, WHOLE)
        if dl1 is not None:
            result += slope * sign(centred)
        tl.store(dx + base + at, result.to(dx.dtype.element_ty), mask=mask)
        if AFFINE:
            product = tl.where(mask, upstream * normalized, 0.0)
            if FEATURES:
                feature_weight += tl.sum(product, 0)
                feature_bias += tl.sum(upstream, 0)
            else:
                tl.store(weights + partial_at, tl.sum(product, 1), mask=inside_c)
                tl.store(biases + partial_at, tl.sum(upstream, 1), mask=inside_c)
    if AFFINE and FEATURES:
        tl.store(weights + item * pixels + p, feature_weight, mask=inside)
        tl.store(biases + item * pixels + p, feature_bias, mask=inside)
        if THRESHOLD:
            tl.store(thresholds + item * pixels + p, feature_threshold, mask=inside)


@triton.jit
def _apply(
    x, dy, dx, dresidual, weight, bias, residual, threshold, maps, scratch, dl1, numel, table, row, tile, per_group,
    pixels, P: tl.constexpr, SUBTRACT_MEAN: tl.constexpr,
    SUMMATION: tl.constexpr, SUPPRESSION: tl.constexpr, WHOLE: tl.constexpr, OVER_BATCH: tl.constexpr,
    FEATURES: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, AFFINE: tl.constexpr,
    THRESHOLD: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """The second pass: dx and dresidual of blocks of channels at a piece of the positions, and its share of the
    parameters' gradients.
    """
    groups = tl.cast(tl.load(table + schema.Header.GROUPS), INDEX)
    base, channels, positions, first_channels, first, blocks, count = second_pass(
        table, row, tile, per_group, pixels, FEATURES, CHANNELS_LAST, INDEX, CHANNELS, PIXELS
    )
    rstds = rstd_maps(maps, table)
    of_a, of_shift = gradient_buffers(scratch, table, WHOLE)
    slope = l1_slope(dl1, numel)
    dweight = tl.zeros([CHANNELS, PIXELS], tl.float32)
    dbias = tl.zeros([CHANNELS, PIXELS], tl.float32)
    dthreshold = tl.zeros([CHANNELS, PIXELS], tl.float32)
    c, inside_c, channel = channel_block(first_channels, row, groups, per_group, channels, FEATURES, INDEX, CHANNELS)
    scale, lift, tau = parameters(weight, bias, threshold, channel, inside_c, 1)
    for block in tl.range(0, count, num_stages=IN_FLIGHT):
        if not (CHANNELS_LAST or FEATURES):
            c, inside_c, channel = channel_block(
                first_channels + block // blocks, row, groups, per_group, channels, FEATURES, INDEX, CHANNELS
            )
            scale, lift, tau = parameters(weight, bias, threshold, channel, inside_c, 1)
        p = (first + block % blocks) * PIXELS + tl.cast(tl.arange(0, PIXELS), INDEX)
        inside = p < positions
        mask = inside_c[:, None] & inside[None, :]
        map_mask = mask if FEATURES else inside[None, :]
        map_at = map_offsets(row % groups if OVER_BATCH else row, c, p, pixels, FEATURES, WHOLE, OVER_BATCH)
        mu, rstd = map_values(maps, rstds, map_at, map_mask, SUMMATION, SUPPRESSION)
        a, shift = gradient_maps(of_a, of_shift, map_at, map_mask, SUMMATION, SUPPRESSION)
        at = activation_offsets(c, p, pixels if FEATURES else groups * per_group, pixels, CHANNELS_LAST or FEATURES)
        values = tl.load(x + base + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        centred = values - mu
        upstream = tl.load(dy + base + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        normalized = (centred if SUBTRACT_MEAN else values) * rstd
        value = with_residual(normalized * scale + lift, residual, base, at, mask, "evict_first")
        if THRESHOLD:
            dthreshold += stopped(upstream, value, tau)
        upstream = passed(upstream, value, tau, mask, ACTIVATION)
        if dresidual is not None:
            rounded = upstream.to(dresidual.dtype.element_ty)
            tl.store(dresidual + base + at, rounded, mask=mask, eviction_policy="evict_first")
        result = input_gradient(upstream * scale, centred, rstd, a, shift, P, SUPPRESSION, WHOLE)
        if dl1 is not None:
            result += slope * sign(centred)
        tl.store(dx + base + at, result.to(dx.dtype.element_ty), mask=mask, eviction_policy="evict_first")
        if AFFINE:
            dweight += tl.where(mask, upstream * normalized, 0.0)
            dbias += upstream
            if block % blocks == blocks - 1:  # where the sums go is looked up here: registers are scarce in the loop
                splits = tl.load(table + schema.Header.SPLITS)
                piece = (row // groups) * splits + tile % splits
                to = scratch + piece * tl.load(table + schema.Header.PARTIAL_COLUMNS) + channel
                tl.store(to + tl.load(table + schema.Header.PARTIALS), tl.sum(dweight, 1), mask=inside_c)
                tl.store(to + tl.load(table + schema.Header.PARTIALS_BIAS), tl.sum(dbias, 1), mask=inside_c)
                if THRESHOLD:
                    thresholds = to + tl.load(table + schema.Header.PARTIALS_THRESHOLD)
                    tl.store(thresholds, tl.sum(dthreshold, 1), mask=inside_c)
                    dthreshold = tl.zeros([CHANNELS, PIXELS], tl.float32)
                dweight = tl.zeros([CHANNELS, PIXELS], tl.float32)
                dbias = tl.zeros([CHANNELS, PIXELS], tl.float32)


@triton.jit
def _stage_item(
    x, dy, dx, dresidual, weight, bias, sigma, residual, threshold, maps, scratch, dl1, numel, table, entry, row, tile,
    tiles, per_group, pixels, P: tl.constexpr, SUBTRACT_MEAN: tl.constexpr,
    SUMMATION: tl.constexpr, SUPPRESSION: tl.constexpr, WHOLE: tl.constexpr, OVER_BATCH: tl.constexpr,
    FEATURES: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, AFFINE: tl.constexpr,
    THRESHOLD: tl.constexpr, SIGMA: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr, WINDOW: tl.constexpr, APPLY_CHANNELS: tl.constexpr, APPLY_PIXELS: tl.constexpr,
):  # fmt: skip
    """An item of the stage at ``entry``."""
    kind = tl.load(entry + schema.Column.KIND)
    if kind == schema.Kind.APPLY:
        _apply(
            x, dy, dx, dresidual, weight, bias, residual, threshold, maps, scratch, dl1, numel, table, row, tile,
            per_group, pixels, P, SUBTRACT_MEAN, SUMMATION, SUPPRESSION, WHOLE, OVER_BATCH, FEATURES, CHANNELS_LAST,
            INDEX, AFFINE, THRESHOLD, ACTIVATION, APPLY_CHANNELS, APPLY_PIXELS,
        )  # fmt: skip
    elif SUMMATION or SUPPRESSION:
        maps_item(
            x, dy, weight, bias, sigma, residual, threshold, maps, scratch, dl1, numel, table, entry, kind, row, tile,
            tiles, per_group, pixels, P, SUBTRACT_MEAN, SUMMATION, SUPPRESSION, WHOLE, OVER_BATCH, FEATURES,
            CHANNELS_LAST, INDEX, SIGMA, ACTIVATION, CHANNELS, PIXELS, WINDOW,
        )  # fmt: skip


@triton.jit(do_not_specialize=["first", "channel_units", "pixel_units"])
def backward_kernel(
    x, dy, dx, dresidual, weight, bias, sigma, residual, threshold, maps, dl1, numel, dweight, dbias, dsigma,
    dthreshold, scratch, counters, table, first, channel_units, pixel_units,
    CHANNEL_UNIT: tl.constexpr, PIXEL_UNIT: tl.constexpr, P: tl.constexpr, SUBTRACT_MEAN: tl.constexpr,
    STRATEGY: tl.constexpr, ORDERED: tl.constexpr, SUMMATION: tl.constexpr, SUPPRESSION: tl.constexpr,
    WHOLE: tl.constexpr, OVER_BATCH: tl.constexpr, FEATURES: tl.constexpr, ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    WINDOW: tl.constexpr, APPLY_CHANNELS: tl.constexpr, APPLY_PIXELS: tl.constexpr,
):  # fmt: skip
    """One item of the backward schedule.

    ``x``, ``residual`` and their gradients and ``dy`` are dense and of one layout. ``dl1`` is the gradient of l1, a
    mean over ``numel`` elements, or absent. ``bias`` and ``residual`` are of use to an ``ACTIVATION``. ``dresidual``
    and the gradients of parameters are absent where not wanted. For the units see `forward_kernel`.
    """
    THRESHOLD: tl.constexpr = dthreshold is not None
    AFFINE: tl.constexpr = dweight is not None or dbias is not None or THRESHOLD
    SIGMA: tl.constexpr = dsigma is not None
    per_group = tl.cast(channel_units, INDEX) * CHANNEL_UNIT
    pixels = tl.cast(pixel_units, INDEX) * PIXEL_UNIT
    item = take_item(counters, first, ORDERED)
    finish = tl.load(table + schema.Header.FINISH)
    if item >= finish:
        if AFFINE or SIGMA:
            if ORDERED:
                wait_for(counters + 1, tl.load(table + schema.Header.AWAITED))
            block = item - finish
            blocks = tl.cdiv(tl.load(table + schema.Header.PARTIAL_COLUMNS), schema.FINISH_COLUMNS) if AFFINE else 0
            if block >= blocks:
                if SIGMA:
                    partials = scratch + tl.load(table + schema.Header.PARTIALS_SIGMA)
                    sum_sigma(partials, dsigma, table, block - blocks, WINDOW)
            else:
                rows = tl.load(table + schema.Header.PARTIAL_ROWS)
                columns = tl.load(table + schema.Header.PARTIAL_COLUMNS)
                if dweight is not None:
                    partials = scratch + tl.load(table + schema.Header.PARTIALS)
                    sum_columns(partials, dweight, rows, columns, block, schema.FINISH_ROWS, schema.FINISH_COLUMNS)
                if dbias is not None:
                    partials = scratch + tl.load(table + schema.Header.PARTIALS_BIAS)
                    sum_columns(partials, dbias, rows, columns, block, schema.FINISH_ROWS, schema.FINISH_COLUMNS)
                if THRESHOLD:
                    partials = scratch + tl.load(table + schema.Header.PARTIALS_THRESHOLD)
                    sum_columns(partials, dthreshold, rows, columns, block, schema.FINISH_ROWS, schema.FINISH_COLUMNS)
    elif STRATEGY == schema.Strategy.SINGLE:
        _single(
            x, dy, dx, dresidual, weight, bias, sigma, residual, threshold, maps, scratch, dl1, numel, table, item,
            per_group, pixels, P, SUBTRACT_MEAN, SUMMATION, SUPPRESSION, WHOLE, FEATURES, CHANNELS_LAST, INDEX, AFFINE,
            THRESHOLD, SIGMA, ACTIVATION, CHANNELS, PIXELS,
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
                    x, dy, dx, dresidual, weight, bias, sigma, residual, threshold, maps, scratch, dl1, numel, table,
                    entry, row, tile, tiles, per_group, pixels, P, SUBTRACT_MEAN, SUMMATION, SUPPRESSION, WHOLE,
                    OVER_BATCH, FEATURES, CHANNELS_LAST, INDEX, AFFINE, THRESHOLD, SIGMA, ACTIVATION, CHANNELS, PIXELS,
                    WINDOW, APPLY_CHANNELS, APPLY_PIXELS,
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
                    x, dy, dx, dresidual, weight, bias, sigma, residual, threshold, maps, scratch, dl1, numel, table,
                    entry, row, tile, tiles, per_group, pixels, P, SUBTRACT_MEAN, SUMMATION, SUPPRESSION, WHOLE,
                    OVER_BATCH, FEATURES, CHANNELS_LAST, INDEX, AFFINE, THRESHOLD, SIGMA, ACTIVATION, CHANNELS, PIXELS,
                    WINDOW, APPLY_CHANNELS, APPLY_PIXELS,
                )  # fmt: skip
            if ORDERED:
                signal(stage_counter(table, counters, chunk, stage))
