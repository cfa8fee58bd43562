"""Changing a model's normalization in one line."""

from __future__ import annotations

import copy
import fnmatch
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from ..checks import check_flag, check_module
from ..modules import ExponentialNorm, LocalResponseNorm, NormalizationLayer
from .carry import replacement
from .fast_paths import keep_off
from .fuse import closed, fused, opened
from .local_response import local_response
from .preceding import Preceding, check_options, normalize_weights, preceding
from .sources import examine, looks_like_one
from .targets import BY_WEIGHTS, LOCAL_RESPONSE, Wanted, split, target

Only = type[nn.Module] | tuple[type[nn.Module], ...] | str | Callable[[str, nn.Module], bool] | None


def convert_norm(
    model: nn.Module,
    to: Wanted,
    *,
    only: Only = None,
    inplace: bool = True,
    report: Callable[[str], None] | None = print,
    fuse: bool = False,
    **options: Any,
) -> nn.Module:
    """Replaces the normalization layers of ``model`` and says which; all that is not normalization stays as it is.

    The layers are torch.nn's, this package's, and those of other libraries that are called norms and turn out to
    compute one (timm's and torchvision's, transformers' RMSNorm); what follows the normalization in such a layer, an
    activation or a dropout, follows the new one. The very parameters go along, running statistics, hooks, device,
    dtype, training mode, statistics across processes, and every option that means the same in the new layer and was
    neither given nor is part of the name; the page on changing a model has the table. A module that is used in several
    places is replaced by one.

    A ``UserWarning`` names what looks like a normalization and is left as it is, with the reason; options that the new
    layer has no place for; and, where there was nothing to replace, the classes that were seen.

    Args:
        model: any module; where it is a normalization layer itself, its replacement is returned.
        to: a class or a partial, called with the number of channels, ``device``, ``dtype`` and ``options``, or a name:
            "bn", "l1bn" (of p=1), "vn" (`VarianceNorm2d`), "ln", "gn", "in", "frn" (`FilterResponseNorm2d`), "rms",
            "dn", "dn-mean-only", "evo-b0" and "evo-s0" (`EvoNorm2dB0`, `EvoNorm2dS0`), "dyt" (`DyT`), "derf" (`Derf`),
            "isru" (every number by itself, ``x / sqrt(sigma^2 + x^2)``), "lrn" (`LocalResponseNorm`, in place of
            torch.nn's alone) or "none". "-s" behind one of the first nine means sigma = 1, "*" sigma = 1 and
            l1_weight = 0.01, the paper's variants. A name takes the form that fits the place: on images "ln" is
            normalization over (C, H, W), on the last dimension of tokens or features it is `LayerNorm`, in place of a
            layer that normalizes every position of an image `PositionalNorm2d`, and "dn" on tokens or features is
            `DivisiveNormFeatures`. "wn" and "sws" drop the norm and normalize the weights before it, by weight norm and
            scaled weight standardization (`divnorm_kernels.weights.normalize`, which takes ``options``): those of a
            convolution or a linear layer whose output goes to the norm alone, as `torch.fx` shows it. For "wn" that
            layer first takes in what the norm does to a channel in eval mode, as for `to_snn`, so that a batch
            normalization in eval mode was the same function; for "sws" the norm's weight becomes the gain, and its bias
            the layer's.
        only: which of them: a class or a tuple of classes, a pattern for names such as ``"layer1.*"``, or a function of
            name and module.
        inplace: whether the model itself is changed, or a copy.
        report: receives a line for every replaced layer; ``None`` for silence.
        fuse: whether the new layers take in what follows them. A ReLU, SiLU or GELU module behind one, and behind it
            alone, by what `torch.fx` records of the module that calls both, whatever flags it has: `torch.nn.Identity`
            takes its place. In the ResNet blocks of torchvision, timm and transformers also the residual, where nothing
            stands between: such a block gets a subclass of its class. What is hooked, shared, a function in place of a
            module or called by code around stays; the page on changing a model says what cannot be seen. EvoNorm, an
            activation itself, takes the place of an activation module behind it.
        options: for the new layers' constructor, such as ``window=5``, ``sigma=0.5``, ``affine=False``, which EvoNorm,
            `DyT` and `Derf` have not.

    Returns:
        The model, or the copy.

    Raises:
        ValueError: on an unknown name, or one that does not fit a layer.
        TypeError: on an argument of another type, and on options that a constructor has not.

    Example:
        >>> model = convert_norm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), "dn", window=5, sigma=0.5)
        1: BatchNorm2d -> DivisiveNorm2d(8, window=5, sigma=0.5)
    """
    check_module("model", model)
    if not (isinstance(to, str) or callable(to)):
        raise TypeError(f"to: got {to!r} of type {type(to).__name__}, expected a str, a class or a partial")
    if isinstance(to, str):
        split(to)
        if to in BY_WEIGHTS:
            check_options(to, options)
    elif (to.func if isinstance(to, partial) else to) in (LocalResponseNorm, ExponentialNorm):
        raise ValueError(
            f"to: got {to!r}, which takes no number of channels, expected {LOCAL_RESPONSE!r} or a function"
        )
    check_flag("fuse", fuse)
    if not inplace:
        model = copy.deepcopy(model)
    unfused = opened(model)  # a class from elsewhere takes in nothing
    try:
        return _converted(model, to, only, report, fuse, options)
    finally:
        closed(unfused)


