"""Which layer takes the place of another: by the name of a family, or by a class."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import modules
from ..modules import NormalizationLayer
from ..modules.base import EPS
from .forms import (
    AnyBatchNorm,
    AnyFilterResponseNorm,
    BatchedInstanceNorm,
    DenseChannelNorm,
    DenseDivisiveNorm,
    LastBatchNorm,
)
from .sources import Source

Wanted = str | type[nn.Module] | Callable[..., nn.Module]

_BATCH = {None: AnyBatchNorm, 1: modules.BatchNorm1d, 2: modules.BatchNorm2d, 3: modules.BatchNorm3d}
_INSTANCE = {1: modules.InstanceNorm1d, 2: modules.InstanceNorm2d, 3: modules.InstanceNorm3d}
_DIVISIVE = {
    None: modules.DivisiveNorm,
    1: modules.DivisiveNorm1d,
    2: modules.DivisiveNorm2d,
    3: modules.DivisiveNorm3d,
}
_VARIANCE = {1: modules.VarianceNorm1d, 2: modules.VarianceNorm2d, 3: modules.VarianceNorm3d}
_RESPONSE = {
    None: AnyFilterResponseNorm,
    1: modules.FilterResponseNorm1d,
    2: modules.FilterResponseNorm2d,
    3: modules.FilterResponseNorm3d,
}
_TOP_K = (modules.TopKBatchNorm1d, modules.TopKBatchNorm2d, modules.TopKBatchNorm3d)
_FAMILIES: dict[str, tuple[type[NormalizationLayer], ...]] = {
    "bn": (*_BATCH.values(), *_VARIANCE.values(), *_TOP_K),
    "frn": tuple(_RESPONSE.values()),
    "in": (*_INSTANCE.values(), BatchedInstanceNorm),
    "gn": (modules.GroupNorm,),
    "ln": (modules.LayerNorm, modules.PositionalNorm2d),
    "rms": (modules.RMSNorm,),
    "windows": (
        *_DIVISIVE.values(),
        DenseDivisiveNorm,
        DenseChannelNorm,
        modules.LocalContrastNorm2d,
        modules.DivisiveNormFeatures,
    ),
}
"""The family of each class that may be asked for."""

SUFFIXES: dict[str, dict[str, Any]] = {
    "": {},
    "-s": {"sigma": 1.0},
    "*": {"sigma": 1.0, "l1_weight": 0.01},
}
"""The paper's variants: a real sigma, and the penalty too. Both numbers are for options to overrule."""
LOCAL_RESPONSE = "lrn"
"""For layers of one class, which have no number of channels."""
BY_WEIGHTS = ("wn", "sws")
"""For no layer: the norm goes, and the weights before it are normalized."""
_WITH_SUFFIX = ("bn", "l1bn", "vn", "ln", "gn", "in", "frn", "rms", "dn")
_EVOLVED = {"evo-b0": modules.EvoNorm2dB0, "evo-s0": modules.EvoNorm2dS0}
_POINTWISE = {"dyt": modules.DyT, "derf": modules.Derf}
NAMES = (*_WITH_SUFFIX, "dn-mean-only", *_EVOLVED, *BY_WEIGHTS, *_POINTWISE, "isru", LOCAL_RESPONSE, "none")
_BATCH_KINDS: dict[str, dict[str, Any]] = {"bn": {}, "l1bn": {"p": 1}, "vn": {"subtract_mean": False}}
"""What a name of batch normalization adds to it."""


@dataclass(frozen=True)
class Target:
    """What takes the place of a layer.

    Args:
        make: called with keywords alone.
        layer: the class of what it makes, where that is one of this package's.
        family: of the layer, as in a name; "windows" where a class of windows was asked for, and ``None`` for what is
            not this package's.
        place: the options that the place asks for; those of the source's layer come before them.
        explicit: the options that were asked for; they come before all others.
    """

    make: Callable[..., nn.Module]
    layer: type[NormalizationLayer] | None
    family: str | None
    place: dict[str, Any] = field(default_factory=dict)
    explicit: dict[str, Any] = field(default_factory=dict)

    @property
    def moves_statistics(self) -> bool:
        """Whether it has statistics of earlier batches, as batch normalization, this package's and torch.nn's."""
        made = self.make.func if isinstance(self.make, partial) else self.make
        return isinstance(made, type) and issubclass(made, _BatchNorm | modules.EvoNorm2dB0)


def split(name: str) -> tuple[str, dict[str, Any]]:
    """The family that a name is of, and the options of its suffix."""
    for suffix in ("*", "-s"):
        if name.endswith(suffix) and name.removesuffix(suffix) in _WITH_SUFFIX:
            return name.removesuffix(suffix), SUFFIXES[suffix]
    if name not in NAMES:
        expected = ", ".join(map(repr, NAMES))
        raise ValueError(
            f'to: got {name!r}, expected a class, a partial, or one of {expected}; "-s" and "*" may follow'
        )
    return name, SUFFIXES[""]


def target(source: Source, to: Wanted, options: dict[str, Any]) -> Target:
    """What takes the place of ``source`` where ``to`` is asked for."""
    if isinstance(to, str):
        family, variant = split(to)
        if family == "none" or family in BY_WEIGHTS:
            return Target(lambda **_: nn.Identity(), None, "none")
        if family in _EVOLVED or family in _POINTWISE:
            return Target(_without_fields(family, source), None, family, explicit=options)
        layer, place = _named(family, source)
        explicit = _renamed(layer, overruled(variant, options))
        family = "bn" if family in _BATCH_KINDS else family
        return Target(layer, layer, family, _sized(layer, source) | place, explicit)
    layer = to.func if isinstance(to, partial) else to
    family = next((family for family, layers in _FAMILIES.items() if layer in layers), None)
    if family is None:
        return Target(partial(to, source.size), None, None, explicit=options)
    explicit = dict(options)
    if isinstance(to, partial):
        given = inspect.signature(layer).bind_partial(*to.args).arguments
        explicit = overruled({**given, **to.keywords}, options)
    place = _sized(layer, source)
    if layer is modules.GroupNorm:
        place["num_groups"] = _groups(source.size)
    return Target(layer, layer, family, place, explicit)


