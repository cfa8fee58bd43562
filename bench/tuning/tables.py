"""The backends' tables as they are tuned: rows in front of others, and files written as the backends keep theirs."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

Row = dict[str, Any]
_LINE = 112
_JOINED = "\0"  # stands for a space at which a line must not break


@contextmanager
def replaced(table: ModuleType, rows: list[Row]) -> Iterator[None]:
    """The module's ``ROWS`` replaced, for calls that have not been planned yet."""
    saved = table.ROWS
    table.ROWS = rows
    try:
        yield
    finally:
        table.ROWS = saved


def with_rows(rows: list[Row], new: list[Row], keys: tuple[str, ...]) -> list[Row]:
    """A table with ``new`` rows in front, in place of those that ``keys`` do not tell from them."""
    there = [tuple(row[key] for key in keys) for row in new]
    return new + [row for row in rows if tuple(row[key] for key in keys) not in there]


def write(path: Path, rows: list[Row]) -> None:
    """Writes a table, the entries of a row side by side."""
    blocks = []
    for row in rows:
        entries = ", ".join(f"{json.dumps(name)}:{_JOINED}{_joined(value)}" for name, value in row.items())
        lines = textwrap.wrap(entries, _LINE, break_on_hyphens=False, break_long_words=False)
        blocks.append("    {\n" + "\n".join(f"      {line}" for line in lines).replace(_JOINED, " ") + "\n    }")
    path.write_text('{\n  "rows": [\n' + ",\n".join(blocks) + "\n  ]\n}\n")


def _joined(value: Any) -> str:
    return json.dumps(value).replace(" ", _JOINED)
