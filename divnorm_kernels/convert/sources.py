"""What a module of a model normalizes: by its class, or by what its forward computes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from .. import modules
from ..modules import NormalizationLayer
from .forms import (
    AnyBatchNorm,
    AnyFilterResponseNorm,
    BatchedInstanceNorm,
    DenseChannelNorm,
    DenseDivisiveNorm,
    LastBatchNorm,
)
from .probing import FOLLOWERS, STATE, recognized

_KINDS: dict[type[nn.Module], tuple[str, int | None]] = {
    nn.BatchNorm1d: ("bn", 1),
    nn.BatchNorm2d: ("bn", 2),
    nn.BatchNorm3d: ("bn", 3),
    nn.SyncBatchNorm: ("bn", None),
    nn.InstanceNorm1d: ("in", 1),
    nn.InstanceNorm2d: ("in", 2),
    nn.InstanceNorm3d: ("in", 3),
    nn.GroupNorm: ("gn", None),
    nn.LayerNorm: ("ln", None),
    nn.RMSNorm: ("rms", None),
    modules.BatchNorm1d: ("bn", 1),
    modules.BatchNorm2d: ("bn", 2),
    modules.BatchNorm3d: ("bn", 3),
    AnyBatchNorm: ("bn", None),
    LastBatchNorm: ("bn", None),
    modules.InstanceNorm1d: ("in", 1),
    BatchedInstanceNorm: ("in", 1),
    modules.InstanceNorm2d: ("in", 2),
    modules.InstanceNorm3d: ("in", 3),
    modules.GroupNorm: ("gn", None),
    modules.LayerNorm: ("ln", None),
    modules.RMSNorm: ("rms", None),
    modules.PositionalNorm2d: ("ln", 2),
    modules.DivisiveNorm: ("dn", None),
    modules.DivisiveNorm1d: ("dn", 1),
    DenseDivisiveNorm: ("dn", 1),
    DenseChannelNorm: ("dn", 1),
    modules.DivisiveNorm2d: ("dn", 2),
    modules.DivisiveNorm3d: ("dn", 3),
    modules.LocalContrastNorm2d: ("dn", 2),
    modules.DivisiveNormFeatures: ("dn", None),
    modules.FilterResponseNorm1d: ("frn", 1),
    modules.FilterResponseNorm2d: ("frn", 2),
    modules.FilterResponseNorm3d: ("frn", 3),
    AnyFilterResponseNorm: ("frn", None),
}
"""The family of every known layer, and its spatial dimensions where they are known."""


_WAYS = ("__call__", "train", "_apply", "state_dict", "_save_to_state_dict", "get_extra_state", "set_extra_state")
"""Methods by which a module does more than its forward, or less than other modules do."""


@dataclass(frozen=True)
class Source:
    """A normalization layer of a model.

    Args:
        module: the layer.
        kind: its family, as the names of `divnorm_kernels.convert_norm` have it; "frozen" is batch normalization by
            statistics that never move.
        size: channels, or features.
        eps: of a layer that is not this package's; ``None`` for RMS normalization by the dtype's.
        dims: spatial dimensions behind the channels, where they are known.
        shape: of what is normalized at the end of x, where channels do not lie second.
        positions: whether every position is normalized by itself, over its channels.
    """

    module: nn.Module
    kind: str
    size: int
    eps: float | None = None
    dims: int | None = None
    shape: tuple[int, ...] | None = None
    positions: bool = False

    @property
    def ours(self) -> bool:
        """Whether the layer has this package's options."""
        return isinstance(self.module, NormalizationLayer)

    @property
    def followers(self) -> dict[str, nn.Module]:
        """The modules that the layer applies behind the normalization, in their order."""
        names = self.module.followed_by if self.ours else FOLLOWERS
        children = {name: self.module._modules.get(name) for name in names}
        return {name: child for name, child in children.items() if not isinstance(child, nn.Identity | None)}


def looks_like_one(module: nn.Module) -> bool:
    """Whether a module is of a known class, or of another that is called a norm and is made as one."""
    if type(module).__module__.startswith("torch.nn.utils") and not is_parametrized(module):
        return False  # weight_norm's and spectral_norm's own modules
    if _known(module) is not None or isinstance(module, nn.LocalResponseNorm):
        return True
    if "norm" not in type(module).__name__.lower() or set(module._modules) - set(FOLLOWERS):
        return False
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return True
    weight = getattr(module, "weight", None)
    return weight is None or (isinstance(weight, Tensor) and weight.dim() == 1)


def examine(module: nn.Module) -> Source | str:
    """What a module that looks like a normalization layer is; or why it is to be left as it is."""
    reason = untouchable(module)
    if reason is not None:
        return reason
    known = _known(module)
    by_class = known is not None and _computes_as(module, known)
    # of other children its forward knows nothing, or nothing is known of what it does with them
    others = set(module._modules) - set(getattr(module, "followed_by", ()) if by_class else FOLLOWERS)
    if others:
        return f"has modules of its own, {_listed(others)}"
    if by_class:
        return _by_class(module, known)
    found = recognized(module)
    return "computes no normalization that has a name here" if found is None else Source(module, **found)


def _is_torchs(kind: type[nn.Module], name: str) -> bool:
    """Whether a method is `torch.nn.Module`'s."""
    return getattr(kind, name) is getattr(nn.Module, name)


def _known(module: nn.Module) -> type[nn.Module] | None:
    return next((base for base in type(module).__mro__ if base in _KINDS), None)


def untouchable(module: nn.Module) -> str | None:
    """What a new layer could not take over from ``module``, whatever it computes."""
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return "is lazy: run the model once first"
    if is_parametrized(module):
        return "is parametrized"
    if "forward" in vars(module):
        return "has a forward set on the instance"
    ways = {name for name in _WAYS if name in vars(module) or not _is_torchs(type(module), name)}
    if ways:
        return f"has methods of its own, {_listed(ways)}"
    own = (module._parameters.keys() | module._buffers.keys()) - STATE
    if isinstance(module, NormalizationLayer):
        own -= {"sigma", "threshold", "eps"}
    if isinstance(module, modules.LocalResponseNorm):
        own -= module.initial.keys()
    return f"has parameters or buffers of its own, {_listed(own)}" if own else None


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))


def _computes_as(module: nn.Module, known: type[nn.Module]) -> bool:
    """Whether a subclass left alone what ``known`` computes."""
    return all(getattr(type(module), name, None) is getattr(known, name, None) for name in ("forward", "_call"))


def _by_class(module: nn.Module, known: type[nn.Module]) -> Source:
    kind, dims = _KINDS[known]
    eps = None if isinstance(module, NormalizationLayer) else module.eps
    if kind in ("bn", "in"):
        shape = (module.num_features,) if known is LastBatchNorm else None
        return Source(module, kind, module.num_features, eps, dims, shape)
    if kind == "frn":
        return Source(module, kind, module.num_features, dims=dims)
    if kind == "gn":
        return Source(module, kind, module.num_channels, eps)
    if known is modules.PositionalNorm2d:
        return Source(module, kind, module.num_channels, dims=dims, positions=True)
    if known is modules.DivisiveNormFeatures:
        return Source(module, kind, module.num_features, shape=(module.num_features,))
    if kind == "dn":
        if module.window is None and module.norm_window in ("all", 1) and module.groups == 1:
            return Source(module, "rms", module.num_channels, dims=dims, positions=module.norm_window == 1)
        return Source(module, kind, module.num_channels, dims=dims)
    shape = tuple(module.normalized_shape)
    return Source(module, kind, shape[0], eps, len(shape) - 1 or None, shape)
