"""Weights whose norms are held by a projection after each step of an optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..checks import check_module, check_number, check_size, compute_dtype
from ..sharding import reshard
from .measuring import norms, scale
from .selection import Place, affine_pairs, held, skipped, weights

_LEAST = 1e-30
"""What a norm is divided by at least, so that zeros stay zeros."""


class Projection:
    """What `project` returns: the hook and what it holds."""

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        places: list[Place],
        pairs: list[list[Place]],
        to: float | None,
        dim: int | None,
        every: int,
        rate: float | None,
    ) -> None:
        self._optimizer, self._model, self._places, self._pairs = optimizer, model, places, pairs
        self._to, self._dim, self._every, self._rate = to, dim, every, rate
        self._count = f"steps_behind_projection.{places[0].name}"
        self._handle = optimizer.register_step_post_hook(self)

    def __call__(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What the optimizer calls after a step."""
        if self._every > 1:
            # in a group, where the optimizer's state_dict keeps it: a resumed run projects at the same steps
            group = optimizer.param_groups[0]
            group[self._count] = (group.get(self._count, 0) + 1) % self._every
            if group[self._count]:
                return
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Projects now, whatever ``every`` is: nGPT, for one, starts from weights that have their norms."""
        reshard(self._model)
        tensors = [place.parameter for place in self._places]
        factors = _reciprocals(norms(tensors, self._dim))
        torch._foreach_mul_(factors, self._initial() if self._to is None else self._to)
        scale(tensors, factors)
        if self._pairs:
            self._apply_to_pairs()

    def remove(self) -> None:
        """Ends it, and takes what it has kept out of the model and the optimizer."""
        self._handle.remove()
        self._optimizer.param_groups[0].pop(self._count, None)
        for place in self._places if self._to is None else ():
            place.module._buffers.pop(_buffer_name(place.attribute), None)

    def _initial(self) -> list[Tensor]:
        return [place.module._buffers[_buffer_name(place.attribute)] for place in self._places]

    def _apply_to_pairs(self) -> None:
        pairs = [[place.parameter for place in pair] for pair in self._pairs]
        every = [p for pair in pairs for p in pair]
        if self._rate is not None:
            torch._foreach_mul_(every, 1 - self._rate)
            ones = [place.parameter for pair in self._pairs for place in pair if place.attribute == "weight"]
            if ones:
                torch._foreach_add_(ones, self._rate)
            return
        found = iter(norms(every))
        joint = torch._foreach_norm([torch.stack([next(found) for _ in pair]) for pair in pairs])
        factors = _reciprocals(joint)
        torch._foreach_mul_(factors, [math.sqrt(pair[0].numel()) for pair in pairs])
        scale(every, [factor for factor, pair in zip(factors, pairs, strict=True) for _ in pair])


def project(
    optimizer: Optimizer,
    model: nn.Module,
    to: float | Literal["initial"] = "initial",
    every: int = 1,
    *,
    dim: int | None = None,
    affine: float | Literal["joint"] | None = None,
    skip: str | nn.Module | Iterable[str | nn.Module] = (),
) -> Projection:
    """Holds the norms of a model's weights: after a step of ``optimizer`` they are multiplied back to what they were.

    Normalize-and-Project (Lyle et al. 2024) is ``project(optimizer, model, skip=the output layer)`` in a model with a
    norm before every nonlinearity: the weights' scale then changes nothing but the effective learning rate, and that is
    held. nGPT's rows (Loshchilov et al. 2024) are ``project(optimizer, model, to=1.0, dim=0)``, with ``dim=1`` and
    another ``skip`` for matrices that write to the stream.

    Weights are the parameters of two or more dimensions that the optimizer has, but those of normalization layers and
    parametrized ones. A step that a gradient scaler leaves out projects nothing. Nothing waits for the device: one
    call (`torch._foreach_norm`) takes the norms, one a weight those of rows, and one multiplies. Weights of half types
    are held to one rounding of theirs. Under `fully_shard`, which comes before this call, the norms are those of
    whole weights, by one collective, or one a weight for rows.

    The initial norms are buffers of the model beside the weights, "weight_initial_norm" beside "weight", and so in its
    ``state_dict``; those that a model has already are kept. How many steps were since the last projection is in the
    optimizer's ``state_dict``, where ``every`` is more than 1. A run goes on exactly where both are loaded, the model's
    after this call. `Projection.remove` ends the projection and takes the buffers away again.

    Args:
        optimizer: whose steps are followed.
        model: whose weights.
        to: "initial", the norms that the weights have now, or a number for all. Weights of zeros stay zeros.
        every: the steps from one projection to the next.
        dim: ``None``: of whole weights; else of what a weight holds at one index of this dimension.
        affine: what happens to weight and bias of the normalization layers, of which the optimizer has them and they
            learn. "joint": both together are projected to the norm sqrt(d), d the elements of weight, which changes
            nothing behind homogeneous activations such as ReLU, and a pair of which one stays is left alone; a number:
            this share of the way to weight 1 and bias 0; ``None``: nothing.
        skip: names or patterns of modules or parameters, or modules: what is left alone, such as the output layer.

    Returns:
        A handle with ``remove()`` and ``apply()``.

    Raises:
        TypeError: on arguments of another type.
        ValueError: on values out of range, weights that have no initial norm, that are projected already, and a model
            of which the optimizer has no weight.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: got {type(optimizer).__name__}, expected a torch.optim.Optimizer")
    check_module("model", model)
    if to != "initial":
        check_number("to", to, 'a positive number or "initial"')
        if not 0 < to < math.inf:
            raise ValueError(f'to: got {to}, expected a positive number or "initial"')
    check_size("every", every)
    if affine is not None and affine != "joint":
        check_number("affine", affine, 'a number from 0 to 1, "joint" or None')
        if not 0 <= affine <= 1:
            raise ValueError(f'affine: got {affine}, expected a number from 0 to 1, "joint" or None')
    reshard(model)
    moved = held(optimizer) - skipped(model, skip)
    places = [place for place in weights(model) if id(place.parameter) in moved]
    if not places:
        raise ValueError("optimizer: got one that has no weight of the model but those to skip, expected one that has")
    _check_dim(dim, places)
    _check_free(optimizer, places)
    pairs = _moved_pairs(model, moved, affine == "joint") if affine is not None else []
    if affine is not None and not pairs:
        raise ValueError(f"affine: got {affine!r} for a model without normalization layers that learn, expected None")
    if to == "initial":
        _keep_norms(places, dim)
    return Projection(
        optimizer,
        model,
        places,
        pairs,
        None if to == "initial" else to,
        dim,
        every,
        None if affine == "joint" else affine,
    )


