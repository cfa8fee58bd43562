"""What goes along from a layer to the one that takes its place: options, parameters, buffers, hooks, followers."""

from __future__ import annotations

import math
import weakref
from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _WrappedHook

from ..modules import LocalContrastNorm2d, NormalizationLayer, convert_sync
from ..modules.base import EPS
from .sources import Source
from .targets import Target, overruled, takes

_BY_EPS = {"bn", "frozen", "in", "gn", "ln", "rms"}
"""Families whose eps keeps from dividing by zero, and means the same in all of them."""
_FIELDS = {"window", "norm_window", "groups", "edges"}
_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith(("_hooks", "_with_kwargs", "_always_called")))
_TRACKED = {"bn": True, "in": False}
"""The families with running statistics, and whether torch.nn's layers keep them unless told otherwise."""


def replacement(source: Source, target: Target) -> tuple[nn.Module, list[str]]:
    """The new layer with everything that it can take over from the old one, and what it could not."""
    old, asked = source.module, target.explicit
    like = next(
        (t for t in (*old.parameters(recurse=False), *old.buffers(recurse=False)) if t.is_floating_point()), None
    )
    factory = {} if like is None else {"device": like.device, "dtype": like.dtype}
    layer = target.make(**factory | _options(source, target))
    _hand_over(source, layer, asked)
    if isinstance(old, nn.SyncBatchNorm) or getattr(old, "sync", False):
        convert_sync(layer, old.process_group)
    for module in layer.modules():
        module.training = old.training
    missing = _missing(source, target, layer)
    layer = _followed(layer, source, asked)
    _share_hooks(old, layer)
    return layer, missing


def _options(source: Source, target: Target) -> dict[str, Any]:
    """What the new layer is made with: what was asked for, else what the old one has, else what the place asks for."""
    if target.layer is None:
        return target.explicit
    old, taken = source.module, takes(target.layer)
    has_weight, has_bias = (getattr(old, name, None) is not None for name in ("weight", "bias"))
    kept: dict[str, Any] = {name: has_weight for name in ("affine", "elementwise_affine")}
    if has_weight and not has_bias:
        kept["bias"] = False
    if source.kind == target.family and source.kind in _TRACKED:
        kept |= {name: getattr(old, name) for name in ("momentum", "track_running_stats") if hasattr(old, name)}
    if source.kind == target.family == "gn":
        kept["num_groups"] = old.num_groups
    fields = _fields(source, target)
    kept |= fields
    if source.ours:
        kept |= {name: getattr(old, name) for name in ("activation", "l1_weight", "learn_sigma", "backend")}
    if fields or {source.kind, target.family} <= _BY_EPS or kept.get("learn_sigma"):
        kept |= _sigma(source, target.explicit)
    kept = {name: value for name, value in kept.items() if name in taken}
    return overruled(overruled(target.place, kept), target.explicit)


def _sigma(source: Source, asked: dict[str, Any]) -> dict[str, float]:
    """Sigma or eps of the old layer as the new one's option; nothing where it goes by the dtype."""
    if not source.ours:
        return {} if source.eps is None else {"eps": source.eps}
    old = source.module
    sigma = old.initial_sigma if old.learn_sigma else old.sigma
    if old.learn_sigma and asked.get("learn_sigma") is False and not old.sigma.is_meta:
        sigma = old.sigma.item()  # fixed at what was learned
    return {} if sigma is None else {"sigma": sigma}


def _fields(source: Source, target: Target) -> dict[str, Any]:
    """Windows of a layer, for one that has windows too and in the same dimensions."""
    old, family = source.module, target.family
    named = family in ("dn", "dn-mean-only") and source.kind == "dn"
    if not (hasattr(old, "window") and (named or family == "windows")):
        return {}
    if (source.shape is None) != ("num_channels" in target.place):
        return {}
    names = _FIELDS & vars(old).keys() & takes(target.layer)
    if isinstance(old, LocalContrastNorm2d):
        names -= {"groups"}  # which its class sets
    if family == "dn-mean-only" or (family == "dn" and old.norm_window is None):
        names -= {"norm_window"}  # which the name sets
    return {name: getattr(old, name) for name in names}


