"""The command line of tuning."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from divnorm_kernels.backends import KERNELS, preference

from ..machine import describe
from ..options import chosen, command_line, device_named, width
from . import search, tables
from .calls import DIRECTIONS, Prepared, calls
from .knobs import KEYS, TUNABLE

DTYPES = ("float32", "bfloat16")
"""One of each size of an element; float16 shares bfloat16's rows."""
PREFERENCE = "preference.json"
PREFERENCE_KEYS = ("arch", "bytes", "fields")
KNOBS = tuple(dict.fromkeys(knob for tunable in TUNABLE.values() for knob in tunable.knobs))
COMPILES = ("triton",)
"""Backends that compile what a row asks for on its first call."""


def tune(
    backend: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(TUNABLE)}; may be repeated; default: those there are.")
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(DTYPES)}; may be repeated.")] = None,
    direction: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(DIRECTIONS)}; may be repeated.")
    ] = None,
    knob: Annotated[
        list[str] | None, typer.Option(help=f"An entry of a table, of {', '.join(KNOBS)}; may be repeated.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.001, help="Time for the values of one entry on one call.")] = 0.05,
    jobs: Annotated[int, typer.Option(min=0, help="Processes that compile Triton's candidates ahead.")] = 0,
    install: Annotated[bool, typer.Option("--install", help="Put the tables into the package too.")] = False,
    out: Annotated[
        Path, typer.Option(help="Folder for the tables as they come out, and tuning.json with every trial.")
    ] = Path("bench/out/tuning"),
) -> None:
    """Tunes the tables of the GPU backends on the GPU at hand, entry by entry, and finds which backend comes first.

    A value of an entry is kept if its results are right and its time is at least 1% shorter than the present one's, as
    a geometric mean over calls. The files are written after every entry.
    """
    device = device_named("cuda")
    there = tuple(name for name in TUNABLE if KERNELS[name].missing() is None)
    backends = chosen("--backend", backend, there, there)
    dtypes = chosen("--dtype", dtype, DTYPES, DTYPES)
    directions = chosen("--direction", direction, DIRECTIONS, DIRECTIONS)
    knobs = chosen("--knob", knob, KNOBS, KNOBS)
    console = Console(width=width())
    out.mkdir(parents=True, exist_ok=True)
    document = {"machine": describe(device), "command": command_line(), "trials": [], "preferences": []}

    def save(file: str, folder: Path, rows: list[tables.Row]) -> None:
        for place in (out, folder) if install else (out,):
            tables.write(place / file, rows)
        (out / "tuning.json").write_text(json.dumps(document, indent=1) + "\n")

    with ExitStack() as stack:
        workers = None
        if jobs and set(backends) & set(COMPILES):
            workers = stack.enter_context(ProcessPoolExecutor(jobs, mp_context=get_context("spawn")))
        for name in dtypes:
            prepared = [Prepared(call) for call in calls(name, device)]
            for tuned_backend in backends:
                tunable, compiling = TUNABLE[tuned_backend], workers if tuned_backend in COMPILES else None
                own = [one for one in knobs if one in tunable.knobs]
                folder = Path(tunable.table.__file__).parent
                for way in directions:
                    console.rule(f"{tuned_backend}, {way}, {name}")
                    for trial in search.tuned(tuned_backend, way, prepared, own, seconds, compiling):
                        console.print(_line(trial))
                        document["trials"].append(asdict(trial))
                        tunable.table.ROWS = tables.with_rows(tunable.table.ROWS, [trial.row], KEYS)
                        save(tunable.file, folder, tunable.table.ROWS)
            if set(there) == set(TUNABLE):
                for row, by_call in search.preferred(prepared, seconds):
                    console.print(f"{name}, {row['fields']}: {' before '.join(row['order'])}")
                    document["preferences"].append({"row": row, "calls": by_call})
                    preference.ROWS = tables.with_rows(preference.ROWS, [row], PREFERENCE_KEYS)
                    save(PREFERENCE, Path(preference.__file__).parent, preference.ROWS)
    console.print(f"written to {out}: tuning.json and the tables")


def _line(trial: search.Trial) -> str:
    scores = ", ".join(f"{value}: {score:.3f}" for value, score in trial.scores.items())
    failed = "".join(f"; {value} is out: {escape(why)}" for value, why in trial.out.items())
    kept = f"[green]{trial.kept}[/]" if trial.kept != trial.present else f"{trial.kept} stays"
    return f"{trial.knob}: {kept} ({scores}){failed}"
