"""Calls of the registered operators: shapes and norms."""

from divnorm_kernels.norm import Norm

CASES = {
    "image": ((2, 4, 5, 6), Norm(3, activation="relu")),
    "whole": ((2, 4, 5, 6), Norm("all", groups=2, activation="relu")),
    "features": ((3, 7), Norm(4, None)),
    "volume": ((2, 4, 3, 4, 5), Norm((3, "all", 2), 2, groups=2, edges="zero")),
    "no mean, over the batch": ((3, 4, 6), Norm(None, "all", groups=4, over_batch=True)),
    "thresholds": ((2, 4, 5, 6), Norm(None, "all", groups=4, activation="tlu")),
    "mean deviation": ((2, 4, 5, 6), Norm(3, p=1, activation="silu")),
    "x kept": ((2, 4, 5, 6), Norm("all", groups=4, over_batch=True, p=1, subtract_mean=False)),
}
