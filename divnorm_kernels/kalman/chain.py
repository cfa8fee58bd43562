"""Wiring a model, so that each norm's prior is what the norm before it predicts."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..checks import check_flag, check_module
from ..convert.carry import clear_hooks, share_hooks
from ..convert.sources import examine
from .carriers import (
    SHORTCUTS,
    BlockCarrier,
    Carrier,
    NetworkCarrier,
    SequenceCarrier,
    carrier_of,
    carrying,
    course_of,
)
from .layer import KalmanNorm, KalmanNorm1d, KalmanNorm2d, KalmanNorm3d, check_prior_weight
from .transition import has_transition

_LAYERS = {1: KalmanNorm1d, 2: KalmanNorm2d, 3: KalmanNorm3d}


def kalman_chain(model: nn.Module, prior_weight: float = 0.9, *, inplace: bool = True) -> nn.Module:
    """Makes Kalman norms of the batch norms of ``model``, each with a prior from the norm before it.

    The model is called as before. Its containers, `torch.nn.Sequential` and ResNets with their blocks as torchvision
    and timm have them, pass the state on beside the activation: `propagate` takes it through what stands between two
    norms, and where a block adds two activations, states are added. States go from call to call of modules and are kept
    nowhere; gradients flow through them. The first norm has no prior. In eval mode, where no norm looks at one, none is
    computed: a norm that is in training mode by itself, in a container that is not, has no prior.

    Parameters and buffers are the very ones that the batch norms had, under the same names, so that an optimizer made
    before trains them and checkpoints load both ways. Containers get a subclass of their class, and may be called with
    x and a state (or ``None``), for y and its state.

    Args:
        model: a sequence or a ResNet, with batch norms of torch.nn or plain ones of this package. Modules between two
            norms that `transition` does not know are to be registered first; behind the last norm there may be any.
        prior_weight: of all norms, as for `KalmanNorm2d`.
        inplace: whether the model itself is changed, or a copy.

    Returns:
        The model, or the copy.

    Raises:
        TypeError: on a container that is not known, or does something else in eval mode than its children's names tell;
            on a module without a transition between two norms; on batch norms that do more than torch.nn's. The model
            is as it was then.
        ValueError: on a model without batch norms.

    Example:
        >>> model = kalman_chain(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3),
        ...                                    nn.BatchNorm2d(8)))
    """
    check_module("model", model)
    check_prior_weight(prior_weight)
    check_flag("inplace", inplace)
    if isinstance(model, _BatchNorm):
        raise TypeError(f"model: got {type(model).__name__}, expected a container of batch norms")
    if not _has_norms(model):
        raise ValueError(f"model: got {type(model).__name__} without batch norms, expected some")
    if not inplace:
        model = copy.deepcopy(model)
    wiring = _Wiring(prior_weight)
    wiring.read(model, "model", False)
    wiring.confirm()
    wiring.apply()
    return model


class _Wiring:
    """What is to be done to a model; nothing is done until all of it could be told."""

    def __init__(self, prior_weight: float) -> None:
        self.prior_weight = prior_weight
        self.layers: dict[nn.Module, KalmanNorm] = {}
        self.carriers: dict[nn.Module, type[Carrier]] = {}
        self.needed: dict[nn.Module, set[str]] = {}
        self.assumed: list[tuple[nn.Module, str]] = []
        """The outermost of those whose children's names alone tell what they do."""

    def read(self, module: nn.Module, path: str, needed: bool, inside: bool = False) -> bool:
        """Whether the state of a module's input is needed, where ``needed`` is whether that of its output is.

        ``inside``: one of those that are assumed holds it.
        """
        if isinstance(module, _BatchNorm):
            if not isinstance(module, KalmanNorm) and module not in self.layers:
                self.layers[module] = _layer(module, path, self.prior_weight)
            return True
        got = f"{path}: got {type(module).__name__}"
        if not _has_norms(module):
            if needed and not has_transition(module):
                raise TypeError(f"{got} between two norms, expected a module that transition.register was told")
            return needed
        carrier = carrier_of(module)
        if carrier is None:
            raise TypeError(f"{got} with batch norms, expected a Sequential, a ResNet or its block")
        if needed and issubclass(carrier, NetworkCarrier):
            raise TypeError(f"{got} in front of a norm, expected it to be the last")
        self.carriers[module] = carrier
        handed = self.needed.setdefault(module, set())
        assumed = carrier is not SequenceCarrier
        if assumed and not inside:
            self.assumed.append((module, path))
        inside = inside or assumed

        def through(names: Iterable[str], needed: bool) -> bool:
            for name in reversed(tuple(names)):
                child = module._modules.get(name)
                if child is not None:
                    if needed and not _has_norms(child):
                        handed.add(name)
                    needed = self.read(child, f"{path}.{name}", needed, inside)
            return needed

        if not assumed:
            return through(module._modules, needed)
        course = course_of(module)
        needed = through(course.last, needed)
        if carrier is not BlockCarrier:  # in front of a head no state is needed
            return through(course.branch, False)
        beside = through(SHORTCUTS, needed)
        return through(course.branch, needed) or beside

    def confirm(self) -> None:
        """Raises unless what is assumed of modules is what they do, in eval mode, on random numbers."""
        for module, path in self.assumed:
            twin, x = _random_twin(module)
            try:
                expected = twin(x)
                wiring = _Wiring(self.prior_weight)
                wiring.read(twin, path, False, inside=True)
                wiring.apply()
                found = twin(x)
            except Exception as error:
                got = f"{type(module).__name__}, which failed on x of shape {tuple(x.shape)}"
                raise TypeError(f"{path}: got {got}, expected a ResNet or its block") from error
            if not torch.allclose(found, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item()):
                got = f"{type(module).__name__}, whose forward does not do what its children's names tell"
                raise TypeError(f"{path}: got {got}, expected a ResNet or its block as torchvision or timm have it")

    def apply(self) -> None:
        """Does it."""
        for parent in self.carriers:
            for name, child in parent._modules.items():
                if child in self.layers:
                    parent._modules[name] = self.layers[child]
        for old, layer in self.layers.items():
            share_hooks(old, layer)
        for module, carrier in self.carriers.items():
            if not isinstance(module, Carrier):
                module.__class__ = carrying(carrier, type(module))
            module.between_norms = frozenset(self.needed[module])


