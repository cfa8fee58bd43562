"""Which tensors of a model are weights: matrices, convolutions, embeddings, but nothing of a normalization layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import Optimizer

from ..decay import is_norm
from .rows import Rows


class Place(NamedTuple):
    """Where a parameter is: modules may be given others, by sharding or conversion, under the same name."""

    module: nn.Module
    attribute: str
    name: str
    """The attribute's, in the model."""

    @property
    def parameter(self) -> nn.Parameter:
        """What is there now.

        Raises:
            RuntimeError: where there is none any more.
        """
        parameter = self.module._parameters.get(self.attribute)
        if parameter is None:
            raise RuntimeError(f"{self.name}: is projected, but no parameter any more; parametrize before `project`")
        return parameter


def weights(model: nn.Module) -> Iterator[Place]:
    """Parameters of two or more dimensions, once each, but those of normalization layers and of parametrizations."""
    seen = set()
    for prefix, module in model.named_modules():
        if is_norm(module) or isinstance(module, ParametrizationList):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() >= 2 and id(parameter) not in seen:
                seen.add(id(parameter))
                yield Place(module, name, f"{prefix}.{name}" if prefix else name)


def directions(model: nn.Module) -> Iterator[Place]:
    """What stands in the place of a weight where `normalize` has parametrized it: v."""
    for prefix, module in model.named_modules():
        if isinstance(module, ParametrizationList) and isinstance(module[0], Rows):
            name = "original" if module.is_tensor else "original1"
            if name in module._parameters:
                yield Place(module, name, f"{prefix}.{name}")


def affine_pairs(model: nn.Module) -> Iterator[list[Place]]:
    """Weight and, where there is one, bias of each normalization layer that has a weight."""
    for prefix, module in model.named_modules():
        if is_norm(module) and module._parameters.get("weight") is not None:
            names = [name for name in ("weight", "bias") if module._parameters.get(name) is not None]
            yield [Place(module, name, f"{prefix}.{name}" if prefix else name) for name in names]


def held(optimizer: Optimizer) -> set[int]:
    """The identities of the parameters that an optimizer moves."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def skipped(model: nn.Module, skip: str | nn.Module | Iterable[str | nn.Module]) -> set[int]:
    """The identities of the parameters that names, patterns for names and modules stand for.

    Raises:
        TypeError: on entries that are neither names nor modules.
        ValueError: on those that stand for nothing in the model.
    """
    single = isinstance(skip, str | nn.Module)
    if not single and not isinstance(skip, Iterable):
        raise TypeError(f"skip: got {type(skip).__name__}, expected names and modules")
    found: set[int] = set()
    for entry in [skip] if single else skip:
        parameters = list(_meant(model, entry))
        if not parameters:
            what = repr(entry) if isinstance(entry, str) else f"a {type(entry).__name__}"
            raise ValueError(f"skip: got {what}, expected names and modules of the model with parameters")
        found.update(map(id, parameters))
    return found


def _meant(model: nn.Module, entry: str | nn.Module) -> Iterator[nn.Parameter]:
    if not isinstance(entry, str | nn.Module):
        raise TypeError(f"skip: got an entry of type {type(entry).__name__}, expected a name or a module")
    for name, module in model.named_modules(remove_duplicate=False):
        if module is entry or (isinstance(entry, str) and fnmatchcase(name, entry)):
            yield from module.parameters()
    if isinstance(entry, str):
        named = model.named_parameters(remove_duplicate=False)
        yield from (parameter for name, parameter in named if fnmatchcase(name, entry))
