"""Keeping off what computes torch.nn's layers by itself, where another layer stands in their place."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from ..modules import NormalizationLayer, RMSNorm


def keep_off(model: nn.Module, new: Collection[nn.Module]) -> None:
    """Of ``model``'s encoders, those that would compute a LayerNorm in the place of one of the layers ``new``.

    In eval mode `torch.nn.TransformerEncoderLayer` reads weight, bias and eps of its norms and does the rest itself,
    and `torch.nn.TransformerEncoder` makes nested tensors for that alone.
    """
    misread = {layer for layer in new if not _tells_by_eps(layer)}
    kept_off = set()
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoderLayer) and not misread.isdisjoint((encoder.norm1, encoder.norm2)):
            encoder.activation_relu_or_gelu = 0  # torch's own flag for an activation that it cannot compute
            kept_off.add(encoder)
    for stack in model.modules():
        if isinstance(stack, nn.TransformerEncoder) and not kept_off.isdisjoint(stack.layers):
            stack.use_nested_tensor = False


def _tells_by_eps(layer: nn.Module) -> bool:
    """Whether eps is NaN where the layer is no LayerNorm, which keeps torch off; an RMSNorm's is its own."""
    return isinstance(layer, NormalizationLayer) and not isinstance(layer, RMSNorm)
