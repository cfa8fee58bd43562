"""The kernels: a program makes some channels at some positions, from all channels there.

Positions are counted through all samples, and a call is on those from ``first`` to before ``end``. Scratch memory holds
float32 numbers of these alone, which lie as x does: with the channels of a position, or the positions of a channel,
side by side.
"""

import triton
import triton.language as tl


@triton.jit
def in_x(c, m, channels, inner, SIDE_BY_SIDE: tl.constexpr):
    """Where channel ``c`` at position ``m`` is in x."""
    if SIDE_BY_SIDE:
        return m * channels + c
    return (m // inner * channels + c) * inner + m % inner


@triton.jit
def in_scratch(c, m, channels, first, end, SIDE_BY_SIDE: tl.constexpr):
    """Where channel ``c`` at position ``m`` is in scratch memory."""
    if SIDE_BY_SIDE:
        return (m - first) * channels + c
    return c * (end - first) + m - first


@triton.jit
def place(pid, first, WIDE: tl.constexpr, POSITIONS: tl.constexpr):
    """The positions of a program."""
    tile = pid.to(tl.int64) if WIDE else pid
    return first + tile * POSITIONS + tl.arange(0, POSITIONS)


@triton.jit
def pooled(x, SIMPLIFIED: tl.constexpr):
    """What the sums over channels are of."""
    return tl.abs(x) if SIMPLIFIED else x * x


@triton.jit
def divisors(
    x,
    beta,
    gamma,
    c,
    m,
    end,
    channels,
    inner,
    SIDE_BY_SIDE: tl.constexpr,
    SIMPLIFIED: tl.constexpr,
    PRECISION: tl.constexpr,
    CHANNELS: tl.constexpr,
    TERMS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """D of the channels ``c`` at the positions ``m``; 1 where there are none."""
    d = tl.zeros([CHANNELS, POSITIONS], tl.float32)
    for k in range(0, channels, TERMS):
        j = k + tl.arange(0, TERMS)
        at = in_x(j[:, None], m[None, :], channels, inner, SIDE_BY_SIDE)
        s = tl.load(x + at, mask=(j < channels)[:, None] & (m < end)[None, :], other=0.0).to(tl.float32)
        mask = (c < channels)[:, None] & (j < channels)[None, :]
        g = tl.load(gamma + c[:, None] * channels + j[None, :], mask=mask, other=0.0).to(tl.float32)
        d = tl.dot(g, pooled(s, SIMPLIFIED), d, input_precision=PRECISION)
    return d + tl.load(beta + c, mask=c < channels, other=1.0).to(tl.float32)[:, None]


@triton.jit(do_not_specialize=["first", "end"])
def forward_kernel(
    x,
    beta,
    gamma,
    y,
    first,
    end,
    channels,
    inner,
    SIDE_BY_SIDE: tl.constexpr,
    INVERSE: tl.constexpr,
    SIMPLIFIED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    TERMS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Makes y = x f(D)."""
    m = place(tl.program_id(0), first, WIDE, POSITIONS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    d = divisors(
        x, beta, gamma, c, m, end, channels, inner, SIDE_BY_SIDE, SIMPLIFIED, PRECISION, CHANNELS, TERMS, POSITIONS
    )
    size = d if SIMPLIFIED else tl.sqrt_rn(d)
    mask = (c < channels)[:, None] & (m < end)[None, :]
    at = in_x(c[:, None], m[None, :], channels, inner, SIDE_BY_SIDE)
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    result = v * size if INVERSE else tl.div_rn(v, size)
    tl.store(y + at, result.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first", "end"])
def slope_kernel(
    dy,
    x,
    beta,
    gamma,
    f,
    dd,
    sums,
    first,
    end,
    channels,
    inner,
    SIDE_BY_SIDE: tl.constexpr,
    INVERSE: tl.constexpr,
    SIMPLIFIED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    TERMS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Makes f(D) and the gradient of D, and what that sums up to in each channel."""
    column = tl.program_id(0)
    m = place(column, first, WIDE, POSITIONS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    d = divisors(
        x, beta, gamma, c, m, end, channels, inner, SIDE_BY_SIDE, SIMPLIFIED, PRECISION, CHANNELS, TERMS, POSITIONS
    )
    size = d if SIMPLIFIED else tl.sqrt_rn(d)
    mask = (c < channels)[:, None] & (m < end)[None, :]
    at = in_x(c[:, None], m[None, :], channels, inner, SIDE_BY_SIDE)
    grad = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    factor = size if INVERSE else tl.div_rn(1.0, size)
    if INVERSE:
        slope = grad * v if SIMPLIFIED else tl.div_rn(0.5 * grad * v, factor)
    else:
        slope = -(grad * (v * factor)) * factor if SIMPLIFIED else -0.5 * grad * (v * factor) * factor * factor
    slope = tl.where(mask, slope, 0.0)
    to = in_scratch(c[:, None], m[None, :], channels, first, end, SIDE_BY_SIDE)
    tl.store(f + to, factor, mask=mask)
    tl.store(dd + to, slope, mask=mask)
    tl.store(sums + column * channels + c, tl.sum(slope, 1), mask=c < channels)


@triton.jit(do_not_specialize=["first", "end"])
def dgamma_kernel(
    x,
    dd,
    products,
    first,
    end,
    channels,
    inner,
    SIDE_BY_SIDE: tl.constexpr,
    INVERSE: tl.constexpr,
    SIMPLIFIED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    TERMS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Makes the products of the gradient of D and what the sums are of, over SPLIT positions, TERMS at a step."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    j = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    split = tl.program_id(2)
    total = tl.zeros([CHANNELS, CHANNELS], tl.float32)
    for step in range(split * (SPLIT // TERMS), (split + 1) * (SPLIT // TERMS)):
        m = place(step, first, WIDE, TERMS)
        to = in_scratch(c[:, None], m[None, :], channels, first, end, SIDE_BY_SIDE)
        slope = tl.load(dd + to, mask=(c < channels)[:, None] & (m < end)[None, :], other=0.0)
        at = in_x(j[None, :], m[:, None], channels, inner, SIDE_BY_SIDE)
        v = tl.load(x + at, mask=(j < channels)[None, :] & (m < end)[:, None], other=0.0).to(tl.float32)
        total = tl.dot(slope, pooled(v, SIMPLIFIED), total, input_precision=PRECISION)
    out = (split * channels + c[:, None]) * channels + j[None, :]
    tl.store(products + out, total, mask=(c < channels)[:, None] & (j < channels)[None, :])


@triton.jit(do_not_specialize=["first", "end"])
def dx_kernel(
    dy,
    x,
    gamma,
    f,
    dd,
    dx,
    first,
    end,
    channels,
    inner,
    SIDE_BY_SIDE: tl.constexpr,
    INVERSE: tl.constexpr,
    SIMPLIFIED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    TERMS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Makes dx: dy f(D), and what comes through the sums."""
    m = place(tl.program_id(0), first, WIDE, POSITIONS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    through = tl.zeros([CHANNELS, POSITIONS], tl.float32)
    for k in range(0, channels, TERMS):
        j = k + tl.arange(0, TERMS)
        to = in_scratch(j[:, None], m[None, :], channels, first, end, SIDE_BY_SIDE)
        slope = tl.load(dd + to, mask=(j < channels)[:, None] & (m < end)[None, :], other=0.0)
        mask = (j < channels)[None, :] & (c < channels)[:, None]
        g = tl.load(gamma + j[None, :] * channels + c[:, None], mask=mask, other=0.0).to(tl.float32)
        through = tl.dot(g, slope, through, input_precision=PRECISION)
    mask = (c < channels)[:, None] & (m < end)[None, :]
    at = in_x(c[:, None], m[None, :], channels, inner, SIDE_BY_SIDE)
    grad = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    to = in_scratch(c[:, None], m[None, :], channels, first, end, SIDE_BY_SIDE)
    factor = tl.load(f + to, mask=mask, other=0.0)
    slope = tl.where(v > 0, 1.0, tl.where(v < 0, -1.0, 0.0)) if SIMPLIFIED else 2.0 * v
    tl.store(dx + at, (grad * factor + slope * through).to(dx.dtype.element_ty), mask=mask)
