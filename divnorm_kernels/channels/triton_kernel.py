"""The Triton kernels of channel normalization: a program has all channels of some positions on chip.

A tile is one-dimensional, with that axis of x fastest which is in memory. What sums over channels takes it apart into
four: each block of four channels is then in the registers of one thread, and what remains are sums over blocks, a
quarter as many, through shared memory. Compiled for an H100, forward over a window of five is 16 to 25 instructions a
number; with scans within blocks of the window's size it was 34 to 130.
"""

import triton
import triton.language as tl

from .triton import MOST_CHANNELS

_LEVELS = tl.constexpr((MOST_CHANNELS // 4).bit_length())


@triton.jit
def places(
    outer, units,
    UNIT: tl.constexpr, CHANNELS: tl.constexpr, LAST: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Where the numbers of the program's tile lie in x, and which of them exist."""
    at = tl.arange(0, BLOCK_C * BLOCK_P)
    c = at % BLOCK_C if LAST else at // BLOCK_P
    p = at // BLOCK_C if LAST else at % BLOCK_P
    position = tl.program_id(0).to(INDEX) * BLOCK_P + p
    inner = units.to(INDEX) * (1 if LAST else UNIT)
    row = position if LAST else position // inner * inner
    offset = row * CHANNELS + (c if LAST else position % inner + c * inner)
    # a thread has one block of channels: more of them meet in the same banks of shared memory
    TOGETHER: tl.constexpr = min(UNIT, 4) if LAST else min(UNIT, BLOCK_P)
    offset = tl.max_contiguous(tl.multiple_of(offset, TOGETHER), TOGETHER)
    return offset, tl.max_constancy((position < outer * inner) & (c < CHANNELS), TOGETHER)


@triton.jit
def scalar(value, learned, WHICH: tl.constexpr, LEARNS: tl.constexpr):
    """The number of this place among k, a, beta and rho: the value, or where the mask says so the learned one."""
    return tl.load(learned + WHICH) if (LEARNS >> WHICH) & 1 else value


@triton.jit
def apart(tile, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, LAST: tl.constexpr):
    """The first, second, third and fourth channel of every block, as tiles in the order of the whole."""
    SIZE: tl.constexpr = BLOCK_C * BLOCK_P // 4
    if LAST:
        pairs = tl.reshape(tile, [SIZE, 2, 2])
    else:
        blocks = tl.reshape(tile, [BLOCK_C // 4, 4, BLOCK_P])
        pairs = tl.reshape(tl.permute(blocks, [0, 2, 1]), [SIZE, 2, 2])
    even, odd = tl.split(pairs)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def together(parts, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, LAST: tl.constexpr):
    """The tile that `apart` has taken apart."""
    pairs = tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3]))
    if LAST:
        tile = tl.reshape(pairs, [BLOCK_C * BLOCK_P])
    else:
        blocks = tl.permute(tl.reshape(pairs, [BLOCK_C // 4, BLOCK_P, 4]), [0, 2, 1])
        tile = tl.reshape(blocks, [BLOCK_C * BLOCK_P])
    return tile


@triton.jit
def shifted(part, BY: tl.constexpr, BLOCKS: tl.constexpr, STRIDE: tl.constexpr):
    """At each block what the part has ``BY`` blocks further up; 0 where there are none."""
    SIZE: tl.constexpr = part.shape[0]
    if BY == 0:
        found = part
    elif BY <= -BLOCKS or BY >= BLOCKS:
        found = tl.zeros_like(part)
    else:
        at = tl.arange(0, SIZE)
        block = (at // STRIDE) % BLOCKS + BY
        source = (at + (SIZE + BY * STRIDE)) % SIZE
        found = tl.where((block >= 0) & (block < BLOCKS), tl.gather(part, source, 0), 0.0)
    return found


@triton.jit
def run(part, COUNT: tl.constexpr, STEP: tl.constexpr, BLOCKS: tl.constexpr, STRIDE: tl.constexpr):
    """The sums over the next ``COUNT`` blocks in steps of 1 or -1: of one, two, four and so on at a time."""
    total = tl.zeros_like(part)
    power = part  # sums over 2^level blocks, the own one among them
    for level in tl.static_range(_LEVELS):
        if (COUNT >> level) & 1:
            total += shifted(power, STEP * (1 + COUNT % (1 << level)), BLOCKS, STRIDE)
        if COUNT >> (level + 1):
            power += shifted(power, STEP << level, BLOCKS, STRIDE)
    return total


@triton.jit
def window(
    parts, prefixes, suffixes,
    PLACE: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, BLOCKS: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """The sums over the box around the channels at this place in their block: the end of one block, the whole ones
    behind it and the beginning of another.
    """
    FIRST: tl.constexpr = PLACE - BEFORE
    FINAL: tl.constexpr = PLACE + AFTER
    LOW: tl.constexpr = FIRST // 4
    HIGH: tl.constexpr = FINAL // 4
    if LOW == HIGH:
        total = parts[PLACE]
        for place in tl.static_range(4):
            if place != PLACE and place >= FIRST and place <= FINAL:
                total += parts[place]
    else:
        total = shifted(suffixes[FIRST % 4], LOW, BLOCKS, STRIDE)
        total += shifted(prefixes[FINAL % 4], HIGH, BLOCKS, STRIDE)
        if LOW < 0 and HIGH > 0:
            total += suffixes[0]
        if HIGH > 1:
            total += run(suffixes[0], HIGH - 1, 1, BLOCKS, STRIDE)
        if LOW < -1:
            total += run(suffixes[0], -LOW - 1, -1, BLOCKS, STRIDE)
    return total


@triton.jit
def boxed(parts, BEFORE: tl.constexpr, AFTER: tl.constexpr, BLOCKS: tl.constexpr, STRIDE: tl.constexpr):
    """The sums over the channels c - before ... c + after."""
    first, second, third, fourth = parts
    prefixes = first, first + second, first + second + third, first + second + third + fourth
    suffixes = first + second + third + fourth, second + third + fourth, third + fourth, fourth
    return (
        window(parts, prefixes, suffixes, 0, BEFORE, AFTER, BLOCKS, STRIDE),
        window(parts, prefixes, suffixes, 1, BEFORE, AFTER, BLOCKS, STRIDE),
        window(parts, prefixes, suffixes, 2, BEFORE, AFTER, BLOCKS, STRIDE),
        window(parts, prefixes, suffixes, 3, BEFORE, AFTER, BLOCKS, STRIDE),
    )


@triton.jit
def decayed(parts, rho, BLOCKS: tl.constexpr, STRIDE: tl.constexpr):
    """The sums over the channels j <= c, and over those j > c, of weights rho^abs(c - j): two recursions."""
    first, second, third, fourth = parts
    # the last of a block, and the first, of 2^level blocks
    up = ((first * rho + second) * rho + third) * rho + fourth
    down = ((fourth * rho + third) * rho + second) * rho + first
    weight = rho * rho
    for level in tl.static_range(_LEVELS):
        if (1 << level) < BLOCKS:
            weight *= weight
            up += weight * shifted(up, -(1 << level), BLOCKS, STRIDE)
            down += weight * shifted(down, 1 << level, BLOCKS, STRIDE)
    up_first = first + rho * shifted(up, -1, BLOCKS, STRIDE)
    up_second = second + rho * up_first
    up_third = third + rho * up_second
    down_fourth = rho * shifted(down, 1, BLOCKS, STRIDE)
    down_third = rho * (fourth + down_fourth)
    down_second = rho * (third + down_third)
    down_first = rho * (second + down_second)
    return (
        (up_first, up_second, up_third, fourth + rho * up_third),
        (down_first, down_second, down_third, down_fourth),
    )


@triton.jit
def added(these, those):
    """The sums of parts."""
    return these[0] + those[0], these[1] + those[1], these[2] + those[2], these[3] + those[3]


@triton.jit
def pooled(parts, rho, BEFORE: tl.constexpr, AFTER: tl.constexpr, BLOCKS: tl.constexpr, STRIDE: tl.constexpr):
    """The sums around each channel; and of an exponential, where ``BEFORE is None``, the two that `decayed` has."""
    if BEFORE is None:
        up, down = decayed(parts, rho, BLOCKS, STRIDE)
        found = added(up, down), up, down
    else:
        sums = boxed(parts, BEFORE, AFTER, BLOCKS, STRIDE)
        found = sums, sums, sums
    return found


@triton.jit
def slope_by_rho(squares, up, down, through, back_up, back_down, BLOCKS: tl.constexpr, STRIDE: tl.constexpr):
    """The sum over the channels of ``through`` times the derivative of the squares' sums by rho.

    A step of a recursion is a product by rho, here of what is one channel below, or above; and what it counts for in
    the result is the recursion over ``through`` in the other direction.
    """
    upper = added(squares, down)
    weights = added(through, back_down)
    steps = weights[0] * shifted(up[3], -1, BLOCKS, STRIDE) + back_up[3] * shifted(upper[0], 1, BLOCKS, STRIDE)
    for place in tl.static_range(3):
        steps += weights[place + 1] * up[place] + back_up[place] * upper[place + 1]
    return tl.sum(steps, 0)


@triton.jit
def powers(divisor, beta, EXACT: tl.constexpr):
    """``(divisor^-beta, 1 / divisor)``; ``EXACT``: beta where it is a number that takes roots alone, else ``None``."""
    if EXACT == 1.0:
        inverse = tl.div_rn(1.0, divisor)
        found = inverse
    else:
        root = tl.rsqrt(divisor)
        inverse = root * root
        if EXACT == 0.5:
            found = root
        elif EXACT == 0.75:
            found = root * tl.sqrt(root)
        else:
            found = tl.exp2(-beta * tl.log2(divisor))
    return found, inverse


@triton.jit(do_not_specialize=["outer", "units"])
def forward_kernel(
    x, y, learned, k, a, beta, rho, outer, units,
    UNIT: tl.constexpr, CHANNELS: tl.constexpr, LAST: tl.constexpr, INDEX: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, SQUARED: tl.constexpr,
    EXACT: tl.constexpr, LEARNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The y of a tile. x is (outer, CHANNELS, units * UNIT), or where LAST (outer, CHANNELS), without gaps."""
    STRIDE: tl.constexpr = 1 if LAST else BLOCK_P
    offset, mask = places(outer, units, UNIT, CHANNELS, LAST, INDEX, BLOCK_C, BLOCK_P)
    value = tl.load(x + offset, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    square = value * value
    rho = scalar(rho, learned, 3, LEARNS)
    sums, _, _ = pooled(apart(square, BLOCK_C, BLOCK_P, LAST), rho, BEFORE, AFTER, BLOCK_C // 4, STRIDE)
    total = together(sums, BLOCK_C, BLOCK_P, LAST)
    divisor = scalar(k, learned, 0, LEARNS) + scalar(a, learned, 1, LEARNS) * total
    scale, _ = powers(divisor, scalar(beta, learned, 2, LEARNS), EXACT)
    found = (square if SQUARED else value) * scale
    tl.store(y + offset, found.to(y.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["outer", "units"])
def backward_kernel(
    x, dy, dx, partials, learned, k, a, beta, rho, outer, units,
    UNIT: tl.constexpr, CHANNELS: tl.constexpr, LAST: tl.constexpr, INDEX: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, SQUARED: tl.constexpr,
    EXACT: tl.constexpr, LEARNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The dx of a tile, and its part of dk, da, dbeta and drho in a row of ``partials``; ``None``: not wanted."""
    STRIDE: tl.constexpr = 1 if LAST else BLOCK_P
    BLOCKS: tl.constexpr = BLOCK_C // 4
    offset, mask = places(outer, units, UNIT, CHANNELS, LAST, INDEX, BLOCK_C, BLOCK_P)
    value = tl.load(x + offset, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    upstream = tl.load(dy + offset, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    k = scalar(k, learned, 0, LEARNS)
    a = scalar(a, learned, 1, LEARNS)
    beta = scalar(beta, learned, 2, LEARNS)
    rho = scalar(rho, learned, 3, LEARNS)
    square = value * value
    squares = apart(square, BLOCK_C, BLOCK_P, LAST)
    sums, up, down = pooled(squares, rho, BEFORE, AFTER, BLOCKS, STRIDE)
    total = together(sums, BLOCK_C, BLOCK_P, LAST)
    # 1 where there is nothing: 0 to a negative power would make what others sum up NaN
    divisor = tl.where(mask, k + a * total, 1.0)
    scale, inverse = powers(divisor, beta, EXACT)
    gradient = upstream * scale
    numerator = square if SQUARED else value
    through = gradient * (numerator * inverse)
    parts = apart(through, BLOCK_C, BLOCK_P, LAST)
    sums, back_up, back_down = pooled(parts, rho, AFTER, BEFORE, BLOCKS, STRIDE)
    if dx is not None:
        mirrored = together(sums, BLOCK_C, BLOCK_P, LAST)
        found = gradient * (2 * value if SQUARED else 1.0) - 2 * a * beta * value * mirrored
        tl.store(dx + offset, found.to(dx.dtype.element_ty), mask=mask, eviction_policy="evict_first")
    if partials is not None:
        row = partials + tl.program_id(0).to(tl.int64) * 4
        tl.store(row, -beta * tl.sum(through, 0) if LEARNS & 1 else 0.0)
        tl.store(row + 1, -beta * tl.sum(through * total, 0) if LEARNS & 2 else 0.0)
        tl.store(row + 2, -tl.sum(gradient * numerator * tl.log(divisor), 0) if LEARNS & 4 else 0.0)
        if BEFORE is None and LEARNS & 8:
            slope = slope_by_rho(squares, up, down, parts, back_up, back_down, BLOCKS, STRIDE)
            tl.store(row + 3, -beta * a * slope)
        else:
            tl.store(row + 3, 0.0)
