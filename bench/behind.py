"""What stands behind and inside the norm: its cost beside the plain norm, and against the same in separate calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import divnorm_kernels
from divnorm_kernels import divisive_norm

from . import gpu, timing
from .cases import DTYPES, FORMATS, Case, Setting, random_input
from .family import IMAGES
from .machine import describe
from .measure import ready
from .options import Device, Dtypes, Threads, chosen, command_line, device_named, width
from .results import geometric_mean, write_rows
from .subjects import Subject, activation, groups_for
from .timing import interleaved, keep_freed_memory

PLAIN, SEPARATE, COMPILED = "plain", "separate calls", "torch.compile"
WINDOW = 5
OPTIONS = {
    "relu": {"activation": "relu"},
    "tlu": {"activation": "tlu"},
    "silu": {"activation": "silu"},
    "gelu": {"activation": "gelu"},
    "residual, relu": {"activation": "relu", "residual": True},
    "p = 1": {"p": 1},
    "x kept": {"subtract_mean": False},
}
MOST = {"relu": 1.1, "tlu": 1.1, "silu": 1.35, "gelu": 1.35, "p = 1": 1.3}
"""Of the plain norm's time, at most, on an activation of `LARGE` bytes or more."""
LARGE, COUNTS = 10_000_000, 1_000_000
SPEEDUP = 1.5
"""How many times as long separate calls should take, on average; `COMPILED` no less than ours from `COUNTS` on."""


@dataclass
class Row:
    """The median milliseconds of a subject, forward and backward."""

    what: str
    shape: tuple[int, ...]
    dtype: str
    format: str
    subject: str
    both: float


