"""`python -m bench evidence`: one command that starts the long runs, or goes on with them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table as Shown

from ..options import INTERRUPTED, chosen, width
from ..training.data import DataError
from . import plan
from .results import RESULTS_FOLDER, Results
from .schedule import in_order, run


def _overview(results: dict[str, Results]) -> Shown:
    out = Shown("table", "runs that have ended", "hours left, a run at a time")
    for name, of in results.items():
        left = of.left()
        total = len([*of.choosing(), *of.table.counting()])
        out.add_row(name, f"{total - len(left)} of {total}", f"{sum(map(of.seconds, left)) / 3600:.1f}")
    return out


def command(
    tables: Annotated[
        list[str] | None, typer.Argument(help="Tables of the plan; default: all, most worth first.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help=f"Folder that holds {plan.CIFAR}, {plan.TEXT} and {plan.PICTURES}."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, each in a process of one thread.")] = 2,
    out: Annotated[Path, typer.Option(help="Folder for logs and checkpoints.")] = Path("bench/out/evidence"),
    results: Annotated[Path, typer.Option(help="Folder of the results, a JSON document a table.")] = RESULTS_FOLDER,
    only_list: Annotated[
        bool, typer.Option("--list", help="Say what has run and what is left, and run nothing.")
    ] = False,
) -> None:
    """Runs the plan behind docs/experiments.md: what has ended is not run again, what was stopped goes on."""
    names, console = chosen("TABLES", tables, plan.TABLES, tuple(plan.TABLES)), Console(width=width())
    found = {name: Results(plan.TABLES[name], results) for name in names}
    if only_list:
        console.print(_overview(found))
        return
    try:
        for of in found.values():
            of.table = of.table.at(data)
            of.table.program.load(of.table.settings)
    except DataError as error:
        raise typer.BadParameter(str(error), param_hint="--data") from None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    console.print(_overview(found))
    works = in_order(found, plan.ORDER)
    try:
        failed = run(works, found, out, jobs, lambda line: console.print(line, highlight=False))
    except KeyboardInterrupt:
        console.print(f"stopped; the same command goes on from the checkpoints in {out}")
        raise typer.Exit(INTERRUPTED) from None
    if failed:
        console.print(f"runs that failed: {len(failed)}; given again, the command tries them anew")
        raise typer.Exit(1)
