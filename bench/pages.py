"""Tables of the documentation, written from committed results: a page names them, a command fills them in."""

from __future__ import annotations

import json
import re
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from . import properties, recurrent
from .training import summary

RESULTS = Path("bench/results/experiments")
PAGES = (Path("docs/experiments.md"),)
_BLOCK = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
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


def table_of(path: Path) -> Table:
    """The table of a results file of any of the commands."""
    document = json.loads(path.read_text())
    if "runs" in document:
        return summary.table(document)
    maker = {"properties.json": properties.table, "cells.json": recurrent.table}[path.name]
    return maker(document["rows"])


def filled(page: str, results: Path = RESULTS) -> str:
    """The page with every block ``<!-- table FILE -->`` to ``<!-- end -->`` made anew; FILE: below ``results``."""
    return _BLOCK.sub(lambda block: f"{block[1]}\n{markdown(table_of(results / block[2]))}\n{block[3]}", page)
