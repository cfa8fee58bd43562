"""What the commands share: options checked by hand, and the width of what they print."""

from __future__ import annotations

import sys
from typing import Annotated

import torch
import typer

from .cases import DTYPES, FORMATS

DEVICES = ("auto", "cpu", "cuda")
Device = Annotated[str, typer.Option(help="Where to measure: cpu, cuda, or auto, a GPU if there is one.")]
Dtypes = Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(DTYPES)}; may be repeated.")]
Formats = Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(FORMATS)}; may be repeated.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads torch and the kernels may use; default: torch's.")]
GO_ON = 75
"""The exit status of a command that another process is to go on with; the C library's name for it is EX_TEMPFAIL."""

INTERRUPTED = 130
"""The exit status of a command that Ctrl-C ended, as shells have it."""


def width() -> int | None:
    """The terminal's, or one that fits every table where the output is no terminal."""
    return None if sys.stdout.isatty() else 190


def command_line() -> str:
    """The command as it was given."""
    return " ".join(["python -m bench", *sys.argv[1:]])


def chosen(name: str, given: list[str] | None, known: dict | tuple, default: tuple[str, ...]) -> list[str]:
    """The values of an option that may be repeated, each one of ``known``."""
    for one in given or ():
        if one not in known:
            raise typer.BadParameter(f"got {one!r}, expected one of {', '.join(known)}", param_hint=name)
    return list(given or default)


def device_named(given: str) -> str:
    """The device to use, cpu or cuda; auto is a GPU where there is one."""
    if given not in DEVICES:
        raise typer.BadParameter(f"got {given!r}, expected one of {', '.join(DEVICES)}", param_hint="--device")
    if given == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("got 'cuda', but torch finds no GPU here", param_hint="--device")
    if given == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return given
