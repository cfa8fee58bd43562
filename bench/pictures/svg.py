"""Pictures in SVG, written number by number, so that the same results give the same file everywhere."""

from __future__ import annotations

from collections.abc import Iterable
from xml.sax.saxutils import escape

INK, BLUE, ORANGE = "#797979", "#2f7fd6", "#d9661f"
"""Of middling lightness and on no ground of their own: white pages and dark ones show them alike."""
_FONTS = {
    "sans": "system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', sans-serif",
    "mono": "ui-monospace, 'Liberation Mono', monospace",
}


class Picture:
    """A picture that is drawn on from the upper left corner, in pixels."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self._lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_n(width)}" height="{_n(height)}" '
            f'viewBox="0 0 {_n(width)} {_n(height)}" role="img">',
            f"<title>{escape(title)}</title>",
        ]

    def rectangle(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        fill: str = "none",
        opacity: float = 1.0,
        stroke: str | None = None,
        dashes: str | None = None,
        thickness: float = 1.0,
    ) -> None:
        """One rectangle, filled, outlined or both; ``opacity`` is the filling's."""
        shape = f'x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" fill="{fill}"'
        self._lines.append(f"<rect {shape}{_opacity('fill', opacity)}{_outline(stroke, thickness, dashes)}/>")

    def line(
        self,
        x0: float,
        y0: float,
        x1: float,
        y1: float,
        *,
        stroke: str = INK,
        opacity: float = 1.0,
        dashes: str | None = None,
        thickness: float = 1.0,
    ) -> None:
        """A straight line."""
        shape = f'x1="{_n(x0)}" y1="{_n(y0)}" x2="{_n(x1)}" y2="{_n(y1)}"'
        self._lines.append(f"<line {shape}{_outline(stroke, thickness, dashes)}{_opacity('stroke', opacity)}/>")

    def arrow(self, x0: float, y0: float, x1: float, y1: float, *, stroke: str = INK, head: float = 5.0) -> None:
        """A line with a head of size ``head`` at its second end."""
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        along, across = ((x1 - x0) / length * head, (y1 - y0) / length * head), head / 2
        base = x1 - along[0], y1 - along[1]
        side = along[1] / head * across, -along[0] / head * across
        self.line(x0, y0, *base, stroke=stroke, thickness=1.5)
        points = ((x1, y1), (base[0] + side[0], base[1] + side[1]), (base[0] - side[0], base[1] - side[1]))
        self._lines.append(f'<polygon points="{" ".join(f"{_n(x)},{_n(y)}" for x, y in points)}" fill="{stroke}"/>')

    def grid(self, x: float, y: float, cell: float, count: int, *, stroke: str = INK, opacity: float = 1.0) -> None:
        """The thin lines of ``count`` by ``count`` square cells."""
        side = _n(count * cell)
        across = "".join(f"M{_n(x)} {_n(y + i * cell)}h{side}" for i in range(count + 1))
        down = "".join(f"M{_n(x + i * cell)} {_n(y)}v{side}" for i in range(count + 1))
        self._lines.append(f'<path d="{across}{down}"{_outline(stroke, 0.5, None)}{_opacity("stroke", opacity)}/>')

    def dots(self, places: Iterable[tuple[float, float]], radius: float, *, fill: str, opacity: float = 1.0) -> None:
        """Filled circles."""
        circles = "".join(f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}"/>' for x, y in places)
        self._lines.append(f'<g fill="{fill}"{_opacity("fill", opacity)}>{circles}</g>')

    def words(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 13,
        anchor: str = "start",
        fill: str = INK,
        font: str = "sans",
        bold: bool = False,
    ) -> None:
        """A line of text, y is its base line; ``anchor``: "start", "middle" or "end" of it stands at x."""
        weight = ' font-weight="600"' if bold else ""
        self._lines.append(
            f'<text x="{_n(x)}" y="{_n(y)}" font-family="{_FONTS[font]}" font-size="{_n(size)}"{weight} '
            f'text-anchor="{anchor}" fill="{fill}">{escape(text)}</text>'
        )

    def text(self) -> str:
        """The file's text."""
        return "\n".join([*self._lines, "</svg>"]) + "\n"


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _opacity(of: str, opacity: float) -> str:
    return "" if opacity == 1 else f' {of}-opacity="{_n(opacity)}"'


def _outline(stroke: str | None, thickness: float, dashes: str | None) -> str:
    if stroke is None:
        return ""
    return f' stroke="{stroke}" stroke-width="{_n(thickness)}"' + (f' stroke-dasharray="{dashes}"' if dashes else "")
