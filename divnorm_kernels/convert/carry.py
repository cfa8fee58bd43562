"""What a layer hands over to the one that takes its place: parameters, buffers, hooks, and what follows it."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _WrappedHook

from ..modules import NormalizationLayer, convert_sync
from ..modules.evonorm import EvoNorm2d, EvoNorm2dB0
from .options import missing, options, owner_of
from .sources import Source
from .targets import Target

_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith(("_hooks", "_with_kwargs", "_always_called")))


_MODULES = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "tlu": nn.ReLU,
}
"""Torch's, for a layer that fuses none; a ReLU is a thresholded linear unit of threshold 0."""


def replacement(source: Source, target: Target) -> tuple[nn.Module, list[str]]:
    """The new layer with everything that it can take over from the old one, and what it could not."""
    old, asked = source.module, target.explicit
    like = next(
        (t for t in (*old.parameters(recurse=False), *old.buffers(recurse=False)) if t.is_floating_point()), None
    )
    factory = {} if like is None else {"device": like.device, "dtype": like.dtype}
    layer = target.make(**factory | options(source, target))
    _hand_over(source, layer, asked)
    across = isinstance(old, nn.SyncBatchNorm) or getattr(old, "sync", False)
    if across:
        convert_sync(layer, old.process_group)
    for module in layer.modules():
        module.training = old.training
    absent = missing(source, target, layer)
    if across and isinstance(layer, EvoNorm2dB0):
        absent.append("statistics across processes")
    layer = _followed(layer, source, asked, absent)
    share_hooks(old, layer)
    return layer, absent


def _hand_over(source: Source, layer: nn.Module, asked: dict[str, Any]) -> None:
    """The very parameters where the new layer's are of the same kind, and the values of the buffers."""
    names = ["weight", "bias"]
    if source.ours and source.module.learn_sigma and isinstance(layer, NormalizationLayer):
        names += [] if {"sigma", "eps"} & asked.keys() else ["sigma"]
    if source.ours and isinstance(layer, NormalizationLayer):
        names += ["threshold"]
        if getattr(source.module, "learn_eps", False) and not {"sigma", "eps"} & asked.keys():
            names += ["eps"]
    for name in names:
        value, owner = getattr(source.module, name, None), owner_of(layer, name)
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


def _copy(own: torch.Tensor, value: torch.Tensor) -> None:
    if not (own.is_meta or value.is_meta):
        with torch.no_grad():
            own.copy_(value.reshape(own.shape))


def _followed(layer: nn.Module, source: Source, asked: dict[str, Any], absent: list[str]) -> nn.Module:
    """The new layer with what the old one applied behind the normalization; ``absent`` takes what of it is lost."""
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
    activation = _MODULES.get(source.module.activation) if source.ours else None
    if isinstance(layer, EvoNorm2d) and layer.activates:
        followers.pop("act", None)
    elif activation is not None:
        absent += ["threshold"] if source.module.activation == "tlu" else []
        followers = {"activation": activation(), **followers}
    if not followers:
        return layer
    norm = {} if isinstance(layer, nn.Identity) else {"norm": layer}
    outer = nn.Sequential(OrderedDict(norm | followers))
    outer.training = source.module.training
    return outer


def _is_plain_relu(module: nn.Module) -> bool:
    """Whether nobody could tell a fused ReLU from ``module``."""
    return type(module) is nn.ReLU and not hooked(module)


def hooked(module: nn.Module) -> bool:
    """Whether somebody looks at what ``module`` takes and gives."""
    return any(getattr(module, name) for name in _HOOKS)


def clear_hooks(module: nn.Module) -> None:
    """Takes all hooks off a module, such as those that a copy has come with."""
    for name in _HOOKS:
        getattr(module, name).clear()


def share_hooks(old: nn.Module, layer: nn.Module) -> None:
    """Gives ``layer`` the dictionaries themselves, from which the handles of the hooks remove them."""
    for name in _HOOKS:
        hooks = getattr(old, name)
        hooks.update(getattr(layer, name))
        setattr(layer, name, hooks)
        for hook in hooks.values():
            if isinstance(hook, _WrappedHook) and hook.with_module:
                hook.module = weakref.ref(layer)
    layer._is_full_backward_hook = old._is_full_backward_hook
