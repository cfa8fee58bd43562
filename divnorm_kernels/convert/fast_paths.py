"""Keeping off what computes torch.nn's layers by itself, where another layer stands in their place."""

from __future__ import annotations

import math
from collections.abc import Collection

from torch import nn

from .. import modules


def keep_off(model: nn.Module, new: Collection[nn.Module]) -> None:
    """Of ``model``'s encoders, those that would compute a LayerNorm in the place of one of the layers ``new``.

    In eval mode `torch.nn.TransformerEncoderLayer` reads weight, bias and eps of its norms and does the rest itself,
    and `torch.nn.TransformerEncoder` makes nested tensors for that alone.
    """
    kept_off = set()
    for encoder in model.modules():
        if not isinstance(encoder, nn.TransformerEncoderLayer):
            continue
        norms = [getattr(encoder, name, None) for name in ("norm1", "norm2")]
        if any(norm is layer for norm in norms for layer in new) and not _both_told(*norms):
            encoder.activation_relu_or_gelu = 0  # torch's own flag for an activation that it cannot compute
            kept_off.add(encoder)
    for stack in model.modules():
        if isinstance(stack, nn.TransformerEncoder) and not kept_off.isdisjoint(stack.layers):
            stack.use_nested_tensor = False


def _both_told(*norms: nn.Module | None) -> bool:
    """Whether layer normalization with weight, bias and eps of the first is what all of them compute."""
    layers = all(type(norm) in (nn.LayerNorm, modules.LayerNorm) for norm in norms)
    return layers and all(norm.bias is not None and math.isclose(norm.eps, norms[0].eps) for norm in norms)
