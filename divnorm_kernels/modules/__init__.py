"""Layers in torch.nn's manners over the one operator: the paper's, and the family it unites."""

from .base import NormalizationLayer
from .batch import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
)
from .channel import ExponentialNorm, LocalResponseNorm
from .divisive import (
    DivisiveNorm,
    DivisiveNorm1d,
    DivisiveNorm2d,
    DivisiveNorm3d,
    DivisiveNormFeatures,
    LocalContrastNorm2d,
    PositionalNorm2d,
)
from .evonorm import EvoNorm2dB0, EvoNorm2dS0
from .gdn import GDN
from .penalty import collect_l1, l1_penalty
from .pointwise import Derf, DyT, StandardizedReLU
from .response import FilterResponseNorm1d, FilterResponseNorm2d, FilterResponseNorm3d
from .sync import convert_sync
from .top_k import TopKBatchNorm1d, TopKBatchNorm2d, TopKBatchNorm3d
from .variance import VarianceNorm1d, VarianceNorm2d, VarianceNorm3d
from .whole import GroupNorm, LayerNorm, RMSNorm

__all__ = [
    "GDN",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Derf",
    "DivisiveNorm",
    "DivisiveNorm1d",
    "DivisiveNorm2d",
    "DivisiveNorm3d",
    "DivisiveNormFeatures",
    "DyT",
    "EvoNorm2dB0",
    "EvoNorm2dS0",
    "ExponentialNorm",
    "FilterResponseNorm1d",
    "FilterResponseNorm2d",
    "FilterResponseNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LocalContrastNorm2d",
    "LocalResponseNorm",
    "NormalizationLayer",
    "PositionalNorm2d",
    "RMSNorm",
    "StandardizedReLU",
    "TopKBatchNorm1d",
    "TopKBatchNorm2d",
    "TopKBatchNorm3d",
    "VarianceNorm1d",
    "VarianceNorm2d",
    "VarianceNorm3d",
    "collect_l1",
    "convert_sync",
    "l1_penalty",
]
