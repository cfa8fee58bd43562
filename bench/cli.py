"""The command line of the benchmark."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, track
from rich.table import Table

from . import behind, channels, family, gdn, models, overhead, pages, properties, recurrent, targets
from .cases import CASES, DTYPES, FORMATS, SUITES, SWEEP_WINDOWS, Case, case_named, settings
from .check.command import app as check
from .evidence.command import command as evidence
from .inputs import image_cases, sample_cases, tensor_case
from .machine import describe, taken_by_others
from .measure import Ended, copy_bandwidth
from .options import GO_ON, INTERRUPTED, Device, Dtypes, Formats, Threads, chosen, command_line, device_named, width
from .plots import plot_ratios, plot_windows
from .report import print_headline, sweep_table, table
from .results import headline, read, write_rows
from .running import Plan, Results, steps
from .timing import keep_freed_memory
from .training.command import app as train
from .training.data import DataError
from .training.images import load as load_images
from .training.placing import check_norm
from .tuning.command import tune

BUSY = 0.1
"""The share of the processors' time that others may take before it is told."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Times divisive normalization against BatchNorm, GroupNorm, LayerNorm, LocalResponseNorm, the eager reference "
    "and torch.compile of it, with a plain copy of the tensor as the yardstick: start with `run`. Trains the paper's "
    "networks: `train`. Checks and tunes the GPU backends: `gpu-check`, `tune`.",
)
app.add_typer(train, name="train")
app.add_typer(check, name="gpu-check")
app.command()(tune)
app.command("evidence")(evidence)
app.command("behind")(behind.command)
app.command("channels")(channels.command)
app.command("gdn")(gdn.command)
app.command("pages")(pages.command)


@app.command()
def cases() -> None:
    """Lists the cases and suites."""
    console = Console(width=width())
    out = Table("case", "what it stands for", "suites")
    for case in CASES.values():
        out.add_row(case.name, case.what, ", ".join(name for name, suite in SUITES.items() if case.name in suite.cases))
    console.print(out)


@app.command()
def run(
    suite: Annotated[
        str | None,
        typer.Option(
            help=f"What to measure where no option below says otherwise: {', '.join(SUITES)}; default: quick, or on a "
            "GPU gpu."
        ),
    ] = None,
    device: Device = "auto",
    case: Annotated[
        list[str] | None,
        typer.Option(help="A shape NxCxHxW (NxF, NxCxL, NxCxDxHxW), or a case by name; may be repeated."),
    ] = None,
    dtype: Dtypes = None,
    format: Formats = None,
    window: Annotated[list[int] | None, typer.Option(min=1, help="A window size; may be repeated.")] = None,
    tensor: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Measure the activation in this .npy file instead.")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Measure the pictures of this folder, and a first layer's response to them, instead.",
        ),
    ] = None,
    threads: Threads = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="Time for the subjects of one setting together.")] = 1.0,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile/--no-compile", help="Measure torch.compile of the reference on the suite's cases for it."
        ),
    ] = True,
    sweep: Annotated[
        bool, typer.Option(help="Measure the time against the window size on the suite's cases for it.")
    ] = True,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Keep what results.json in the folder has, and measure what it has not yet."),
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for results.json, ratios.png and windows.png.")] = Path("bench/out"),
) -> None:
    """Measures forward, backward and both; prints a table, writes JSON and plots.

    Every subject of a setting runs in turn, round after round, so that the machine's moods hit all alike; figures are
    medians. Results are compared with the reference in float64 first, and a wrong one is not timed: the command then
    ends with status 1, as where one of our backends failed. results.json is written after every setting; a run that was
    killed goes on with --resume, and one that a subject ended, with status 75, goes on without that subject.
    """
    device = device_named(device)
    suite = suite or ("quick" if device == "cpu" else "gpu")
    if suite not in SUITES:
        raise typer.BadParameter(f"got {suite!r}, expected one of {', '.join(SUITES)}", param_hint="--suite")
    selection = SUITES[suite]
    dtypes = chosen("--dtype", dtype, DTYPES, selection.dtypes)
    formats = chosen("--format", format, FORMATS, selection.formats)
    windows = list(window or selection.windows)
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)

    try:
        own = ([tensor_case(tensor)] if tensor else []) + (image_cases(images) if images else [])
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if own:
        plan = list(settings(own, dtypes, formats, windows, device))
        swept: list[Case] = own[:1]
    else:
        try:
            named = [case_named(name) for name in case or selection.cases]
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--case") from None
        plan = list(settings(named, dtypes, formats, windows, device))
        if case is None:  # the default run always sees a real picture
            plan += settings(sample_cases(), dtypes[:1], formats, windows[:1], device)
        swept = [CASES[name] for name in selection.sweep if CASES[name] in named]
    with_compiled = {s.case.name for s in plan if s.case.name in selection.compiled or own} if compiled else set()
    sweeps = [
        [replace(setting, window=window) for window in SWEEP_WINDOWS]
        for setting in settings(swept if sweep else [], dtypes, formats, windows[:1], device)
    ]

    console = Console(width=width())
    out.mkdir(parents=True, exist_ok=True)
    others = taken_by_others()
    if others is not None and others > BUSY:
        console.print(f"others take {others:.0%} of the processors' time: what follows compares little", style="bold")
    with console.status("timing a copy and small calls"):
        machine = describe(device) | {"copy_bytes_per_second": copy_bandwidth(device)}
        results = Results(out / "results.json", machine, command_line(), overhead.call_overhead(device))
    work = Plan(plan, sweeps, with_compiled, seconds)
    if resume:
        try:
            results.go_on()
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--resume") from None
        work = work.without(results)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        todo = list(steps(work, results))
        task = progress.add_task("", total=len(todo))
        for description, step in todo:
            progress.update(task, description=description)
            try:
                step()
            except Ended as ended:
                results.add(ended)
                raise _to_go_on(console, ended) from None
            except KeyboardInterrupt:
                raise _stopped(console) from None
            progress.advance(task)
    results.write()
    _show(console, out, results.document())
    summary = headline(results.rows)
    if summary["wrong"] or summary["failed"]:
        raise typer.Exit(1)


