"""Puts parametrizations on the weights of layers, and takes them off again for inference."""

from __future__ import annotations

import math
from typing import Literal

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, parametrize

from ..checks import DTYPES, check_at_least_zero, check_flag, check_module, check_number
from ..modules.pointwise import RELU_GAIN
from ..sharding import distributed
from .rows import BoundedWeightNorm, Rows, ScaledWeightStandardization, SharedBound, WeightNorm, WeightStandardization

Kind = Literal["wn", "bwn", "ws", "sws"]

_OPTIONS: dict[str, set[str]] = {"wn": set(), "bwn": {"p", "shared"}, "ws": {"eps"}, "sws": {"eps", "gamma"}}


def normalize(
    module: nn.Module,
    kind: Kind,
    dim: int | None = 0,
    *,
    name: str = "weight",
    p: float | None = None,
    shared: bool | None = None,
    eps: float | None = None,
    gamma: float | Literal["relu"] | None = None,
) -> nn.Module:
    """Parametrizes a weight of ``module`` by rows of a known norm, ``w_i = gain_i c_i / norm(c_i)``, and returns it.

    A row is what the weight holds at one index of ``dim``; v, which is learned in its place, has its shape, and g one
    number a row.

    ============= ============================================ ============================== =======================
    kind          row i of the weight                          keys of ``parametrizations``   source
    ============= ============================================ ============================== =======================
    "wn"          g_i v_i / norm(v_i)                          original0 (g), original1 (v)   Salimans & Kingma, 2016
    "bwn"         rho g_i / norm(g) v_i / norm_p(v_i)          original0, original1, 0.rho    Hoffer et al., 2018
    "bwn", shared rho v_i / norm_p(v_i)                        original (v), 0.rho            Hoffer et al., 2018
    "ws"          (v_i - mean) / sqrt(var + eps)               original                       Qiao et al., 2019
    "sws"         gamma g_i (v_i - mean) / sqrt(n (var + eps)) original0, original1           Brock et al., 2021
    ============= ============================================ ============================== =======================

    mean and biased var are of the n elements of the row. "wn" and "bwn" start from the weight as it is, but for its
    dtype's rounding: g are the norms of its rows and rho, the bound, is the norm of g; shared, rho is the average of g,
    and all rows have this norm. The g of "sws" start from 1. "wn" has the keys of
    `torch.nn.utils.parametrizations.weight_norm`, older ones too: checkpoints load both ways. Assigning to the weight
    starts anew.

    Sums of half types are taken in float32, and the weight has v's dtype. A row of zeros stays zeros, where torch's
    has NaN, and its gradient is taken as if its norm were 1; a constant row is one of zeros for "ws" and "sws", its
    deviation sqrt(eps). The gradient of p = inf is divided evenly among the largest.

    "ws" and the shared bound keep the parameter that an optimizer may hold. The others have new ones: make the
    optimizer afterwards. `fully_shard` comes afterwards too.

    Args:
        module: any layer with a weight of two dimensions or more: Linear, Embedding, convolutions, recurrent ones.
        kind: which, by the table.
        dim: 0, the output channels of most layers; 1 for those of transposed convolutions; ``None``: all is one row.
        name: of the parameter.
        p: of "bwn": 1, 2 (the default) or ``math.inf``.
        shared: of "bwn": one norm for all rows.
        eps: of "ws" and "sws": 1e-6 by default.
        gamma: of "sws": the gain of the activation in front, 1 by default; "relu": sqrt(2 pi / (pi - 1)).

    Raises:
        TypeError: on a module, option or dtype that is none.
        ValueError: on kinds and options that do not exist or do not go together, and on weights without rows.

    Example:
        >>> for layer in [m for m in model.modules() if isinstance(m, nn.Conv2d)]:
        ...     _ = normalize(layer, "ws")
    """
    check_module("module", module)
    if not isinstance(kind, str) or kind not in _OPTIONS:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(map(repr, _OPTIONS))}")
    for option, value in {"p": p, "shared": shared, "eps": eps, "gamma": gamma}.items():
        if value is not None and option not in _OPTIONS[kind]:
            raise ValueError(f"{option}: got {value!r} for {kind!r}, which has no such option")
    _check_weight(module, name, dim)
    rows = _rows(kind, dim, p, shared, eps, gamma)
    if kind == "wn":  # torch's own way in also reads the older keys weight_g and weight_v
        parametrizations.weight_norm(module, name, dim)
        module.parametrizations[name][0] = rows.train(module.training)
        return module
    return parametrize.register_parametrization(module, name, rows)


