"""Local response normalization, torch's into this package's: it has no number of channels, as other layers have."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..modules import LocalResponseNorm
from .carry import share_hooks
from .sources import untouchable
from .targets import LOCAL_RESPONSE


def local_response(module: nn.Module, options: dict[str, Any], like: Tensor | None) -> LocalResponseNorm | str:
    """The layer in place of a module, or why that is to be left as it is.

    What it learns is of the dtype of ``like`` and beside it.
    """
    ours = isinstance(module, LocalResponseNorm)
    if type(module) not in (nn.LocalResponseNorm, LocalResponseNorm):
        return f"is no LocalResponseNorm, which {LOCAL_RESPONSE!r} is for"
    reason = untouchable(module)
    if reason is not None:
        return reason
    scalars = {name: getattr(module, name) for name in ("alpha", "beta", "k")}
    learned = {name: value for name, value in scalars.items() if isinstance(value, nn.Parameter)}
    given = {"size": module.size, **scalars, **{name: value.item() for name, value in learned.items()}}
    if ours:
        given |= {"learnable": module.learnable, "backend": module.backend}
    try:
        LocalResponseNorm(**given)
    except (TypeError, ValueError) as error:
        return f"is none that kernels compute ({error})"
    factory = {} if like is None else {"device": like.device, "dtype": like.dtype}
    layer = LocalResponseNorm(**factory | given | options)
    for name in learned.keys() - options.keys() if layer.learnable else ():
        setattr(layer, name, learned[name])
        layer.initial[name] = module.initial[name]
    layer.training = module.training
    share_hooks(module, layer)
    return layer
