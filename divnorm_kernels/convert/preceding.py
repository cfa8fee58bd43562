"""The convolution or linear layer before a norm, for models that normalize by weights or not at all."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import compute_dtype
from ..modules.running import scaled
from ..norm import Norm
from ..weights import normalize
from . import courses
from .carry import hooked
from .sources import Source, examine, looks_like_one

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


@dataclass(frozen=True)
class Preceding:
    """A layer whose output goes to one norm and nowhere else.

    Args:
        path: of the layer.
        layer: a convolution or a linear layer of torch.nn's.
        source: the norm.
    """

    path: str
    layer: nn.Module
    source: Source

    @property
    def kind(self) -> str:
        """The name of the layer's class, which a parametrization changes."""
        return type(self.layer).__name__.removeprefix("Parametrized")

    @property
    def dim(self) -> int:
        """The dimension of the layer's weight in which the outputs lie."""
        return int(isinstance(self.layer, _TRANSPOSED))

    def missing(self, kind: str) -> list[str]:
        """What of the norm finds no place in weights that are normalized by ``kind``."""
        if not self.folds:
            return ["weight", "bias"]
        lost = kind == "sws" and not self.has_rows and getattr(self.source.module, "weight", None) is not None
        return ["weight"] if lost else []

    @property
    def has_rows(self) -> bool:
        """Whether each output has a row of the weight: groups of a transposed convolution share theirs."""
        return self.layer.weight.shape[self.dim] == self.source.size

    @property
    def folds(self) -> bool:
        """Whether the norm in eval mode, by running statistics or what it multiplies and adds, is a map a channel."""
        weights = [getattr(self.source.module, name, None) for name in ("weight", "bias")]
        return all(t is None or t.shape == (self.source.size,) for t in weights)


def preceding(model: nn.Module) -> dict[nn.Module, Preceding]:
    """What precedes each norm of ``model``, by the norm, where `torch.fx` shows it as for fused layers.

    Of norms and layers that are in one place each, with weights of their own, which no code around them reads, and
    without hooks. A linear layer is taken to give (N, C) to a norm of channels: nothing shows that it gives (N, C, L),
    where L = C lets the norm pass and its map is along another dimension.
    """
    times = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    called, read = cache(courses.called), cache(courses.read)

    def alone(module: nn.Module | None) -> bool:
        if module is None or times[id(module)] > 1 or hooked(module) or "forward" in vars(module):
            return False
        return all(owners[id(p)] == 1 for p in module._parameters.values() if p is not None)

    found = {}
    for path, module in model.named_modules():
        children = module._modules
        norms = {name for name, child in children.items() if alone(child) and looks_like_one(child)}
        layers = {name for name, child in children.items() if alone(child) and _is_layer(child)}
        if not (norms and layers) or "forward" in vars(module):
            continue
        pairs = courses.followers(module)
        elsewhere = set()
        if pairs:
            around = (courses.called_from_around(model, path, uses) for uses in (called, read))
            elsewhere = read(module).union(*around)
        for norm, names in pairs.items():
            if norm not in norms or len(names) != 1 or names[0] not in layers or elsewhere & {norm, *names}:
                continue
            source, layer = examine(children[norm]), children[names[0]]
            if isinstance(source, Source) and _fits(layer, source):
                found[source.module] = Preceding(f"{path}.{names[0]}".lstrip("."), layer, source)
    return found


def has_state(norm: nn.Module) -> bool:
    """Whether there is more to a norm than what it divides by."""
    return any(True for own in (norm.parameters, norm.buffers) for _ in own(recurse=False))