class Separate(nn.Module):
    """A layer of torch's with what stands behind it, one call after the other."""

    def __init__(self, norm: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.function = norm, function

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """As ours is called."""
        y = self.norm(x)
        return self.function(y if residual is None else y + residual)


def _layers(channels: int) -> Iterator[tuple[str, nn.Module, nn.Module, bool]]:
    """Names of pairs, ours, torch's, and whether there is a residual."""
    groups = groups_for(channels)
    ours = divnorm_kernels.GroupNorm(groups, channels, activation="silu")
    yield "GroupNorm + SiLU", ours, Separate(nn.GroupNorm(groups, channels), nn.functional.silu), False
    ours = divnorm_kernels.BatchNorm2d(channels, activation="relu")
    yield "BatchNorm + add + ReLU", ours, Separate(nn.BatchNorm2d(channels), nn.functional.relu), True


def measure(
    shape: tuple[int, ...], dtype: str, form: str, device: str, seconds: float, compiled: bool = True
) -> list[Row]:
    """The options beside the plain norm, then the layers; every subject in turn, round after round."""
    setting = Setting(Case("x".join(map(str, shape)), shape, ""), dtype, form, WINDOW, device)
    x = activation(setting, random_input(shape)).requires_grad_()
    residual, dy = (torch.randn_like(x) for _ in range(2))
    residual.requires_grad_()
    rows = _timed("options", setting, dict(_calls(x, residual)), x, dy, seconds)
    for name, ours, theirs, adds in _layers(shape[1]):
        subjects = {"ours": ours, SEPARATE: theirs}
        if compiled:
            torch.compiler.reset()
            subjects[COMPILED] = torch.compile(theirs)
        made = {}
        for key, layer in subjects.items():
            layer.to(device=x.device, dtype=x.dtype)
            more = (residual,) if adds else ()
            made[key] = Subject(
                key, name, lambda x, layer=layer, more=more: layer(x, *more), [*layer.parameters(), *more]
            )
        rows += _timed(name, setting, made, x, dy, seconds)
    return rows


def _calls(x: Tensor, residual: Tensor) -> Iterator[tuple[str, Subject]]:
    for name, options in {PLAIN: {}, **OPTIONS}.items():
        weight, bias, threshold = (torch.ones(x.shape[1], device=x.device, requires_grad=True) for _ in range(3))
        keywords: dict[str, Any] = {**options, "window": WINDOW}
        parameters = [weight, bias]
        if keywords.pop("residual", False):
            keywords["residual"] = residual
            parameters.append(residual)
        if keywords.get("activation") == "tlu":
            keywords["threshold"] = threshold
            parameters.append(threshold)
        yield (
            name,
            Subject(name, "", lambda x, w=weight, b=bias, k=keywords: divisive_norm(x, w, b, **k), parameters),
        )


def _timed(
    what: str, setting: Setting, subjects: dict[str, Subject], x: Tensor, dy: Tensor, seconds: float
) -> list[Row]:
    clock = timing if setting.device == "cpu" else gpu
    times = interleaved({name: ready(clock, subject, x, dy) for name, subject in subjects.items()}, seconds)
    shape = setting.case.shape
    return [Row(what, shape, setting.dtype, setting.format, name, found.both) for name, found in times.items()]


def settings(dtypes: list[str]) -> list[tuple[tuple[int, ...], str, str]]:
    """The layers' shapes, in every dtype and format."""
    return [(shape, dtype, form) for shape in IMAGES for dtype in dtypes for form in FORMATS]


def _by_setting(rows: list[Row]) -> dict[tuple, dict[str, float]]:
    found: dict[tuple, dict[str, float]] = {}
    for row in rows:
        found.setdefault((row.what, tuple(row.shape), row.dtype, row.format), {})[row.subject] = row.both
    return found


def table(rows: list[Row]) -> Table:
    """A line per setting: the options' times over the plain norm's, and the layers' over ours."""
    out = Table("what", "shape", "dtype", "format", "ms", "ratios", title="forward + backward")
    for (what, shape, dtype, form), times in _by_setting(rows).items():
        first, *rest = times
        ratios = ", ".join(f"{name} {times[name] / times[first]:.2f}" for name in rest)
        out.add_row(what, "x".join(map(str, shape)), dtype, form, f"{first} {times[first]:.2f}", ratios)
    return out


def missed(rows: list[Row]) -> list[str]:
    """What is slower than it is held to, in words."""
    found, separate = [], []
    for (what, shape, dtype, form), times in _by_setting(rows).items():
        size = torch.Size(shape).numel() * getattr(torch, dtype).itemsize
        where = f"{'x'.join(map(str, shape))}, {dtype}, {form}"
        if what == "options":
            for name, most in MOST.items():
                share = times[name] / times[PLAIN]
                if size >= LARGE and share > most:
                    found.append(f"{name}, {where}: {share:.2f} of the plain norm's time, at most {most:.2f} asked")
            continue
        separate.append(times[SEPARATE] / times["ours"])
        if COMPILED in times and size >= COUNTS and times[COMPILED] < times["ours"]:
            found.append(f"{what}, {where}: {times['ours'] / times[COMPILED]:.2f} of torch.compile's time")
    if separate and geometric_mean(separate) < SPEEDUP:
        found.append(f"separate calls take {geometric_mean(separate):.2f} of ours on average, {SPEEDUP} asked")
    return found


def command(
    device: Device = "auto",
    dtype: Dtypes = None,
    threads: Threads = None,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Measure torch.compile too.")] = True,
    seconds: Annotated[float, typer.Option(min=0.01, help="Time for the subjects of one line together.")] = 2.0,
    out: Annotated[Path, typer.Option(help="Folder for behind.json.")] = Path("bench/out"),
) -> None:
    """Times activations, residuals and exponents beside the plain norm, and layers with them against separate calls."""
    device = device_named(device)
    dtypes = chosen("--dtype", dtype, DTYPES, ("float32", "bfloat16"))
    if threads is not None:
        torch.set_num_threads(threads)
    console, rows = Console(width=width()), []
    keep_freed_memory()
    out.mkdir(parents=True, exist_ok=True)
    machine = describe(device)
    for of in track(settings(dtypes), "timing", console=console, transient=True):
        rows += measure(*of, device, seconds, compiled)
        write_rows(out / "behind.json", rows, machine, command_line())
    console.print(table(rows))
    for words in missed(rows):
        console.print(words)
