"""Weights of a known norm, by parametrization."""

from .parametrizing import fold, normalize

__all__ = ["fold", "normalize"]
