"""Tables and plots of the documentation, made of committed results: a page names them, a command fills them in."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from . import family, properties, recurrent, report, targets
from .evidence import plots as evidence_plots
from .evidence import views as evidence_views
from .training import summary

RESULTS = Path("bench/results")
PAGES = (Path("README.md"), Path("docs/performance.md"), Path("docs/experiments.md"))
VIEWS: dict[str, Callable[[list[dict]], Table]] = {
    "means": report.means_table,
    "ratios": lambda documents: report.ratios_table(documents[0]["rows"]),
    "settings": lambda documents: report.table(documents[0]["rows"]),
    "windows": lambda documents: report.sweep_table(documents[0]["sweeps"]),
    "targets": lambda documents: targets.table(targets.verdicts(documents[0]["rows"], documents[0]["machine"])),
    "layers": family.means_table,
    "properties": lambda documents: properties.table(documents[0]["rows"]),
    "cells": lambda documents: recurrent.table(documents[0]["rows"]),
    "runs": lambda documents: summary.table(documents[0]),
}
"""The ways to show results: ``means`` and ``layers`` compare the files of several machines, the others show one."""
EVIDENCE = "experiments"
"""The folder, below the results, of those that `evidence_views` and `evidence_plots` read, by the plan's names."""
_BLOCK = re.compile(r"(<!-- table (\w+) ((?:\S+ )*)-->\n).*?(<!-- end -->)", re.DOTALL)
_PLOT = re.compile(r"(<!-- plot (\w+) ((?:\S+ )+)in (\S+): ([^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_FIGURE = re.compile(r"(<!-- figure (\S+) (\S+) -->).*?(<!-- end -->)")
_NOTHING = "*Not yet run.*"
_WIDTH = 250
"""Wider than any table."""


def markdown(table: Table) -> str:
    """The table in Markdown, without title and caption."""
    table.title = table.caption = None
    table.box = box.MARKDOWN
    console = Console(width=_WIDTH, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.strip() for line in captured.get().strip().splitlines()) + "\n"


def filled(page: str, results: Path = RESULTS) -> str:
    """The page with every block ``<!-- table VIEW WORD... -->`` or plot to ``<!-- end -->`` made anew.

    The words are files below ``results``, or for a view of the evidence what it takes: names of the plan's tables. Runs
    have their command above the table. A
    plot is ``<!-- plot VIEW TABLE... in PATH: WHAT IT SHOWS -->``. Where none of its runs has ended, a block says so. A
    figure within a sentence, a norm's in a table of the plan, is ``<!-- figure TABLE NORM -->`` to ``<!-- end -->``.

    Raises:
        ValueError: on a view that does not exist.
    """

    def made(block: re.Match[str]) -> str:
        view, words = block[2], block[3].split()
        if view in evidence_views.VIEWS:
            if not evidence_views.begun(view, words, results / EVIDENCE):
                return f"{block[1]}\n{_NOTHING}\n\n{block[4]}"
            table = evidence_views.VIEWS[view](words, results / EVIDENCE)
        elif view in VIEWS:
            documents = [json.loads((results / name).read_text()) for name in words]
            table = VIEWS[view](documents)
            if view == "runs":
                return f"{block[1]}\n```\n{documents[0]['command']}\n```\n\n{markdown(table)}\n{block[4]}"
        else:
            raise ValueError(
                f"{block[1].strip()}: got view {view!r}, expected one of {', '.join((*VIEWS, *evidence_views.VIEWS))}"
            )
        return f"{block[1]}\n{markdown(table)}\n{block[4]}"

    def shown(block: re.Match[str]) -> str:
        begun = evidence_views.begun(block[2], block[3].split(), results / EVIDENCE)
        return f"{block[1]}\n{f'![{block[5]}]({block[4]})' if begun else _NOTHING}\n\n{block[6]}"

    def told(place: re.Match[str]) -> str:
        return f"{place[1]}{evidence_views.figure(place[2], place[3], results / EVIDENCE)}{place[4]}"

    return _FIGURE.sub(told, _PLOT.sub(shown, _BLOCK.sub(made, page)))


def pictures(page: Path) -> dict[Path, Callable[[], None]]:
    """What draws the plots of a page for which runs have ended, by their paths."""

    def drawing(view: str, words: list[str], path: Path) -> Callable[[], None]:
        return lambda: evidence_plots.VIEWS[view](path, words, RESULTS / EVIDENCE)

    found = ((view, words.split(), page.parent / name) for _, view, words, name, *_ in _PLOT.findall(page.read_text()))
    return {
        path: drawing(view, words, path)
        for view, words, path in found
        if evidence_views.begun(view, words, RESULTS / EVIDENCE)
    }


def command(
    check: Annotated[
        bool, typer.Option(help="Change nothing; status 1 where a table is not up to date or a plot is not there.")
    ] = False,
) -> None:
    """Writes the documentation's tables and plots anew from the committed results."""
    stale = [page for page in PAGES if filled(page.read_text()) != page.read_text()]
    drawings = {path: draw for page in PAGES for path, draw in pictures(page).items()}
    missing = [path for path in drawings if not path.exists()]
    if check:
        for path in (*stale, *missing):
            typer.echo(f"{path}: {'not up to date' if path in stale else 'not there'}")
        if stale or missing:
            raise typer.Exit(1)
        return
    for page in stale:
        page.write_text(filled(page.read_text()))
        typer.echo(f"{page}: written")
    for draw in drawings.values():
        draw()