def _rows(
    kind: Kind, dim: int | None, p: float | None, shared: bool | None, eps: float | None, gamma: float | str | None
) -> Rows:
    if kind == "wn":
        return WeightNorm(dim)
    if kind == "bwn":
        p, shared = 2 if p is None else p, False if shared is None else shared
        if p not in (1, 2, math.inf):
            raise ValueError(f"p: got {p!r}, expected 1, 2 or math.inf")
        check_flag("shared", shared)
        if dim is None and not shared:
            raise ValueError("dim: got None, expected a dimension or shared=True: a single gain would change nothing")
        return SharedBound(dim, p) if shared else BoundedWeightNorm(dim, p)
    eps = 1e-6 if eps is None else eps
    check_at_least_zero("eps", eps, "a number")
    if kind == "ws":
        return WeightStandardization(dim, eps)
    if gamma is None:
        gamma = 1.0
    elif isinstance(gamma, str) and gamma == "relu":
        gamma = RELU_GAIN
    check_number("gamma", gamma, 'a number or "relu"')
    return ScaledWeightStandardization(dim, eps, gamma)


def _check_weight(module: nn.Module, name: str, dim: int | None) -> None:
    if parametrize.is_parametrized(module, name):
        raise ValueError(f"module: got one whose {name!r} is parametrized already, expected a plain parameter")
    weight = module._parameters.get(name)
    if weight is None:
        raise ValueError(f"name: got {name!r}, expected a parameter of {type(module).__name__}")
    if is_lazy(weight):
        raise ValueError(f"module: got a {type(module).__name__} without a size yet; run the model once")
    if distributed(weight):
        raise ValueError(f"module: got one whose {name!r} is a DTensor; shard it afterwards")
    if weight.dtype not in DTYPES:
        raise TypeError(f"module: got {name!r} of {weight.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if weight.dim() < 2 or weight.numel() == 0:
        raise ValueError(f"module: got {name!r} of shape {tuple(weight.shape)}, expected two dimensions or more")
    if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int)):
        raise TypeError(f"dim: got {dim!r} of type {type(dim).__name__}, expected an int or None")
    if dim is not None and not 0 <= dim < weight.dim():
        raise ValueError(f"dim: got {dim}, expected None or 0 to {weight.dim() - 1} for {tuple(weight.shape)}")


def fold(model: nn.Module) -> nn.Module:
    """Replaces every parametrized tensor of ``model`` by its value, in place, and returns the model: for inference.

    What `torch.nn.utils.parametrize.remove_parametrizations` leaves with ``leave_parametrized=True``, of any
    parametrization; but a copy (`copy.deepcopy`) is folded without harm to the original, what was a parameter stays
    one where it does not require a gradient, and it is a new one: what was learned in its place may be tied to another
    weight. Keys, shapes and dtypes are those of the model before it was parametrized.

    Raises:
        TypeError: on what is no module.
        ValueError: where what was learned is a DTensor: fold before `fully_shard`.
    """
    check_module("model", model)
    modules = [(path, module) for path, module in model.named_modules() if parametrize.is_parametrized(module)]
    for path, module in modules:
        if any(distributed(p) for p in module.parametrizations.parameters()):
            raise ValueError(
                f"model: got DTensors in {path or 'model'}, expected plain ones; fold before `fully_shard`"
            )
    for _, module in modules:
        _fold(module)
    return model


def _fold(module: nn.Module) -> None:
    cls = type(module)
    module.__class__ = type(cls.__name__, cls.__bases__, dict(vars(cls)))  # a copy shares it, with its properties
    for name, originals in list(module.parametrizations.items()):
        is_parameter = any(True for _ in originals.parameters(recurse=False))
        if originals.is_tensor and is_parameter:  # torch writes the value into the very tensor
            originals.original = nn.Parameter(originals.original.detach().clone(), originals.original.requires_grad)
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        if is_parameter and name in module._buffers:
            value = module._buffers.pop(name)
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))
