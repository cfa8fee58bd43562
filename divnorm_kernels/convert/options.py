"""Which options of a layer the one that takes its place is made with, and which find no place in it."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ..modules import FilterResponseNorm2d, LocalContrastNorm2d, NormalizationLayer
from ..modules.base import EPS
from .sources import Source
from .targets import Target, overruled, takes

_BY_EPS = {"bn", "frozen", "in", "gn", "ln", "rms"}
"""Families whose eps keeps from dividing by zero, and means the same in all of them."""
_FIELDS = {"window", "norm_window", "groups", "edges"}
_TRACKED = {"bn": True, "in": False}
"""The families with running statistics, and whether torch.nn's layers keep them unless told otherwise."""


def options(source: Source, target: Target) -> dict[str, Any]:
    """What the new layer is made with: what was asked for, else what the old one has, else what the place asks for."""
    if target.layer is None:
        return _of_evonorm(source, target) | target.explicit
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
        if old.activation is None and target.family == "frn" and source.kind != "frn":
            del kept["activation"]  # its threshold is part of what it is
        kept |= {name: getattr(old, name) for name in ("k", "learn_eps") if hasattr(old, name)}
        if target.family != "bn":  # of whose kinds these make one another
            kept |= {name: getattr(old, name) for name in {"p", "subtract_mean"} - old._settled.keys()}
    if source.kind == target.family == "frn" and old.learn_eps and "eps" not in target.explicit:
        kept["eps"] = old.initial_eps
    elif (
        fields
        or source.kind == target.family == "frn"
        or {source.kind, target.family} <= _BY_EPS
        or kept.get("learn_sigma")
    ):
        kept |= _sigma(source, target.explicit, (target.place | kept | target.explicit).get("p", 2))
    kept = {name: value for name, value in kept.items() if name in taken}
    return overruled(overruled(target.place, kept), target.explicit)


def _of_evonorm(source: Source, target: Target) -> dict[str, Any]:
    """What EvoNorm has of the old layer's options."""
    old, kept = source.module, {}
    if target.family == "evo-b0" and source.kind == "bn" and old.momentum is not None:
        kept["momentum"] = old.momentum
    if target.family == "evo-s0":
        if source.kind == "gn":
            kept["groups"] = old.num_groups
        if source.kind in _BY_EPS:
            for name, value in _sigma(source, {}, 2).items():
                kept["eps"] = value**2 if name == "sigma" else value
        if source.ours:
            kept["backend"] = old.backend
    return kept


def _sigma(source: Source, asked: dict[str, Any], p: float) -> dict[str, float]:
    """Sigma or eps of the old layer as the new one's option; nothing where it goes by the dtype.

    Of layers with different ``p`` it is eps that stays, what is added under the root.
    """
    if not source.ours:
        return {} if source.eps is None else {"eps": source.eps}
    old = source.module
    sigma = old.initial_sigma if old.learn_sigma else old.sigma
    if old.learn_sigma and asked.get("learn_sigma") is False and not old.sigma.is_meta:
        sigma = old.sigma.item()  # fixed at what was learned
    if sigma is not None and p != old.p and source.kind in _BY_EPS:
        return {"eps": sigma**old.norm.root}
    return {} if sigma is None else {"sigma": sigma}


def _fields(source: Source, target: Target) -> dict[str, Any]:
    """Windows of a layer, for one that has windows too and in the same dimensions."""
    old, family = source.module, target.family
    named = family in ("dn", "dn-mean-only") and source.kind == "dn"
    if not (hasattr(old, "window") and (named or family == "windows")):
        return {}
    if (source.shape is None) != ("num_channels" in target.place):
        return {}
    names = {name for name in _FIELDS & takes(target.layer) if hasattr(old, name)}
    if isinstance(old, LocalContrastNorm2d):
        names -= {"groups"}  # which its class sets
    if family == "dn-mean-only" or (family == "dn" and old.norm_window is None):
        names -= {"norm_window"}  # which the name sets
    return {name: getattr(old, name) for name in names}


def missing(source: Source, target: Target, layer: nn.Module) -> list[str]:
    """What ``source`` has beside its fields that is not its default, was not overruled, and ``layer`` has not."""
    if target.family == "none":
        return []
    old, asked = source.module, target.explicit
    names = []
    for name, option in (
        ("weight", {"affine", "elementwise_affine"}),
        ("bias", {"affine", "elementwise_affine", "bias"}),
    ):
        if option & asked.keys():
            continue
        value, owner = getattr(old, name, None), owner_of(layer, name)
        if value is not None and (owner is None or owner._parameters[name].numel() != value.numel()):
            names.append(name)
        elif value is None and owner is not None:
            names.append("affine=False" if name == "weight" else "bias=False")
    if not {"sigma", "eps"} & asked.keys():
        names += _missing_sigma(source, layer)
    defaults: dict[str, Any] = {}
    if source.kind in _TRACKED and hasattr(old, "track_running_stats"):
        defaults["track_running_stats"] = _TRACKED[source.kind]
        if old.track_running_stats:
            defaults["momentum"] = 0.1
    if source.ours:
        defaults |= {"l1_weight": 0.0, "learn_sigma": False, "backend": None, "learn_eps": False, "k": 10}
    nothing = object()
    for name, default in defaults.items():
        value = getattr(old, name, default)
        if value != default and name not in asked and getattr(layer, name, nothing) != value:
            names.append(f"{name}={value!r}")
    return names


def _missing_sigma(source: Source, layer: nn.Module) -> list[str]:
    default = {"rms": None, "dn": 1.0, "frn": FilterResponseNorm2d._default_eps}.get(source.kind, EPS)
    sigma = next(iter(_sigma(source, {}, source.module.p if source.ours else 2).items()), None)
    if sigma is None:
        return []
    name, value = sigma
    eps = abs(value) ** source.module.norm.root if name == "sigma" else value
    if isinstance(layer, NormalizationLayer):
        new = None if layer.initial_sigma is None else abs(layer.initial_sigma) ** layer.norm.root
    else:
        new = getattr(layer, "eps", None)
    same = [isinstance(other, float) and math.isclose(eps, other, rel_tol=2e-6) for other in (default, new)]
    return [] if any(same) else [f"{name}={value!r}"]


def owner_of(layer: nn.Module, name: str) -> nn.Module | None:
    """The module whose parameter ``name`` is that of ``layer``: itself, or one inside."""
    return next((module for module in layer.modules() if module._parameters.get(name) is not None), None)
