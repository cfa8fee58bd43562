"""What the code of a module does with its children, by `torch.fx`, in every course that its flags may make it take."""

from __future__ import annotations

import copy
import types
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from inspect import getattr_static
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node, Proxy, Tracer

MOST = 32
"""Courses that are looked at; code that may take more says nothing."""

Asked = Callable[[Hashable, bool], bool]
Called = Callable[[nn.Module], set[str]]


def followers(module: nn.Module) -> dict[str, list[str]]:
    """The children that take nothing but other children's whole outputs, and each once, with the names of the latter.

    In every course that calls any of them. None, where there is a course that cannot be told.
    """
    pairs: dict[str, list[str]] = {}
    courses = []
    for graph, told in _courses(module):
        if not told:
            return {}
        courses.append((_pairs(graph), set(_calls(graph))))
        pairs |= courses[-1][0]
    return {
        name: names
        for name, names in pairs.items()
        if name in module._modules
        and all(found.get(name) == names or calls.isdisjoint((name, *names)) for found, calls in courses)
    }


def called(module: nn.Module) -> set[str]:
    """The modules, by their paths, that the code of ``module`` calls in any course, as far as that can be told."""
    return {path for graph, _ in _courses(module) for path in _calls(graph)}


def read(module: nn.Module) -> set[str]:
    """The modules, by their paths, of which the code of ``module`` takes a parameter, as far as that can be told."""
    nodes = (node for graph, _ in _courses(module) for node in graph.nodes)
    return {node.target.rpartition(".")[0] for node in nodes if node.op == "get_attr"}


def called_from_around(model: nn.Module, path: str, called: Called) -> set[str]:
    """What lies in the module at ``path`` and is called by modules around it themselves, as far as that can be told.

    ``called`` is the function of this module, or one that keeps what that found; or `read`, for whose parameters.
    """
    parts, found = path.split(".") if path else [], set()
    for depth in range(len(parts)):
        own = ".".join(parts[depth:]) + "."
        calls = called(model.get_submodule(".".join(parts[:depth])))
        found |= {name.removeprefix(own) for name in calls if name.startswith(own)}
    return found


def _calls(graph: Graph) -> list[str]:
    return [node.target for node in graph.nodes if node.op == "call_module"]


def _pairs(graph: Graph) -> dict[str, list[str]]:
    times = Counter(_calls(graph))
    found: dict[str, list[str]] = {}
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        before = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if not (isinstance(before, Node) and before.op == "call_module" and len(before.users) == 1):
            before = None
        alone = before is not None and times[before.target] == 1
        found.setdefault(node.target, []).append(before.target if alone else "")
    return {name: names for name, names in found.items() if "" not in names}


def _courses(module: nn.Module) -> Iterator[tuple[Graph, bool]]:
    """What is recorded of each course, and whether that is all: to its end, with nothing kept of children's outputs."""
    to_come: list[dict[Hashable, bool]] = [{}]
    for _ in range(MOST):
        if not to_come:
            return
        given = to_come.pop()
        tracer = _Tracer(given)
        told = _recorded(tracer, module)
        yield tracer.graph, told
        answers = list(tracer.answers.items())
        for i in range(len(given), len(answers)):  # each new question once more, answered the other way
            question, answer = answers[i]
            to_come.append({**dict(answers[:i]), question: not answer})
    if to_come:
        yield Graph(), False


class _Tracer(Tracer):
    """To it modules are what they are called; conditions and flags go by ``answers``, and unanswered by the usual."""

    def __init__(self, answers: dict[Hashable, bool]) -> None:
        super().__init__()
        self.graph = Graph()
        self.answers = dict(answers)
        self._conditions = 0

    def asked(self, question: Hashable, usual: bool) -> bool:
        """The answer of this course."""
        return self.answers.setdefault(question, usual)

    def to_bool(self, obj: Proxy) -> bool:
        """A condition on numbers, each by its place in the course."""
        self._conditions += 1
        return self.asked(self._conditions, False)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """As it is called; a part of an `nn.Sequential`, which is made on the way, by the modules in it."""
        if isinstance(m, nn.Sequential) and m not in self.submodule_paths:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)


def _recorded(tracer: _Tracer, module: nn.Module) -> bool:
    """Whether all of a course could be recorded, by a twin, for its code may set attributes."""
    try:
        twin = _twin(module, tracer.asked)
        with torch.random.fork_rng(devices=[]):
            tracer.trace(twin)
    except Exception:  # whatever it is, the code does not say what follows what
        return False
    # what is kept of a child's output has another use
    return not any(_holds_output(value) for value in vars(twin).values())


def _twin(module: nn.Module, asked: Asked) -> nn.Module:
    kind = type(module)
    twin = object.__new__(types.new_class(kind.__name__, (_asking(kind, asked), kind)))
    state = {name: copy.copy(v) if isinstance(v, dict | list | set) else v for name, v in vars(module).items()}
    state["_buffers"] = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
    vars(twin).update(state)
    return twin


def _asking(kind: type, asked: Asked) -> type:
    """A base that asks for the value of every flag: `training`, and all others that are plain attributes."""

    class Asking:
        def __init_subclass__(cls) -> None:
            """Nothing of what ``kind`` would do: the twin's class is no new one."""

        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            if type(value) is bool and not isinstance(getattr_static(kind, name, None), property):
                return asked((name, value), value)
            return value

    return Asking


def _holds_output(value: object) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, Proxy) or (isinstance(value, list | set | tuple) and any(map(_holds_output, value)))
