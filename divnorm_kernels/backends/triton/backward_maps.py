"""The backward kernel's way to its maps: sums over the channels, merges and the adjoint window sums."""

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
    map_offsets,
    map_values,
    rstd_maps,
    sigma_at,
    sign,
    window_sum,
)
from .epilogue import (
    parameters,
    passed,
    with_residual,
)


@triton.jit
def l1_slope(dl1, numel):
    """The gradient of l1 for each abs(v)."""
    return 0.0 if dl1 is None else tl.div_rn(tl.load(dl1).to(tl.float32), numel)


@triton.jit
def slope_of_power(centred, P: tl.constexpr):
    """sign(v) abs(v)^(p-1), by which dx depends on s."""
    return centred if P == 2 else sign(centred)


@triton.jit
def channel_sums(
    values, gradient, mu, mask,
    DL1: tl.constexpr, P: tl.constexpr, SUBTRACT_MEAN: tl.constexpr, SUPPRESSION: tl.constexpr,
):  # fmt: skip
    """``(v, P1, P2, V, sum of sign(v))`` of a tile whose ``gradient`` is weight * dy; for p = 1 V is the latter.

    Without a suppression field there is no P2 and no V: nothing of x is in dx. Where mu is in s alone there is no P1.
    """
    nothing = tl.zeros(mu.shape, tl.float32)
    centred = tl.where(mask, values - mu[None, :], 0.0)
    p1 = tl.sum(gradient, 0) if SUBTRACT_MEAN else nothing
    p2 = tl.sum(gradient * (centred if SUBTRACT_MEAN else values), 0) if SUPPRESSION else nothing
    signs = tl.sum(sign(centred), 0) if DL1 or P == 1 else nothing
    slopes = (tl.sum(centred, 0) if P == 2 else signs) if SUPPRESSION else nothing
    return centred, p1, p2, slopes, signs


@triton.jit
def sigma_partial(table, sigma, group, p2, rstd, inside, P: tl.constexpr):
    """The sum of sigma P2/s^3, for p = 1 of sign(sigma) P2/s^2.

    Times sigma/s, which is at most 1, before the sum: it overflows where dsigma does.
    """
    value = sigma_at(table, sigma, group)
    factor = value * rstd if P == 2 else sign(value)
    return tl.sum(tl.where(inside, ((p2 * rstd) * rstd) * factor, 0.0), 0)


