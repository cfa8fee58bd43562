"""What a norm costs in a recurrent layer: time per token, against the same layer with torch's LayerNorm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from time import perf_counter
from typing import Any

import torch
from rich.table import Table
from torch import nn

from divnorm_kernels import collect_l1

from .timing import interleaved
from .training import cells
from .training.norms import OverTime
from .training.text import BATCH, STEPS, UNITS, WINDOWS, over_time

TORCH = "torch LayerNorm"
NORMS = ("none", TORCH, "bn", "ln", "ln-s", "dn", "dn*", "dn-mean-only")
MODELS = tuple(WINDOWS)
TOKENS = BATCH * STEPS


def _norm(name: str, model: str) -> Callable[[int, int], OverTime]:
    def make(units: int, parts: int) -> OverTime:
        norm = over_time("ln" if name == TORCH else name, model, None, units, parts)
        if name == TORCH:
            norm.layer = nn.LayerNorm(units, elementwise_affine=False)
        return norm

    return make


def _round(model: str, name: str) -> Callable[[], tuple[float, float]]:
    """A forward and a backward pass over a sequence."""
    torch.manual_seed(0)
    layer = cells.make(model, UNITS, UNITS, _norm(name, model))
    x = torch.randn(STEPS, BATCH, UNITS, requires_grad=True)
    state = (torch.zeros(BATCH, UNITS),) * layer.STATES
    gradient = torch.randn(STEPS, BATCH, UNITS)
    wanted = [x, *layer.parameters()]

    def once() -> tuple[float, float]:
        begin = perf_counter()
        with collect_l1(layer) as collected:
            y, _ = layer(x, state)
        middle = perf_counter()
        penalty = collected()
        ends = (y, penalty) if penalty.requires_grad else (y,)
        torch.autograd.grad(ends, wanted, (gradient, torch.ones(()))[: len(ends)])
        return middle - begin, perf_counter() - middle

    return once


def measure(models: list[str], norms: list[str], seconds: float) -> list[dict[str, Any]]:
    """The norms of a model in turn, round after round, in ``seconds`` for each model.

    A row has the cell, the norm and the `Times` in milliseconds of a sequence of 20 steps in a batch of 20.
    """
    rows = []
    for model in models:
        times = interleaved({name: _round(model, name) for name in norms}, seconds)
        rows += [{"cell": model, "norm": name, "times": asdict(times[name])} for name in norms]
    return rows


def _token(row: dict[str, Any]) -> float:
    """Microseconds per token, forward and backward."""
    return 1e3 * row["times"]["both"] / TOKENS


def table(rows: list[dict[str, Any]]) -> Table:
    """A line per layer and norm, from rows as `write` keeps them."""
    out = Table("cell", "norm", title=f"a recurrent layer of {UNITS} units, batch {BATCH}, {STEPS} steps")
    for name in ("forward ms", "backward ms", "us a token", f"{TORCH} / this"):
        out.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        peer = next((_token(r) for r in rows if r["cell"] == row["cell"] and r["norm"] == TORCH), None)
        out.add_row(
            row["cell"],
            row["norm"],
            f"{row['times']['forward']:.2f}",
            f"{row['times']['backward']:.2f}",
            f"{_token(row):.1f}",
            "-" if peer is None else f"{peer / _token(row):.2f}x",
        )
    return out
