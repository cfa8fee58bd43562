"""Deep networks at their initial values: scale and similarity of activations, and gradients, by norm.

After Lubana, Dick and Tanaka, "Beyond BatchNorm: Towards a Unified Understanding of Normalization in Deep Learning",
NeurIPS 2021: activations that grow with depth, activations that become alike for all inputs, and gradients that explode
are what keeps a norm from training. Its layers are here, beside this package's others.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from rich.table import Table
from torch import Tensor, nn

from divnorm_kernels import StandardizedReLU, convert_norm
from divnorm_kernels.weights import normalize

from .training import norms as experiments
from .training.images import Images
from .training.norms import Constants, image_norm

EVOLVED = ("evo-b0", "evo-s0")
BY_WEIGHTS = ("wn", "sws")
NORMS = ("none", "bn", "ln", "in", "gn", "frn", "vn", *EVOLVED, *BY_WEIGHTS, "rms", "dn-mean-only", "dn")
NETWORKS = ("plain", "residual")
MEASURES = {
    "scale": "root mean square of activations",
    "variance": "mean over channels of the variance over the batch",
    "similarity": "mean cosine between two pictures' activations",
    "rank": "stable rank of the activations' Gram matrix",
    "gradient": "norm of the gradient, that of the last layer = 1",
}
WINDOW = 5
SIGMA = 0.5
"""The paper's for CIFAR, where the name alone does not say it."""
CONSTANTS = {name: Constants(SIGMA) for name in ("dn", "dn-mean-only", "dn*", "ln-s", "ln*", "bn-s", "bn*")}


def check_norm(name: str) -> None:
    """Raises ValueError on a name that is not of the family."""
    if name not in (*EVOLVED, *BY_WEIGHTS):
        experiments.check_norm(name)


def _behind(convolution: nn.Conv2d, norm: str, backend: str | None) -> nn.Module:
    """The norm and the activation behind a convolution, or the activation alone where its weights are normalized."""
    width = convolution.out_channels
    if norm in EVOLVED:
        options = {"backend": backend} if norm == "evo-s0" else {}
        return convert_norm(nn.BatchNorm2d(width), norm, report=None, **options)
    if norm in BY_WEIGHTS:
        normalize(convolution, norm, **({"gamma": "relu"} if norm == "sws" else {}))
        if norm == "sws":
            return nn.ReLU()
        nn.init.ones_(convolution.parametrizations.weight.original0)  # what the activation is standardized for
        return StandardizedReLU()
    return image_norm(norm, width, CONSTANTS, window=WINDOW, backend=backend)


class Deep(nn.Module):
    """A stem that halves height and width, then 3x3 convolutions, each with a norm and a ReLU, added to x or not."""

    def __init__(self, norm: str, depth: int, width: int, residual: bool, backend: str | None = None) -> None:
        super().__init__()
        self.residual = residual
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(depth))
        for convolution in (self.stem, *self.convolutions):
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        self.norms = nn.ModuleList(_behind(convolution, norm, backend) for convolution in self.convolutions)

    def forward(self, x: Tensor) -> list[Tensor]:
        """The activations behind the stem and behind every layer."""
        outputs = [self.stem(x)]
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            y = norm(convolution(outputs[-1]))
            outputs.append(outputs[-1] + y if self.residual else y)
        return outputs


def similarity(y: Tensor) -> float:
    """The mean cosine of the angle between the activations of two samples of ``y`` (N, ...)."""
    rows = nn.functional.normalize(y.flatten(1).double())
    count = len(rows)
    return float(((rows @ rows.T).sum() - rows.square().sum()) / (count * (count - 1)))


def variance(y: Tensor) -> float:
    """The mean over the channels of ``y`` (N, C, ...) of the variance over all else."""
    return float(y.double().transpose(0, 1).flatten(1).var(1, correction=0).mean())


def stable_rank(y: Tensor) -> float:
    """``trace(K) / norm(K)`` of the Gram matrix K of the samples of ``y`` (N, ...), by its largest eigenvalue."""
    rows = y.flatten(1).double()
    gram = rows @ rows.T
    return float(gram.trace() / torch.linalg.matrix_norm(gram, 2))


def _root_mean_square(y: Tensor) -> float:
    return float(y.double().square().mean().sqrt())


def measure(network: Deep, x: Tensor, direction: Tensor) -> dict[str, list[float]]:
    """Every measure behind each layer; gradients are those of the last activations' product with ``direction``."""
    outputs = network(x)
    gradients = torch.autograd.grad((outputs[-1] * direction).sum(), outputs)
    sizes = [float(g.double().norm()) for g in gradients]
    probes = {"scale": _root_mean_square, "variance": variance, "similarity": similarity, "rank": stable_rank}
    found = {name: [probe(y.detach()) for y in outputs] for name, probe in probes.items()}
    return {**found, "gradient": [size / sizes[-1] for size in sizes]}


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
    """A row of panels per network, a panel per measure, a line per norm, against depth."""
    figure, panels = plt.subplots(
        len(NETWORKS), len(MEASURES), figsize=(21, 4 * len(NETWORKS)), layout="constrained", squeeze=False
    )
    for line, kind in zip(panels, NETWORKS, strict=True):
        for axes, (name, label) in zip(line, MEASURES.items(), strict=True):
            axes.set_prop_cycle(color=plt.get_cmap("tab20").colors)  # as many as there are norms, and more
            for norm in _norms(rows):
                axes.plot(_mean_over_seeds(rows, kind, norm, name), label=norm, linewidth=1.3)
            axes.set(xlabel="layer", ylabel=label, title=kind)
            if name not in ("similarity", "rank"):
                axes.set_yscale("log")
        line[-1].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(path: Path, rows: list[dict[str, Any]], command: str, data: str) -> None:
    """One JSON document."""
    path.write_text(json.dumps({"command": command, "data": data, "rows": rows}, indent=1) + "\n")
