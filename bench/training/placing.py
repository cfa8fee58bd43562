"""What stands behind a convolution: a norm and an activation, or an activation alone and normalized weights.

`norms.image_norm` has the layers of the operator; here are those of other papers beside them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from divnorm_kernels import StandardizedReLU, TopKBatchNorm2d, convert_norm
from divnorm_kernels.weights import normalize

from . import norms
from .norms import Constants, image_norm

EVOLVED = ("evo-b0", "evo-s0")
BY_WEIGHTS = ("wn", "sws")
"""Those of "Beyond BatchNorm", with the initial gains that their variance needs."""
BOUNDED = {
    "weight-norm": {"kind": "wn"},
    "bwn-l2": {"kind": "bwn"},
    "bwn-l1": {"kind": "bwn", "p": 1},
    "bwn-linf": {"kind": "bwn", "p": math.inf},
}
"""Weight norm as it was published, and bounded: they start from the weights that there are."""
TOP_K = "topk"
KALMAN = "kalman"
"""A batch normalization that `divnorm_kernels.kalman_chain` is to take, with its activation apart."""


def check_norm(name: str) -> None:
    """Raises ValueError on a name that is none of these, nor of the operator's family."""
    if name not in (*EVOLVED, *BY_WEIGHTS, *BOUNDED, TOP_K, KALMAN):
        norms.check_norm(name)


def behind(
    convolution: nn.Conv2d, norm: str, constants: Mapping[str, Constants], backend: str | None, **options: Any
) -> nn.Module:
    """What follows ``convolution``, whose weights it may parametrize; ``options`` are those of `image_norm`."""
    width = convolution.out_channels
    if norm in EVOLVED:
        chosen = {"backend": backend} if norm == "evo-s0" else {}
        if norm == "evo-s0" and options.get("num_groups") is not None:
            chosen |= {"groups": options["num_groups"]}
        return convert_norm(nn.BatchNorm2d(width), norm, report=None, **chosen)
    if norm in BY_WEIGHTS:
        normalize(convolution, norm, **({"gamma": "relu"} if norm == "sws" else {}))
        if norm == "sws":
            return nn.ReLU()
        nn.init.ones_(convolution.parametrizations.weight.original0)  # what the activation is standardized for
        return StandardizedReLU()
    if norm in BOUNDED:
        normalize(convolution, **BOUNDED[norm])
        return nn.ReLU()
    if norm == TOP_K:
        return TopKBatchNorm2d(width, sigma=constants["bn"].sigma, activation="relu")
    if norm == KALMAN:
        return nn.Sequential(nn.BatchNorm2d(width, eps=constants["bn"].sigma ** 2), nn.ReLU())
    if norm == "frn":
        options |= {"activation": "tlu"}
    return image_norm(norm, width, constants, backend=backend, **options)
