"""Norms that take in what follows them: an activation, and in ResNet blocks a residual too."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection

import torch
from torch import nn
from torch.fx import Graph, Node, Proxy, Tracer
from torch.nn import functional as F

from ..modules import NormalizationLayer
from . import blocks
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

    Where the code of a module shows, by `torch.fx` and in both modes, that a layer's output goes to an activation and
    nowhere else; `torch.nn.Identity` then stands in the activation's place. What is hooked, shared, called more than
    once or not a module stays; so does what the code of a module around it calls too, as far as that can be traced.
    """
    done: list[str] = []
    undo: list[Undo] = []
    times = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    free = {m for m in new if isinstance(m, NormalizationLayer) and times[id(m)] == 1 and m.activation is None}
    free = {m for m in free if not hooked(m)}
    try:
        for path, module in model.named_modules():
            _fuse_follower(path, module, free, done, undo)
        free = {m for m in free if not m.followed_by}
        for path, module in model.named_modules():
            _fuse_block(path, module, free, done, undo)
        for path, module in list(model.named_modules()):
            if not free.isdisjoint(module._modules.values()):
                _fuse_pairs(model, path, module, free, done, undo)
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
        _fuse_block("", module, norms, [], [])


def _take_in(norm: NormalizationLayer, activation: str, undo: list[Undo]) -> None:
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


def _fuse_block(path: str, module: nn.Module, free: set[nn.Module], done: list[str], undo: list[Undo]) -> None:
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
    for norm, activation in pairs:
        _take_in(norm, activation, undo)
        free.discard(norm)
    kind = type(module)
    module.__class__ = getattr(blocks, name)
    undo.append(lambda: setattr(module, "__class__", kind))
    done.append(f"{path}: {kind.__name__} -> {name}")


def _fuse_pairs(
    model: nn.Module, path: str, module: nn.Module, free: set[nn.Module], done: list[str], undo: list[Undo]
) -> None:
    if "forward" in vars(module):
        return
    elsewhere = _called_from_around(model, path)
    found, in_eval = (_followers(module, training) for training in (True, False))
    for name, names in found.items():
        act, norms = module._modules[name], [module._modules.get(norm) for norm in names]
        activation = activation_of(act)
        if activation is None or in_eval.get(name) != names or not free.issuperset(norms):
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


def _holds_output(value: object) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, Proxy) or (isinstance(value, list | set | tuple) and any(map(_holds_output, value)))


class _ChildrenAreLeaves(Tracer):
    """To it modules are what they are called, but for those that are looked into, by their paths."""

    def __init__(self, into: Collection[str] = ()) -> None:
        super().__init__()
        self._into = into

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return qualified_name not in self._into


def _called_from_around(model: nn.Module, path: str) -> set[str]:
    """The children of the module at ``path`` that modules around it call themselves, where their code can be traced."""
    parts, found = path.split(".") if path else [], set()
    for depth in range(len(parts)):
        around = model.get_submodule(".".join(parts[:depth]))
        own = ".".join(parts[depth:])
        within = [".".join(parts[depth:end]) for end in range(depth + 1, len(parts))]
        for training in (True, False):
            for name in _calls(around, training, within):
                if name.startswith(f"{own}.") and "." not in name[len(own) + 1 :]:
                    found.add(name[len(own) + 1 :])
    return found


def _calls(module: nn.Module, training: bool, into: Collection[str]) -> list[str]:
    graph = _traced(module, training, into)
    return [] if graph is None else [node.target for node in graph.nodes if node.op == "call_module"]


def _followers(module: nn.Module, training: bool) -> dict[str, list[str]]:
    """The children that take nothing but other children's whole outputs, and each once, with the names of the latter.

    By the code of ``module`` alone.
    """
    graph = _traced(module, training)
    if graph is None:
        return {}
    calls = [node for node in graph.nodes if node.op == "call_module"]
    times = Counter(node.target for node in calls)
    found: dict[str, list[str]] = {}
    for node in calls:
        before = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if not (isinstance(before, Node) and before.op == "call_module" and len(before.users) == 1):
            before = None
        alone = before is not None and times[before.target] == 1
        found.setdefault(node.target, []).append(before.target if alone else "")
    return {name: names for name, names in found.items() if name in module._modules and "" not in names}


def _traced(module: nn.Module, training: bool, into: Collection[str] = ()) -> Graph | None:
    """What the code of ``module`` does with its children; ``None`` where that cannot be told.

    A twin runs it, for it may set attributes; what it would keep of its children's outputs has another use.
    """
    twin = object.__new__(type(module))
    state = {name: copy.copy(v) if isinstance(v, dict | list | set) else v for name, v in vars(module).items()}
    state["_buffers"] = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
    vars(twin).update({**state, "training": training})
    try:
        with torch.random.fork_rng(devices=[]):
            graph = _ChildrenAreLeaves(into).trace(twin)
    except Exception:  # whatever it is, the code does not say what follows what
        return None
    return None if any(_holds_output(value) for value in vars(twin).values()) else graph
