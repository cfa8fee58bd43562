"""The work of a call as a list of stages, and the table that tells the kernels about them.

A call whose rows fit one program each has one stage. Any other goes through several: channel statistics, window sums
on the maps one axis at a time, then the second pass over x. Where there are rows enough with small maps, a program goes
through all stages of a row by itself. Elsewhere programs take items, a stage's independent pieces, numbered so that an
item depends on items of lower number alone: a program that takes its number from a counter may wait for the items it
needs without a deadlock. Rows are then worked on in chunks, so that the second read of x finds the chunk in the
second-level cache: while one chunk's statistics are computed, the chunk before goes through the window sums of the
first field, the one before that through those of the second, and the one before that is passed over again. For p = 1
the mean of abs(v) over the channels takes a pass of its own over the chunk, once mu is known.

A *row* is a group of a sample; a *map row* is a row of the maps: the same, or under ``over_batch`` a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

from ...fields import Axis, Geometry
from .schema import AXES, MOST_STAGES, Buffer, Column, Epilogue, Header, Kind, Strategy
from .tiles import Tiles, deviations_apart, second_pass, steps_apart

DIRECT_AREA = 64
"""The largest window over two axes that is summed in one stage."""
DIRECT = 12
"""The longest window that is summed position by position; longer ones are summed by blocks, and blocks by blocks."""
RADIX = 8
"""The most blocks of one level that make one of the next, but for what the topmost level leaves."""


@dataclass(frozen=True)
class Stage:
    """One stage; of the columns, those that a stage knows by itself."""

    kind: Kind
    rows: int
    all_rows: int
    tiles: int
    lag: int = 0
    source: int = 0
    target: int = 0
    stride: int = 1
    extent: int = 1
    lo: int = 0
    hi: int = 0
    levels: int = 0
    radix: int = 1
    bound: int = 1
    epilogue: Epilogue = Epilogue.STORE
    outer_stride: int = 1
    outer_extent: int = 1
    outer_lo: int = 0
    outer_bound: int = 1

    @property
    def count(self) -> int:
        """Its items in a chunk."""
        return self.rows * self.tiles

    @property
    def size(self) -> int:
        """The positions in a block of the topmost level."""
        return self.radix**self.levels


@dataclass(frozen=True)
class Order:
    """What the host needs to know of a schedule for a launch."""

    runs: tuple[tuple[int, int], ...]
    """(first item, number) in a step of items that are independent of each other; in order."""
    steps: int
    finish: int
    """The items behind the last step, which add up partial sums."""
    counters: int
    """The number of counters: items taken, items done in the last stage, then one per chunk and stage."""
    scratch: int
    """The size of the scratch memory in float32 numbers."""

    @property
    def step(self) -> int:
        """The items of a step."""
        return sum(count for _, count in self.runs)

    @property
    def items(self) -> int:
        """All items."""
        return self.steps * self.step + self.finish

    @property
    def independent(self) -> bool:
        """Whether no item depends on another."""
        return self.steps * len(self.runs) + bool(self.finish) == 1

    def segments(self) -> Iterator[tuple[int, int]]:
        """(first item, number) of items that are independent of each other; in order. Counted out, not kept: steps may
        be many.
        """
        step = self.step
        for at in range(self.steps):
            for begin, count in self.runs:
                yield at * step + begin, count
        if self.finish:
            yield self.steps * step, self.finish


@dataclass(frozen=True)
class Schedule:
    """A call's work: the table for the kernel and the order for the host."""

    table: tuple[int, ...]
    order: Order


def _levels(length: int) -> tuple[int, int]:
    """``(levels, radix)`` for windows of ``length`` positions; a sum takes about ``radix (2 levels + 1)`` loads."""
    if length <= DIRECT:
        return 0, 1
    levels = next(n for n in range(1, 64) if RADIX ** (n + 1) >= length)
    return levels, next(r for r in range(2, RADIX + 1) if r ** (levels + 1) >= length)


