"""The command line of the check on a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..gpu import Spoilt
from ..machine import describe
from ..options import GO_ON, chosen, device_named, width
from ..results import write
from . import running
from . import steps as data
from .record import DONE, FAILED, Record
from .steps import STEPS

SCRIPT = "bench/gpu_check.sh"
MINUTES = 8.0
COLORS = {DONE: "green", FAILED: "red"}

app = typer.Typer(
    no_args_is_help=True,
    help="Builds, tests and measures on a GPU, in steps that each end in minutes: `status` says what is done and what "
    "to run next.",
)
Out = Annotated[Path, typer.Option(help="Folder for logs, results and check.json, which other runs go on from.")]
FOLDER = data.ROOT / "bench" / "results" / "gpu"


@app.command()
def status(out: Out = FOLDER) -> None:
    """Prints every step, what came of it, and the command to run next."""
    _show(Console(width=width()), Record.read(out))


@app.command()
def run(
    step: Annotated[
        list[str] | None, typer.Argument(help="Steps by name, to be run again too; default: what is not done yet.")
    ] = None,
    minutes: Annotated[
        float,
        typer.Option(min=0.01, help="No step begins or goes on behind these; what was cut off goes on next time."),
    ] = MINUTES,
    out: Out = FOLDER,
) -> None:
    """Runs the steps that come next, or those named, while there is time; ends with status 1 where one failed.

    Every step has a log in the folder, whose results are all of one GPU and of the same kernels. Where the environment
    variable OUT names a folder, all is packed into gpu-check.tar.gz there after every step.
    """
    names = chosen("STEP", step, STEPS, ())
    console, record, device = Console(width=width()), Record.read(out), data.device()
    if device is None:
        raise typer.BadParameter("torch finds no GPU here")
    for name, value in (("gpu", device.name), ("sources", data.sources())):
        if getattr(record, name) not in (None, value):
            message = f"{out}: got results of {name} {getattr(record, name)}, expected {value}, as here"
            raise typer.BadParameter(message, param_hint="--out")
        setattr(record, name, value)
    wanted = [STEPS[name] for name in names] or record.next(device)
    failed = False
    for one, outcome in running.run(wanted, device, record, 60 * minutes):
        failed |= outcome.state == FAILED
        console.print(f"== {one.name}: {outcome.state} after {outcome.seconds:.0f} s")
        console.print(escape("\n".join(outcome.says)))
    _show(console, record)
    if failed:
        raise typer.Exit(1)


@app.command()
def facts(
    fact: Annotated[
        list[str] | None,
        typer.Option(help="One by name, to be found again too; may be repeated; default: what is new."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.001, help="Time for the values of a table's entry together.")] = 0.2,
    out: Out = FOLDER,
) -> None:
    """Finds what the first minutes on a GPU are to tell; facts.json has what was found, and why something was not.

    What failed is tried again, but for what ended a process, with status 75: the same command goes on without that.
    """
    from .facts import facts as known
    from .facts import find

    device_named("cuda")
    path, names = out / "facts.json", list(known(seconds))
    figures = json.loads(path.read_text())["facts"] if path.exists() else {}
    left = tuple(name for name in names if name not in figures or figures[name].get("spoilt") is False)
    wanted = chosen("--fact", fact, tuple(names), left)
    out.mkdir(parents=True, exist_ok=True)
    machine = describe("cuda")
    console = Console(width=width())
    try:
        find(wanted, figures, seconds, lambda: write(path, {"machine": machine, "facts": figures}))
    except Spoilt as error:
        console.print(escape(str(error)))
        raise typer.Exit(GO_ON) from None
    for name, found in figures.items():
        console.print(f"[bold]{escape(name)}[/]: {escape(json.dumps(found))}")
    if any("failure" in found for found in figures.values()):
        raise typer.Exit(1)


def _show(console: Console, record: Record) -> None:
    table = Table(title=f"the check on {record.gpu or 'a GPU: not begun'}", pad_edge=False)
    for name in ("step", "what", "state", "seconds", "said last"):
        table.add_column(name)
    for step in STEPS.values():
        outcome = record.outcomes.get(step.name)
        if outcome is None:
            table.add_row(step.name, escape(step.what), "by name alone" if step.asked_for else "", "", "")
        else:
            state = f"[{COLORS.get(outcome.state, 'yellow')}]{outcome.state}[/]"
            said = escape(outcome.says[-1]) if outcome.says else ""
            table.add_row(step.name, escape(step.what), state, f"{outcome.seconds:.0f}", said)
    console.print(table)
    place = "" if record.folder == FOLDER else f" --out {record.folder}"
    for name, outcome in record.outcomes.items():
        if outcome.state == FAILED:
            console.print(f"{name} failed: {record.folder / name}.log; once more: {SCRIPT} run {name}{place}")
    left = record.next()
    if left:
        console.print(f"{len(left)} to run, {left[0].name} first: {SCRIPT} run{place}")
    else:
        console.print("all steps are done" if not _failures(record) else "nothing is left but what failed")


def _failures(record: Record) -> bool:
    return any(outcome.state == FAILED for outcome in record.outcomes.values())
