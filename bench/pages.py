"""Tables of the documentation, written from committed results: a page names them, a command fills them in."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from . import family, properties, recurrent, report, targets
from .training import summary

RESULTS = Path("bench/results")
PAGES = (Path("docs/performance.md"), Path("docs/experiments.md"))
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
_BLOCK = re.compile(r"(<!-- table (\w+) ((?:\S+ )+)-->\n).*?(<!-- end -->)", re.DOTALL)
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
    """The page with every block ``<!-- table VIEW FILE... -->`` to ``<!-- end -->`` made anew; FILE: below ``results``.

    Raises:
        ValueError: on a view that does not exist.
    """

    def made(block: re.Match[str]) -> str:
        if block[2] not in VIEWS:
            raise ValueError(f"{block[1].strip()}: got view {block[2]!r}, expected one of {', '.join(VIEWS)}")
        documents = [json.loads((results / name).read_text()) for name in block[3].split()]
        return f"{block[1]}\n{markdown(VIEWS[block[2]](documents))}\n{block[4]}"

    return _BLOCK.sub(made, page)
