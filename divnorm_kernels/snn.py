"""Self-normalizing networks, from networks with norms."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin

from .checks import check_flag, check_module
from .convert import convert_norm
from .convert.carry import share_hooks
from .convert.fuse import opened
from .convert.preceding import fold, has_state, preceding, take_bias
from .convert.sources import Source, examine, looks_like_one

Report = Callable[[str], None]

_EXCHANGED: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    nn.ReLU: lambda old: nn.SELU(old.inplace),
    nn.Dropout: lambda old: nn.AlphaDropout(old.p, old.inplace),
    **{
        kind: lambda old: nn.FeatureAlphaDropout(old.p, old.inplace)
        for kind in (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
    },
}


def to_snn(model: nn.Module, *, init: bool = False, inplace: bool = True, report: Report | None = print) -> nn.Module:
    """Makes a self-normalizing network of ``model``: no norms, SELU and alpha dropout, all of them torch.nn's.

    Norms are dropped as `divnorm_kernels.convert_norm` drops them. Where one follows a convolution or a linear layer,
    and follows it alone, as `torch.fx` shows it, that layer takes in what the norm does to a channel in eval mode: the
    running statistics where the norm has them, weight and bias; of a linear layer as for (N, C). In eval mode the layer
    then gives what it gave together with a batch normalization; what other norms divide by is lost. A layer without a
    bias takes the norm's own, and a ``UserWarning`` names norms whose parameters find no place. `torch.nn.ReLU` (also
    one that a norm has fused) becomes `torch.nn.SELU`, `torch.nn.Dropout` `torch.nn.AlphaDropout`, and those of whole
    channels `torch.nn.FeatureAlphaDropout`, with p as it was: the paper's is 0.05 to 0.1. What a ``forward`` calls as a
    function stays. Source: Klambauer et al., "Self-Normalizing Neural Networks", NIPS 2017.

    Args:
        model: any module.
        init: draws the weights of all convolutions and linear layers anew, LeCun normal, and sets their biases to zero,
            so that norms leave nothing but a bias to layers that have none; a ``UserWarning`` names layers whose
            weights are parametrized, which stay as they are. Without it activations have mean 0 and variance 1 only
            where the weights happen to have such norms.
        inplace: whether the model itself is changed, or a copy.
        report: receives a line for every change; ``None`` for silence.

    Returns:
        The model, or the copy.

    Raises:
        TypeError: on a bad argument.
        ValueError: on a lazy layer that has not run.

    Example:
        >>> model = to_snn(nn.Sequential(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU()))
        0: with what 1 does to a channel
        1: BatchNorm1d -> Identity
        2: ReLU -> SELU
    """
    check_module("model", model)
    check_flag("init", init)
    check_flag("inplace", inplace)
    for path, module in model.named_modules():
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
            raise ValueError(f"model: got {type(module).__name__} ({path or 'model'}), expected it to have run once")
    if not inplace:
        model = copy.deepcopy(model)
    say = report or (lambda line: None)
    opened(model)  # a fused block would call what takes the place of its norm with two tensors
    model = _without_norms(model, init, say)
    model = _exchanged(model, say)
    if init:
        _initialize(model)
    return model


def _without_norms(model: nn.Module, init: bool, say: Report) -> nn.Module:
    before, lost = preceding(model), []
    found = [(path, module) for path, module in model.named_modules() if looks_like_one(module)]
    for path, module in found:
        if not isinstance(examine(module), Source):
            continue  # which stays
        layer = before.get(module)
        if init:
            if layer is not None and take_bias(layer):
                say(f"{layer.path}: with the bias of {path}")
        elif has_state(module):
            if layer is not None and layer.folds:
                fold(layer)
                say(f"{layer.path}: with what {path} does to a channel")
            else:
                lost.append(path or "model")
    if lost:
        warnings.warn(f"to_snn: lost what these do to a channel: {', '.join(lost)}", UserWarning, stacklevel=3)
    return convert_norm(model, "none", report=say) if found else model


def _exchanged(model: nn.Module, say: Report) -> nn.Module:
    made: dict[nn.Module, nn.Module] = {}

    def new(path: str, old: nn.Module) -> nn.Module:
        if type(old) not in _EXCHANGED or "forward" in vars(old):
            return old
        if old not in made:
            made[old] = _EXCHANGED[type(old)](old).train(old.training)
            share_hooks(old, made[old])
            say(f"{path or 'model'}: {type(old).__name__} -> {type(made[old]).__name__}")
        return made[old]

    for path, parent in list(model.named_modules()):
        for name, child in parent._modules.items():
            if child is not None:
                parent._modules[name] = new(f"{path}.{name}".lstrip("."), child)
    return new("", model)


def _initialize(model: nn.Module) -> None:
    kept = []
    for path, layer in model.named_modules():
        if not isinstance(layer, _ConvNd | nn.Linear):
            continue
        if "weight" not in layer._parameters:  # parametrized, by hooks of torch's older functions too
            kept.append(path or "model")
            continue
        if isinstance(layer, _ConvTransposeNd):  # whose weight has the inputs of all groups first
            for group in layer.weight.detach().chunk(layer.groups):
                nn.init.kaiming_normal_(group, mode="fan_out", nonlinearity="linear")
        else:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    if kept:
        warnings.warn(f"to_snn: not initialized, for parametrized: {', '.join(kept)}", UserWarning, stacklevel=3)
