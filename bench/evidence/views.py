"""The evidence as tables: a line per norm, a line per answer, and how far the plan has come."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from rich.table import Table as Shown

from ..training.probes import MEASURES
from ..training.summary import written
from . import plan
from .answers import CONFIDENCE, answer, interval, rank_correlation
from .results import Logs, Results

_SCALES = ("growth", "sigma share")


def _digits(program: Any) -> int:
    return 4 if program.figure == "accuracy" else 2


def _of(logs: Logs, norm: str) -> Logs:
    return [log for log in logs if log["settings"]["norm"] == norm]


def norms(names: list[str], folder: Path) -> Shown:
    """Tables side by side: a line per norm, a column with the figure of each, and the rate that was chosen."""
    found = [Results(plan.TABLES[name], folder) for name in names]
    first = found[0].table.program
    out = Shown("norm")
    lines = list(dict.fromkeys(norm for of in found for norm in of.table.norms))
    for of in found:
        table = of.table
        title = f"{table.name}: {first.figure}" if len(found) > 1 else first.figure
        for name in (
            title,
            *first.also,
            *(["rate"] if table.choice else []),
            "seeds",
            *(["paper"] if table.paper else []),
        ):
            out.add_column(name, justify="right", no_wrap=True)
    for norm in lines:
        out.add_row(norm, *(cell for of in found for cell in _cells(of, norm)))
    return out


def _rate(rate: float | None, tried: tuple[float, ...]) -> str:
    """With a word where it is at an end of what was tried: a better one may lie beyond."""
    if rate is None:
        return "-"
    return f"{rate:g}" + {max(tried): " (highest)", min(tried): " (lowest)"}.get(rate, "")


def _cells(of: Results, norm: str) -> list[str]:
    table, program = of.table, of.table.program
    logs = _of(of.counting(), norm)
    ended = [log for log in logs if not log["diverged"]]
    digits = _digits(program)
    found = []
    for name in (program.figure, *program.also):
        values = [log["figures"][name] for log in ended if name in log["figures"]]
        found.append(written(values, digits if name == program.figure else 3))
    if len(ended) < len(logs):
        found[0] += f" ({len(logs) - len(ended)} diverged)"
    if table.choice:
        found.append(_rate(of.chosen(norm), of.tried(norm)))
    planned = table.seeds if norm in table.norms else 0
    found.append(f"{len(logs)}" if len(logs) == planned else f"{len(logs)} of {planned}")
    if table.paper:
        found.append(f"{table.paper[norm]:.{digits}f}" if norm in table.paper else "-")
    return found


def figure(name: str, norm: str, folder: Path) -> str:
    """The figure of a norm in a table, as that has it."""
    of = Results(plan.TABLES[name], folder)
    return _cells(of, norm)[0]


def answers(names: list[str], folder: Path) -> Shown:
    """A line per contrast of a question: the mean difference of the runs of a seed, with its interval."""
    out = Shown(
        "table", "norm", "against", title=f"± is half of the interval that holds the mean with {CONFIDENCE:.0%}"
    )
    for name in ("difference", "seeds", "verdict"):
        out.add_column(name, justify="right", no_wrap=True)
    for contrast in plan.QUESTIONS[" ".join(names)]:
        found = answer(contrast, folder)
        digits = _digits(plan.TABLES[contrast.table].program)
        differences = list(found.differences)
        half = interval(differences)
        difference = f"{mean(differences):+.{digits}f}" if differences else "-"
        difference += f" ± {half:.{digits}f}" if len(differences) > 1 else ""
        seeds = len(differences) if len(differences) == found.planned else f"{len(differences)} of {found.planned}"
        against = contrast.than if contrast.than_table is None else f"{contrast.than} ({contrast.than_table})"
        out.add_row(contrast.table, contrast.norm, against, difference, str(seeds), found.verdict)
    return out


def scales(names: list[str], folder: Path) -> Shown:
    """A line per norm, two columns per table: growth of the weights and sigma's share of the divisor at the end."""
    found = [Results(plan.TABLES[name], folder) for name in names]
    out = Shown("norm")
    for name in names:
        for figure in _SCALES:
            out.add_column(f"{name}: {figure}", justify="right")
    for norm in dict.fromkeys(norm for of in found for norm in of.table.norms):
        cells = []
        for of in found:
            last = [log["records"][-1] for log in _of(of.counting(), norm) if not log["diverged"]]
            cells += [written([record[name] for record in last if name in record], 3) for name in _SCALES]
        out.add_row(norm, *cells)
    return out


def probes(names: list[str], folder: Path) -> Shown:
    """A line per probe: how its rank over the norms goes with the accuracy's."""
    out = Shown("probe", "what it is")
    out.add_column("rank correlation with accuracy", justify="right")
    out.add_column("p", justify="right")
    logs = Results(plan.TABLES[names[0]], folder).counting()
    enough = len({log["settings"]["norm"] for log in logs}) > 2
    for name, what in MEASURES.items():
        correlation, p = rank_correlation(logs, name) if enough else (None, None)
        out.add_row(name, what, *(["not yet run", "-"] if p is None else [f"{correlation:.2f}", f"{p:.3f}"]))
    return out


def progress(names: list[str], folder: Path) -> Shown:
    """How many of the planned runs have ended, by table."""
    out = Shown("table", "norms", "steps", "batch", "rates tried")
    out.add_column("runs that have ended", justify="right")
    for name in names or list(plan.TABLES):
        of = Results(plan.TABLES[name], folder)
        table = of.table
        planned = [*of.choosing(), *table.counting()]
        tried = sorted({rate for norm in table.norms for rate in of.tried(norm)})
        rates = ", ".join(f"{rate:g}" for rate in tried) or "-"
        batch = getattr(table.settings, "batch", "-")
        ended = f"{len(planned) - len(of.left())} of {len(planned)}"
        out.add_row(name, ", ".join(table.norms), str(table.settings.steps), str(batch), rates, ended)
    return out


def begun(view: str, names: list[str], folder: Path) -> bool:
    """Whether any run has ended that a view of `VIEWS` or a plot would show; how far the plan has come always shows."""
    if view == "progress":
        return True
    if view == "answers":
        return any(answer(contrast, folder).verdict != "not yet run" for contrast in plan.QUESTIONS[" ".join(names)])
    return any(Results(plan.TABLES[name], folder).counting() for name in names)


VIEWS = {"norms": norms, "answers": answers, "scales": scales, "probes": probes, "progress": progress}
"""By their names in a page; called with the words behind it and the folder of the results."""
