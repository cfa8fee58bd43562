"""What many runs come to: mean and deviation by norm, as a table."""

from __future__ import annotations

from statistics import mean, median, stdev
from typing import Any

from rich.table import Table

Runs = list[dict[str, Any]]


def by_norm(runs: Runs, order: tuple[str, ...] = ()) -> dict[str, Runs]:
    """Runs by norm, the ``order`` first."""
    found = {run["settings"]["norm"] for run in runs}
    names = [name for name in order if name in found] + sorted(found - set(order))
    return {name: [run for run in runs if run["settings"]["norm"] == name] for name in names}


def mean_and_deviation(values: list[float]) -> tuple[float, float]:
    """The mean, and the deviation of the sample: NaN of a single value."""
    return mean(values), stdev(values) if len(values) > 1 else float("nan")


def written(values: list[float], digits: int | None = None) -> str:
    """Mean ± deviation; four digits for shares, two for other figures, where ``digits`` does not say otherwise."""
    if not values:
        return "-"
    if digits is None:
        digits = 4 if max(values) <= 1 else 2
    middle, deviation = mean_and_deviation(values)
    return f"{middle:.{digits}f}" + (f" ± {deviation:.{digits}f}" if len(values) > 1 else "")


def table(document: dict[str, Any]) -> Table:
    """A line per norm: figures with their deviation, wall time of a step, activations, the paper's figure."""
    figure, paper = document["figure"], document["paper"]
    rows = by_norm(document["runs"], tuple(document["norms"]))
    extra = [name for name in document["also"] if any(name in run["figures"] for run in document["runs"])]
    out = Table(title=document["title"], caption=f"ms a step: median, while {document['jobs']} at a time were training")
    out.add_column("norm")
    for name in (figure, *extra, "seeds", "ms a step", "sparsity", "correlation"):
        out.add_column(name, justify="right", no_wrap=True)
    if paper:
        out.add_column("paper", justify="right", no_wrap=True)
    for norm, runs in rows.items():
        ended = [run for run in runs if not run["diverged"]]
        cells = [written([run["figures"][name] for run in ended]) for name in (figure, *extra)]
        cells[0] += f" ({len(runs) - len(ended)} diverged)" if len(ended) < len(runs) else ""
        seconds = median(run["seconds_per_step"] for run in runs)
        measured = [place for run in ended for place in run["activations"].values()]
        shares = [
            written([mean([place[name] for place in measured])], 2) if measured else "-"
            for name in ("sparsity", "correlation")
        ]
        cells += [str(len(runs)), f"{1e3 * seconds:.0f}", *shares]
        out.add_row(norm, *cells, *([written([paper[norm]] if norm in paper else [])] if paper else []))
    return out
