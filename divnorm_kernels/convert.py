"""Changing a model's normalization in one line."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import modules
from .modules import NormalizationLayer

Only = type[nn.Module] | tuple[type[nn.Module], ...] | str | Callable[[str, nn.Module], bool] | None
Target = str | type[nn.Module] | Callable[..., nn.Module]

_DIMS = {
    nn.BatchNorm1d: 1,
    nn.BatchNorm2d: 2,
    nn.BatchNorm3d: 3,
    nn.SyncBatchNorm: 2,
    nn.InstanceNorm1d: 1,
    nn.InstanceNorm2d: 2,
    nn.InstanceNorm3d: 3,
    modules.BatchNorm1d: 1,
    modules.BatchNorm2d: 2,
    modules.BatchNorm3d: 3,
    modules.InstanceNorm1d: 1,
    modules.InstanceNorm2d: 2,
    modules.InstanceNorm3d: 3,
    modules.DivisiveNorm1d: 1,
    modules.DivisiveNorm2d: 2,
    modules.DivisiveNorm3d: 3,
    modules.LocalContrastNorm2d: 2,
    modules.PositionalNorm2d: 2,
}
_GROUPED = (nn.GroupNorm, modules.GroupNorm)
_TRAILING = (nn.LayerNorm, nn.RMSNorm, modules.LayerNorm, modules.RMSNorm)

_BATCH = (modules.BatchNorm1d, modules.BatchNorm2d, modules.BatchNorm3d)
_INSTANCE = (modules.InstanceNorm1d, modules.InstanceNorm2d, modules.InstanceNorm3d)
_DIVISIVE = (modules.DivisiveNorm1d, modules.DivisiveNorm2d, modules.DivisiveNorm3d)
_WINDOWED = (modules.LocalContrastNorm2d, modules.DivisiveNormFeatures, *_DIVISIVE)

SUFFIXES: dict[str, dict[str, Any]] = {
    "": {},
    "-s": {"sigma": 1.0},
    "*": {"sigma": 1.0, "l1_weight": 0.01},
}
"""The paper's variants: a real sigma, and the penalty too. Both numbers are for options to overrule."""
NAMES = ("bn", "ln", "gn", "in", "rms", "dn", "dn-mean-only", "none")


@dataclass(frozen=True)
class _Source:
    """What a layer normalizes: ``dims`` spatial dimensions behind ``size`` channels, or ``shape`` at the end of x."""

    module: nn.Module
    size: int
    dims: int | None
    shape: tuple[int, ...] | None = None

    @property
    def eps(self) -> float | None:
        """Where it is small, as that of torch.nn's layers; a sigma that is part of the model is no eps."""
        return None if isinstance(self.module, _WINDOWED) else getattr(self.module, "eps", None)


