"""Divisive normalization by neighbouring channels: local response normalization and exponential pools."""

from .functional import channel_norm
from .pool import Exponential

__all__ = ["Exponential", "channel_norm"]
