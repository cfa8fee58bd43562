"""Probes of deep networks: scale, variance, similarity and rank of activations, and the size of gradients.

Source: Lubana, Dick and Tanaka, "Beyond BatchNorm: Towards a Unified Understanding of Normalization in Deep Learning",
NeurIPS 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

MEASURES = {
    "scale": "root mean square of activations",
    "variance": "mean over channels of the variance over the batch",
    "similarity": "mean cosine between two pictures' activations",
    "rank": "stable rank of the activations' Gram matrix",
    "gradient": "norm of the gradient, that of the last layer = 1",
}


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


def measure(network: nn.Module, x: Tensor, direction: Tensor) -> dict[str, list[float]]:
    """Every measure behind each layer of a network that returns all activations, the first ones first.

    Gradients are those of the last activations' product with ``direction``.
    """
    outputs = network(x)
    gradients = torch.autograd.grad((outputs[-1] * direction).sum(), outputs)
    sizes = [float(g.double().norm()) for g in gradients]
    probes = {"scale": _root_mean_square, "variance": variance, "similarity": similarity, "rank": stable_rank}
    found = {name: [probe(y.detach()) for y in outputs] for name, probe in probes.items()}
    return {**found, "gradient": [size / sizes[-1] for size in sizes]}