def _has_norms(module: nn.Module) -> bool:
    return any(isinstance(m, _BatchNorm) for m in module.modules())


def _layer(module: _BatchNorm, path: str, prior_weight: float) -> KalmanNorm:
    """The Kalman norm with a batch norm's options, parameters and buffers."""
    source = examine(module)
    if isinstance(source, str):
        raise TypeError(f"{path}: got {type(module).__name__}, which {source}, expected a batch norm of torch.nn")
    more = math.isnan(module.eps) or source.followers or getattr(module, "sync", False)
    if source.kind != "bn" or source.dims not in _LAYERS or more:
        raise TypeError(f"{path}: got {module}, expected a batch norm that does what torch.nn's do, in one process")
    layer = _LAYERS[source.dims](
        module.num_features,
        prior_weight,
        module.eps,
        module.momentum,
        module.affine,
        module.track_running_stats,
        device="meta",
        backend=getattr(module, "backend", None),
    )
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(layer, name, getattr(module, name))
    return layer.train(module.training)


@torch.no_grad()
def _random_twin(module: nn.Module) -> tuple[nn.Module, Tensor]:
    """A copy in eval mode with random parameters and buffers in float64, and an x for it."""
    twin = copy.deepcopy(module).to_empty(device="cpu").double().eval()
    generator = torch.Generator().manual_seed(0)
    for m in twin.modules():
        clear_hooks(m)
    for t in (*twin.parameters(), *twin.buffers()):
        if t.dim() > 1:
            t.normal_(std=t[0].numel() ** -0.5, generator=generator)
        elif t.is_floating_point():
            t.uniform_(0.5, 1.5, generator=generator)
    first = next(m for m in twin.modules() if isinstance(m, _ConvNd))
    dims = first.weight.dim() - 2
    size = (2, first.in_channels, *[16 if dims == 3 else 32] * dims)
    return twin, torch.randn(size, generator=generator, dtype=torch.float64)