def _without_fields(family: str, source: Source) -> Callable[..., nn.Module]:
    """What makes a layer that is no call of the operator in the place of ``source``."""
    shape = source.shape
    if family in _POINTWISE:
        return partial(_POINTWISE[family], source.size, dim=1 if shape is None else -len(shape))
    if source.dims not in (None, 2) or (shape is not None and len(shape) == 1):
        expected = "one for images (N, C, H, W)"
        raise ValueError(f"to: got {family!r} for a {type(source.module).__name__}, expected {expected}")
    groups = {"groups": _groups(source.size)} if family == "evo-s0" else {}
    return partial(_EVOLVED[family], source.size, **groups)


def _named(family: str, source: Source) -> tuple[type[NormalizationLayer], dict[str, Any]]:
    """The layer of a family that fits the place of ``source``, and the options that make it fit."""
    shape, dims = source.shape, source.dims
    if shape is not None and (len(shape) == 1 or family in ("ln", "rms")):  # a weight for every element of the shape
        if family == source.kind == "rms" and getattr(source.module, "bias", None) is not None:
            # which RMSNorm has not
            return modules.DivisiveNormFeatures, {"window": None, "norm_window": "all", "eps": EPS}
        return _over_the_end(family)
    if dims is not None and dims > 3:
        raise ValueError(f"to: got {family!r} for a layer over {shape}, expected 'ln' or 'rms' for so many dimensions")
    dense = dims == 1 and (source.kind == "bn" or isinstance(source.module, DenseDivisiveNorm))
    windows = DenseDivisiveNorm if dense else _DIVISIVE[dims]
    if family in ("dn", "dn-mean-only"):
        return windows, _mean_only(family)
    if family == "isru":
        alone = DenseChannelNorm if dense else windows
        return alone, {"window": None, "norm_window": 1, "groups": source.size}
    if family == "rms":
        eps = torch.finfo(torch.float32).eps if source.kind == "rms" else EPS  # where the source tells none
        return windows, {"window": None, "norm_window": 1 if source.positions else "all", "eps": eps}
    if family == "ln":
        if not source.positions:
            return modules.GroupNorm, {"num_groups": 1}
        return (modules.PositionalNorm2d, {}) if dims == 2 else (_DIVISIVE[dims], {"window": 1, "eps": EPS})
    if family == "gn":
        return modules.GroupNorm, {"num_groups": _groups(source.size)}
    if family == "in" and dims is None:
        return modules.GroupNorm, {"num_groups": source.size}
    if family == "in" and dense:
        return BatchedInstanceNorm, {}
    if family == "vn" and dims is not None:
        return _VARIANCE[dims], {}
    if family in _BATCH_KINDS:
        return _BATCH[dims], _BATCH_KINDS[family]
    return {"in": _INSTANCE, "frn": _RESPONSE}[family][dims], {}


def _over_the_end(family: str) -> tuple[type[NormalizationLayer], dict[str, Any]]:
    layers: dict[str, type[NormalizationLayer]] = {
        "ln": modules.LayerNorm,
        "rms": modules.RMSNorm,
        "dn": modules.DivisiveNormFeatures,
        "dn-mean-only": modules.DivisiveNormFeatures,
        "isru": modules.DivisiveNormFeatures,
        **dict.fromkeys(_BATCH_KINDS, LastBatchNorm),
    }
    if family not in layers:
        names = ", ".join(map(repr, layers))
        raise ValueError(f"to: got {family!r} for a layer over the last dimension, expected one of {names}")
    if family == "isru":
        return layers[family], {"window": None, "norm_window": 1}
    return layers[family], _BATCH_KINDS.get(family) or _mean_only(family)


def _mean_only(family: str) -> dict[str, Any]:
    return {"norm_window": None} if family == "dn-mean-only" else {}


def _groups(channels: int) -> int:
    """32, or the largest number below that divides the channels."""
    return next(n for n in range(min(32, channels), 0, -1) if channels % n == 0)


def overruled(options: dict[str, Any], by: dict[str, Any]) -> dict[str, Any]:
    """``options`` where ``by`` says nothing else; sigma and eps are one option."""
    if {"sigma", "eps"} & by.keys():
        options = {name: value for name, value in options.items() if name not in ("sigma", "eps")}
    return {**options, **by}


@cache
def takes(layer: type[NormalizationLayer]) -> set[str]:
    """The options of a layer's constructor."""
    return set(inspect.signature(layer).parameters) | (
        modules.base.Options.__annotations__.keys() - layer._settled.keys()
    )


def _sized(layer: type[NormalizationLayer], source: Source) -> dict[str, Any]:
    """The number of channels, or the shape, under the name that ``layer`` has for it."""
    (name,) = {"num_features", "num_channels", "normalized_shape"} & takes(layer)
    whole = name == "normalized_shape" and source.shape is not None
    return {name: source.shape if whole else source.size}


def _renamed(layer: type[NormalizationLayer], options: dict[str, Any]) -> dict[str, Any]:
    """``affine``, that a name's other layers take, in the word of layers over the last dimension."""
    if "affine" in options and "elementwise_affine" in takes(layer):
        return {"elementwise_affine" if name == "affine" else name: value for name, value in options.items()}
    return options
