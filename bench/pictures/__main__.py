"""`python -m bench.pictures`: draws the pictures of README.md and the documentation anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..pages import RESULTS
from . import fields
from .speed import speed

FOLDER = Path("docs/pictures")
MACHINES = ("cpu-epyc-avx2-2threads", "cpu-xeon-avx512-2threads")


def drawn() -> dict[str, str]:
    """The text of every picture by its file's name."""
    documents = [json.loads((RESULTS / machine / "results.json").read_text()) for machine in MACHINES]
    of_fields = {f.__name__: f() for f in (fields.sliding, fields.family, fields.windows, fields.edges, fields.planes)}
    return {f"{name}.svg": text for name, text in {**of_fields, "speed": speed(documents)}.items()}


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def draw(
    check: Annotated[bool, typer.Option(help="Change nothing; status 1 where a picture is not up to date.")] = False,
) -> None:
    """Draws the documentation's pictures: windows from the library's geometry, speed from the committed results."""
    files = {FOLDER / name: text for name, text in drawn().items()}
    stale = [file for file, text in files.items() if not file.exists() or file.read_text() != text]
    FOLDER.mkdir(parents=True, exist_ok=True)
    for file in stale:
        typer.echo(f"{file}: {'not up to date' if check else 'written'}")
        if not check:
            file.write_text(files[file])
    if check and stale:
        raise typer.Exit(1)


if __name__ == "__main__":
    app(prog_name="python -m bench.pictures")
