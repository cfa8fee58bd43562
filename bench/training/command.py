"""`python -m bench train`: the command line of the experiments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from divnorm_kernels.backends import availability, check_name

from ..machine import describe
from ..options import INTERRUPTED, chosen, command_line, device_named, width
from .data import DataError
from .loop import ResumeError
from .plots import plot_activations, plot_curves
from .runs import EXPERIMENTS, RESULTS, Experiment, Run, collect, run_all
from .settings import ClassSettings, Settings
from .summary import table
from .superres import SuperresSettings
from .text import TextSettings

WITHOUT_DATA = {
    "cifar": "textures of ten classes, made on the spot",
    "text": "the help texts that come with Python",
    "superres": "the sample pictures of scikit-image",
}
app = typer.Typer(
    no_args_is_help=True,
    help="Trains the paper's networks with norms of the family and prints a table of norm against result. A command "
    "that was stopped goes on where it was when it is given again.",
)

Norm = Annotated[
    list[str] | None,
    typer.Option(
        help='Of the family: none, bn, ln, gn, in, rms, dn, dn-mean-only; "-s" and "*" may follow. May be repeated.'
    ),
]
Steps = Annotated[int, typer.Option(min=1, help="Training steps; default: about an hour on two cores for all.")]
Seeds = Annotated[int, typer.Option(min=1, help="Runs per norm, with seeds 0, 1, ...")]
Rate = Annotated[float | None, typer.Option(min=0, help="Learning rate; default: the paper's.")]
Decay = Annotated[
    list[float] | None,
    typer.Option(
        min=0, max=1, help="Part of the steps at which the rate falls tenfold; may be repeated; default: the paper's."
    ),
]
Evaluations = Annotated[int, typer.Option(min=1, help="Evaluations of a run, evenly spread.")]
Checkpoint = Annotated[int, typer.Option("--checkpoint-every", min=1, help="Steps between checkpoints.")]
Backend = Annotated[
    str | None, typer.Option(help=f"Of divnorm_kernels: {', '.join(availability())}; default: the best.")
]
Device = Annotated[str, typer.Option(help="Where to train: cpu, cuda, or auto, a GPU if there is one.")]
Jobs = Annotated[int, typer.Option(min=1, help="Runs at a time, each in a process of its own.")]
Out = Annotated[
    Path | None, typer.Option(help="Folder for logs, checkpoints, results.json and plots; default: bench/out/train/...")
]


def _model(experiment: Experiment) -> Any:
    return typer.Option(help=f"Network: {', '.join(experiment.models)}.")


def _data(what: str, without: str) -> Any:
    return typer.Option(help=f"Folder with {what}; without: {without}.")


def _title(experiment: Experiment, settings: Settings, machine: dict[str, Any]) -> str:
    data = "the set that comes along" if settings.data is None else settings.data.resolve().name
    device = machine["gpu"]["name"] if machine["gpu"] else machine["processor"]
    return f"{experiment.name} {settings.model}, {data}, {settings.steps} steps, {device}"


def _train(name: str, settings: Settings, norm: list[str] | None, seeds: int, jobs: int, out: Path | None) -> None:
    """Trains what is missing, then writes and shows the results of all runs in the folder."""
    experiment, console = EXPERIMENTS[name], Console(width=width())
    chosen("--model", [settings.model], experiment.models, experiment.models)
    norms = list(dict.fromkeys(norm or experiment.norms))
    try:
        check_name(settings.backend)
        experiment.load(settings)
    except DataError as error:
        raise typer.BadParameter(str(error), param_hint="--data") from None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    missing = availability().get(settings.backend)
    if missing is not None:
        raise typer.BadParameter(f"{settings.backend} is missing: {missing}", param_hint="--backend")
    try:
        for one in norms:
            experiment.check_norm(one, settings.model)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--norm") from None
    out = out or Path("bench/out/train") / f"{name}-{settings.model}"
    if settings.data is None:
        console.print(f"no --data given: training on {WITHOUT_DATA[name]}")
    runs = [Run(norm, seed) for seed in range(seeds) for norm in norms]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    done = [0] * len(runs)
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("training", total=len(runs) * settings.steps)

        def report(number: int, step: int) -> None:
            done[number] = step
            ended = sum(count == settings.steps for count in done)
            progress.update(bar, completed=sum(done), description=f"{ended} of {len(runs)} runs ended, steps")

        try:
            run_all(name, settings, runs, out, jobs, report)
        except ResumeError as error:
            raise typer.BadParameter(str(error), param_hint="--out") from None
        except KeyboardInterrupt:
            progress.stop()
            console.print(
                f"stopped; the same command goes on from the checkpoints in {out}, "
                f"which are written every {settings.checkpoint_every} steps"
            )
            raise typer.Exit(INTERRUPTED) from None
    machine = describe(settings.device)
    document = {
        "title": _title(experiment, settings, machine),
        "command": command_line(),
        "jobs": jobs,
        "machine": machine,
        "figure": experiment.figure,
        "curve": experiment.curve,
        "also": experiment.also,
        "higher_is_better": experiment.higher_is_better,
        "norms": experiment.norms,
        "paper": experiment.paper(settings),
        "runs": collect(out, settings.record()),
    }
    (out / RESULTS).write_text(json.dumps(document, separators=(",", ":")) + "\n")
    _show(console, out, document)


def _show(console: Console, folder: Path, document: dict[str, Any]) -> None:
    console.print(table(document))
    plot_curves(folder / "curves.png", document)
    plot_activations(folder / "activations.png", document)
    console.print(f"written to {folder}: {RESULTS}, curves.png, activations.png, and a folder for every run")


@app.command()
def cifar(
    model: Annotated[str, _model(EXPERIMENTS["cifar"])] = "cnn",
    data: Annotated[Path | None, _data("CIFAR-10 or CIFAR-100 in the binary layout", WITHOUT_DATA["cifar"])] = None,
    norm: Norm = None,
    steps: Steps = EXPERIMENTS["cifar"].steps,
    seeds: Seeds = 3,
    rate: Rate = None,
    decay: Decay = None,
    evaluations: Evaluations = 5,
    checkpoint_every: Checkpoint = 200,
    backend: Backend = None,
    device: Device = "auto",
    jobs: Jobs = 1,
    out: Out = None,
) -> None:
    """Classes of small pictures: the paper's convolutional network, or ResNet-32 with a learned sigma."""
    decay = tuple(decay or ())
    settings = ClassSettings(
        model, data, steps, rate, decay, evaluations, checkpoint_every, backend, device_named(device)
    )
    _train("cifar", settings, norm, seeds, jobs, out)