def _hand_over(source: Source, layer: nn.Module, asked: dict[str, Any]) -> None:
    """The very parameters where the new layer's are of the same kind, and the values of the buffers."""
    names = ["weight", "bias"]
    if source.ours and source.module.learn_sigma and isinstance(layer, NormalizationLayer):
        names += [] if {"sigma", "eps"} & asked.keys() else ["sigma"]
    for name in names:
        value, owner = getattr(source.module, name, None), _owner(layer, name)
        if value is None or owner is None:
            continue
        own = owner._parameters[name]
        if not isinstance(value, nn.Parameter):
            value = nn.Parameter(value.detach().clone())  # a frozen layer's
        if (own.shape, own.dtype, own.device) == (value.shape, value.dtype, value.device):
            owner._parameters[name] = value
        elif own.numel() == value.numel():
            _copy(own, value)
            own.requires_grad_(value.requires_grad)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        value = source.module._buffers.get(name)
        owner = next((module for module in layer.modules() if module._buffers.get(name) is not None), None)
        if value is None or owner is None or owner._buffers[name].shape != value.shape:
            continue
        if {"device", "dtype"} & asked.keys():
            _copy(owner._buffers[name], value)
        else:
            owner._buffers[name] = value.clone()  # statistics may be of another dtype than the parameters


def _owner(layer: nn.Module, name: str) -> nn.Module | None:
    """The module whose parameter ``name`` is that of ``layer``: itself, or one inside."""
    return next((module for module in layer.modules() if module._parameters.get(name) is not None), None)


def _copy(own: torch.Tensor, value: torch.Tensor) -> None:
    if not (own.is_meta or value.is_meta):
        with torch.no_grad():
            own.copy_(value.reshape(own.shape))


def _followed(layer: nn.Module, source: Source, asked: dict[str, Any]) -> nn.Module:
    """The new layer with what the old one applied behind the normalization."""
    followers = source.followers
    if isinstance(layer, NormalizationLayer):
        if "activation" in asked:
            followers.pop("act", None)
        if layer.activation is None and followers.keys() == {"act"} and _is_plain_relu(followers["act"]):
            layer.activation = "relu"
            return layer
        for name, follower in followers.items():
            layer.add_module(name, follower)
        layer.followed_by = tuple(followers)
        return layer
    if source.ours and source.module.activation == "relu":
        followers = {"activation": nn.ReLU(), **followers}
    if not followers:
        return layer
    norm = {} if isinstance(layer, nn.Identity) else {"norm": layer}
    outer = nn.Sequential(OrderedDict(norm | followers))
    outer.training = source.module.training
    return outer


def _is_plain_relu(module: nn.Module) -> bool:
    """Whether nobody could tell a fused ReLU from ``module``."""
    return type(module) is nn.ReLU and not any(getattr(module, name) for name in _HOOKS)


def _share_hooks(old: nn.Module, layer: nn.Module) -> None:
    """The dictionaries themselves, from which the handles of the hooks remove them."""
    for name in _HOOKS:
        hooks = getattr(old, name)
        hooks.update(getattr(layer, name))
        setattr(layer, name, hooks)
        for hook in hooks.values():
            if isinstance(hook, _WrappedHook) and hook.with_module:
                hook.module = weakref.ref(layer)
    layer._is_full_backward_hook = old._is_full_backward_hook


def _missing(source: Source, target: Target, layer: nn.Module) -> list[str]:
    """What ``source`` has beside its fields that is not its default, was not overruled, and ``layer`` has not."""
    if target.family == "none":
        return []
    old, asked = source.module, target.explicit
    missing = []
    for name, option in (
        ("weight", {"affine", "elementwise_affine"}),
        ("bias", {"affine", "elementwise_affine", "bias"}),
    ):
        if option & asked.keys():
            continue
        value, owner = getattr(old, name, None), _owner(layer, name)
        if value is not None and (owner is None or owner._parameters[name].numel() != value.numel()):
            missing.append(name)
        elif value is None and owner is not None:
            missing.append("affine=False" if name == "weight" else "bias=False")
    if not {"sigma", "eps"} & asked.keys():
        missing += _missing_sigma(source, layer)
    options: dict[str, Any] = {}
    if source.kind in _TRACKED and hasattr(old, "track_running_stats"):
        options["track_running_stats"] = _TRACKED[source.kind]
        if old.track_running_stats:
            options["momentum"] = 0.1
    if source.ours:
        options |= {"l1_weight": 0.0, "learn_sigma": False, "backend": None}
    nothing = object()
    for name, default in options.items():
        value = getattr(old, name, default)
        if value != default and name not in asked and getattr(layer, name, nothing) != value:
            missing.append(f"{name}={value!r}")
    return missing


def _missing_sigma(source: Source, layer: nn.Module) -> list[str]:
    default = {"rms": None, "dn": 1.0}.get(source.kind, EPS**0.5)
    sigma = next(iter(_sigma(source, {}).items()), None)
    if sigma is None:
        return []
    name, value = sigma
    root = value if name == "sigma" else value**0.5
    if isinstance(layer, NormalizationLayer):
        new = layer.initial_sigma
    else:
        eps = getattr(layer, "eps", None)
        new = eps**0.5 if isinstance(eps, float) else None
    same = [other is not None and math.isclose(root, other, rel_tol=1e-6) for other in (default, new)]
    return [] if any(same) else [f"{name}={value!r}"]
