"""The paper's penalty on the centred activations, summed over the calls of a model's layers."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..checks import compute_dtype

_ADDING = threading.Lock()
"""Replicas of a model call from threads of their own."""


class _Pending:
    """Stands for a call whose output is in some graph: one of its hooks holds it."""

    __slots__ = ("__weakref__", "node", "passed")

    def __init__(self, y: Tensor) -> None:
        node = y.grad_fn
        self.node = weakref.ref(node) if hasattr(node, "saved_tensors") else None
        self.passed = False
        y.register_hook(self)

    def __call__(self, dy: Tensor) -> None:
        self.passed = True

    def open(self) -> bool:
        """Whether the graph can still be gone backward through, also after a gradient that has kept it."""
        if not self.passed:
            return True
        node = None if self.node is None else self.node()
        try:
            return node is not None and bool(node.saved_tensors)
        except RuntimeError:  # they have been freed
            return False


class Calls:
    """What a layer and its replicas know of their calls in training mode, beside ``l1`` of the last one."""

    def __init__(self) -> None:
        self.collectors: tuple[Penalty, ...] = ()
        self.pending: weakref.WeakSet[_Pending] = weakref.WeakSet()
        """Calls since a penalty was last taken, without those whose graph is gone."""
        self.last: weakref.ref[_Pending] | None = None
        """The last call, if it has a graph."""
        self.unwatched = 0
        """Calls since then, or since one with a graph, that have none: by torch.func's, or without gradients."""
        self.without_gradient = False
        """Whether the last call was made without gradients."""
        self.replicated = False
        """Whether the last call was one of a replica, on which ``l1`` has stayed."""

    def __reduce__(self) -> tuple[type[Calls], tuple[()]]:
        return Calls, ()  # a copy has not been called

    def taken(self) -> None:
        """A penalty has been taken that counts all calls so far."""
        self.pending.clear()
        self.unwatched = 0

    def note(self, y: Tensor, l1: Tensor, weight: float, replica: bool) -> None:
        """A call in training mode, its output and its l1, of which ``weight`` times as much is the penalty."""
        if torch.compiler.is_compiling():
            for collector in self.collectors:
                collector.add(weight * l1)
            return
        if torch._C._current_graph_task_id() != -1:  # a checkpoint in backward: this call has been counted
            return
        for collector in self.collectors:
            with _ADDING:
                collector.add(weight * l1)
        self.without_gradient, self.replicated = not torch.is_grad_enabled(), replica
        if y.requires_grad and not torch._C._are_functorch_transforms_active():
            call = _Pending(y)
            self.pending.add(call)
            self.last, self.unwatched = weakref.ref(call), 0
        else:
            self.last, self.unwatched = None, self.unwatched + 1

    def open(self) -> list[_Pending]:
        """Calls since a penalty was last taken that can still be in a loss."""
        return [call for call in self.pending if call.open()]

    def current(self) -> bool:
        """Whether the last call may belong to the loss at hand: a backward pass through it is not over."""
        call = None if self.last is None else self.last()
        return self.last is None or (call is not None and call.open())


class Penalty:
    """The sum over calls that `collect_l1` hands out; calling it gives the penalty so far."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.total: Tensor | None = None
        self.without_gradient = False

    def add(self, term: Tensor) -> None:
        """One call's share."""
        if not torch.is_grad_enabled():
            self.without_gradient = True
        self.total = term if self.total is None else self.total + term.to(self.total.device)

    def __call__(self) -> Tensor:
        """The sum of ``l1_weight * l1`` over all calls in training mode since the block began: a scalar.

        Raises:
            RuntimeError: where it would be wrong: a call was made without gradients, which a reentrant checkpoint does
                too, or under a transformation of torch.func that has ended.
        """
        for _, layer in _layers(self.model):
            layer._calls.taken()
        if self.total is None:
            return _nothing(self.model)
        if self.without_gradient and torch.is_grad_enabled():
            raise _without_gradient("collect_l1", "a layer")
        _check_level("collect_l1", self.total)
        return self.total


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, m) for name, m in model.named_modules() if isinstance(m.__dict__.get("_calls"), Calls))


