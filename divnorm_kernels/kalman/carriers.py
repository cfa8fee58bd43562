"""Containers that hand the state of their activation on beside it: sequences, blocks of a ResNet, and all of one.

Called with x alone, a container gives y alone, as it did before. Called with x and the state of x, which may be
``None``, it gives y and its state, which is ``None`` where no norm behind it looks at one: where it ends in modules
behind its last norm, where a branch of a sum has none, and in eval mode. It never keeps one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .layer import KalmanNorm
from .state import KalmanState, add_states, check_state
from .transition import transition

State = KalmanState | None


class Carrier:
    """What a container has before its own class in its method resolution order."""

    between_norms: frozenset[str] | None = None
    """The children that have a norm before and one behind them; ``None``, in a slice of a sequence: all may have."""

    def forward(self, input: Tensor, *prior: State) -> Tensor | tuple[Tensor, State]:
        """y, and where a state of x is given, ``None`` too, that of y."""
        for state in prior:
            if state is not None:
                check_state("prior", state)
        y, state = self._advance(input, *(s and KalmanState(*s) for s in prior or (None,)))
        return (y, state) if prior else y

    def _advance(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        raise NotImplementedError

    def _through(self, names: Iterable[str], x: Tensor, state: State) -> tuple[Tensor, State]:
        """Takes x and its state through children, one after the other; those that are not there are left out."""
        for name in names:
            if self._modules.get(name) is not None:
                x, state = self._step(name, x, state)
        return x, state

    def _step(self, name: str, x: Tensor, state: State) -> tuple[Tensor, State]:
        module = self._modules[name]
        if carries(module):
            return module(x, state)
        y = module(x)
        # in eval mode no norm looks at a state
        if state is None or not self.training or not (self.between_norms is None or name in self.between_norms):
            return y, None
        return y, transition(module, state)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """For copies and pickles, to which classes made on the way have no name."""
        return _empty, type(self)._made_of, super().__reduce_ex__(protocol)[2]


def carries(module: nn.Module) -> bool:
    """Whether a module takes a state and gives one; of a compiled one, what is in it."""
    return isinstance(getattr(module, "_orig_mod", module), Carrier | KalmanNorm)


@cache
def carrying(carrier: type[Carrier], kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a container of a ``kind``."""
    named = {"__module__": __name__, "__doc__": kind.__doc__, "_made_of": (carrier, kind)}
    return type(f"Kalman{kind.__name__}", (carrier, kind), named)


def _empty(carrier: type[Carrier], kind: type[nn.Module]) -> nn.Module:
    made = carrying(carrier, kind)
    return made.__new__(made)


class SequenceCarrier(Carrier):
    """One module after the other."""

    def _advance(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        return self._through(self._modules, x, state)


@dataclass(frozen=True)
class Course:
    """In which order a module calls its children.

    Args:
        branch: their names; of a block what stands before the sum.
        last: of a block what stands behind it; of a network its head.
        optional: those that need not be there, or may be ``None``.
    """

    branch: tuple[str, ...]
    last: tuple[str, ...]
    optional: frozenset[str]

    def fits(self, module: nn.Module) -> bool:
        """Whether the module has these children, and no other."""
        there = {name for name, child in module._modules.items() if child is not None}
        names = {*self.branch, *self.last}
        return names - self.optional <= there <= names | self.optional


SHORTCUTS = ("downsample", "shortcut")
"""What a block's other branch is called, where it is a module."""
_BESIDE = frozenset((*SHORTCUTS, "drop_block", "aa", "se", "drop_path"))
_BLOCKS = tuple(
    Course(tuple(branch.split()), (last,), _BESIDE)
    for branch, last in (
        ("conv1 bn1 relu conv2 bn2", "relu"),
        ("conv1 bn1 relu conv2 bn2 relu conv3 bn3", "relu"),
        ("conv1 bn1 drop_block act1 aa conv2 bn2 se drop_path", "act2"),
        ("conv1 bn1 act1 conv2 bn2 drop_block act2 aa conv3 bn3 se drop_path", "act3"),
    )
)
"""torchvision's two, and timm's."""
_STAGES = frozenset(("maxpool", "layer2", "layer3", "layer4"))
_NETWORKS = tuple(
    Course(("conv1", "bn1", act, "maxpool", "layer1", "layer2", "layer3", "layer4"), head, _STAGES)
    for act, head in (("relu", ("avgpool", "fc")), ("act1", ("global_pool", "fc")))
)


def course_of(module: nn.Module) -> Course | None:
    """The order that a ResNet's block or a ResNet is to have by its children, ``None`` of any other module."""
    return next((course for course in (*_BLOCKS, *_NETWORKS) if course.fits(module)), None)


class BlockCarrier(Carrier):
    """A residual block, as torchvision and timm have them."""

    def _advance(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        course = course_of(self)
        y, own = self._through(course.branch, x, state)
        shortcut, other = self._through(SHORTCUTS, x, state)
        total = None if own is None or other is None else add_states(own, other)
        return self._through(course.last, y + shortcut.to(y.dtype), total)


class NetworkCarrier(Carrier):
    """A ResNet of torchvision's kind; behind its head there is no state."""

    def _advance(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        return self._head(self._features(x, state)), None

    def _features(self, x: Tensor, state: State) -> Tensor:
        return self._through(course_of(self).branch, x, state)[0]

    def _head(self, x: Tensor) -> Tensor:
        return self.fc(self.avgpool(x).flatten(1))


class TimmNetworkCarrier(NetworkCarrier):
    """A ResNet of timm's kind."""

    def forward_features(self, x: Tensor) -> Tensor:
        """What stands before the head."""
        return self._features(x, None)

    def _step(self, name: str, x: Tensor, state: State) -> tuple[Tensor, State]:
        if self.grad_checkpointing and name.startswith("layer"):
            return checkpoint(self._modules[name], x, state, use_reentrant=False)
        return super()._step(name, x, state)

    def _head(self, x: Tensor) -> Tensor:
        return self.forward_head(x)


def carrier_of(module: nn.Module) -> type[Carrier] | None:
    """Which of them a container becomes; ``None``: no one knows it."""
    if isinstance(module, nn.Sequential):
        return SequenceCarrier if type(module).forward in (nn.Sequential.forward, Carrier.forward) else None
    course = course_of(module)
    if course is None:
        return None
    if course in _BLOCKS:
        return BlockCarrier
    return TimmNetworkCarrier if hasattr(module, "forward_head") else NetworkCarrier
