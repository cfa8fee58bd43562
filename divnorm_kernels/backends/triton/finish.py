"""The end of the schedule: partial sums become the results that have no position, in a fixed order."""

import triton
import triton.language as tl

from . import schema


@triton.jit
def sum_partials(partials, count, BLOCK: tl.constexpr):
    """The sum of ``count`` numbers, in an order that depends on nothing else."""
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, count, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        total += tl.load(partials + at, mask=at < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def sum_columns(partials, target, rows, columns, block, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sums at a block of columns, as of a parameter's gradient at some channels, from ``rows`` of partial ones."""
    at = block * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(0, rows, ROWS):
        row = begin + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (at < columns)[None, :]
        total += tl.load(partials + row[:, None] * columns + at[None, :], mask=mask, other=0.0)
    tl.store(target + at, tl.sum(total, 0).to(target.dtype.element_ty), mask=at < columns)


@triton.jit
def sum_sigma(partials, dsigma, table, which, BLOCK: tl.constexpr):
    """The gradient of one sigma: of a group's, or of the one for all groups."""
    groups = tl.load(table + schema.Header.GROUPS)
    tiles = tl.load(table + schema.Header.STATISTICS_TILES)
    one = tl.load(table + schema.Header.SIGMAS) == 1
    rows = tl.load(table + schema.Header.BATCH) * tl.where(one, groups, 1)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, rows * tiles, BLOCK):
        entry = begin + tl.arange(0, BLOCK)
        row = (entry // tiles) * tl.where(one, 1, groups) + which
        total += tl.load(partials + row * tiles + entry % tiles, mask=entry < rows * tiles, other=0.0)
    tl.store(dsigma + which, (-tl.sum(total, 0)).to(dsigma.dtype.element_ty))
