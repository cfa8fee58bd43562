"""Calls of the registered operators: shapes and norms, and their arguments."""

from json import loads

import torch

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


def forward_arguments(shape=(2, 4, 5, 6), norm=CASES["image"][1], dtype=torch.float32, parameters=None, with_l1=False):
    """Of forward, with a sigma that is a tensor."""
    x = torch.randn(shape).to(dtype)
    weight, bias = (torch.randn(shape[1]).to(parameters or dtype) for _ in range(2))
    sigma = (torch.rand(norm.groups) + 0.5).to(parameters or dtype)
    threshold = torch.randn(shape[1]).to(parameters or dtype) if norm.activation == "tlu" else None
    return [x, weight, bias, sigma, 0.0, norm.text, with_l1, False, None, torch.randn(shape).to(x), threshold]


def backward_arguments(arguments, maps):
    x, weight, bias, sigma, value, norm, with_l1, _, backend, residual, threshold = arguments
    dl1 = torch.rand((), dtype=maps.dtype) if with_l1 else None
    dtype = None if bias is None else bias.dtype
    kept, residual = (bias, residual) if Norm(**loads(norm)).activation else (None, None)
    needs = [True, *(t is not None for t in (weight, bias, sigma, residual, threshold))]
    given = [torch.randn_like(x), dl1, x, maps, weight, kept, dtype, sigma, value, norm, needs, backend]
    return [*given, residual, threshold]
