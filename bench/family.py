"""The layers that torch has too: ours against torch's, plain and with a ReLU behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import divnorm_kernels

from . import gpu, results, timing
from .cases import Case, Setting, random_input
from .measure import Attempts, ready
from .results import against, geometric_mean, in_words, machine_name
from .subjects import Subject, activation, groups_for
from .timing import Times, interleaved, step

IMAGES = (
    (32, 64, 56, 56),
    (16, 256, 28, 28),
    (32, 512, 7, 7),
    (8, 16, 32, 32),
    (2, 64, 224, 224),
    (1, 64, 224, 224),
)
TOKENS = ((4096, 768), (64, 197, 768))

Maker = Callable[[tuple[int, ...]], nn.Module]


@dataclass(frozen=True)
class Pair:
    """A layer of ours and torch's of the same name; both receive the shape of x."""

    name: str
    ours: Maker
    theirs: Maker
    shapes: tuple[tuple[int, ...], ...]


def _pair(name: str, arguments: Callable[[tuple[int, ...]], tuple], shapes: tuple, **options: bool) -> Pair:
    ours, theirs = (getattr(package, name) for package in (divnorm_kernels, nn))
    return Pair(
        name,
        lambda shape, **more: ours(*arguments(shape), **options, **more),
        lambda shape: theirs(*arguments(shape), **options),
        shapes,
    )


PAIRS = (
    _pair("BatchNorm2d", lambda shape: (shape[1],), IMAGES),
    _pair("GroupNorm", lambda shape: (groups_for(shape[1]), shape[1]), IMAGES),
    _pair("InstanceNorm2d", lambda shape: (shape[1],), IMAGES, affine=True),
    _pair("LayerNorm", lambda shape: (shape[-1],), TOKENS),
)


@dataclass
class FamilyRow:
    """One layer in one setting. Times in milliseconds; absent where ours was wrong, or a layer failed."""

    layer: str
    shape: list[int]
    dtype: str
    format: str
    relu: bool
    ours: Times | None
    theirs: Times | None
    copy: Times | None
    error: float | None
    """The largest difference of y and dx from the reference in float64, in units of what the arithmetic may make."""
    failure: str | None = None
    """Why there are no times of ours, or of theirs."""


def settings(dtypes: list[str], formats: list[str], device: str) -> list[tuple[Pair, Setting, bool]]:
    """Every pair in every setting, plain and with a ReLU; tokens have one memory format."""
    found = []
    for pair in PAIRS:
        for shape in pair.shapes:
            case = Case("x".join(map(str, shape)), shape, pair.name, random_input)
            for dtype in dtypes:
                for form in formats if len(shape) == 4 else formats[:1]:
                    found += [(pair, Setting(case, dtype, form, 0, device), relu) for relu in (False, True)]
    return found


def key(row: dict) -> tuple:
    """What tells a row, as data, from others."""
    return row["layer"], *row["shape"], row["dtype"], row["format"], row["relu"]


def unmeasured(pair: Pair, setting: Setting, relu: bool, failure: str | None = None) -> FamilyRow:
    """A row without figures."""
    shape = list(setting.case.shape)
    return FamilyRow(pair.name, shape, setting.dtype, setting.format, relu, None, None, None, None, failure)


def measure(pair: Pair, setting: Setting, relu: bool, seconds: float) -> FamilyRow:
    """Checks ours against the reference in float64, then times it, torch's layer and a copy in turn.

    Raises:
        Ended: where a layer's failure leaves nothing to measure with in this process.
    """
    x = activation(setting, setting.case.values()).detach().requires_grad_()
    dy = torch.empty_like(x, requires_grad=False).copy_(
        torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    )
    shape = setting.case.shape
    plain = pair.theirs(shape)
    theirs = nn.Sequential(plain, nn.ReLU()) if relu else plain
    ours = pair.ours(shape, activation="relu" if relu else None)
    exact = pair.ours(shape, activation=ours.activation, backend="reference")
    attempt, row = Attempts(setting, {}), unmeasured(pair, setting, relu)
    row.error = attempt("ours", lambda: _error(ours, exact, x, dy))
    clock = timing if setting.device == "cpu" else gpu
    rounds = {"copy": clock.copy_round(x)}
    for name, module in (("ours", ours), ("theirs", theirs)):
        if name == "theirs" or (row.error is not None and row.error <= 1):
            once = attempt(name, partial(ready, clock, _subject(name, module, x), x, dy))
            rounds |= {} if once is None else {name: once}
    for name, times in interleaved(rounds, seconds).items():
        setattr(row, name, times)
    row.failure = "; ".join(f"{name}: {failure}" for name, failure in attempt.failures.items()) or None
    return row


