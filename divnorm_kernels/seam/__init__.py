"""Whole fields with something of the caller's between the statistics and their use."""

from .functional import normalize

__all__ = ["normalize"]