@contextmanager
def collect_l1(model: nn.Module) -> Iterator[Penalty]:
    """Counts every call of the layers of ``model`` inside the block, of shared ones and of recurrent cells too.

    Also where `l1_penalty` cannot: in compiled models, in checkpoints (``use_reentrant=False``), and in the replicas of
    `torch.nn.DataParallel`, each of which is a call, with the mean over its own samples. What a checkpoint calls again
    in backward counts once. Layers that ``model`` gets inside the block are not counted.

    Args:
        model: whose layers have an ``l1_weight`` above 0.

    Yields:
        ``penalty``: ``penalty()`` is the sum of ``l1_weight * l1`` over the calls in training mode so far, a scalar to
        add to the loss. It may be called behind the block too.

    Raises:
        RuntimeError: by ``penalty()``, where the value would have no gradient or belongs to a transformation of
            torch.func that has ended.

    Example:
        >>> norm, h = DivisiveNormFeatures(8, window=3, l1_weight=0.01), torch.zeros(2, 8)
        >>> with collect_l1(norm) as penalty:
        ...     for x in torch.randn(5, 2, 8):
        ...         h = norm(x + h).tanh()
        >>> loss = h.square().mean() + penalty()
    """
    penalty = Penalty(model)
    calls = [layer._calls for _, layer in _layers(model)]
    for of_layer in calls:
        of_layer.collectors += (penalty,)
    try:
        yield penalty
    finally:
        for of_layer in calls:
            of_layer.collectors = tuple(c for c in of_layer.collectors if c is not penalty)


def l1_penalty(model: nn.Module) -> Tensor:
    """The sum of ``l1_weight * l1`` over the layers of ``model``, from each layer's one call in training mode.

    A scalar to add to the loss; zero, on the device of the parameters, where no layer has a penalty. A layer keeps the
    ``l1`` of its last call: where there are several for a loss, or the model is compiled, use `collect_l1`. A layer
    that the loss went past adds nothing.

    Raises:
        RuntimeError: where it would be wrong: a layer was called more than once for this loss, in replicas, without
            gradients (as a reentrant checkpoint does), or under a transformation of torch.func that has ended. Calls
            in compiled code are not seen, nor those whose output is in no graph any more.
    """
    layers = list(_layers(model))
    for name, layer in layers:
        _check_one_call(f"{name or 'the model'}, a {type(layer).__name__},", layer._calls, layer.l1)
    counted = [layer for _, layer in layers if layer.l1 is not None]
    # what this loss has gone past keeps an l1 of an earlier one; behind backward all do, for whoever looks at it then
    total = None
    for layer in [layer for layer in counted if layer._calls.current()] or counted:
        term = layer.l1_weight * layer.l1
        total = term if total is None else total + term.to(total.device)
    for _, layer in layers:
        layer._calls.taken()
    return _nothing(model) if total is None else total


def _check_one_call(kind: str, calls: Calls, l1: Tensor | None) -> None:
    """Raises where ``l1`` is not that of all calls of a layer for a loss."""
    if calls.replicated:
        raise RuntimeError(f"l1_penalty: {kind} was called in replicas; `with collect_l1(model)` sums over them")
    pending = calls.open()
    times = len(pending) + calls.unwatched
    if times > 1:
        counted = f"was called {times} times, l1 is that of the last"
        raise RuntimeError(f"l1_penalty: {kind} {counted}; `with collect_l1(model)` sums over all calls")
    if pending and (l1 is None or calls.last is None or calls.last() not in pending):
        again = "was called again after the call that counts, in eval mode or for a gradient of its own"
        raise RuntimeError(f"l1_penalty: {kind} {again}; `with collect_l1(model)` keeps what was before")
    if l1 is not None:
        if calls.without_gradient and torch.is_grad_enabled():
            raise _without_gradient("l1_penalty", kind)
        _check_level("l1_penalty", l1)


def _nothing(model: nn.Module) -> Tensor:
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    device, dtype = ("cpu", torch.float32) if like is None else (like.device, compute_dtype(like))
    return torch.zeros((), device=device, dtype=dtype)


def _without_gradient(function: str, what: str) -> RuntimeError:
    return RuntimeError(
        f"{function}: {what} was called without gradients, so its penalty has none; a checkpoint needs "
        "use_reentrant=False, a call that should not count eval mode"
    )


def _check_level(function: str, t: Tensor) -> None:
    """Raises where ``t`` belongs to a transformation of torch.func that is not at work any more."""
    if not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(t):
        level = torch._C._functorch.maybe_current_level()
        if level is None or torch._C._functorch.maybe_get_level(t) > level:
            raise RuntimeError(
                f"{function}: a layer was called under a transformation of torch.func that has ended; take the "
                "penalty inside of it and return it"
            )
