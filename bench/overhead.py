"""What a call costs beyond its work: tensors of a few kilobytes, part by part, with each layer in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

import divnorm_kernels

CALLS = 20
ROUNDS = 200
PARTS = ("forward, no grad", "forward", "forward + backward", "backward")


@dataclass(frozen=True)
class Case:
    """A shape, layers by name, and what this package's are held to: by part, whose time and which share of it."""

    shape: tuple[int, ...]
    layers: dict[str, Callable[[], nn.Module]]
    targets: dict[str, tuple[str, float]]


CASES = {
    "image": Case(
        (2, 8, 8, 8),
        {
            "DivisiveNorm2d": lambda: divnorm_kernels.DivisiveNorm2d(8),
            "torch LayerNorm": lambda: nn.LayerNorm((8, 8, 8)),
            "torch GroupNorm": lambda: nn.GroupNorm(2, 8),
            "torch BatchNorm2d": lambda: nn.BatchNorm2d(8),
        },
        {
            "forward, no grad": ("torch LayerNorm", 1.0),
            "forward": ("torch GroupNorm", 1.0),
            "forward + backward": ("torch BatchNorm2d", 1.0),
        },
    ),
    "features": Case(
        (20, 200),
        {
            "DivisiveNormFeatures": lambda: divnorm_kernels.DivisiveNormFeatures(200, window=60),
            "LayerNorm": lambda: divnorm_kernels.LayerNorm(200),
            "torch LayerNorm": lambda: nn.LayerNorm(200),
        },
        {"forward + backward": ("torch LayerNorm", 1.15)},
    ),
}


def call_overhead(device: str = "cpu") -> dict[str, float]:
    """Median microseconds of a forward call on 4 kilobytes, layer by layer, interleaved; with gradients on."""
    case = CASES["image"]
    x = torch.randn(case.shape, device=device, requires_grad=True)
    layers = {name: make().to(device) for name, make in case.layers.items()}
    taken = _interleaved({name: lambda layer=layer: layer(x) for name, layer in layers.items()}, device)
    return {name: median(samples) for name, samples in taken.items()}


def measure(name: str, device: str) -> list[dict[str, Any]]:
    """Rows of a case: a layer, a part, and the quartiles of its microseconds in interleaved rounds."""
    case = CASES[name]
    x = torch.randn(case.shape, device=device, requires_grad=True)
    plain, dy = x.detach(), torch.randn(case.shape, device=device)
    jobs = {}
    for layer_name, make in case.layers.items():
        layer = make().to(device)
        for part, job in zip(PARTS, _jobs(layer, x, plain, dy), strict=True):
            jobs[layer_name, part] = job
    return [
        {"case": name, "shape": list(case.shape), "layer": layer, "part": part, "us": quantiles(samples, n=4)}
        for (layer, part), samples in _interleaved(jobs, device).items()
    ]


def _jobs(layer: nn.Module, x: Tensor, plain: Tensor, dy: Tensor) -> tuple[Callable[[], object], ...]:
    inputs = [x, *layer.parameters()]
    y = layer(x)

    @torch.no_grad()
    def alone() -> Tensor:
        return layer(plain)

    return (
        alone,
        lambda: layer(x),
        lambda: torch.autograd.grad(layer(x), inputs, dy),
        lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True),
    )


def _interleaved(jobs: dict[Any, Callable[[], object]], device: str) -> dict[Any, list[float]]:
    """Microseconds of a call of each job, job by job in every round."""
    taken: dict[Any, list[float]] = {name: [] for name in jobs}
    for job in jobs.values():
        job()  # compiles what is compiled on first use
    for _ in range(ROUNDS):
        for name, job in jobs.items():
            begin = perf_counter()
            for _ in range(CALLS):
                job()
            if device != "cpu":
                torch.cuda.synchronize()
            taken[name].append(1e6 * (perf_counter() - begin) / CALLS)
    return taken


def table(rows: list[dict[str, Any]]) -> Table:
    """A line per layer; of this package's, each part with what it is held to."""
    out = Table(
        "shape", "layer", title="microseconds of a call, first quartile; in brackets: this / what it is held to"
    )
    for part in PARTS:
        out.add_column(part, justify="right")
    times = {(row["case"], row["layer"], row["part"]): row["us"][0] for row in rows}
    for case, layer in dict.fromkeys((row["case"], row["layer"]) for row in rows):
        cells = []
        for part in PARTS:
            own, (peer, _) = times[case, layer, part], CASES[case].targets.get(part, (None, None))
            held = peer is not None and not layer.startswith("torch")
            cells.append(f"{own:.1f}" + (f" ({own / times[case, peer, part]:.2f})" if held else ""))
        out.add_row("x".join(map(str, CASES[case].shape)), layer, *cells)
    return out


def missed(rows: list[dict[str, Any]]) -> list[str]:
    """Where this package's layers take longer than they are held to, in words."""
    times = {(row["case"], row["layer"], row["part"]): row["us"][0] for row in rows}
    return [
        f"{layer}, {part}: {own / times[case, peer, part]:.2f} of {peer}'s time, at most {share:.2f} asked"
        for (case, layer, part), own in times.items()
        if not layer.startswith("torch") and part in CASES[case].targets
        for peer, share in [CASES[case].targets[part]]
        if own > share * times[case, peer, part]
    ]
