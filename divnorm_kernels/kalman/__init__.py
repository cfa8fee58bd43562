"""Kalman normalization: each layer's statistics are a batch's and those that the layers before predict."""

from .chain import kalman_chain
from .layer import KalmanNorm1d, KalmanNorm2d, KalmanNorm3d
from .state import KalmanState, add_states
from .transition import propagate, transition

__all__ = [
    "KalmanNorm1d",
    "KalmanNorm2d",
    "KalmanNorm3d",
    "KalmanState",
    "add_states",
    "kalman_chain",
    "propagate",
    "transition",
]
