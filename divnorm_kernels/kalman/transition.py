"""How modules change the moments of what they are given: from one layer's state to the next one's prior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ..checks import check_module, check_size
from ..constant import constant
from ..sharding import distributed
from .state import KalmanState, along, check_state, moments


def propagate(
    module: nn.Module,
    state: KalmanState,
    *,
    sample: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> KalmanState:
    """The state of what ``module`` gives, where ``state`` is that of what it takes: the next layer's prior.

    The values of a channel are taken to be independent normals of one mean and variance, at all positions; edges,
    strides and dilations change nothing then. In closed form, with m and v of the state::

        convolution, linear     mean' = sum w m + bias;  var' = sum w^2 v
        ReLU                    mean' = m Phi(t) + s phi(t);  var' = (m^2 + v) Phi(t) + m s phi(t) - mean'^2
                                with s = sqrt(v), t = m/s
        average pooling of k    mean' = m;  var' = v/k
        max pooling of k        mean and variance of the largest of k independent normals
        dropout                 mean' = m;  var' = (v + q m^2) / (1 - q) in training mode, q its probability
        batch, instance and     the affine map that they are by running statistics, or where they take their input's,
        group normalization     by those of the state

    `torch.nn.Sequential` does one after the other, `torch.nn.Identity` and ``Flatten(1)`` nothing: a linear layer takes
    as many features a channel as it has. `add_states` is the sum of two branches; other modules are registered with
    `transition`. Differentiable in the state and the module's parameters; computed in the state's dtype, under autocast
    too. Where v is 0, gradients go by the mean alone.

    Args:
        module: a `torch.nn.Module`.
        state: mean and variance, each of shape (C,).
        sample: in place of the closed form, the moments of what the module, any module, gives for normal numbers of
            shape (N, C, ``*S``), edges too; ``sample`` is (N, ``*S``). The published code draws one sample of the
            activation's size. What the module does besides, such as moving running statistics, it does.
        generator: of the sample; ``None``: torch's default.

    Returns:
        The state of the module's output.

    Raises:
        TypeError: on a module that has no `transition`, where there is no ``sample``.
        TypeError, ValueError: on a bad argument.

    Source: Wang et al., "Kalman Normalization", NeurIPS 2018, section 3; the rectified normal's moments in place of a
    sample are this package's.
    """
    check_module("module", module)
    check_state("state", state)
    state = KalmanState(*state)
    if sample is None:
        if generator is not None:
            raise ValueError("generator: got one without sample, expected None: the closed form draws nothing")
        return transition(module, state)
    if not isinstance(sample, Sequence) or not sample:
        raise TypeError(f"sample: got {sample!r}, expected (N, *S), the sizes of a sample without its channels")
    for size in sample:
        check_size("sample", size)
    mean, variance = (along(t, len(sample) + 1) for t in state)
    size = (sample[0], mean.shape[1], *sample[1:])
    normal = torch.randn(size, generator=generator, dtype=mean.dtype, device=mean.device)
    like = next((p for p in module.parameters() if p.is_floating_point()), mean)
    return moments(module((mean + _root(variance) * normal).to(like.dtype)), mean.dtype)


@singledispatch
def transition(module: Any, state: KalmanState) -> KalmanState:
    """`propagate` in closed form, without its checks, by the class of ``module``.

    Subclasses go by their base. ``@transition.register``, `functools.singledispatch`'s decorator, above a function of a
    module and a state adds a class or puts something else in its place:

        >>> @transition.register
        ... def _(module: nn.Hardtanh, state: KalmanState) -> KalmanState: ...
    """
    raise TypeError(
        f"module: got {type(module).__name__}, which has no transition, expected one that transition.register was told"
    )


def has_transition(module: nn.Module) -> bool:
    """Whether `transition` knows a module; of an `nn.Sequential`, all that is in it."""
    if transition.dispatch(type(module)) is _sequence:
        return all(map(has_transition, module))
    return transition.dispatch(type(module)) is not transition.dispatch(object)


@transition.register
def _sequence(module: nn.Sequential, state: KalmanState) -> KalmanState:
    for child in module:
        state = transition(child, state)
    return state


@transition.register(nn.Identity)
def _identity(module: nn.Identity, state: KalmanState) -> KalmanState:
    return state


@transition.register
def _flatten(module: nn.Flatten, state: KalmanState) -> KalmanState:
    if module.start_dim != 1:
        raise TypeError(f"module: got Flatten({module.start_dim}), expected one from dimension 1, that of channels")
    return state


@transition.register(nn.Conv1d)
@transition.register(nn.Conv2d)
@transition.register(nn.Conv3d)
def _convolution(module: Any, state: KalmanState) -> KalmanState:
    return _weighted(module.weight.flatten(2), module.bias, module.groups, state)


@transition.register
def _linear(module: nn.Linear, state: KalmanState) -> KalmanState:
    channels, features = state.mean.shape[0], module.in_features
    if features % channels:
        raise ValueError(f"state: got {channels} channels, expected a divisor of in_features, {features}")
    return _weighted(module.weight.unflatten(1, (channels, -1)), module.bias, 1, state)


def _weighted(weight: Tensor, bias: Tensor | None, groups: int, state: KalmanState) -> KalmanState:
    """By ``weight``, (outputs, inputs of a group, numbers for each input)."""
    if distributed(weight):  # resharded as soon as its own module has been called
        raise RuntimeError(
            "module: got one whose weight is a DTensor, expected whole weights: fully_shard containers of the chain, "
            "such as a Sequential or the model, and not the layers between norms by themselves"
        )
    channels = weight.shape[1] * groups
    if state.mean.shape[0] != channels:
        raise ValueError(f"state: got {state.mean.shape[0]} channels, expected {channels}")
    weight = weight.to(state.mean.dtype).unflatten(0, (groups, -1))
    m, v = (t.view(groups, 1, -1) for t in state)
    # sums of products, which unlike matrix products autocast and TF32 leave alone
    mean, variance = (weight.sum(3) * m).sum(2), (weight.square().sum(3) * v).sum(2)
    mean = mean.flatten() if bias is None else mean.flatten() + bias.to(mean.dtype)
    return KalmanState(mean, variance.flatten())


@transition.register
def _rectified(module: nn.ReLU, state: KalmanState) -> KalmanState:
    mean, variance = state
    s = _root(variance)
    t = mean / s
    density = torch.exp(-0.5 * t.square()) / math.sqrt(2 * math.pi)
    # erfc, since torch's ndtr has no digits far below 0
    above, below = (0.5 * torch.special.erfc(u / math.sqrt(2)) for u in (-t, t))
    positive, negative = density + t * above, density - t * below
    # the second moment without the square of the first, of which nothing would be left for large t
    return KalmanState(s * positive, variance * (above - positive * negative))


def _root(variance: Tensor) -> Tensor:
    """The deviation; its slope at 0 is taken to be 0."""
    return variance.clamp(min=torch.finfo(variance.dtype).tiny).sqrt()


for _dims, _average, _largest in (
    (1, nn.AvgPool1d, nn.MaxPool1d),
    (2, nn.AvgPool2d, nn.MaxPool2d),
    (3, nn.AvgPool3d, nn.MaxPool3d),
):

    @transition.register(_average)
    def _averaged(module: Any, state: KalmanState, dims: int = _dims) -> KalmanState:
        positions = _positions(module.kernel_size, dims)
        divisor = getattr(module, "divisor_override", None) or positions
        return KalmanState(state.mean * (positions / divisor), state.variance * (positions / divisor**2))

    @transition.register(_largest)
    def _maximum(module: Any, state: KalmanState, dims: int = _dims) -> KalmanState:
        shift, scale = _constants(_positions(module.kernel_size, dims))
        return KalmanState(state.mean + shift * _root(state.variance), state.variance * scale)


def _positions(kernel_size: int | Sequence[int], dims: int) -> int:
    """How many positions a window has."""
    return kernel_size**dims if isinstance(kernel_size, int) else math.prod(kernel_size)


@constant
def _constants(count: int) -> tuple[float, float]:
    """`_of_the_largest`, which a compiler would trace by steps, past the cache."""
    return _of_the_largest(count)


@cache
def _of_the_largest(count: int) -> tuple[float, float]:
    """Mean and variance of the largest of ``count`` independent standard normals."""
    step = 1 / 32  # at which the trapezoid rule has all digits of a smooth function that vanishes at both ends
    points = [i * step for i in range(-12 * 32, 12 * 32 + 1)]
    scale = step * count / math.sqrt(2 * math.pi)
    density = [scale * math.exp(-x * x / 2) * (0.5 * math.erfc(-x / math.sqrt(2))) ** (count - 1) for x in points]
    mean = math.fsum(d * x for d, x in zip(density, points, strict=True))
    return mean, math.fsum(d * (x - mean) ** 2 for d, x in zip(density, points, strict=True))


@transition.register(nn.Dropout)
@transition.register(nn.Dropout1d)
@transition.register(nn.Dropout2d)
@transition.register(nn.Dropout3d)
def _dropped(module: Any, state: KalmanState) -> KalmanState:
    if not module.training:
        return state
    if module.p == 1:
        return KalmanState(*map(torch.zeros_like, state))
    return KalmanState(state.mean, (state.variance + module.p * state.mean.square()) / (1 - module.p))


@transition.register(_BatchNorm)
@transition.register(_InstanceNorm)
def _normalized(module: Any, state: KalmanState) -> KalmanState:
    if module.training or module.running_mean is None:
        return _scaled(module, state, *state)
    return _scaled(module, state, module.running_mean.to(state.mean), module.running_var.to(state.mean))


@transition.register
def _normalized_in_groups(module: nn.GroupNorm, state: KalmanState) -> KalmanState:
    size = module.num_channels // module.num_groups
    m, v = (t.view(module.num_groups, size) for t in state)
    mean = m.mean(1, keepdim=True)
    variance = (v + (m - mean).square()).mean(1)
    return _scaled(module, state, mean.flatten().repeat_interleave(size), variance.repeat_interleave(size))


def _scaled(module: Any, state: KalmanState, mean: Tensor, variance: Tensor) -> KalmanState:
    """A state normalized by ``mean`` and ``variance``."""
    if math.isnan(module.eps):  # as this package's layers say that they do more
        raise TypeError(f"module: got {module}, which does more than torch.nn's, expected one that does not")
    scale = (variance + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * module.weight.to(scale)
    moved = (state.mean - mean) * scale
    return KalmanState(moved if module.bias is None else moved + module.bias.to(moved), state.variance * scale.square())
