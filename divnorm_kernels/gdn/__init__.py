"""Generalized divisive normalization: each channel by a learned weighing of all channels at its position."""

from .functional import gdn

__all__ = ["gdn"]