@triton.jit
def store_sources(
    scratch, table, row, pixels, p, inside, count, p1, p2, slopes, signs, rstd, slope,
    P: tl.constexpr, SUBTRACT_MEAN: tl.constexpr, SUMMATION: tl.constexpr, SUPPRESSION: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """The maps that the adjoint sums start from, divided by what the averages divide by; ``count`` channels."""
    shift = p1 * rstd + slope * signs if SUBTRACT_MEAN else slope * signs
    if SUPPRESSION:
        # 1/s^3 may overflow where P2/s^3 does not
        scale = ((p2 * rstd) * rstd) * (rstd if P == 2 else C_1)
        scale = tl.div_rn(scale, count * field_count(table, p, True, INDEX))
        tl.store(buffer_at(scratch, table, schema.Buffer.SCALE, row, pixels) + p, scale, mask=inside)
        tl.store(buffer_at(scratch, table, schema.Buffer.SLOPES, row, pixels) + p, slopes, mask=inside)
    elif SUMMATION:
        shift = tl.div_rn(shift, count * field_count(table, p, False, INDEX))
    tl.store(buffer_at(scratch, table, schema.Buffer.SHIFT, row, pixels) + p, shift, mask=inside)


@triton.jit
def whole_rstd(maps, table, map_row, SUPPRESSION: tl.constexpr):
    """1/s of a row whose fields cover everything."""
    return tl.load(rstd_maps(maps, table) + map_row) if SUPPRESSION else 1.0


@triton.jit
def whole_sources(
    p1, p2, slopes, signs, rstd, slope, inside, count,
    P: tl.constexpr, SUBTRACT_MEAN: tl.constexpr, SUPPRESSION: tl.constexpr,
):  # fmt: skip
    """``(s^2 a, A'[g/s + l1's share], A[v]/s)`` / n of a tile where the fields cover ``count`` elements; for p = 1
    ``(s a, the same, A[sign(v)])`` / n.

    Averages are taken before anything is divided by s, so that they overflow where dx does.
    """
    shift = slope * tl.div_rn(tl.sum(tl.where(inside, signs, 0.0), 0), count)
    if SUBTRACT_MEAN:
        shift += tl.div_rn(tl.sum(tl.where(inside, p1, 0.0), 0), count) * rstd
    scale = 0.0
    mean = 0.0
    if SUPPRESSION:
        scale = tl.div_rn(tl.sum(tl.where(inside, p2, 0.0), 0), count) * rstd
        mean = tl.div_rn(tl.sum(tl.where(inside, slopes, 0.0), 0), count)
        if P == 1:
            scale *= C_1
        else:
            mean *= rstd
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
            mean += tl.load(buffer_at(scratch, table, schema.Buffer.SLOPES, 0, 0) + at, mask=mask, other=0.0)
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
        slopes = tl.load(buffer_at(scratch, table, schema.Buffer.SLOPES, row, pixels) + p, mask=inside, other=0.0)
        at = buffer_at(scratch, table, schema.Buffer.SHIFT, row, pixels)
        shift = tl.load(at + p, mask=inside, other=0.0) - total * slopes
        tl.store(at + p, tl.div_rn(shift, count * field_count(table, p, False, INDEX)), mask=inside)
    target = buffer_at(scratch, table, tl.load(entry + schema.Column.TARGET), row, pixels)
    tl.store(target + p, total, mask=inside)


@triton.jit
def gradient_buffers(scratch, table, WHOLE: tl.constexpr):
    """The buffers of what `gradient_maps` gives."""
    of_a = buffer_at(scratch, table, schema.Buffer.FIRST if WHOLE else schema.Buffer.SLOPES, 0, 0)
    return of_a, buffer_at(scratch, table, schema.Buffer.SECOND if WHOLE else schema.Buffer.SCALE, 0, 0)


@triton.jit
def gradient_maps(of_a, of_shift, at, mask, SUMMATION: tl.constexpr, SUPPRESSION: tl.constexpr):
    """The coefficient a, of whole fields as in `whole_sources`, and A'[d]/n at the offsets ``at``; zeros where a field
    is absent.
    """
    a = tl.zeros(at.shape, tl.float32)
    shift = tl.zeros(at.shape, tl.float32)
    if SUPPRESSION:
        a = tl.load(of_a + at, mask=mask, other=0.0)
    if SUMMATION:
        shift = tl.load(of_shift + at, mask=mask, other=0.0)
    return a, shift


@triton.jit
def input_gradient(gradient, centred, rstd, a, shift, P: tl.constexpr, SUPPRESSION: tl.constexpr, WHOLE: tl.constexpr):
    """dx, but for what l1 adds at the element itself."""
    if not SUPPRESSION:
        found = gradient - shift
    elif WHOLE:
        found = (gradient - a * (centred * rstd if P == 2 else sign(centred))) * rstd - shift
    else:
        found = gradient * rstd - (a * slope_of_power(centred, P) + shift)
    return found


@triton.jit
def _averaged(table, per_group, OVER_BATCH: tl.constexpr):
    """How many elements the statistics average at a position."""
    count = per_group.to(tl.float32)
    return count * tl.load(table + schema.Header.BATCH).to(tl.float32) if OVER_BATCH else count


@triton.jit
def _statistics(
    x, dy, weight, bias, sigma, residual, threshold, maps, scratch, dl1, numel, table, row, tile, tiles, per_group,
    pixels, P: tl.constexpr, SUBTRACT_MEAN: tl.constexpr,
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
    slopes = tl.zeros([PIXELS], tl.float32)
    signs = tl.zeros([PIXELS], tl.float32)
    for begin in tl.range(0, per_group, CHANNELS, num_stages=IN_FLIGHT):
        c = tl.cast(begin + tl.arange(0, CHANNELS), INDEX)
        inside_c = c < per_group
        mask = inside_c[:, None] & inside[None, :]
        at = activation_offsets(c, p, groups * per_group, pixels, CHANNELS_LAST)
        values = tl.load(x + base + at, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        gradient = tl.load(dy + base + at, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        if FEATURES:
            scale, lift, tau = parameters(weight, bias, threshold, p, inside, 0)
        else:
            scale, lift, tau = parameters(weight, bias, threshold, (row % groups) * per_group + c, inside_c, 1)
        numerator = values - mu[None, :] if SUBTRACT_MEAN else values
        value = with_residual(numerator * rstd[None, :] * scale + lift, residual, base, at, mask, "evict_last")
        gradient = passed(gradient, value, tau, mask, ACTIVATION) * scale
        _, chunk_p1, chunk_p2, chunk_slopes, chunk_signs = channel_sums(
            values, gradient, mu, mask, dl1 is not None, P, SUBTRACT_MEAN, SUPPRESSION
        )
        p1 += chunk_p1
        p2 += chunk_p2
        slopes += chunk_slopes
        signs += chunk_signs
    slope = l1_slope(dl1, numel)
    count = _averaged(table, per_group, OVER_BATCH)
    if SIGMA:
        partial = sigma_partial(table, sigma, row % groups, p2, rstd, inside, P)
        tl.store(scratch + tl.load(table + schema.Header.PARTIALS_SIGMA) + row * tiles + tile, partial)
    if WHOLE:
        at = row * tiles + tile
        row_rstd = whole_rstd(maps, table, map_row, SUPPRESSION)
        count *= pixels.to(tl.float32)
        scale, shift, mean = whole_sources(
            p1, p2, slopes, signs, row_rstd, slope, inside, count, P, SUBTRACT_MEAN, SUPPRESSION
        )
        tl.store(buffer_at(scratch, table, schema.Buffer.SHIFT, 0, 0) + at, shift)
        if SUPPRESSION:
            tl.store(buffer_at(scratch, table, schema.Buffer.SCALE, 0, 0) + at, scale)
            tl.store(buffer_at(scratch, table, schema.Buffer.SLOPES, 0, 0) + at, mean)
    else:
        store_sources(
            scratch, table, row, pixels, p, inside, count, p1, p2, slopes, signs, rstd, slope,
            P, SUBTRACT_MEAN, SUMMATION, SUPPRESSION, INDEX,
        )  # fmt: skip


@triton.jit
def maps_item(
    x, dy, weight, bias, sigma, residual, threshold, maps, scratch, dl1, numel, table, entry, kind, row, tile, tiles,
    per_group, pixels, P: tl.constexpr, SUBTRACT_MEAN: tl.constexpr,
    SUMMATION: tl.constexpr, SUPPRESSION: tl.constexpr, WHOLE: tl.constexpr, OVER_BATCH: tl.constexpr,
    FEATURES: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, SIGMA: tl.constexpr,
    ACTIVATION: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """An item of the stages that lead to the maps."""
    if kind == schema.Kind.STATISTICS:
        _statistics(
            x, dy, weight, bias, sigma, residual, threshold, maps, scratch, dl1, numel, table, row, tile, tiles,
            per_group, pixels, P, SUBTRACT_MEAN, SUMMATION, SUPPRESSION, WHOLE, OVER_BATCH, FEATURES, CHANNELS_LAST,
            INDEX, SIGMA, ACTIVATION, CHANNELS, PIXELS,
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
                    _merge_batch(scratch, table, row, pixels, p, inside, schema.Buffer.SLOPES)
            else:
                window_item(scratch, table, entry, row, pixels, p, inside, count, SUMMATION, INDEX)
        else:
            window_item(scratch, table, entry, row, pixels, p, inside, count, SUMMATION, INDEX)