@app.command()
def layers(
    layer: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(p.name for p in family.PAIRS)}; may be repeated.")
    ] = None,
    device: Device = "auto",
    dtype: Dtypes = None,
    format: Formats = None,
    threads: Threads = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="Time for the subjects of one setting together.")] = 1.0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what layers.json in the folder has, and measure what it has not yet.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for layers.json.")] = Path("bench/out"),
) -> None:
    """Times the layers that torch has too against torch's, alone and followed by a ReLU, which ours fuse.

    Results are compared with the reference in float64 first; the command ends with status 1 where one is wrong or
    failed. A run that was killed goes on with --resume, as does one that a layer ended, with status 75.
    """
    device = device_named(device)
    names = chosen("--layer", layer, tuple(p.name for p in family.PAIRS), tuple(p.name for p in family.PAIRS))
    dtypes = chosen("--dtype", dtype, DTYPES, ("float32", "bfloat16"))
    formats = chosen("--format", format, FORMATS, FORMATS)
    if threads is not None:
        torch.set_num_threads(threads)
    console, machine, path = Console(width=width()), describe(device), out / "layers.json"
    try:
        rows = family.read(path, machine) if resume else []
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--resume") from None
    keep_freed_memory()
    done = {family.key(asdict(row)) for row in rows}
    plan = [of for of in family.settings(dtypes, formats, device) if of[0].name in names]
    plan = [of for of in plan if family.key(asdict(family.unmeasured(*of))) not in done]
    out.mkdir(parents=True, exist_ok=True)
    for pair, setting, relu in track(plan, "timing", console=console, transient=True):
        try:
            rows.append(family.measure(pair, setting, relu, seconds))
        except Ended as ended:
            rows.append(family.unmeasured(pair, setting, relu, ended.failure))
            family.write(path, rows, machine, command_line())
            raise _to_go_on(console, ended) from None
        except KeyboardInterrupt:
            raise _stopped(console) from None
        family.write(path, rows, machine, command_line())
    family.show(console, rows, machine)
    if any(row.ours is None for row in rows):
        raise typer.Exit(1)


@app.command("models")
def models_command(
    norm: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(models.NORMS)}; may be repeated.")] = None,
    device: Device = "auto",
    dtype: Dtypes = None,
    format: Formats = None,
    threads: Threads = None,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Measure under torch.compile too.")] = True,
    seconds: Annotated[float, typer.Option(min=0.01, help="Time for the networks of one setting together.")] = 10.0,
    out: Annotated[Path, typer.Option(help="Folder for models.json.")] = Path("bench/out"),
) -> None:
    """Times a training step of a small convolutional network with each norm, eager and under torch.compile.

    Results are compared with the same network in float64 first; the command ends with status 1 where one is wrong.
    """
    device = device_named(device)
    norms = chosen("--norm", norm, models.NORMS, tuple(models.NORMS))
    dtypes = chosen("--dtype", dtype, DTYPES, ("float32", "bfloat16"))
    formats = chosen("--format", format, FORMATS, FORMATS)
    modes = [models.EAGER, models.COMPILED][: 1 + compiled]
    if threads is not None:
        torch.set_num_threads(threads)
    console, rows = Console(width=width()), []
    keep_freed_memory()
    out.mkdir(parents=True, exist_ok=True)
    machine = describe(device)
    for setting in track(models.settings(dtypes, formats, device), "timing", console=console, transient=True):
        rows += models.measure(setting, norms, modes, seconds)
        write_rows(out / "models.json", rows, machine, command_line())
    console.print(models.table(rows))
    if any(row["times"] is None for row in rows):
        raise typer.Exit(1)


