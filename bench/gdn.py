"""Generalized divisive normalization: ours against CompressAI's formula, eager and compiled: time and memory."""

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

import divnorm_kernels

from . import gpu, timing
from .cases import DTYPES, FORMATS, Case, Setting, random_input
from .machine import describe
from .measure import ready
from .options import Device, Dtypes, Formats, Threads, chosen, command_line, device_named, width
from .results import write_rows
from .subjects import OURS, Subject, activation
from .timing import Times, interleaved, keep_freed_memory, return_freed_memory

EAGER, COMPILED = "CompressAI's formula", "torch.compile of it"
SHAPES = ((8, 192, 64, 64), (8, 128, 128, 128))
SPEEDUP = 1.5
"""How many times as long as ours `EAGER` should take; `COMPILED` should be no faster than ours."""


@dataclass
class Row:
    """A subject's times in milliseconds, and its memory beyond x, y, dy and dx in bytes."""

    shape: tuple[int, ...]
    dtype: str
    format: str
    subject: str
    times: Times
    extra_bytes: int | None


def formula(x: Tensor, beta: Tensor, gamma: Tensor) -> Tensor:
    """The normalization as a convolution and what stands around it, one operation after the other."""
    return x * torch.rsqrt(F.conv2d(x**2, gamma.reshape(*gamma.shape, 1, 1), beta))


def subjects(x: Tensor, compiled: bool) -> list[Subject]:
    """Ours and the formula on an x, all with parameters of their own."""
    torch.compiler.reset()
    functions: dict[str, Callable[..., Tensor]] = {OURS: divnorm_kernels.gdn, EAGER: formula}
    if compiled:
        functions[COMPILED] = torch.compile(formula)
    made = []
    for name, function in functions.items():
        beta = torch.ones(x.shape[1], device=x.device, dtype=x.dtype, requires_grad=True)
        gamma = (0.1 * torch.eye(x.shape[1], device=x.device) + 0.01).to(x.dtype).requires_grad_()
        made.append(Subject(name, name, lambda x, f=function, b=beta, g=gamma: f(x, b, g), [beta, gamma]))
    return made


def _made(shape: tuple[int, ...], dtype: str, form: str, device: str) -> tuple[Tensor, Tensor]:
    setting = Setting(Case("x".join(map(str, shape)), shape, ""), dtype, form, 0, device)
    x = activation(setting, random_input(shape)).requires_grad_()
    return x, torch.randn_like(x)


def memory(shape: tuple[int, ...], dtype: str, form: str, device: str, compiled: bool = True) -> dict[str, int | None]:
    """Every subject's memory; on the CPU before anything was timed."""
    x, dy = _made(shape, dtype, form, device)
    clock = timing if device == "cpu" else gpu
    return {subject.name: clock.extra_memory(subject, x, dy) for subject in subjects(x, compiled)}


def measure(
    shape: tuple[int, ...],
    dtype: str,
    form: str,
    device: str,
    seconds: float,
    extra: dict[str, int | None],
    compiled: bool = True,
) -> list[Row]:
    """All subjects in turn, round after round; ``extra``: their memory."""
    x, dy = _made(shape, dtype, form, device)
    clock = timing if device == "cpu" else gpu
    rounds = {subject.name: ready(clock, subject, x, dy) for subject in subjects(x, compiled)}
    return [Row(shape, dtype, form, name, times, extra[name]) for name, times in interleaved(rounds, seconds).items()]


def _by_setting(rows: list[Row]) -> dict[tuple, dict[str, Row]]:
    found: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row.shape, row.dtype, row.format), {})[row.subject] = row
    return found


def table(rows: list[Row]) -> Table:
    """A line per subject: its times, how many of ours that is, and its memory as a share of x."""
    out = Table("shape", "dtype", "format", "subject", "fwd ms", "bwd ms", "both / ours", "memory / x", title="GDN")
    for (shape, dtype, form), found in _by_setting(rows).items():
        size = torch.Size(shape).numel() * getattr(torch, dtype).itemsize
        for name, row in found.items():
            memory = "-" if row.extra_bytes is None else f"{row.extra_bytes / size:.2f}"
            ratio = f"{row.times.both / found[OURS].times.both:.2f}"
            both = f"{row.times.forward:.2f}", f"{row.times.backward:.2f}"
            out.add_row("x".join(map(str, shape)), dtype, form, name, *both, ratio, memory)
    return out


def missed(rows: list[Row]) -> list[str]:
    """Where ours is slower or takes more memory than it is held to, in words."""
    found = []
    for (shape, dtype, form), subjects in _by_setting(rows).items():
        where = f"{'x'.join(map(str, shape))}, {dtype}, {form}"
        own = subjects[OURS]
        for name, least in ((EAGER, SPEEDUP), (COMPILED, 1.0)):
            if name in subjects and subjects[name].times.both < least * own.times.both:
                ratio = subjects[name].times.both / own.times.both
                found.append(f"{name}, {where}: {ratio:.2f} of our time, at least {least:.2f} asked")
        size = torch.Size(shape).numel() * getattr(torch, dtype).itemsize
        if own.extra_bytes is not None and own.extra_bytes >= size:
            found.append(f"memory, {where}: {own.extra_bytes / size:.2f} of x, less than 1 asked")
    return found


def command(
    device: Device = "auto",
    dtype: Dtypes = None,
    format: Formats = None,
    threads: Threads = None,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Measure torch.compile too.")] = True,
    seconds: Annotated[float, typer.Option(min=0.01, help="Time for the subjects of one line together.")] = 20.0,
    out: Annotated[Path, typer.Option(help="Folder for gdn.json.")] = Path("bench/out"),
) -> None:
    """Times generalized divisive normalization against CompressAI's formula, eager and compiled."""
    device = device_named(device)
    dtypes = chosen("--dtype", dtype, DTYPES, ("float32",))
    formats = chosen("--format", format, FORMATS, FORMATS)
    if threads is not None:
        torch.set_num_threads(threads)
    console, rows = Console(width=width()), []
    out.mkdir(parents=True, exist_ok=True)
    machine = describe(device)
    settings = [(shape, dtype, form) for shape in SHAPES for dtype in dtypes for form in formats]
    return_freed_memory()
    extra = [memory(*of, device, compiled) for of in track(settings, "memory", console=console, transient=True)]
    keep_freed_memory()
    for of, needed in track(list(zip(settings, extra, strict=True)), "timing", console=console, transient=True):
        rows += measure(*of, device, seconds, needed, compiled)
        write_rows(out / "gdn.json", rows, machine, command_line())
    console.print(table(rows))
    for words in missed(rows):
        console.print(words)
