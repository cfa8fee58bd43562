"""Divisive normalization for PyTorch: one operator for windowed, layer, group, instance and batch normalization."""

from .autograd import DivisiveNormFunction
from .functional import divisive_norm
from .modules import DivisiveNorm1d, DivisiveNorm2d, DivisiveNorm3d, DivisiveNormFeatures, l1_penalty
from .version import __version__

__all__ = [
    "DivisiveNorm1d",
    "DivisiveNorm2d",
    "DivisiveNorm3d",
    "DivisiveNormFeatures",
    "DivisiveNormFunction",
    "__version__",
    "divisive_norm",
    "l1_penalty",
]
