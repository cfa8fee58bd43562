"""The backward kernel's way to its maps: sums over the channels, merges and the adjoint window sums."""

import triton
import triton.language as tl

from . import schema
from .device import (
    IN_FLIGHT,
    activation_base,
    activation_offsets,
    buffer_at,
    field_count,
    map_offsets,
    map_values,
    parameter,
    rstd_maps,
    sigma_at,
    sign,
    window_sum,
)
from .epilogue import (
    passed,
)


@triton.jit
def l1_slope(dl1, numel):
    """The gradient of l1 for each abs(v)."""
    return 0.0 if dl1 is None else tl.div_rn(tl.load(dl1).to(tl.float32), numel)


@triton.jit
def channel_sums(values, gradient, mu, mask, DL1: tl.constexpr, SUPPRESSION: tl.constexpr):
    """``(v, P1, P2, V, sum of sign(v))`` of a tile whose ``gradient`` is weight * dy.

    Without a suppression field there is no P2 and no V: nothing of x is in dx.
    """
    centred = tl.where(mask, values - mu[None, :], 0.0)
    p2 = tl.sum(gradient * centred, 0) if SUPPRESSION else tl.zeros(mu.shape, tl.float32)
    centred_sum = tl.sum(centred, 0) if SUPPRESSION else tl.zeros(mu.shape, tl.float32)
    signs = tl.sum(sign(centred), 0) if DL1 else tl.zeros(mu.shape, tl.float32)
    return centred, tl.sum(gradient, 0), p2, centred_sum, signs


@triton.jit
def sigma_partial(table, sigma, group, p2, rstd, inside):
    """The sum of sigma P2/s^3. Times sigma/s, which is at most 1, before the sum: it overflows where dsigma does."""
    over_s = sigma_at(table, sigma, group) * rstd
    return tl.sum(tl.where(inside, ((p2 * rstd) * rstd) * over_s, 0.0), 0)


