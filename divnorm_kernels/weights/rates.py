"""How fast weights turn: the learning rate by the weights' norm."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, NAdam, Optimizer, RAdam, RMSprop, Rprop

from ..checks import check_module
from ..sharding import reshard
from .measuring import norms
from .selection import directions, held, weights

_BY_DIRECTION = (Adadelta, Adagrad, Adam, Adamax, NAdam, RAdam, RMSprop, Rprop)


def effective_rates(model: nn.Module, optimizer: Optimizer, power: int | None = None) -> dict[str, Tensor]:
    """The effective learning rate of each weight, by its name in the model.

    A weight w behind which a norm stands has a scale that changes nothing, and its direction moves as with norm 1 and
    the learning rate ``lr / norm(w)^2`` for SGD, whose gradient goes as 1 / norm(w), and ``lr / norm(w)`` for
    optimizers whose steps do not depend on the gradient's scale, such as Adam. Norms are those of whole weights.
    Source: van Laarhoven, "L2 regularization versus batch and weight normalization", 2017.

    Args:
        model: whose weights: parameters of two or more dimensions that the optimizer has, but those of normalization
            layers; of weights that `normalize` has parametrized v, by its own name.
        optimizer: whose learning rates, one a group.
        power: of the norm. ``None``: 2 for SGD, 1 for torch's adaptive optimizers.

    Returns:
        Tensors of shape () on the weights' devices, of which none has been looked at, so nothing waits for them.

    Raises:
        TypeError: on arguments of another type.
        ValueError: without ``power`` for an optimizer that is not known, and on a power that is neither 1 nor 2.
    """
    check_module("model", model)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: got {type(optimizer).__name__}, expected a torch.optim.Optimizer")
    if power is None:
        power = _power(optimizer)
    if power not in (1, 2):
        raise ValueError(f"power: got {power!r}, expected 1 or 2")
    reshard(model)
    moved = held(optimizer)
    places = [place for place in (*weights(model), *directions(model)) if id(place.parameter) in moved]
    found = norms([place.parameter for place in places])
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    return {p.name: rate[id(p.parameter)] / norm**power for p, norm in zip(places, found, strict=True)}


def _power(optimizer: Optimizer) -> int:
    if isinstance(optimizer, SGD):
        return 2
    if isinstance(optimizer, _BY_DIRECTION):
        return 1
    raise ValueError(
        f"power: got None for {type(optimizer).__name__}, expected 1 or 2, for it is not a known optimizer"
    )
