"""Norms that take in what follows them: an activation, and in ResNet blocks a residual too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from functools import cache

from torch import nn
from torch.nn import functional as F

from ..modules import NormalizationLayer
from ..modules.evonorm import EvoNorm2d
from . import blocks, courses
from .carry import hooked

Undo = Callable[[], None]
_PLAIN = {nn.ReLU: "relu", nn.SiLU: "silu"}
_GELU = {"none": "gelu", "tanh": "gelu_tanh"}
_TRANSFORMERS = {"SiLUActivation": "silu", "GELUActivation": "gelu", "GELUTanh": "gelu_tanh"}


def activation_of(module: nn.Module | None) -> str | None:
    """The activation that nobody could tell from a ``module``; ``None`` where there is none."""
    if module is None or hooked(module) or "forward" in vars(module):
        return None
    if any((module._parameters, module._buffers, module._modules)):  # a state_dict would lack them
        return None
    kind = type(module)
    if kind.__module__ == "transformers.activations":
        # these keep what they call, a function of torch's unless they were asked for Python's
        inner = vars(module).get("act", F.gelu)
        return _TRANSFORMERS.get(kind.__name__) if getattr(inner, "func", inner) is F.gelu else None
    return _GELU.get(module.approximate) if kind is nn.GELU else _PLAIN.get(kind)


def fused(model: nn.Module, new: Collection[nn.Module]) -> list[str]:
    """Lets the layers ``new`` of ``model`` take in what follows them; lines for a report. An error changes nothing.

    Where the code of a module shows, by `torch.fx` and whatever its flags are, that a layer's output goes to an
    activation and nowhere else; `torch.nn.Identity` then stands in the activation's place. What is hooked, shared,
    called more than once or not a module stays; so does what the code of a module around it calls too, as far as that
    can be told.
    """
    done: list[str] = []
    undo: list[Undo] = []
    times = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    alone = [m for m in new if times[id(m)] == 1 and not hooked(m)]
    free = {m for m in alone if isinstance(m, NormalizationLayer) and m.activation is None}
    try:
        for path, module in model.named_modules():
            _fuse_follower(path, module, free, done, undo)
        free = {m for m in free if not m.followed_by}
        called = cache(courses.called)
        for path, _ in model.named_modules():
            _fuse_block(model, path, called, free, done, undo)
        free |= {m for m in alone if isinstance(m, EvoNorm2d) and m.activates}  # which add no residual
        for path, module in list(model.named_modules()):
            if not free.isdisjoint(module._modules.values()):
                _fuse_pairs(model, path, called, free, done, undo)
    except BaseException:
        while undo:  # the last first
            undo.pop()()
        raise
    return done


def opened(model: nn.Module) -> list[nn.Module]:
    """Gives the fused blocks of ``model`` their libraries' classes back, in which activations follow the norms."""
    found = []
    for module in model.modules():
        block = blocks.fused_block(module)
        if block is not None:
            children = dict(module.named_modules(remove_duplicate=False))
            for norm, _ in block.pairs:
                children[norm].activation = None
            module.__class__ = type(module).__mro__[1]
            found.append(module)
    return found


def closed(again: list[nn.Module]) -> None:
    """Fuses what was `opened` again, where its norms can take in what they took in."""
    for module in again:
        norms = {m for m in module.modules() if isinstance(m, NormalizationLayer) and m.activation is None}
        _fuse_block(module, "", courses.called, norms, [], [])


def _take_in(norm: nn.Module, activation: str, undo: list[Undo]) -> None:
    if isinstance(norm, EvoNorm2d):  # has one of its own
        return
    norm.activation = activation
    undo.append(lambda: setattr(norm, "activation", None))


def _fuse_follower(path: str, norm: nn.Module, free: set[nn.Module], done: list[str], undo: list[Undo]) -> None:
    """The activation that a layer itself applies, as those in the places of timm's."""
    if norm not in free or norm.followed_by != ("act",):
        return
    module = norm._modules["act"]
    activation = activation_of(module)
    if activation is None:
        return
    _take_in(norm, activation, undo)
    del norm._modules["act"]
    norm.followed_by = ()

    def back() -> None:
        norm._modules["act"], norm.followed_by = module, ("act",)

    undo.append(back)
    free.discard(norm)
    done.append(f"{path}: with {type(module).__name__}")


def _fuse_block(
    model: nn.Module, path: str, called: courses.Called, free: set[nn.Module], done: list[str], undo: list[Undo]
) -> None:
    module = model.get_submodule(path)
    known = blocks.block_of(module)
    if known is None or "forward" in vars(module):
        return
    name, block = known
    children = dict(module.named_modules(remove_duplicate=False))
    if any(not isinstance(children.get(child), nn.Identity | None) for child in block.absent):
        return
    pairs = [(children.get(norm), activation_of(children.get(act))) for norm, act in block.pairs]
    if any(norm not in free or activation is None for norm, activation in pairs):
        return
    if not courses.called_from_around(model, path, called).isdisjoint(child for pair in block.pairs for child in pair):
        return
    kind = type(module)
    module.__class__ = getattr(blocks, name)
    undo.append(lambda: setattr(module, "__class__", kind))
    done.append(f"{path or 'model'}: {kind.__name__} -> {name}")
    last = block.pairs[-1][0]
    for (norm, activation), (its_name, act) in zip(pairs, block.pairs, strict=True):
        _take_in(norm, activation, undo)
        free.discard(norm)
        residual = "the residual and " if its_name == last else ""
        done.append(f"{path}.{its_name}: with {residual}{type(children[act]).__name__}".lstrip("."))


def _fuse_pairs(
    model: nn.Module, path: str, called: courses.Called, free: set[nn.Module], done: list[str], undo: list[Undo]
) -> None:
    module = model.get_submodule(path)
    if "forward" in vars(module):
        return
    found = courses.followers(module)
    elsewhere = courses.called_from_around(model, path, called) if found else set()
    for name, names in found.items():
        act, norms = module._modules[name], [module._modules.get(norm) for norm in names]
        activation = activation_of(act)
        if activation is None or not free.issuperset(norms):
            continue
        if not elsewhere.isdisjoint((name, *names)):
            continue
        if sum(child is act for child in module._modules.values()) > 1:
            continue  # to the tracer all calls of it are of one name
        for norm, its_name in zip(norms, names, strict=True):
            _take_in(norm, activation, undo)
            free.discard(norm)
            done.append(f"{path}.{its_name}: with {type(act).__name__}".lstrip("."))
        module._modules[name] = nn.Identity()
        undo.append(lambda name=name, act=act: module._modules.__setitem__(name, act))
