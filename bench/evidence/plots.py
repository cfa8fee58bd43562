"""The evidence as pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean
from textwrap import fill

from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from ..figures import plt, save
from ..training.probes import MEASURES
from ..training.summary import by_norm
from . import plan
from .answers import probe_points
from .results import Logs, Results

_LEAST = {"accuracy": 0.05}
"""What an axis spans at least, by figure: differences that seeds do not tell should not fill a panel."""
_AXES = {"valid": "perplexity of the validation text"}
"""Names of figures that need more words on an axis."""


def _draw(path: Path, panels: int, draw: Callable[[list[plt.Axes]], None], height: float = 3.6) -> None:
    columns = min(panels, 2)  # more would be too small to read at the width of a page
    rows = -(-panels // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.2 * columns + 1, height * rows), layout="constrained", squeeze=False
    )
    for unused in axes.flat[panels:]:
        unused.set_axis_off()
    draw(list(axes.flat[:panels]))
    save(figure, path)


def _share_scales(panels: list[plt.Axes], found: list[Results]) -> None:
    """The same network on the same data has one scale."""
    first: dict[tuple[str, str | None], plt.Axes] = {}
    for axes, of in zip(panels, found, strict=True):
        one = first.setdefault((of.table.settings.model, of.table.data), axes)
        if one is not axes:
            axes.sharey(one)


def _mark(axis: Axis) -> None:
    """Plain numbers on a logarithmic axis, even where it has less than a decade."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(MaxNLocator(5) if high < 3 * low else LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def _finish(axes: plt.Axes, logs: Logs) -> None:
    axes.grid(alpha=0.3)
    if not logs:
        axes.text(0.5, 0.5, "not yet run", transform=axes.transAxes, ha="center")


def points(path: Path, names: list[str], folder: Path) -> None:
    """A panel a table, a column a norm: a point for every seed, and a line for the mean."""

    def draw(panels: list[plt.Axes]) -> None:
        found = [Results(plan.TABLES[name], folder) for name in names]
        _share_scales(panels, found)
        for axes, of, name in zip(panels, found, names, strict=True):
            table, logs = of.table, of.counting()
            for at, norm in enumerate(table.norms):
                of_norm = [log for log in logs if log["settings"]["norm"] == norm and not log["diverged"]]
                values = [log["figures"][table.program.figure] for log in of_norm]
                if values:
                    axes.plot([at] * len(values), values, "o", color="tab:blue", markersize=5, alpha=0.7)
                    axes.plot([at - 0.3, at + 0.3], [mean(values)] * 2, color="tab:blue", linewidth=2)
            axes.set_xticks(range(len(table.norms)), table.norms, rotation=45 if len(table.norms) > 5 else 0)
            seeds = len({log["settings"]["seed"] for log in logs})
            title = f"{name}, {seeds} {'seed' if seeds == 1 else 'seeds'}"
            axes.set(ylabel=table.program.figure, xlim=(-0.6, len(table.norms) - 0.4))
            axes.set_title(title, fontsize=10)
            _finish(axes, logs)
        for axes, of in zip(panels, found, strict=True):
            low, high = axes.get_ylim()  # of all that shares it
            more = (_LEAST.get(of.table.program.figure, 0.0) - (high - low)) / 2
            if more > 0:
                axes.set_ylim(low - more, high + more)

    _draw(path, len(names), draw)


def curves(path: Path, names: list[str], folder: Path) -> None:
    """A panel a table: the figure of every evaluation against the steps.

    Means over the seeds and their range, as far as all have run.
    """
    _against_steps(path, names, folder, None)


def shares(path: Path, names: list[str], folder: Path) -> None:
    """As `curves`, of sigma's share of the divisor."""
    _against_steps(path, names, folder, "sigma share")


def _against_steps(path: Path, names: list[str], folder: Path, figure: str | None) -> None:
    def draw(panels: list[plt.Axes]) -> None:
        found = [Results(plan.TABLES[name], folder) for name in names]
        _share_scales(panels, found)
        norms = dict.fromkeys(norm for of in found for norm in of.table.norms)
        colors = {norm: f"C{i}" for i, norm in enumerate(norms)}
        for axes, of, name in zip(panels, found, names, strict=True):
            program = of.table.program
            shown = figure or program.curve
            for norm, logs in by_norm(of.counting(), of.table.norms).items():
                values = [{r["step"]: r[shown] for r in log["records"] if shown in r} for log in logs]
                values = [of_run for of_run in values if of_run] or [{}]  # a run may diverge before it is evaluated
                steps = sorted(set.intersection(*map(set, values)))  # a run may have ended before another
                rows = [[of_run[step] for of_run in values] for step in steps]
                axes.plot(steps, [mean(row) for row in rows], label=norm, linewidth=1.4, color=colors[norm])
                axes.fill_between(steps, [min(r) for r in rows], [max(r) for r in rows], color=colors[norm], alpha=0.15)
            axes.set(xlabel="step", ylabel=_AXES.get(shown, shown), title=name)
            if not program.higher_is_better:
                axes.set_yscale("log")
                _mark(axes.yaxis)
            _finish(axes, of.counting())
        lines = {line.get_label(): line for axes in panels for line in axes.get_lines()}
        handles = [lines[norm] for norm in norms if norm in lines]
        if handles:
            panels[0].figure.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=min(len(handles), 5))

    _draw(path, len(names), draw, 4.0)


def probes(path: Path, names: list[str], folder: Path) -> None:
    """A panel a probe: what it was at the start against the accuracy at the end, a point a norm."""
    logs = Results(plan.TABLES[names[0]], folder).counting()

    def draw(panels: list[plt.Axes]) -> None:
        for axes, (probe, what) in zip(panels, MEASURES.items(), strict=True):
            points = sorted(probe_points(logs, probe).items(), key=lambda point: point[1][1])
            for i, (norm, at) in enumerate(points):
                axes.plot(*at, "o", color="tab:blue")
                side, aligned = ((-5, "right"), (5, "left"))[i % 2]  # neighbours in accuracy may lie on each other
                axes.annotate(norm, at, fontsize=8, xytext=(side, 3), ha=aligned, textcoords="offset points")
            axes.set(xlabel=fill(what, 40), ylabel="accuracy")
            axes.margins(x=0.12)
            if probe not in ("similarity", "rank"):
                axes.set_xscale("log")
                _mark(axes.xaxis)
            _finish(axes, logs)

    _draw(path, len(MEASURES), draw)


VIEWS = {"points": points, "curves": curves, "shares": shares, "probes": probes}
"""By their names in a page; called with the picture's path, the words behind the name and the folder of the results."""