def fold(before: Preceding) -> None:
    """Gives the layer what its norm does in eval mode: by running statistics where there are any, weight and bias.

    What a norm without running statistics divides by is lost. A layer without a bias takes the norm's own.
    """
    layer, dim = before.layer, before.dim
    wide = compute_dtype(layer.weight)
    with torch.no_grad():
        scale, shift = (t.to(wide) for t in _map(before.source, layer.weight))
        shape = [1] * layer.weight.dim()
        if dim == 1:  # the groups of a transposed convolution lie side by side in the first dimension
            groups = layer.weight.to(wide).unflatten(0, (layer.groups, -1))
            folded = (groups * scale.view(layer.groups, 1, -1, *shape[2:])).flatten(0, 1)
        else:
            folded = layer.weight.to(wide) * scale.view(-1, *shape[1:])
        layer.weight.copy_(folded)
        if layer.bias is not None:
            layer.bias.copy_(layer.bias.to(wide) * scale + shift)
            return
        layer.bias = _own_bias(before)
        layer.bias.copy_(shift)


def take_bias(before: Preceding) -> bool:
    """Gives a layer without a bias its norm's; whether there was one to give."""
    own = getattr(before.source.module, "bias", None)
    if before.layer.bias is not None or own is None or not before.folds:
        return False
    before.layer.bias = _own_bias(before)
    return True


def check_options(kind: str, options: dict[str, Any]) -> None:
    """Raises on options that weights cannot be normalized with."""
    normalize(nn.Linear(1, 1), kind, **options)


def normalize_weights(before: Preceding, kind: str, options: dict[str, Any]) -> None:
    """Parametrizes the layer's weights in place of its norm, which hands over what it multiplies by and adds."""
    layer, old = before.layer, before.source.module
    if kind == "wn" and before.folds and has_state(old):
        fold(before)
    normalize(layer, kind, before.dim, **options)
    if not before.folds or kind == "wn":
        return
    weight, gain = getattr(old, "weight", None), layer.parametrizations.weight.original0
    with torch.no_grad():
        if weight is not None and before.has_rows:
            gain.copy_(weight.view(gain.shape))
        if getattr(old, "bias", None) is not None:
            layer.bias = _own_bias(before)
            layer.bias.copy_(old.bias)


def _own_bias(before: Preceding) -> nn.Parameter:
    """The norm's bias, or one like it beside the layer's weight."""
    own, weight = getattr(before.source.module, "bias", None), before.layer.weight
    if isinstance(own, nn.Parameter) and (own.dtype, own.device) == (weight.dtype, weight.device):
        return own
    learns = any(p.requires_grad for p in before.layer.parameters())
    return nn.Parameter(weight.detach().new_zeros(before.source.size), requires_grad=learns)


def _map(source: Source, like: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and the shift of a norm in eval mode, each of shape (C,)."""
    old = source.module
    zeros = like.new_zeros(source.size, dtype=compute_dtype(like))
    weight, bias, mean, variance = (
        None if t is None else t.to(zeros)
        for t in (getattr(old, name, None) for name in ("weight", "bias", "running_mean", "running_var"))
    )
    scale = zeros + 1 if weight is None else weight
    if mean is None or variance is None:
        return scale, zeros if bias is None else bias
    norm = replace(old.norm, activation=None) if source.ours else Norm("all")
    sigma = old.sigma if source.ours else source.eps**0.5
    sigma = sigma.to(zeros) if isinstance(sigma, Tensor) else sigma
    scale = scaled(norm, zeros.new_ones(1, source.size), None, zeros, variance, weight, None, sigma, None)[0]
    shift = -mean * scale if norm.subtract_mean else zeros
    return scale, shift if bias is None else shift + bias


def _is_layer(module: nn.Module) -> bool:
    """Whether it is one by its very class: what a subclass does with its weight is not known."""
    return type(module) in (*_CONVOLUTIONS, nn.Linear)


def _fits(layer: nn.Module, source: Source) -> bool:
    """Whether the layer's outputs are what the norm normalizes."""
    if isinstance(layer, nn.Linear):
        return layer.out_features == source.size and source.dims in (None, 1)
    return layer.out_channels == source.size and (source.shape is None or len(source.shape) > 1)