def _axis_stages(window: Stage, first_level: int) -> Iterator[Stage]:
    """The sums along one axis: of blocks, level by level, then of the windows."""
    length = min(window.lo + window.hi + 1, window.extent)
    levels, radix = _levels(length)
    for level in range(1, levels + 1):
        yield replace(
            window,
            target=first_level + level - 1,
            lo=0,
            hi=radix**level - 1,
            levels=level - 1,
            radix=radix,
            bound=radix,
            epilogue=Epilogue.STORE,
            outer_stride=1,
            outer_extent=1,
            outer_lo=0,
            outer_bound=1,
        )
    yield replace(window, levels=levels, radix=radix, bound=length // radix**levels)


def strides(spatial: tuple[int, ...]) -> tuple[int, ...]:
    """The distance of neighbours along each spatial dimension of a map."""
    return tuple(prod(spatial[d + 1 :]) for d in range(len(spatial)))


def field_stages(
    axes: tuple[Axis, ...], spatial: tuple[int, ...], window: Stage, first_level: int, *, mirrored: bool
) -> Iterator[Stage]:
    """The window sums along a field's axes, from ``window.source`` to ``window.target``; mirrored for the adjoint."""
    lines = list(_paired([_line(axis, stride, mirrored) for axis, stride in zip(axes, strides(spatial), strict=True)]))
    between = [Buffer.FIRST, Buffer.SECOND] * AXES
    buffers = pairwise([window.source, *between[: len(lines) - 1], window.target])
    for left, (line, (source, target)) in enumerate(zip(lines, buffers, strict=True), 1 - len(lines)):
        stage = replace(window, source=source, target=target, **line)
        yield from _axis_stages(stage if left == 0 else replace(stage, epilogue=Epilogue.STORE), first_level)


def _line(axis: Axis, stride: int, mirrored: bool) -> dict[str, int]:
    """An axis as a stage is described by it; no window is longer than it can matter."""
    lo, hi = (min(side, max(axis.extent - 1, 0)) for side in (axis.lo, axis.hi))
    lo, hi = (hi, lo) if mirrored else (lo, hi)
    return {"stride": stride, "extent": axis.extent, "lo": lo, "hi": hi}


def _paired(lines: list[dict[str, int]]) -> Iterator[dict[str, int]]:
    """Lines to sum along one after the other: without those of one position, and two at once where both are short."""
    lines = [line for line in lines if line["lo"] + line["hi"] > 0] or lines[-1:]
    while lines:
        first, *rest = lines
        size = first["lo"] + first["hi"] + 1
        if rest and size * (rest[0]["lo"] + rest[0]["hi"] + 1) <= DIRECT_AREA:
            outer = {f"outer_{name}": first[name] for name in ("stride", "extent", "lo")}
            yield {**rest[0], **outer, "outer_bound": size}
            lines = rest[1:]
        else:
            yield first
            lines = rest


def _map_stages(
    g: Geometry, deviations: Stage, merge: Stage | None, window: Stage, first_level: int, backward: bool
) -> Iterator[Stage]:
    """The stages between the statistics and the second pass, from templates of one lag."""
    forward_order = (
        (g.summation, Buffer.MEAN, Buffer.VARIANCE, Epilogue.MEAN),
        (g.suppression, Buffer.VARIANCE, Buffer.FIRST, Epilogue.RSTD),
    )
    backward_order = (
        (g.suppression, Buffer.SCALE, Buffer.SLOPES, Epilogue.COEFFICIENT),
        (g.summation, Buffer.SHIFT, Buffer.SCALE, Epilogue.STORE),
    )
    fields = [field for field in (backward_order if backward else forward_order) if field[0] is not None]
    apart = deviations_apart(g, backward)
    unmerged = Buffer.MEAN if apart else Buffer.VARIANCE  # to the latter the mean belongs too
    step = 1
    for axes, source, target, epilogue in fields:
        if apart and epilogue == Epilogue.RSTD:
            yield replace(deviations, lag=step * deviations.lag)
            unmerged, step = Buffer.VARIANCE, step + 1
        if merge is not None and unmerged is not None:
            yield replace(merge, lag=step * merge.lag, source=unmerged)
            unmerged = None
        if not g.whole:
            start = replace(window, lag=step * window.lag, source=source, target=target, epilogue=epilogue)
            yield from field_stages(axes, g.spatial, start, first_level, mirrored=backward)
        step += 1


def _stages(g: Geometry, tiles: Tiles, first_level: int, backward: bool) -> list[Stage]:
    """The stages of a call whose rows no program holds."""
    rows, pixels = g.batch * g.groups, prod(g.spatial)
    chunk = rows if g.over_batch or g.features else min(rows, tiles.chunk_samples * g.groups)
    map_rows, map_chunk = (g.groups, g.groups) if g.over_batch else (rows, chunk)
    lag = int(chunk < rows)
    stages = []
    if g.summation is not None or g.suppression is not None:
        statistics = Stage(Kind.STATISTICS, chunk, rows, -(-pixels // tiles.pixels))
        deviations = replace(statistics, kind=Kind.DEVIATIONS, lag=lag)
        window = Stage(Kind.WINDOW, map_chunk, map_rows, 1 if g.whole else -(-pixels // tiles.window), lag)
        merge = replace(window, kind=Kind.MERGE) if g.over_batch or g.whole else None
        stages = [statistics, *_map_stages(g, deviations, merge, window, first_level, backward)]
    channel_tiles = -(-second_pass(g)[0] // (tiles.apply_channels * tiles.channel_blocks))
    apply_rows, all_rows = (1, 1) if g.features else (chunk, rows)
    lag *= steps_apart(g, backward)
    return [*stages, Stage(Kind.APPLY, apply_rows, all_rows, channel_tiles * tiles.splits, lag)]


def _field(axes: tuple[Axis, ...] | None, spatial: tuple[int, ...]) -> list[int]:
    entries = [(1, 1, 0, 0, 1)] * AXES
    if axes is not None:
        entries[: len(axes)] = [
            (a.extent, stride, a.lo, a.hi, a.divisor) for a, stride in zip(axes, strides(spatial), strict=True)
        ]
    return [number for entry in entries for number in entry]


def schedule(g: Geometry, tiles: Tiles, *, backward: bool, finish: int, sigmas: int, variance: bool) -> Schedule:
    """The schedule of a direction; ``finish`` is the number of items that add up partial sums, 0 for none.

    ``variance`` keeps those of rows behind rstd.
    """
    rows, pixels = g.batch * g.groups, prod(g.spatial)
    map_size = (g.groups if g.over_batch else rows) * (1 if g.whole else pixels)
    rstd = map_size if g.summation else 0
    first_level = Buffer.SLOPES + 1 if backward else Buffer.SECOND + 1
    single, looped = (tiles.strategy == strategy for strategy in (Strategy.SINGLE, Strategy.LOOPED))
    if single:
        template = Stage(Kind.WINDOW, 0, 0, 1)
        deviations = replace(template, kind=Kind.DEVIATIONS)
        stages = [] if g.whole else list(_map_stages(g, deviations, None, template, first_level, backward))
        chunks, step, steps = 1, min(rows, tiles.items), 1
        scratch_rows, awaited, statistics_tiles = step, step, 1
    else:
        stages = _stages(g, tiles, first_level, backward)
        if looped:
            chunks, step, steps, awaited = 1, rows, 1, rows
        else:
            chunks = 1 if g.features else -(-rows // stages[0].rows)
            step, steps = sum(stage.count for stage in stages), chunks + stages[-1].lag
            awaited = stages[-1].count * chunks
        scratch_rows = rows
        statistics_tiles = stages[0].tiles if stages[0].kind == Kind.STATISTICS else 1
    if len(stages) > MOST_STAGES:
        raise AssertionError(f"{len(stages)} stages, at most {MOST_STAGES} fit the table")

    begins = [sum(stage.count for stage in stages[:i]) for i in range(len(stages))]
    buffers = 1 + max(first_level - 1, *(stage.target for stage in stages), 0)
    per_row = max(1, statistics_tiles) if g.whole else pixels
    buffer = scratch_rows * per_row
    pieces = step if single else tiles.splits * (1 if g.features else g.batch)
    sums = 3 if g.norm.activation == "tlu" else 2  # dweight, dbias, dthreshold
    if backward:
        partial_rows, partial_columns = g.batch if single and not g.features else pieces, g.affine_size
        partials = (sums * partial_rows * partial_columns + rows * statistics_tiles) if finish else 0
    else:
        partial_rows, partial_columns = 1, step if single else stages[-1].all_rows * stages[-1].tiles
        partials = partial_columns if finish else 0
    head = {
        Header.STAGES: len(stages),
        Header.STEP_ITEMS: step,
        Header.CHUNKS: chunks,
        Header.FINISH: step * steps,
        Header.AWAITED: awaited,
        Header.BATCH: g.batch,
        Header.GROUPS: g.groups,
        Header.ITEMS: step,
        Header.STATISTICS_TILES: statistics_tiles,
        Header.SPLITS: tiles.splits,
        Header.SPLIT_BLOCKS: -(-second_pass(g)[1] // (tiles.apply_pixels * tiles.splits)),
        Header.CHANNEL_BLOCKS: tiles.channel_blocks,
        Header.BUFFER: buffer,
        Header.LEVELS: first_level,
        Header.RSTD: rstd,
        Header.VARIANCE: rstd + map_size if variance else 0,
        Header.PARTIALS: buffers * buffer,
        Header.PARTIALS_BIAS: buffers * buffer + partial_rows * partial_columns,
        Header.PARTIALS_THRESHOLD: buffers * buffer + 2 * partial_rows * partial_columns,
        Header.PARTIALS_SIGMA: buffers * buffer + sums * partial_rows * partial_columns,
        Header.PARTIAL_ROWS: partial_rows,
        Header.PARTIAL_COLUMNS: partial_columns,
        Header.SIGMAS: sigmas,
    }
    table = [head[entry] for entry in Header if entry != Header.FIELDS]
    for axes in (g.summation, g.suppression):
        table += _field(axes, g.spatial)
    for stage, begin in zip(stages, begins, strict=True):
        row = {Column.BEGIN: begin} | {c: getattr(stage, c.name.lower()) for c in Column if c != Column.BEGIN}
        table += [row[column] for column in Column]

    one_run = single or looped
    runs = ((0, step),) if one_run else tuple((b, s.count) for b, s in zip(begins, stages, strict=True))
    counters = 2 + (0 if one_run else chunks * len(stages))
    return Schedule(
        tuple(int(n) for n in table), Order(runs, steps, finish, counters, scratch=buffers * buffer + partials)
    )
