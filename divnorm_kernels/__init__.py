"""Divisive normalization for PyTorch: one operator for windowed, layer, group, instance and batch normalization."""

from .autograd import DivisiveNormFunction
from .convert import convert_norm
from .decay import no_decay_groups
from .functional import divisive_norm
from .modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    DivisiveNorm,
    DivisiveNorm1d,
    DivisiveNorm2d,
    DivisiveNorm3d,
    DivisiveNormFeatures,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    LocalContrastNorm2d,
    NormalizationLayer,
    PositionalNorm2d,
    RMSNorm,
    collect_l1,
    convert_sync,
    l1_penalty,
)
from .norm import Span
from .version import __version__

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "DivisiveNorm",
    "DivisiveNorm1d",
    "DivisiveNorm2d",
    "DivisiveNorm3d",
    "DivisiveNormFeatures",
    "DivisiveNormFunction",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LocalContrastNorm2d",
    "NormalizationLayer",
    "PositionalNorm2d",
    "RMSNorm",
    "Span",
    "__version__",
    "collect_l1",
    "convert_norm",
    "convert_sync",
    "divisive_norm",
    "l1_penalty",
    "no_decay_groups",
]
