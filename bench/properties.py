"""Deep networks at their initial values: scale and similarity of activations, and gradients, by norm.

After Lubana, Dick and Tanaka, "Beyond BatchNorm: Towards a Unified Understanding of Normalization in Deep Learning",
NeurIPS 2021: activations that grow with depth, activations that become alike for all inputs, and gradients that explode
are what keeps a norm from training. Its layers are here, beside this package's others.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from textwrap import fill
from typing import Any

import torch
from rich.table import Table

from .figures import plt, save
from .training.deep import Deep
from .training.images import Images
from .training.placing import BY_WEIGHTS, EVOLVED
from .training.probes import MEASURES, measure

NORMS = ("none", "bn", "ln", "in", "gn", "frn", "vn", *EVOLVED, *BY_WEIGHTS, "rms", "dn-mean-only", "dn")
NETWORKS = ("plain", "residual")


def measure_all(
    norms: list[str], images: Images, depth: int, width: int, batch: int, seeds: int, backend: str | None, advance: Any
) -> list[dict[str, Any]]:
    """A row per network, norm and seed, on the first pictures of the test set; ``advance`` is called after each."""
    x = images.test[:batch].float()
    x = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)
    rows = []
    for kind in NETWORKS:
        for norm in norms:
            for seed in range(seeds):
                torch.manual_seed(seed)
                network = Deep(norm, depth, width, kind == "residual", backend)
                direction = torch.randn(len(x), width, x.shape[2] // 2, x.shape[3] // 2)
                rows.append({"network": kind, "norm": norm, "seed": seed, **measure(network, x, direction)})
                advance()
    return rows


def _mean_over_seeds(rows: list[dict[str, Any]], kind: str, norm: str, name: str) -> list[float]:
    lines = [row[name] for row in rows if row["network"] == kind and row["norm"] == norm]
    return [mean(values) for values in zip(*lines, strict=True)]


def _norms(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["norm"] for row in rows))


def table(rows: list[dict[str, Any]]) -> Table:
    """A line per network and norm: what is left of each measure at the far end of the network."""
    out = Table("network", "norm", title="at initial values; means over the seeds")
    for name in (
        "scale, last / first",
        "variance, last / first",
        "similarity, first",
        "similarity, last",
        "stable rank, first",
        "stable rank, last",
        "gradient, first / last",
    ):
        out.add_column(name, justify="right", no_wrap=True)
    for kind in NETWORKS:
        for norm in _norms(rows):
            scale, spread, alike, rank, gradient = (_mean_over_seeds(rows, kind, norm, name) for name in MEASURES)
            out.add_row(
                kind,
                norm,
                f"{scale[-1] / scale[0]:.3g}",
                f"{spread[-1] / spread[0]:.3g}",
                f"{alike[0]:.2f}",
                f"{alike[-1]:.2f}",
                f"{rank[0]:.2f}",
                f"{rank[-1]:.2f}",
                f"{gradient[0]:.3g}",
            )
    return out


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """A row of panels per measure, a column per network, a line per norm, against depth."""
    figure, panels = plt.subplots(
        len(MEASURES), len(NETWORKS), figsize=(9, 3.2 * len(MEASURES)), layout="constrained", squeeze=False
    )
    for line, (name, label) in zip(panels, MEASURES.items(), strict=True):
        for axes, kind in zip(line, NETWORKS, strict=True):
            for i, norm in enumerate(_norms(rows)):
                style = ("-", "--")[i // 7 % 2]
                axes.plot(_mean_over_seeds(rows, kind, norm, name), style, color=f"C{i % 7}", label=norm)
            axes.set(xlabel="layer", title=kind)
            axes.xaxis.get_major_locator().set_params(integer=True)
            if name not in ("similarity", "rank"):
                axes.set_yscale("log")
        line[0].set_ylabel(fill(label, 28))
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=7, handlelength=3)
    save(figure, path)


def write(path: Path, rows: list[dict[str, Any]], command: str, data: str) -> None:
    """One JSON document."""
    path.write_text(json.dumps({"command": command, "data": data, "rows": rows}, indent=1) + "\n")
