"""Sparsity and pairwise correlation of activations, which the paper's penalty is about."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

ROWS = 20_000
"""Samples and positions that a correlation is taken over, at most."""


def _rows(y: Tensor) -> Tensor:
    """(samples and positions, channels), at most `ROWS` of them, evenly spread."""
    rows = y.movedim(1, -1).reshape(-1, y.shape[1])
    return rows[:: -(-len(rows) // ROWS)].double()


def sparsity(rows: Tensor) -> float:
    """The mean over channels of 1 - mean(|y|)^2 / mean(y^2): 0 for constant ones, near 1 where few are far from zero.

    Source: Treves and Rolls (1991), as Vinje and Gallant (2000) scale it. A channel that is zero throughout counts 1.
    """
    square = rows.square().mean(0)
    ratio = torch.where(square > 0, rows.abs().mean(0).square() / square, 0.0)
    count = len(rows)
    return float(((1 - ratio) / (1 - 1 / count)).clamp(max=1).mean())


def correlation(rows: Tensor) -> float:
    """The mean of |correlation| over the pairs of channels that vary; 0 where fewer than two do."""
    centred = rows - rows.mean(0)
    scale = centred.square().sum(0).sqrt()
    centred = centred[:, scale > 0] / scale[scale > 0]
    count = centred.shape[1]
    if count < 2:
        return 0.0
    return float(((centred.T @ centred).abs().sum() - count) / (count * (count - 1)))


def measure(places: dict[str, nn.Module], probe: Callable[[], None]) -> dict[str, dict[str, float]]:
    """Sparsity, share of zeros and correlation of the outputs of ``places`` while ``probe`` runs, by name."""
    seen: dict[str, list[Tensor]] = {name: [] for name in places}

    def keep(name: str) -> Callable[[nn.Module, tuple, Tensor | tuple], None]:
        def hook(module: nn.Module, inputs: tuple, y: Tensor | tuple) -> None:
            # a recurrent layer gives (T, N, units) and its state
            seen[name].append((y if isinstance(y, Tensor) else y[0].flatten(0, 1)).cpu())

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in places.items()]
    try:
        with torch.no_grad():
            probe()
    finally:
        for hook in hooks:
            hook.remove()
    measured = {}
    for name, outputs in seen.items():
        rows = _rows(torch.cat(outputs))
        zeros = float((rows == 0).double().mean())
        measured[name] = {"sparsity": sparsity(rows), "zeros": zeros, "correlation": correlation(rows)}
    return measured
