"""Weights of a known norm: by parametrization, or projected after each step of an optimizer."""

from .parametrizing import fold, normalize
from .projection import Projection, project
from .rates import effective_rates

__all__ = ["Projection", "effective_rates", "fold", "normalize", "project"]