def _converted(
    model: nn.Module,
    to: Wanted,
    only: Only,
    report: Callable[[str], None] | None,
    fuse: bool,
    options: dict[str, Any],
) -> nn.Module:
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    made: dict[nn.Module, nn.Module] = {}
    left: dict[tuple[str, str], list[str]] = defaultdict(list)
    without: dict[tuple[str, str], list[str]] = defaultdict(list)
    layers = preceding(model) if to in BY_WEIGHTS else None

    def replace(name: str, module: nn.Module) -> nn.Module | None:
        if module in made:
            return made[module]
        if not (looks_like_one(module) and _wanted(only, name, module)):
            return None
        kind, path = type(module).__name__, name or "model"
        found = _new(module, to, options, like, layers)
        if isinstance(found, str):
            left[kind, found].append(path)
            return None
        layer, missing = found
        made[module] = layer
        if missing:
            without[f"{kind} -> {type(layer).__name__}", ", ".join(missing)].append(path)
        if report is not None:
            report(f"{path}: {kind} -> {_described(layer)}")
        return layer

    whole = replace("", model)
    places = []
    for prefix, parent in [] if whole is not None else list(model.named_modules()):
        for name, child in [] if parent in made else parent._modules.items():
            new = None if child is None else replace(f"{prefix}.{name}".lstrip("."), child)
            if new is not None:
                places.append((parent, name, new))
    before = [(parent, name, parent._modules[name]) for parent, name, _ in places]
    for parent, name, new in places:  # when all are made: an error leaves the model as it was
        parent._modules[name] = new
    if fuse:
        try:
            taken_in = fused(model if whole is None else whole, made.values())
        except BaseException:
            for parent, name, old in before:
                parent._modules[name] = old
            raise
        nothing = ["fuse: nothing behind the new layers that they could take in"] if made else []
        for line in (taken_in or nothing) if report is not None else ():
            report(line)
    for place in [layers[norm] for norm in made] if layers is not None else ():
        normalize_weights(place, to, options)
        if report is not None:
            report(f"{place.path}: {place.kind} by {to!r}")
    if whole is None:
        keep_off(model, made.values())
    for (kind, reason), paths in left.items():
        _warn(f"left as it is: {kind} ({', '.join(paths)}) {reason}")
    for (kinds, missing), paths in without.items():
        _warn(f"not carried over: {missing} of {kinds} ({', '.join(paths)})")
    if not made and not left:
        seen = sorted({type(module).__name__ for module in model.modules() if looks_like_one(module)})
        _warn(f"nothing to replace; modules that look like normalization: {', '.join(seen) or 'none'}")
    return model if whole is None else whole


def _new(
    module: nn.Module,
    to: Wanted,
    options: dict[str, Any],
    like: nn.Parameter | None,
    layers: dict[nn.Module, Preceding] | None,
) -> tuple[nn.Module, list[str]] | str:
    """What takes the place of a module, and what of its options that has no place for; or why it is to be left.

    With ``layers``, by the norms that they precede, these are to normalize their weights.
    """
    if to == LOCAL_RESPONSE:
        layer = local_response(module, options, like)
        return layer if isinstance(layer, str) else (layer, [])
    source = examine(module)
    if isinstance(source, str):
        return source
    wanted = target(source, to, options)
    if layers is not None and module not in layers:
        return "has no convolution or linear layer before it that could normalize its weights"
    if source.kind == "frozen" and wanted.moves_statistics:
        return "has statistics that never move"
    layer, missing = replacement(source, wanted)
    return layer, missing + ([] if layers is None else layers[module].missing(to))


def _wanted(only: Only, name: str, module: nn.Module) -> bool:
    if only is None:
        return True
    if isinstance(only, str):
        return fnmatch.fnmatchcase(name, only)
    if isinstance(only, type | tuple):
        return isinstance(module, only)
    return only(name, module)


def _described(layer: nn.Module) -> str:
    """A line of a report on a layer, with what follows it."""
    if isinstance(layer, nn.Sequential):
        return " and ".join(type(child).__name__ for child in layer)
    if isinstance(layer, LocalResponseNorm):
        return f"{type(layer).__name__}({layer.extra_repr()})"
    if not isinstance(layer, NormalizationLayer):
        return type(layer).__name__
    followers = [f" and {type(getattr(layer, name)).__name__}" for name in layer.followed_by]
    return f"{type(layer).__name__}({layer.extra_repr()}){''.join(followers)}"


def _warn(message: str) -> None:
    warnings.warn(f"convert_norm: {message}", UserWarning, stacklevel=3)
