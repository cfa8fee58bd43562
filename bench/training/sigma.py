"""How much of what a norm divides by is its sigma."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from divnorm_kernels import NormalizationLayer, divisive_norm


def sigma_share(layer: NormalizationLayer, x: Tensor) -> float:
    """``sigma^2 / (sigma^2 + mean of v^2)``, v what ``layer`` makes of ``x`` before it divides.

    1: the layer only centres. 0: sigma has no effect.
    """
    norm = layer.norm
    fields = {"groups": norm.groups, "edges": norm.edges, "over_batch": norm.over_batch}
    v = divisive_norm(x.detach().float(), window=norm.window, norm_window=None, sigma=1.0, **fields)
    square = float(layer.sigma) ** 2
    return square / (square + float(v.square().mean()))


def sigma_shares(model: nn.Module, probe: Callable[[], None]) -> list[float]:
    """`sigma_share` of the layers of ``model`` that divide by a deviation, in the order of ``probe``'s calls."""
    found: list[float] = []
    layers = [m for m in model.modules() if isinstance(m, NormalizationLayer) and _divides(m)]
    hooks = [m.register_forward_pre_hook(lambda m, inputs: found.append(sigma_share(m, inputs[0]))) for m in layers]
    try:
        probe()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _divides(layer: NormalizationLayer) -> bool:
    return layer.norm.suppression is not None and layer.norm.p == 2
