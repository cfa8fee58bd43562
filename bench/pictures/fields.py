"""Windows as the library sees them: what of x stands in the average at a position, from the geometry of a call."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from divnorm_kernels import Span
from divnorm_kernels.fields import Axis, Geometry, geometry
from divnorm_kernels.norm import Norm

from .svg import BLUE, INK, ORANGE, Picture

Place = tuple[int, ...]
"""An element of x: sample, channel, position."""


def field(g: Geometry, axes: Sequence[Axis], place: Place) -> set[Place]:
    """The elements of x that are averaged over at ``place``; ``axes``: one of the geometry's two fields."""
    sample, channel, *position = place
    size = g.channels // g.groups
    first = channel // size * size
    around = (
        range(max(at - axis.lo, 0), min(at + axis.hi, axis.extent - 1) + 1)
        for at, axis in zip(position, axes, strict=True)
    )
    samples = range(g.batch) if g.over_batch else (sample,)
    return set(product(samples, range(first, first + size), *around))


_CELL, _GAP = 7, 9
_SAMPLES, _SIDE = 2, 9
_WIDTH = _SIDE * _CELL
"""Of a map of an activation: two samples of square maps, a column of maps per channel."""


def _activation(picture: Picture, x: float, y: float, norm: Norm, channels: int, place: Place) -> None:
    """An activation with the summation field of ``place``, or where there is none the suppression field."""
    g = geometry(norm, (_SAMPLES, channels, _SIDE, _SIDE))
    inside = field(g, g.summation or g.suppression, place)
    for sample, channel in product(range(_SAMPLES), range(channels)):
        left, top = x + channel * (_WIDTH + _GAP), y + sample * (_WIDTH + _GAP)
        picture.rectangle(left, top, _WIDTH, _WIDTH, fill=INK, opacity=0.1)
        rows = sorted(at[2] for at in inside if at[:2] == (sample, channel))
        if rows:
            columns = sorted(at[3] for at in inside if at[:2] == (sample, channel))
            _cells(picture, left, top, (rows[0], columns[0]), (rows[-1], columns[-1]), fill=BLUE, opacity=0.55)
        picture.grid(left, top, _CELL, _SIDE, opacity=0.35)
        if place[:2] == (sample, channel):
            _cells(picture, left, top, place[2:], place[2:], fill=ORANGE)


def _cells(picture: Picture, left: float, top: float, first: Place, last: Place, **how: object) -> None:
    rows, columns = last[0] - first[0] + 1, last[1] - first[1] + 1
    picture.rectangle(left + first[1] * _CELL, top + first[0] * _CELL, columns * _CELL, rows * _CELL, **how)


def _panel_width(channels: int) -> float:
    return channels * (_WIDTH + _GAP) - _GAP


def sliding() -> str:
    """One number of an activation and what it is normalized by: under two norms of torch.nn, in a sliding window."""
    channels, place, later = 3, (0, 1, 5, 5), (0, 1, 0, 0)
    panels = (
        ("BatchNorm", "its channel, the whole batch", Norm("all", groups=channels, over_batch=True)),
        ("LayerNorm", "its sample, all channels, all positions", Norm("all")),
        ("Divisive normalization", "its sample, all channels, a window", Norm(5)),
    )
    step, top = _panel_width(channels) + 48, 46
    picture = Picture(3 * step - 48 + 60, top + _SAMPLES * (_WIDTH + _GAP) + 16, "What a number is normalized by")
    for sample in range(_SAMPLES):
        middle = top + sample * (_WIDTH + _GAP) + _WIDTH / 2 + 4
        picture.words(52, middle, f"sample {sample + 1}", size=11, anchor="end")
    below = top + _SAMPLES * (_WIDTH + _GAP) + 6
    for i, (name, what, norm) in enumerate(panels):
        left = 60 + i * step
        picture.words(left, 16, name, bold=True)
        picture.words(left, 34, what, size=11)
        _activation(picture, left, top, norm, channels, place)
        for channel in range(channels):
            middle = left + channel * (_WIDTH + _GAP) + _WIDTH / 2
            picture.words(middle, below, f"channel {channel + 1}", size=10, anchor="middle")
    g = geometry(panels[-1][2], (_SAMPLES, channels, _SIDE, _SIDE))
    for channel in range(channels):
        inside = [at[2:] for at in field(g, g.summation, later) if at[1] == channel]
        x = left + channel * (_WIDTH + _GAP)
        _cells(picture, x, top, min(inside), max(inside), stroke=BLUE, dashes="3 2", thickness=1.5)
    x = left + later[1] * (_WIDTH + _GAP)
    centre = [[(at + 0.5) * _CELL for at in one[2:]] for one in (place, later)]
    picture.arrow(x + centre[0][1], top + centre[0][0], x + centre[1][1], top + centre[1][0], stroke=ORANGE)
    return picture.text()


