"""ResNet blocks of torchvision, timm and transformers whose norms add the residual and apply the activations.

The classes are subclasses of the libraries' own, made when they are first asked for, and found by name when a block is
unpickled. They hold what the block held, under the same names; its activations are there, and are not called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Block:
    """What is known of a library's block.

    Args:
        source: module and name of its class.
        forward: of the fused block.
        pairs: the paths of its norms, each with that of the activation behind it; the last norm adds the residual.
        absent: children that stand between norm and activation, where there are any.
    """

    source: tuple[str, str]
    forward: Callable[[Any, Tensor], Tensor]
    pairs: tuple[tuple[str, str], ...]
    absent: tuple[str, ...] = ()


def _two(self: Any, x: Tensor) -> Tensor:
    y = _smoothed(self, self.bn1(self.conv1(x)))
    return _with_residual(self.bn2, self.conv2(y), _shortcut(self, x))


def _three(self: Any, x: Tensor) -> Tensor:
    y = self.bn1(self.conv1(x))
    y = _smoothed(self, self.bn2(self.conv2(y)))
    return _with_residual(self.bn3, self.conv3(y), _shortcut(self, x))


def _smoothed(self: Any, y: Tensor) -> Tensor:
    """By timm's module against aliasing, which torchvision's blocks have not."""
    return self.aa(y) if hasattr(self, "aa") else y


def _shortcut(self: Any, x: Tensor) -> Tensor:
    return x if self.downsample is None else self.downsample(x)


def _transformers(self: Any, hidden_state: Tensor) -> Tensor:
    y = hidden_state
    for layer in self.layer[:-1]:
        y = layer(y)
    last = self.layer[-1]
    return _with_residual(last.normalization, last.convolution(y), self.shortcut(hidden_state))


def _with_residual(norm: nn.Module, y: Tensor, residual: Tensor) -> Tensor:
    """The libraries add in place: the sum has y's dtype, whatever autocast has made of it."""
    return norm(y, residual.to(y.dtype))


_BETWEEN = ("drop_block", "se", "drop_path")
_TORCHVISION, _TIMM = "torchvision.models.resnet", "timm.models.resnet"
_TRANSFORMERS = "transformers.models.resnet.modeling_resnet"
_TWO, _THREE = (("bn1", "relu"), ("bn2", "relu")), (("bn1", "relu"), ("bn2", "relu"), ("bn3", "relu"))
_TIMMS_THREE = (("bn1", "act1"), ("bn2", "act2"), ("bn3", "act3"))
BLOCKS = {
    "TorchvisionBasicBlock": Block((_TORCHVISION, "BasicBlock"), _two, _TWO),
    "TorchvisionBottleneck": Block((_TORCHVISION, "Bottleneck"), _three, _THREE),
    "TimmBasicBlock": Block((_TIMM, "BasicBlock"), _two, _TIMMS_THREE[:2], _BETWEEN),
    "TimmBottleneck": Block((_TIMM, "Bottleneck"), _three, _TIMMS_THREE, _BETWEEN),
    "TransformersBasicLayer": Block(
        (_TRANSFORMERS, "ResNetBasicLayer"),
        _transformers,
        (("layer.1.normalization", "activation"),),
        ("layer.1.activation",),
    ),
    "TransformersBottleNeckLayer": Block(
        (_TRANSFORMERS, "ResNetBottleNeckLayer"),
        _transformers,
        (("layer.2.normalization", "activation"),),
        ("layer.2.activation",),
    ),
}
"""By the name of the fused class in this module."""
_NAMES = {block.source: name for name, block in BLOCKS.items()}


def block_of(module: nn.Module) -> tuple[str, Block] | None:
    """The name of the fused class for a block and what is known of it; ``None`` for any other module."""
    kind = type(module)
    name = _NAMES.get((kind.__module__, kind.__name__))
    return None if name is None else (name, BLOCKS[name])


def fused_block(module: nn.Module) -> Block | None:
    """What is known of a fused block; ``None`` for any other module."""
    kind = type(module)
    return BLOCKS.get(kind.__name__) if kind.__module__ == __name__ else None


def __getattr__(name: str) -> Any:
    if name not in BLOCKS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    block = BLOCKS[name]
    path, source = block.source
    base = getattr(import_module(path), source)
    made = type(name, (base,), {"forward": block.forward, "__module__": __name__, "__doc__": f"A fused `{source}`."})
    globals()[name] = made
    return made