@app.command("overhead")
def overhead_command(
    case: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(overhead.CASES)}; may be repeated.")
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    out: Annotated[Path, typer.Option(help="Folder for overhead.json.")] = Path("bench/out"),
) -> None:
    """Times calls on a few kilobytes, where the call is the time, against torch's layers."""
    device = device_named(device)
    cases = chosen("--case", case, overhead.CASES, tuple(overhead.CASES))
    if threads is not None:
        torch.set_num_threads(threads)
    console = Console(width=width())
    rows = [
        row
        for name in track(cases, "timing", console=console, transient=True)
        for row in overhead.measure(name, device)
    ]
    out.mkdir(parents=True, exist_ok=True)
    write_rows(out / "overhead.json", rows, describe(device), command_line())
    console.print(overhead.table(rows))
    for words in overhead.missed(rows):
        console.print(words)


@app.command("properties")
def properties_command(
    norm: Annotated[
        list[str] | None, typer.Option(help=f"Default: {', '.join(properties.NORMS)}; may be repeated.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with CIFAR in the binary layout; without: textures made on the spot.")
    ] = None,
    depth: Annotated[int, typer.Option(min=1, help="Layers behind the stem.")] = 20,
    channels: Annotated[int, typer.Option(min=2, help="Channels of every layer.")] = 64,
    batch: Annotated[int, typer.Option(min=2, help="Pictures.")] = 32,
    seeds: Annotated[int, typer.Option(min=1, help="Networks per norm, with seeds 0, 1, ...")] = 3,
    backend: Annotated[str | None, typer.Option(help="Of divnorm_kernels; default: the best.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for properties.json and properties.png.")] = Path("bench/out"),
) -> None:
    """Measures deep networks at their initial values: size, similarity and rank of activations, gradients."""
    norms = list(dict.fromkeys(norm or properties.NORMS))
    try:
        for one in norms:
            check_norm(one)
        images = load_images(data)
    except DataError as error:
        raise typer.BadParameter(str(error), param_hint="--data") from None
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--norm") from None
    console = Console(width=width())
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=len(properties.NETWORKS) * len(norms) * seeds)
        rows = properties.measure_all(
            norms, images, depth, channels, batch, seeds, backend, lambda: progress.advance(task)
        )
    out.mkdir(parents=True, exist_ok=True)
    properties.write(out / "properties.json", rows, command_line(), images.name)
    properties.plot(out / "properties.png", rows)
    console.print(properties.table(rows))
    console.print(f"written to {out}: properties.json, properties.png")


@app.command()
def cells(
    cell: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(recurrent.MODELS)}; may be repeated.")
    ] = None,
    norm: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(recurrent.NORMS)}; may be repeated.")
    ] = None,
    threads: Threads = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="Time for all norms of one cell together.")] = 10.0,
    out: Annotated[Path, typer.Option(help="Folder for cells.json.")] = Path("bench/out"),
) -> None:
    """Times recurrent layers with a norm in every step against the same layer with torch's LayerNorm."""
    models = chosen("--cell", cell, recurrent.MODELS, recurrent.MODELS)
    norms = chosen("--norm", norm, recurrent.NORMS, recurrent.NORMS)
    if threads is not None:
        torch.set_num_threads(threads)
    keep_freed_memory()
    rows, machine = recurrent.measure(models, norms, seconds), describe("cpu")
    out.mkdir(parents=True, exist_ok=True)
    write_rows(out / "cells.json", rows, machine, command_line())
    Console(width=width()).print(recurrent.table(rows))


@app.command()
def show(
    results: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A results.json of an earlier run.")],
) -> None:
    """Prints the table and draws the plots of an earlier run again, beside its file."""
    try:
        document = read(results)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    _show(Console(width=width()), results.parent, document)


def _to_go_on(console: Console, ended: Ended) -> typer.Exit:
    console.print(f"{escape(str(ended))}\nthis process can measure nothing more; --resume goes on without it")
    return typer.Exit(GO_ON)


def _stopped(console: Console) -> typer.Exit:
    console.print("stopped; the same command with --resume goes on with what is left")
    return typer.Exit(INTERRUPTED)


def _show(console: Console, folder: Path, document: dict) -> None:
    rows, sweeps, machine = document["rows"], document["sweeps"], document["machine"]
    console.print(table(rows))
    reached = targets.verdicts(rows, machine)
    if reached:
        console.print(targets.table(reached))
        console.print(f"{sum(not verdict.missed for verdict in reached)} of {len(reached)} reach all targets")
    plot_ratios(folder / "ratios.png", rows, machine)
    if sweeps:
        console.print(sweep_table(sweeps))
        plot_windows(folder / "windows.png", sweeps, machine)
    console.print(f"written to {folder}: results.json and plots")
    print_headline(console, rows, sweeps, document["call_overhead_us"], machine)