def family() -> str:
    """The windows, groups and batches of the operator that are layers with a name."""
    channels, place = 4, (0, 1, 5, 5)
    panels = (
        ("divisive normalization", "window=5", Norm(5)),
        ("local contrast normalization", "window=5, groups=C", Norm(5, groups=channels)),
        ("positional normalization", "window=1", Norm(1)),
        ("LayerNorm over (C, H, W)", 'window="all"', Norm("all")),
        ("GroupNorm(2)", 'window="all", groups=2', Norm("all", groups=2)),
        ("InstanceNorm", 'window="all", groups=C', Norm("all", groups=channels)),
        ("BatchNorm", 'window="all", groups=C, over_batch=True', Norm("all", groups=channels, over_batch=True)),
        ("filter response normalization", 'window=None, norm_window="all", groups=C', Norm(None, "all", channels)),
    )
    across, down = _panel_width(channels) + 44, 46 + _SAMPLES * (_WIDTH + _GAP) + 22
    picture = Picture(2 * across - 44, -(-len(panels) // 2) * down - 22, "Windows that have a name")
    for i, (name, call, norm) in enumerate(panels):
        left, top = i % 2 * across, i // 2 * down
        picture.words(left, top + 16, name, bold=True)
        picture.words(left, top + 34, call, size=11, font="mono")
        _activation(picture, left, top + 46, norm, channels, place)
    return picture.text()


_STEP = 26
"""A position in the pictures of one dimension."""


def _row(picture: Picture, x: float, y: float, axis: Axis, at: int, before: int, behind: int) -> None:
    """The positions of a row with the window of one of them; room for ``before`` and ``behind`` positions outside."""
    for p in range(-before, axis.extent + behind):
        left, inside = x + (p + before) * _STEP, at - axis.lo <= p <= at + axis.hi
        if 0 <= p < axis.extent:
            picture.rectangle(left, y, _STEP - 3, _STEP - 3, fill=INK, opacity=0.12)
            if inside:
                picture.rectangle(left, y, _STEP - 3, _STEP - 3, fill=BLUE, opacity=0.55)
            if p == at:
                picture.rectangle(left + 6, y + 6, _STEP - 15, _STEP - 15, fill=ORANGE)
        elif inside:
            picture.rectangle(left + 1, y + 1, _STEP - 5, _STEP - 5, stroke=BLUE, dashes="3 2")
            if axis.divisor:
                picture.words(left + (_STEP - 3) / 2, y + _STEP / 2 + 3, "0", size=12, anchor="middle", fill=BLUE)


def _rows(title: str, entries: Sequence[tuple[str, Norm, int, int]], before: int, behind: int, label: int) -> str:
    """A picture of rows: (call, its norm, the extent, the position)."""
    behind_cells = label + (max(extent for _, _, extent, _ in entries) + before + behind) * _STEP + 8
    picture = Picture(behind_cells + 90, len(entries) * (_STEP + 12) - 8, title)
    for i, (call, norm, extent, at) in enumerate(entries):
        y, (axis,) = i * (_STEP + 12), geometry(norm, (1, 1, extent)).summation
        picture.words(0, y + _STEP / 2 + 3, call, font="mono", size=12)
        _row(picture, label, y, axis, at, before, behind)
        count = len(field(geometry(norm, (1, 1, extent)), (axis,), (0, 0, at)))
        picture.words(behind_cells, y + _STEP / 2 + 3, f"sum of {count} / {axis.divisor or count}", size=12)
    return picture.text()


def windows() -> str:
    """Odd, even, causal and other windows, in the middle of a row."""
    chosen = (5, 4, Span(4, 0), Span(1, 3), "all")
    return _rows("Windows in the middle of a row", [(_call(w), Norm(w), 12, 5) for w in chosen], 0, 0, 150)


def _call(window: int | str | Span) -> str:
    shown = f"Span({window.before}, {window.after})" if isinstance(window, Span) else repr(window).replace("'", '"')
    return f"window={shown}"


def edges() -> str:
    """What windows do at the edges, and where they are larger than the image."""
    entries = []
    for window, extent, at in ((5, 8, 0), (5, 8, 7), (9, 5, 2), (Span(4, 0), 8, 1)):
        for edge in ("valid", "zero"):
            entries.append((f'{_call(window)}, edges="{edge}"', Norm(window, edges=edge), extent, at))
    return _rows("Windows at the edges", entries, 4, 4, 250)


def planes() -> str:
    """Windows of two dimensions: two fields of their own sizes, and a window for each dimension."""
    place = (0, 0, 4, 5)
    calls = (
        ("window=5, norm_window=3", Norm(5, 3)),
        ('window=(3, "all")', Norm((3, "all"))),
        ("window=(Span(4, 0), 3)", Norm((Span(4, 0), 3))),
    )
    cell, step, top = 2 * _CELL, 2 * _WIDTH + 90, 30
    picture = Picture(3 * step - 40, top + 2 * _WIDTH + 44, "Windows of two dimensions")
    for i, (call, norm) in enumerate(calls):
        g, left = geometry(norm, (1, 1, _SIDE, _SIDE)), i * step
        picture.words(left, 16, call, font="mono", size=12)
        for row, column in product(range(_SIDE), repeat=2):
            at = (0, 0, row, column)
            x, y = left + column * cell, top + row * cell
            picture.rectangle(x, y, cell - 2, cell - 2, fill=INK, opacity=0.12)
            if at in field(g, g.summation, place):
                picture.rectangle(x, y, cell - 2, cell - 2, fill=BLUE, opacity=0.55)
            if norm.norm_window != "same" and at in field(g, g.suppression, place):
                picture.rectangle(x + 1, y + 1, cell - 4, cell - 4, stroke=ORANGE, thickness=1.5)
            if at == place:
                picture.rectangle(x + 3, y + 3, cell - 8, cell - 8, fill=ORANGE)
    legend = top + 2 * _WIDTH + 20
    picture.rectangle(0, legend - 10, 12, 12, fill=BLUE, opacity=0.55)
    picture.words(18, legend, "window: the mean that is subtracted", size=12)
    picture.rectangle(1, legend + 9, 10, 10, stroke=ORANGE, thickness=1.5)
    picture.words(18, legend + 18, "norm_window: the mean square that divides, where it is another one", size=12)
    return picture.text()
