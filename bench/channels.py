"""Windows over channels: torch's local response normalization beside ours, and ours beside divisive normalization."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from divnorm_kernels import Exponential, channel_norm, divisive_norm

from . import gpu, timing
from .cases import DTYPES, FORMATS, Case, Setting, random_input
from .family import IMAGES
from .machine import describe
from .measure import ready
from .options import Device, Dtypes, Formats, Threads, chosen, command_line, device_named, width
from .results import geometric_mean, write_rows
from .subjects import Subject, activation
from .timing import Times, interleaved, keep_freed_memory

SIZE = 5
OURS, TORCHS, PLAIN, DECAYING = "LRN", "torch's LRN", "divisive, window 1", "exponential"
SUBJECTS: dict[str, Callable[[Tensor], Tensor]] = {
    OURS: lambda x: channel_norm(x, SIZE),
    TORCHS: lambda x: F.local_response_norm(x, SIZE),
    PLAIN: lambda x: divisive_norm(x, window=1),
    DECAYING: lambda x: channel_norm(x, Exponential(float(SIZE))),
}
SPEEDUP = 15.0
"""How many times as long as ours `TORCHS` should take, on average."""
MOST = {PLAIN: 1.3, DECAYING: 1.5}
"""Ours of `PLAIN`, at most, on an activation of `LARGE` bytes or more; and `DECAYING` of ours."""
LARGE = 10_000_000


@dataclass
class Row:
    """A subject's times in milliseconds."""

    shape: tuple[int, ...]
    dtype: str
    format: str
    subject: str
    times: Times


def measure(shape: tuple[int, ...], dtype: str, form: str, device: str, seconds: float) -> list[Row]:
    """All subjects in turn, round after round."""
    setting = Setting(Case("x".join(map(str, shape)), shape, ""), dtype, form, SIZE, device)
    x = activation(setting, random_input(shape)).requires_grad_()
    dy = torch.randn_like(x)
    clock = timing if device == "cpu" else gpu
    made = {name: ready(clock, Subject(name, "", f, []), x, dy) for name, f in SUBJECTS.items()}
    return [Row(shape, dtype, form, name, times) for name, times in interleaved(made, seconds).items()]


def _by_setting(rows: list[Row]) -> dict[tuple, dict[str, float]]:
    found: dict[tuple, dict[str, float]] = {}
    for row in rows:
        found.setdefault((row.shape, row.dtype, row.format), {})[row.subject] = row.times.both
    return found


def table(rows: list[Row]) -> Table:
    """A line per setting: every subject's milliseconds, and how many of ours they are."""
    out = Table("shape", "dtype", "format", *SUBJECTS, title=f"forward + backward, ms (of ours), {SIZE} channels")
    for (shape, dtype, form), times in _by_setting(rows).items():
        cells = [f"{times[name]:.2f} ({times[name] / times[OURS]:.2f})" for name in SUBJECTS]
        out.add_row("x".join(map(str, shape)), dtype, form, *cells)
    return out


def missed(rows: list[Row]) -> list[str]:
    """What is slower than it is held to, in words."""
    found, ratios = [], []
    for (shape, dtype, form), times in _by_setting(rows).items():
        where = f"{'x'.join(map(str, shape))}, {dtype}, {form}"
        ratios.append(times[TORCHS] / times[OURS])
        size = torch.Size(shape).numel() * getattr(torch, dtype).itemsize
        if size >= LARGE and times[OURS] > MOST[PLAIN] * times[PLAIN]:
            found.append(f"{OURS}, {where}: {times[OURS] / times[PLAIN]:.2f} of {PLAIN}, at most {MOST[PLAIN]} asked")
        if times[DECAYING] > MOST[DECAYING] * times[OURS]:
            share = times[DECAYING] / times[OURS]
            found.append(f"{DECAYING}, {where}: {share:.2f} of {OURS}, at most {MOST[DECAYING]} asked")
    if ratios and geometric_mean(ratios) < SPEEDUP:
        found.append(f"{TORCHS} takes {geometric_mean(ratios):.1f} of ours on average, {SPEEDUP} asked")
    return found


def command(
    device: Device = "auto",
    dtype: Dtypes = None,
    format: Formats = None,
    threads: Threads = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="Time for the subjects of one line together.")] = 3.0,
    out: Annotated[Path, typer.Option(help="Folder for channels.json.")] = Path("bench/out"),
) -> None:
    """Times windows over channels against torch's local response normalization and against divisive normalization."""
    device = device_named(device)
    dtypes = chosen("--dtype", dtype, DTYPES, ("float32",))
    formats = chosen("--format", format, FORMATS, FORMATS)
    if threads is not None:
        torch.set_num_threads(threads)
    console, rows = Console(width=width()), []
    keep_freed_memory()
    out.mkdir(parents=True, exist_ok=True)
    machine = describe(device)
    settings = [(shape, dtype, form) for shape in IMAGES for dtype in dtypes for form in formats]
    for of in track(settings, "timing", console=console, transient=True):
        rows += measure(*of, device, seconds)
        write_rows(out / "channels.json", rows, machine, command_line())
    console.print(table(rows))
    ratios = [times[TORCHS] / times[OURS] for times in _by_setting(rows).values()]
    console.print(f"{TORCHS} takes {geometric_mean(ratios):.1f} of ours on average")
    for words in missed(rows):
        console.print(words)