def _subject(name: str, module: nn.Module, x: Tensor) -> Subject:
    module = module.to(device=x.device, dtype=x.dtype)
    return Subject(name, type(module).__name__, module, list(module.parameters()))


def _error(ours: nn.Module, reference: nn.Module, x: Tensor, dy: Tensor) -> float:
    wide = x.detach().double().requires_grad_()
    _, _, (y, dx, *_) = step(_subject("reference", reference, wide), wide, dy.double())
    _, _, (own_y, own_dx, *_) = step(_subject("ours", ours, x), x, dy)
    # dx passes where the ReLU does: next to zero, rounding decides that
    agree = (y > 0) == (own_y > 0) if ours.activation else torch.ones_like(y, dtype=torch.bool)
    rounding = torch.finfo(x.dtype).eps + x.numel() ** 0.5 * torch.finfo(torch.float32).eps
    errors = [(own_y - y).abs().max() / y.abs().max(), ((own_dx - dx) * agree).abs().max() / dx.abs().max()]
    return float(max(errors)) / (2 * rounding)


def ratio(row: FamilyRow) -> float | None:
    """How many times as long torch's layer takes, forward and backward."""
    return None if row.ours is None or row.theirs is None else row.theirs.both / row.ours.both


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _ours(row: FamilyRow) -> tuple[str, str]:
    if row.ours is None:
        return "wrong" if row.failure is None else "failed", ""
    return _milliseconds(row.ours.forward), _milliseconds(row.ours.backward)


def show(console: Console, rows: list[FamilyRow], machine: dict) -> None:
    """A line per setting, and the ratios that sum the run up."""
    out = Table(title="our layers and torch's, forward + backward", pad_edge=False)
    for name in (
        "layer",
        "x",
        "dtype",
        "format",
        "ReLU",
        "copy ms",
        "ours fwd",
        "ours bwd",
        "torch ms",
        "torch / ours",
    ):
        out.add_column(name, no_wrap=True, justify="left" if name in ("layer", "x", "dtype", "format") else "right")
    for row in rows:
        value = ratio(row)
        out.add_row(
            row.layer,
            "x".join(map(str, row.shape)),
            row.dtype,
            row.format,
            "yes" if row.relu else "",
            _milliseconds(row.copy and row.copy.both),
            *_ours(row),
            _milliseconds(row.theirs and row.theirs.both),
            "-" if value is None else f"[{'green' if value >= 1 else 'red'}]{value:.2f}x[/]",
        )
    console.print(out)
    console.rule(machine_name(machine))
    for name in dict.fromkeys(row.layer for row in rows):
        for relu in (False, True):
            found = [r for row in rows if row.layer == name and row.relu == relu and (r := ratio(row)) is not None]
            if found:
                what = f"{name}{' and ReLU' if relu else ''}"
                count = sum(r >= 1 for r in found)
                console.print(
                    against(geometric_mean(found), f"torch's {what}") + " (geometric mean); no slower in "
                    f"{count} of {len(found)}, worst {in_words(min(found))}"
                )


def means_table(documents: list[dict]) -> Table:
    """A line per layer: how many times as long torch's takes (geometric mean), and how often ours is no slower."""
    out = Table("layer")
    for document in documents:
        for suffix in ("", ", with a ReLU behind it"):
            out.add_column(machine_name(document["machine"]) + suffix, no_wrap=True)
    for name in dict.fromkeys(row["layer"] for document in documents for row in document["rows"]):
        cells = []
        for document in documents:
            for relu in (False, True):
                rows = [row for row in document["rows"] if (row["layer"], row["relu"]) == (name, relu)]
                found = [r["theirs"]["both"] / r["ours"]["both"] for r in rows if r["ours"] and r["theirs"]]
                mean = f"{geometric_mean(found):.2f}x, {sum(r >= 1 for r in found)} of {len(found)}" if found else "-"
                cells.append(mean)
        out.add_row(name, *cells)
    return out


def write(path: Path, rows: list[FamilyRow], machine: dict, command: str) -> None:
    """One JSON document."""
    results.write(path, {"machine": machine, "command": command, "rows": [asdict(row) for row in rows]})


def read(path: Path, machine: dict) -> list[FamilyRow]:
    """The rows of a document of `write`, none where there is no file.

    Raises:
        ValueError: where it is of another machine.
    """
    if not path.exists():
        return []
    document = json.loads(path.read_text())
    results.check_machine(path, document["machine"], machine)
    rows = [FamilyRow(**row) for row in document["rows"]]
    for row in rows:
        for name in ("ours", "theirs", "copy"):
            times = getattr(row, name)
            setattr(row, name, times and Times(**times))
    return rows