class _ChannelsLast(nn.Module):
    """Gives a layer that wants its channels second an x of shape (..., C): a view, since C lies last in memory."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """``x`` with its last dimension moved to the second place, through the layer, and back."""
        return self.layer(x.movedim(-1, 1)).movedim(1, -1)


def _source(module: nn.Module) -> _Source | None:
    """What there is to know of a normalization layer; ``None`` for any other module."""
    kind = next((known for known in _DIMS if isinstance(module, known)), None)
    if kind is not None:
        size = getattr(module, "num_features", None) or module.num_channels
        return _Source(module, size, _DIMS[kind])
    if isinstance(module, _GROUPED):
        return _Source(module, module.num_channels, 2)
    if isinstance(module, _TRAILING):
        shape = tuple(module.normalized_shape)
        if len(shape) > 1:
            return _Source(module, shape[0], len(shape) - 1)
        # LayerNorm over the channels of an image, as ConvNeXt and timm write it
        if getattr(module, "data_format", "channels_last") == "channels_first" or "2d" in type(module).__name__:
            return _Source(module, shape[0], 2)
        return _Source(module, shape[0], None, shape)
    if isinstance(module, modules.DivisiveNormFeatures):
        return _Source(module, module.num_features, None, (module.num_features,))
    if isinstance(module, _ChannelsLast) and (inner := _source(module.layer)) is not None:
        return _Source(module.layer, inner.size, None, (inner.size,))
    return None


def _split(name: str) -> tuple[str, dict[str, Any]]:
    """The family that a name is of, and the options of its suffix."""
    for suffix in ("*", "-s"):
        if name.endswith(suffix) and name.removesuffix(suffix) in NAMES[:-2]:
            return name.removesuffix(suffix), SUFFIXES[suffix]
    if name not in NAMES:
        expected = ", ".join(map(repr, NAMES))
        raise ValueError(
            f'to: got {name!r}, expected a class, a partial, or one of {expected}; "-s" and "*" may follow'
        )
    return name, SUFFIXES[""]


def _named(family: str, source: _Source) -> Callable[..., nn.Module]:
    """The layer of a family that takes the place of ``source``, to be called with options alone."""
    if family == "none":
        return lambda **_: nn.Identity()
    shape = tuple(getattr(source.module, "normalized_shape", ()))
    if len(shape) > 1 and family in ("ln", "rms"):  # a weight for every element, which no norm over channels has
        return partial(modules.LayerNorm if family == "ln" else modules.RMSNorm, shape)
    if source.dims is not None and source.dims > len(_DIVISIVE):
        raise ValueError(f"to: got {family!r} for a layer over {shape}, expected 'ln' or 'rms' for so many dimensions")
    if source.shape is not None:
        trailing: dict[str, Callable[..., nn.Module]] = {
            "ln": partial(modules.LayerNorm, source.shape),
            "rms": partial(modules.RMSNorm, source.shape),
            "dn": partial(modules.DivisiveNormFeatures, source.size),
            "dn-mean-only": partial(modules.DivisiveNormFeatures, source.size, norm_window=None),
            "bn": lambda **options: _ChannelsLast(_AnyBatchNorm(source.size, **options)),
        }
        if family not in trailing:
            names = ", ".join(map(repr, trailing))
            raise ValueError(f"to: got {family!r} for a layer over the last dimension, expected one of {names}")
        return trailing[family]
    at = source.dims - 1
    if source.dims == 1 and family.startswith("dn") and isinstance(source.module, _BATCH[0] | nn.BatchNorm1d):
        # over (N, C) as well as (N, C, L): the features of a dense layer, as in the paper
        return partial(modules.DivisiveNormFeatures, source.size, **_mean_only(family))
    if family == "rms":
        return partial(_DIVISIVE[at], source.size, None, "all", eps=source.eps)
    return {
        "bn": partial(_BATCH[at], source.size),
        "ln": partial(modules.GroupNorm, 1, source.size),
        "gn": partial(_group_norm, source.size),
        "in": partial(_INSTANCE[at], source.size, affine=True),
    }.get(family) or partial(_DIVISIVE[at], source.size, **_mean_only(family))


def _mean_only(family: str) -> dict[str, Any]:
    return {"norm_window": None} if family == "dn-mean-only" else {}


def _group_norm(num_channels: int, num_groups: int | None = None, **options: Any) -> nn.Module:
    """By default 32 groups, or the largest number below that divides the channels."""
    groups = num_groups or next(n for n in range(min(32, num_channels), 0, -1) if num_channels % n == 0)
    return modules.GroupNorm(groups, num_channels, **options)


class _AnyBatchNorm(modules.BatchNorm2d):
    """Batch normalization of x with its channels second and any number of dimensions behind them."""

    _dims = (2, 3, 4, 5)


def _wanted(only: Only, name: str, module: nn.Module) -> bool:
    if only is None:
        return True
    if isinstance(only, str):
        return fnmatch.fnmatchcase(name, only)
    if isinstance(only, type | tuple):
        return isinstance(module, only)
    return only(name, module)


def _carry(source: nn.Module, layer: nn.Module) -> None:
    """Weight, bias, running statistics, processes and training mode of ``source`` into ``layer``."""
    own = dict(layer.named_parameters()) | dict(layer.named_buffers())
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        value = getattr(source, name, None)
        target = next((t for key, t in own.items() if key.rsplit(".", 1)[-1] == name), None)
        if value is None or target is None or value.numel() != target.numel():
            continue
        if not target.is_meta:
            with torch.no_grad():
                target.copy_(value.reshape(target.shape))
        if isinstance(target, nn.Parameter):
            target.requires_grad_(value.requires_grad)
    if isinstance(source, nn.SyncBatchNorm) or getattr(source, "sync", False):
        modules.convert_sync(layer, source.process_group)
    layer.train(source.training)


def _replacement(source: _Source, to: Target, options: dict[str, Any]) -> nn.Module:
    old = source.module
    like = next(
        (t for t in (*old.parameters(recurse=False), *old.buffers(recurse=False)) if t.is_floating_point()), None
    )
    factory = {} if like is None else {"device": like.device, "dtype": like.dtype}
    if isinstance(to, str):
        family, variant = _split(to)
        make = _named(family, source)
        known = {**variant, **options}
        if family in ("bn", "ln", "gn", "in") and not {"sigma", "eps"} & known.keys() and source.eps is not None:
            known["eps"] = source.eps
        layer = make(**known, **factory)
    else:
        layer = to(source.size, **options, **factory)
    _carry(old, layer)
    return layer


def convert_norm(
    model: nn.Module,
    to: Target,
    *,
    only: Only = None,
    inplace: bool = True,
    report: Callable[[str], None] | None = print,
    **options: Any,
) -> nn.Module:
    """Replaces the normalization layers of ``model``, torch.nn's and this package's, and says which.

    Weight, bias, running statistics, device, dtype, ``requires_grad``, training mode and statistics across processes
    are carried over, as far as the new layer has them; so is eps, where the new layer is of the batch, layer, group or
    instance family and neither sigma nor eps is given. A module that is used in several places is replaced by one.

    Args:
        model: any module; where it is a normalization layer itself, its replacement is returned.
        to: a class or a partial, called with the number of channels, ``device``, ``dtype`` and ``options``, or a name:
            "bn", "ln", "gn", "in", "rms", "dn", "dn-mean-only" or "none". "-s" behind it means sigma = 1, "*" sigma = 1
            and l1_weight = 0.01, the paper's variants. A name takes the form that fits the place: on images "ln" is
            normalization over (C, H, W), on the last dimension of tokens or features it is `LayerNorm`, and "dn" there
            `DivisiveNormFeatures`.
        only: which of them: a class or a tuple of classes, a pattern for names such as ``"layer1.*"``, or a function of
            name and module.
        inplace: whether the model itself is changed, or a copy.
        report: receives a line for every replaced layer; ``None`` for silence.
        options: for the new layers' constructor, such as ``window=5``, ``sigma=0.5``, ``affine=False``.

    Returns:
        The model, or the copy.

    Raises:
        ValueError: on an unknown name, or one that does not fit a layer.

    Example:
        >>> model = convert_norm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), "dn", window=5, sigma=0.5)
        1: BatchNorm2d -> DivisiveNorm2d(8, window=5, sigma=0.5)
    """
    if not (isinstance(to, str) or callable(to)):
        raise TypeError(f"to: got {to!r} of type {type(to).__name__}, expected a str, a class or a partial")
    if isinstance(to, str):
        _split(to)
    if not inplace:
        model = copy.deepcopy(model)
    made: dict[int, nn.Module] = {}

    def replace(name: str, module: nn.Module) -> nn.Module | None:
        source = _source(module)
        if source is None or not _wanted(only, name, module):
            return None
        if id(module) not in made:
            made[id(module)] = _replacement(source, to, options)
            if report is not None:
                report(f"{name or 'model'}: {type(source.module).__name__} -> {_described(made[id(module)])}")
        return made[id(module)]

    whole = replace("", model)
    if whole is not None:
        return whole
    for prefix, parent in list(model.named_modules()):
        if isinstance(parent, _ChannelsLast):  # a source itself
            continue
        for child_name, child in list(parent._modules.items()):
            new = None if child is None else replace(f"{prefix}.{child_name}".lstrip("."), child)
            if new is not None:
                parent._modules[child_name] = new
    return model


def _described(layer: nn.Module) -> str:
    inner = layer.layer if isinstance(layer, _ChannelsLast) else layer
    name = "BatchNorm over the last dimension" if isinstance(inner, _AnyBatchNorm) else type(inner).__name__
    return f"{name}({inner.extra_repr()})" if isinstance(inner, NormalizationLayer) else name