def _moved_pairs(model: nn.Module, moved: set[int], joint: bool) -> list[list[Place]]:
    """What of the affine pairs moves and learns, each parameter once; ``joint``: whole pairs alone."""
    pairs, left = [], set(moved)
    for pair in affine_pairs(model):
        own = [place for place in pair if id(place.parameter) in left and place.parameter.requires_grad]
        left -= {id(place.parameter) for place in pair}
        if own and (len(own) == len(pair) or not joint):
            pairs.append(own)
    return pairs


def _check_free(optimizer: Optimizer, places: list[Place]) -> None:
    """Raises where a projection behind ``optimizer`` holds one of the weights: one would end what the other needs."""
    others = [hook for hook in optimizer._optimizer_step_post_hooks.values() if isinstance(hook, Projection)]
    projected = {id(place.parameter) for other in others for place in other._places}
    for place in places:
        if id(place.parameter) in projected:
            raise ValueError(f"optimizer: got one that projects {place.name} already, expected `remove()` before")


def _buffer_name(attribute: str) -> str:
    """Where the initial norms of a parameter are, beside it."""
    return f"{attribute}_initial_norm"


@torch.no_grad()
def _keep_norms(places: list[Place], dim: int | None) -> None:
    new = []
    for place, norm in zip(places, norms([place.parameter for place in places], dim), strict=True):
        name = _buffer_name(place.attribute)
        kept = place.module._buffers.get(name)
        if kept is None:
            if not norm.is_meta and not norm.any():
                raise ValueError(f"to: got 'initial' for {place.name}, which is zero and has no direction; skip it")
            new.append((place.module, name, norm.to(compute_dtype(place.parameter))))
        elif kept.shape != norm.shape:
            got = f"shape {tuple(norm.shape)} for {place.name}"
            raise ValueError(f"dim: got {dim}, {got}, expected that of the norms kept, {tuple(kept.shape)}")
    for module, name, norm in new:
        module.register_buffer(name, norm)


def _check_dim(dim: int | None, places: list[Place]) -> None:
    if dim is None:
        return
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim: got {dim!r} of type {type(dim).__name__}, expected an int or None")
    for place in places:
        if not 0 <= dim < place.parameter.dim():
            raise ValueError(f"dim: got {dim}, expected None or 0 to {place.parameter.dim() - 1} for {place.name}")


def _reciprocals(found: Sequence[Tensor]) -> list[Tensor]:
    return list(torch._foreach_reciprocal(torch._foreach_clamp_min(found, _LEAST)))