@triton.jit
def store_sources(
    scratch, table, row, pixels, p, inside, count, p1, p2, centred, signs, rstd, slope,
    SUMMATION: tl.constexpr, SUPPRESSION: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """The maps that the adjoint sums start from, divided by what the averages divide by; ``count`` channels."""
    shift = p1 * rstd + slope * signs
    if SUPPRESSION:
        # 1/s^3 may overflow where P2/s^3 does not
        scale = tl.div_rn(((p2 * rstd) * rstd) * rstd, count * field_count(table, p, True, INDEX))
        tl.store(buffer_at(scratch, table, schema.Buffer.SCALE, row, pixels) + p, scale, mask=inside)
        tl.store(buffer_at(scratch, table, schema.Buffer.CENTRED, row, pixels) + p, centred, mask=inside)
    elif SUMMATION:
        shift = tl.div_rn(shift, count * field_count(table, p, False, INDEX))
    tl.store(buffer_at(scratch, table, schema.Buffer.SHIFT, row, pixels) + p, shift, mask=inside)


@triton.jit
def whole_rstd(maps, table, map_row, SUPPRESSION: tl.constexpr):
    """1/s of a row whose fields cover everything."""
    return tl.load(rstd_maps(maps, table) + map_row) if SUPPRESSION else 1.0


@triton.jit
def whole_sources(p1, p2, centred, signs, rstd, slope, inside, count, SUPPRESSION: tl.constexpr):
    """``(s a, A'[g/s + l1's share], A[v]/s)`` / n of a tile where the fields cover ``count`` elements.

    Averages are taken before anything is divided by s, so that they overflow where dx does.
    """
    shift = tl.div_rn(tl.sum(tl.where(inside, p1, 0.0), 0), count) * rstd
    shift += slope * tl.div_rn(tl.sum(tl.where(inside, signs, 0.0), 0), count)
    scale = 0.0
    mean = 0.0
    if SUPPRESSION:
        scale = tl.div_rn(tl.sum(tl.where(inside, p2, 0.0), 0), count) * rstd
        mean = tl.div_rn(tl.sum(tl.where(inside, centred, 0.0), 0), count) * rstd
    return scale, shift, mean


@triton.jit
def whole_shift(scale, shift, mean, rstd, SUMMATION: tl.constexpr, SUPPRESSION: tl.constexpr):
    """A'[d]/n where the fields cover everything, from the sums of `whole_sources`."""
    if not SUMMATION:
        found = 0.0
    elif SUPPRESSION:
        found = shift - (scale * mean) * rstd
    else:
        found = shift
    return found


@triton.jit
def _merge_whole(
    scratch, table, row, rstd, OVER_BATCH: tl.constexpr, SUMMATION: tl.constexpr, SUPPRESSION: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`whole_sources` of a map row from those of its tiles, in all samples under ``OVER_BATCH``; and what follows."""
    groups = tl.load(table + schema.Header.GROUPS)
    tiles = tl.load(table + schema.Header.STATISTICS_TILES)
    entries = tiles
    if OVER_BATCH:
        entries = tiles * tl.load(table + schema.Header.BATCH)
    scale = tl.zeros([BLOCK], tl.float32)
    shift = tl.zeros([BLOCK], tl.float32)
    mean = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, entries, BLOCK):
        entry = begin + tl.arange(0, BLOCK)
        at = (row + (entry // tiles) * groups) * tiles + entry % tiles
        mask = entry < entries
        shift += tl.load(buffer_at(scratch, table, schema.Buffer.SHIFT, 0, 0) + at, mask=mask, other=0.0)
        if SUPPRESSION:
            scale += tl.load(buffer_at(scratch, table, schema.Buffer.SCALE, 0, 0) + at, mask=mask, other=0.0)
            mean += tl.load(buffer_at(scratch, table, schema.Buffer.CENTRED, 0, 0) + at, mask=mask, other=0.0)
    together = tl.sum(scale, 0)
    return together, whole_shift(together, tl.sum(shift, 0), tl.sum(mean, 0), rstd, SUMMATION, SUPPRESSION)


@triton.jit
def _merge_batch(scratch, table, row, pixels, p, inside, BUFFER: tl.constexpr):
    """The sum over the samples of a buffer at every position of a group, into the first sample's place."""
    groups = tl.load(table + schema.Header.GROUPS)
    total = tl.zeros(p.shape, tl.float32)
    for sample in range(tl.load(table + schema.Header.BATCH)):
        total += tl.load(buffer_at(scratch, table, BUFFER, row + sample * groups, pixels) + p, mask=inside, other=0.0)
    tl.store(buffer_at(scratch, table, BUFFER, row, pixels) + p, total, mask=inside)


@triton.jit
def window_item(scratch, table, entry, row, pixels, p, inside, count, SUMMATION: tl.constexpr, INDEX: tl.constexpr):
    """One window sum and what becomes of it; ``row`` is the place in the scratch buffers."""
    total = window_sum(scratch, table, entry, row, pixels, p, inside, INDEX)
    if tl.load(entry + schema.Column.EPILOGUE) == schema.Epilogue.COEFFICIENT and SUMMATION:
        centred = tl.load(buffer_at(scratch, table, schema.Buffer.CENTRED, row, pixels) + p, mask=inside, other=0.0)
        at = buffer_at(scratch, table, schema.Buffer.SHIFT, row, pixels)
        shift = tl.load(at + p, mask=inside, other=0.0) - total * centred
        tl.store(at + p, tl.div_rn(shift, count * field_count(table, p, False, INDEX)), mask=inside)
    target = buffer_at(scratch, table, tl.load(entry + schema.Column.TARGET), row, pixels)
    tl.store(target + p, total, mask=inside)


@triton.jit
def gradient_buffers(scratch, table, WHOLE: tl.constexpr):
    """The buffers of what `gradient_maps` gives."""
    of_a = buffer_at(scratch, table, schema.Buffer.FIRST if WHOLE else schema.Buffer.CENTRED, 0, 0)
    return of_a, buffer_at(scratch, table, schema.Buffer.SECOND if WHOLE else schema.Buffer.SCALE, 0, 0)


@triton.jit
def gradient_maps(of_a, of_shift, at, mask, SUMMATION: tl.constexpr, SUPPRESSION: tl.constexpr):
    """The coefficient a, or of whole fields s a, and A'[d]/n at the offsets ``at``; zeros where a field is absent."""
    a = tl.zeros(at.shape, tl.float32)
    shift = tl.zeros(at.shape, tl.float32)
    if SUPPRESSION:
        a = tl.load(of_a + at, mask=mask, other=0.0)
    if SUMMATION:
        shift = tl.load(of_shift + at, mask=mask, other=0.0)
    return a, shift


@triton.jit
def input_gradient(
    gradient, centred, normalized, rstd, a, shift, SUPPRESSION: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """dx, but for what l1 adds at the element itself."""
    if not SUPPRESSION:
        found = gradient - shift
    elif WHOLE:
        found = (gradient - a * normalized) * rstd - shift
    else:
        found = gradient * rstd - (a * centred + shift)
    return found


@triton.jit
def _averaged(table, per_group, OVER_BATCH: tl.constexpr):
    """How many elements the statistics average at a position."""
    count = per_group.to(tl.float32)
    return count * tl.load(table + schema.Header.BATCH).to(tl.float32) if OVER_BATCH else count


@triton.jit
def _statistics(
    x, dy, weight, bias, sigma, maps, scratch, dl1, numel, table, row, tile, tiles, per_group, pixels,
    SUMMATION: tl.constexpr, SUPPRESSION: tl.constexpr, WHOLE: tl.constexpr, OVER_BATCH: tl.constexpr,
    FEATURES: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, SIGMA: tl.constexpr,
    ACTIVATION: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """The sums over the channels of a group at a tile of positions."""
    groups = tl.cast(tl.load(table + schema.Header.GROUPS), INDEX)
    p = tl.cast(tile, INDEX) * PIXELS + tl.cast(tl.arange(0, PIXELS), INDEX)
    inside = p < pixels
    base = activation_base(row, groups, per_group, pixels, CHANNELS_LAST)
    map_row = row % groups if OVER_BATCH else row
    map_at = map_offsets(map_row, p, p, pixels, False, WHOLE, OVER_BATCH)
    mu, rstd = map_values(maps, rstd_maps(maps, table), map_at, inside[None, :], SUMMATION, SUPPRESSION)
    mu = tl.reshape(mu, [PIXELS])
    rstd = tl.reshape(rstd, [PIXELS])
    p1 = tl.zeros([PIXELS], tl.float32)
    p2 = tl.zeros([PIXELS], tl.float32)
    centred_sum = tl.zeros([PIXELS], tl.float32)
    signs = tl.zeros([PIXELS], tl.float32)
    for begin in tl.range(0, per_group, CHANNELS, num_stages=IN_FLIGHT):
        c = tl.cast(begin + tl.arange(0, CHANNELS), INDEX)
        inside_c = c < per_group
        mask = inside_c[:, None] & inside[None, :]
        at = activation_offsets(c, p, groups * per_group, pixels, CHANNELS_LAST)
        values = tl.load(x + base + at, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        gradient = tl.load(dy + base + at, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        channel = (row % groups) * per_group + c
        if FEATURES:
            scale = parameter(weight, p, inside, 1.0)[None, :]
        else:
            scale = parameter(weight, channel, inside_c, 1.0)[:, None]
        if ACTIVATION:
            if FEATURES:
                lift = parameter(bias, p, inside, 0.0)[None, :]
            else:
                lift = parameter(bias, channel, inside_c, 0.0)[:, None]
            gradient = passed(gradient, (values - mu[None, :]) * rstd[None, :] * scale + lift, mask, ACTIVATION)
        gradient *= scale
        _, chunk_p1, chunk_p2, chunk_centred, chunk_signs = channel_sums(
            values, gradient, mu, mask, dl1 is not None, SUPPRESSION
        )
        p1 += chunk_p1
        p2 += chunk_p2
        centred_sum += chunk_centred
        signs += chunk_signs
    slope = l1_slope(dl1, numel)
    count = _averaged(table, per_group, OVER_BATCH)
    if SIGMA:
        partial = sigma_partial(table, sigma, row % groups, p2, rstd, inside)
        tl.store(scratch + tl.load(table + schema.Header.PARTIALS_SIGMA) + row * tiles + tile, partial)
    if WHOLE:
        at = row * tiles + tile
        row_rstd = whole_rstd(maps, table, map_row, SUPPRESSION)
        count *= pixels.to(tl.float32)
        scale, shift, mean = whole_sources(p1, p2, centred_sum, signs, row_rstd, slope, inside, count, SUPPRESSION)
        tl.store(buffer_at(scratch, table, schema.Buffer.SHIFT, 0, 0) + at, shift)
        if SUPPRESSION:
            tl.store(buffer_at(scratch, table, schema.Buffer.SCALE, 0, 0) + at, scale)
            tl.store(buffer_at(scratch, table, schema.Buffer.CENTRED, 0, 0) + at, mean)
    else:
        store_sources(
            scratch, table, row, pixels, p, inside, count, p1, p2, centred_sum, signs, rstd, slope,
            SUMMATION, SUPPRESSION, INDEX,
        )  # fmt: skip


@triton.jit
def maps_item(
    x, dy, weight, bias, sigma, maps, scratch, dl1, numel, table, entry, kind, row, tile, tiles, per_group, pixels,
    SUMMATION: tl.constexpr, SUPPRESSION: tl.constexpr, WHOLE: tl.constexpr, OVER_BATCH: tl.constexpr,
    FEATURES: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, SIGMA: tl.constexpr,
    ACTIVATION: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """An item of the stages that lead to the maps."""
    if kind == schema.Kind.STATISTICS:
        _statistics(
            x, dy, weight, bias, sigma, maps, scratch, dl1, numel, table, row, tile, tiles, per_group, pixels,
            SUMMATION, SUPPRESSION, WHOLE, OVER_BATCH, FEATURES, CHANNELS_LAST, INDEX, SIGMA, ACTIVATION,
            CHANNELS, PIXELS,
        )  # fmt: skip
    elif WHOLE:
        rstd = whole_rstd(maps, table, row, SUPPRESSION)
        a, shift = _merge_whole(scratch, table, row, rstd, OVER_BATCH, SUMMATION, SUPPRESSION, WINDOW)
        tl.store(buffer_at(scratch, table, schema.Buffer.FIRST, 0, 0) + row, a)
        tl.store(buffer_at(scratch, table, schema.Buffer.SECOND, 0, 0) + row, shift)
    else:
        count = _averaged(table, per_group, OVER_BATCH)
        p = tl.cast(tile, INDEX) * WINDOW + tl.cast(tl.arange(0, WINDOW), INDEX)
        inside = p < pixels
        if OVER_BATCH:
            if kind == schema.Kind.MERGE:
                _merge_batch(scratch, table, row, pixels, p, inside, schema.Buffer.SHIFT)
                if SUPPRESSION:
                    _merge_batch(scratch, table, row, pixels, p, inside, schema.Buffer.SCALE)
                    _merge_batch(scratch, table, row, pixels, p, inside, schema.Buffer.CENTRED)
            else:
                window_item(scratch, table, entry, row, pixels, p, inside, count, SUMMATION, INDEX)
        else:
            window_item(scratch, table, entry, row, pixels, p, inside, count, SUMMATION, INDEX)
