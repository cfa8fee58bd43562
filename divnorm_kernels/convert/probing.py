"""What a module of an unknown class computes: its forward on small random inputs against torch's functions."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STATE = frozenset({"weight", "bias", "running_mean", "running_var", "num_batches_tracked"})
"""Parameters and buffers that a normalization has."""
FOLLOWERS = ("drop", "act")
"""Children that timm's layers apply behind the normalization, in this order."""

Tensors = dict[str, Tensor | None]


@dataclass(frozen=True)
class _Guess:
    """A normalization that a module may compute."""

    kind: str
    eps: float | None
    call: Callable[[Tensor, Tensors, bool], Tensor]
    """Of x, parameters and buffers, and training mode; moves the buffers."""
    positions: bool = False


class _Step(nn.Module):
    """Stands in the place of a follower, and shows in y that it was applied, and when."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.scale, self.shift = {"drop": (2.0, 0.0), "act": (1.0, 1.0)}[name]

    def forward(self, y: Tensor) -> Tensor:
        """``y`` times one number plus another."""
        return y * self.scale + self.shift


def recognized(module: nn.Module) -> dict[str, Any] | None:
    """What a `Source` says of a module, found out by what it computes; ``None`` where that is nothing known.

    The module itself is not called, and neither are its hooks and children; no random numbers are drawn but here.
    """
    shape = _shape(module)
    if shape is None or not _takes_x_alone(module):
        return None
    with (
        torch.random.fork_rng(devices=[]),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.device("cpu"),
        warnings.catch_warnings(),
    ):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would reach the GPUs' too
        warnings.simplefilter("ignore")
        return _found(module, shape)


def _found(module: nn.Module, shape: tuple[int, ...]) -> dict[str, Any] | None:
    # The end takes the smaller inputs, but without a weight it may be positions, of instance normalization.
    places = (_found_at_the_end, _found_in_channels)
    ordered = places if getattr(module, "weight", None) is not None else places[::-1]
    return next((found for place in ordered if (found := place(module, shape)) is not None), None)


def _found_in_channels(module: nn.Module, shape: tuple[int, ...]) -> dict[str, Any] | None:
    for guess in _over_channels(module, shape[0]) if len(shape) == 1 else ():
        dims = [d for d in (1, 2, 3) if _confirmed(module, guess, (*shape, *_sizes(shape)[:d]))]
        if dims:
            found = {"kind": guess.kind, "size": shape[0], "eps": guess.eps, "positions": guess.positions}
            return {**found, "dims": dims[0] if len(dims) == 1 else None}
    return None


def _found_at_the_end(module: nn.Module, shape: tuple[int, ...]) -> dict[str, Any] | None:
    for guess in _over_the_end(module, shape):
        if _confirmed(module, guess, (_sizes(shape)[0], *shape)):
            dims = len(shape) - 1 or None
            return {"kind": guess.kind, "size": shape[0], "eps": guess.eps, "dims": dims, "shape": shape}
    return None


def _shape(module: nn.Module) -> tuple[int, ...] | None:
    """Of the weight, or of what is normalized where there is none."""
    weight = getattr(module, "weight", None)
    if weight is not None:
        return tuple(weight.shape)
    names = ("normalized_shape", "num_features", "num_channels")
    size = next((value for name in names if (value := getattr(module, name, None)) is not None), None)
    if isinstance(size, int):
        return (size,)
    return tuple(size) if isinstance(size, tuple | list) else None


def _takes_x_alone(module: nn.Module) -> bool:
    """Whether there is nothing but x that a caller might pass to ``forward``."""
    return len(inspect.signature(type(module).forward).parameters) == 2


def _sizes(shape: tuple[int, ...]) -> list[int]:
    """Sizes of other dimensions, none the same as another or as one of ``shape``."""
    return [n for n in range(2, 12) if n not in shape]


def _epsilons(module: nn.Module) -> list[float | None]:
    names = [name for name in ("eps", "variance_epsilon") if hasattr(module, name)]
    return [eps for eps in (getattr(module, name) for name in names) if eps is None or isinstance(eps, float | int)]


def _over_channels(module: nn.Module, channels: int) -> Iterator[_Guess]:
    """Every normalization of (N, C, ...) that a module of C channels may be."""
    group_kind = "in" if isinstance(module, nn.modules.instancenorm._InstanceNorm) else "gn"
    groups = getattr(module, "num_groups", channels if group_kind == "in" else None)
    for eps in _epsilons(module):
        if eps is not None:
            yield _Guess("bn", eps, _batch(module, eps))
            if module._buffers.get("running_mean") is not None:
                yield _Guess("frozen", eps, _frozen(eps))
            if isinstance(groups, int) and groups > 0 and channels % groups == 0:
                yield _Guess(group_kind, eps, _group(groups, eps))
            yield _Guess("ln", eps, _turned(_layer((channels,), eps)), positions=True)
        yield _Guess("rms", eps, _turned(_rms((channels,), eps)), positions=True)


def _over_the_end(module: nn.Module, shape: tuple[int, ...]) -> Iterator[_Guess]:
    """Every normalization over the last dimensions of x."""
    for eps in _epsilons(module):
        if eps is not None:
            yield _Guess("ln", eps, _layer(shape, eps))
        yield _Guess("rms", eps, _rms(shape, eps))


def _batch(module: nn.Module, eps: float) -> Callable[[Tensor, Tensors, bool], Tensor]:
    momentum, tracked = getattr(module, "momentum", 0.1), getattr(module, "track_running_stats", True)

    def call(x: Tensor, t: Tensors, training: bool) -> Tensor:
        mean, variance, count = (t.get(name) for name in ("running_mean", "running_var", "num_batches_tracked"))
        share = 0.0
        if training and tracked and count is not None:
            count += 1
            share = 1 / count.item() if momentum is None else momentum
        if training and not tracked:
            mean = variance = None
        return F.batch_norm(x, mean, variance, t.get("weight"), t.get("bias"), training or mean is None, share, eps)

    return call


def _frozen(eps: float) -> Callable[[Tensor, Tensors, bool], Tensor]:
    def call(x: Tensor, t: Tensors, training: bool) -> Tensor:
        return F.batch_norm(x, t["running_mean"], t["running_var"], t.get("weight"), t.get("bias"), False, 0.0, eps)

    return call


def _group(groups: int, eps: float) -> Callable[[Tensor, Tensors, bool], Tensor]:
    return lambda x, t, training: F.group_norm(x, groups, t.get("weight"), t.get("bias"), eps)


def _layer(shape: tuple[int, ...], eps: float) -> Callable[[Tensor, Tensors, bool], Tensor]:
    return lambda x, t, training: F.layer_norm(x, shape, t.get("weight"), t.get("bias"), eps)


def _rms(shape: tuple[int, ...], eps: float | None) -> Callable[[Tensor, Tensors, bool], Tensor]:
    def call(x: Tensor, t: Tensors, training: bool) -> Tensor:
        y = F.rms_norm(x, shape, t.get("weight"), eps)
        return y if t.get("bias") is None else y + t["bias"]

    return call


def _turned(call: Callable[[Tensor, Tensors, bool], Tensor]) -> Callable[[Tensor, Tensors, bool], Tensor]:
    """Of the channels, in the second place, what ``call`` does at the end."""
    return lambda x, t, training: call(x.movedim(1, -1), t, training).movedim(-1, 1)


def _confirmed(module: nn.Module, guess: _Guess, shape: tuple[int, ...]) -> bool:
    """Whether ``module`` computes a guess on samples of a shape: y, gradients and buffers, in both modes.

    On numbers so small that eps counts too.
    """
    small = max(1e-7 if guess.eps is None else guess.eps, 1e-12) ** 0.5
    # with processes SyncBatchNorm's training takes no CPU tensors
    modes = (False,) if isinstance(module, nn.SyncBatchNorm) else (True, False)
    return all(_agrees(module, guess, shape, scale, training) for scale in (1.0, small) for training in modes)


def _agrees(module: nn.Module, guess: _Guess, shape: tuple[int, ...], scale: float, training: bool) -> bool:
    x = scale * (torch.randn(_sizes(shape)[0], *shape) + 0.5)
    twin = _twin(module, scale, training)
    parameters = {name: _leaf(p) for name, p in twin._parameters.items()}
    state = {**parameters, **{name: None if t is None else t.clone() for name, t in twin._buffers.items()}}
    own, others = _leaf(x), _leaf(x)
    try:
        with torch.enable_grad():
            y = type(module).forward(twin, own)
            expected = guess.call(others, state, training)
            for step in twin._modules.values():
                expected = step(expected)
            if not _same(y, expected):
                return False
            found = _gradients(y, [own, *twin._parameters.values()])
            wanted = _gradients(expected, [others, *parameters.values()])
    except Exception:  # whatever it is, the module does not take what the guess takes, or has not what it needs
        return False
    return all(map(_same, found, wanted)) and all(_same(twin._buffers[name], state[name]) for name in twin._buffers)


def _leaf(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().clone().requires_grad_()


def _gradients(y: Tensor, leaves: list[Tensor | None]) -> list[Tensor]:
    weights = torch.linspace(-1, 2, y.numel()).view(y.shape)
    return list(torch.autograd.grad((y * weights).sum(), [t for t in leaves if t is not None], materialize_grads=True))


def _twin(module: nn.Module, scale: float, training: bool) -> nn.Module:
    """A module of the same class and attributes with random values, without hooks, followed by `_Step`."""
    twin = object.__new__(type(module))
    vars(twin).update({**vars(module), **vars(nn.Module()), "training": training})
    for name, parameter in module._parameters.items():
        twin._parameters[name] = None if parameter is None else nn.Parameter(_random(name, parameter, scale))
    for name, buffer in module._buffers.items():
        twin._buffers[name] = None if buffer is None else _random(name, buffer, scale)
    steps = (name for name in FOLLOWERS if module._modules.get(name) is not None)
    vars(twin)["_modules"] = {name: _Step(name) for name in steps}
    return twin


def _random(name: str, like: Tensor, scale: float) -> Tensor:
    if not like.is_floating_point():
        return torch.full(like.shape, 3, dtype=like.dtype)
    value = torch.rand(like.shape, dtype=torch.float32) + 0.5
    return value * {"running_mean": scale, "running_var": scale**2}.get(name, 1.0)


def _same(found: Any, expected: Tensor | None) -> bool:
    if not isinstance(found, Tensor) or expected is None:
        return found is expected
    if found.shape != expected.shape:
        return False
    return bool((found - expected).abs().max() <= 1e-4 * expected.abs().max())