@app.command()
def text(
    model: Annotated[str, _model(EXPERIMENTS["text"])] = "lstm",
    data: Annotated[Path | None, _data("train.txt, valid.txt and test.txt, or ptb.*.txt", WITHOUT_DATA["text"])] = None,
    norm: Norm = None,
    steps: Steps = EXPERIMENTS["text"].steps,
    seeds: Seeds = 3,
    vocabulary: Annotated[int, typer.Option(min=2, help="Words told apart, the most frequent ones.")] = 10_000,
    rate: Rate = None,
    decay: Decay = None,
    evaluations: Evaluations = 5,
    checkpoint_every: Checkpoint = 200,
    backend: Backend = None,
    device: Device = "auto",
    jobs: Jobs = 1,
    out: Out = None,
) -> None:
    """A language model over words: recurrent networks of two layers with a norm in every step."""
    decay = tuple(decay or ())
    settings = TextSettings(
        model, data, steps, rate, decay, evaluations, checkpoint_every, backend, device_named(device), vocabulary
    )
    _train("text", settings, norm, seeds, jobs, out)


@app.command()
def superres(
    data: Annotated[Path | None, _data("the folders train and Set14 with pictures", WITHOUT_DATA["superres"])] = None,
    norm: Norm = None,
    steps: Steps = EXPERIMENTS["superres"].steps,
    seeds: Seeds = 3,
    scale: Annotated[int, typer.Option(min=2, help="Factor of height and width.")] = 3,
    rate: Rate = None,
    decay: Decay = None,
    evaluations: Evaluations = 5,
    checkpoint_every: Checkpoint = 200,
    backend: Backend = None,
    device: Device = "auto",
    jobs: Jobs = 1,
    out: Out = None,
) -> None:
    """Enlarging pictures: the three-layer network on brightness, PSNR and SSIM against bicubic."""
    decay = tuple(decay or ())
    settings = SuperresSettings(
        "srcnn", data, steps, rate, decay, evaluations, checkpoint_every, backend, device_named(device), scale
    )
    _train("superres", settings, norm, seeds, jobs, out)


@app.command()
def show(
    results: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A results.json of earlier runs.")],
) -> None:
    """Prints the table of earlier runs and draws their plots again, beside the file."""
    try:
        document = json.loads(results.read_text())
        document["runs"], document["figure"]
    except (ValueError, KeyError, TypeError) as error:
        raise typer.BadParameter(f"{results}: expected the {RESULTS} of a training command ({error!r})") from None
    _show(Console(width=width()), results.parent, document)
