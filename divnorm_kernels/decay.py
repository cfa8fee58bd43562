"""Weight decay for what it is good for: the weights of a model, and not what scales and shifts its activations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrize import ParametrizationList

from .checks import check_flag, check_module, check_number
from .modules import GDN, Derf, DyT, NormalizationLayer

_NORMS = (NormalizationLayer, GDN, DyT, Derf, _NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def no_decay_groups(model: nn.Module, weight_decay: float, biases: bool = False) -> list[dict[str, Any]]:
    """Two groups for an optimizer: what ``weight_decay`` pulls towards zero, and with 0.0 what it should leave alone.

    Left alone are all parameters of this package's layers (sigma too), those of torch.nn's normalization layers, and of
    modules with "norm" in their class' name and parameters of one dimension, such as transformers', and the gains of
    parametrized weights, ``original0`` of one number a row, torch's ``weight_norm`` too. Shared parameters come once,
    left alone if any layer says so; those with ``requires_grad=False`` not at all.

    Args:
        model: whose parameters.
        weight_decay: of the first group.
        biases: whether the biases of other layers decay: parameters with "bias" in the last part of their name. By
            default they do not, as in timm and transformers.

    Example:
        >>> optimizer = torch.optim.AdamW(no_decay_groups(model, weight_decay=0.05), lr=1e-3)
    """
    check_module("model", model)
    check_number("weight_decay", weight_decay, "a number of at least 0")
    if weight_decay < 0:
        raise ValueError(f"weight_decay: got {weight_decay}, expected a number of at least 0")
    check_flag("biases", biases)
    kept = {id(p) for module in model.modules() for p in _kept(module, biases)}
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if id(p) not in kept], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in kept], "weight_decay": 0.0},
    ]


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a normalization layer: of this package, of torch.nn, or by its name and parameters."""
    if isinstance(module, _NORMS):
        return True
    return "norm" in type(module).__name__.lower() and all(p.dim() == 1 for p in module.parameters(recurse=False))


def _kept(module: nn.Module, biases: bool) -> Iterator[nn.Parameter]:
    """The module's own parameters that do not decay."""
    norm, parametrized = is_norm(module), isinstance(module, ParametrizationList)
    for name, parameter in module.named_parameters(recurse=False):
        gain = parametrized and name == "original0" and parameter.numel() == max(parameter.shape, default=1)
        if norm or gain or (not biases and "bias" in name):
            yield parameter
