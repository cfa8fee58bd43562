"""Calls with tensors of one unusual kind: ``python hostile.py KIND`` prints a line of JSON for every layer and form.

A process of its own, because a wrong address may end it. Each line has the subject and what came of it: ``"right"``
(values and gradients are those of the plain tensor with the same numbers), or the error's type and message. The subject
is printed before it runs, so that a crash has a name.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from test_citizens import LAYERS
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from divnorm_kernels import divisive_norm

FORMS = {
    "divisive_norm, a window": ((2, 4, 5, 6), {"window": 3}),
    "divisive_norm, whole fields": ((2, 4, 5, 6), {"window": "all", "groups": 2}),
    "divisive_norm, features": ((3, 7), {"window": 4}),
    "divisive_norm, the reference": ((2, 4, 5, 6), {"window": 3, "backend": "reference"}),
    "divisive_norm, a ReLU and l1": ((2, 4, 7), {"window": 3, "activation": "relu", "return_l1": True}),
}
EVALUATING = ", evaluating"
"""Behind the name of a layer with running statistics: in eval mode."""
JAGGED = ("DivisiveNormFeatures", "RMSNorm")
"""The layers whose rows are shorter than what varies: one dimension, of which there may be any number."""


def same(t: Tensor) -> Tensor:
    return t


@dataclass
class Kind:
    """One kind of tensor: how a plain one is made into it, and what is expected of it."""

    x: Callable[[Tensor], Any] = same
    """x of this kind, from a plain one."""
    values: Callable[[Tensor], Tensor] = same
    """A plain tensor with numbers that the kind can hold."""
    dy: Callable[[Tensor], Tensor] = same
    """The gradient of y, of this kind."""
    dy_values: Callable[[Tensor], Tensor] = same
    """The plain gradient with the numbers of ``dy``."""
    parameter: str | None = None
    """The parameter that is of this kind, in place of x: weight, bias or sigma; of the function alone."""
    everywhere: bool = False
    """Whether the function's parameters are of this kind too."""
    grad: Callable[[Tensor, list[Tensor], Tensor], Any] = lambda y, leaves, dy: torch.autograd.grad(y, leaves, dy)
    plain_grad: Callable[[Tensor, list[Tensor], Tensor], Any] = lambda y, leaves, dy: torch.autograd.grad(y, leaves, dy)
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    right: Callable[[str], bool] = lambda subject: True
    """For which subjects the right values are expected, for the others an error."""
    backward: bool = True
    meta: bool = False
    """Whether there are no numbers to compare, but shape, dtype and device."""


class Subclass(torch.Tensor):
    """A subclass as people write it: with nothing of its own."""


def freed(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def freed_behind_an_offset(t: Tensor) -> Tensor:
    t = torch.cat([t, t])[t.shape[0] :]
    t.untyped_storage().resize_(0)
    return t


def shrunk(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(t.element_size())
    return t


def spread(t: Tensor) -> Tensor:
    """All samples the first one's memory."""
    return t[:1].expand_as(t)


def overlapping(t: Tensor) -> Tensor:
    """Every number is that of its distance from the first."""
    return torch.sin(torch.arange(float(sum(t.shape)))).as_strided(t.shape, (1,) * t.dim())


def overlapped(t: Tensor) -> Tensor:
    """Numbers that such memory holds."""
    return torch.sin(sum(torch.arange(size).view(-1, *[1] * (t.dim() - 1 - d)) for d, size in enumerate(t.shape)))


def shrunk_and_transposed(t: Tensor) -> Tensor:
    t = t.movedim(-1, 0).contiguous().movedim(0, -1)
    t.untyped_storage().resize_(t.element_size())
    return t


def sliced(t: Tensor) -> Tensor:
    wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"))
    wide[..., ::2] = t
    return wide[..., ::2]


def conjugated(t: Tensor) -> Tensor:
    return torch.complex(t, -t).conj().imag


def freed_before(**options: bool) -> Callable[[Tensor, list[Tensor], Tensor], Any]:
    """Backward of an x whose storage has gone since forward."""

    def grad(y: Tensor, leaves: list[Tensor], dy: Tensor) -> Any:
        leaves[0].detach().untyped_storage().resize_(0)
        return torch.autograd.grad(y, leaves, dy, **options)

    return grad


def batched(grad: Callable[[Tensor, list[Tensor], Tensor], Any]) -> dict[str, Any]:
    """Three gradients at once, by ``grad``, against one after the other."""

    def one_by_one(y: Tensor, leaves: list[Tensor], dy: Tensor) -> list[Tensor]:
        rows = [torch.autograd.grad(y, leaves, scale * dy, retain_graph=True) for scale in (1, -2, 3)]
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    return {"grad": lambda y, leaves, dy: grad(y, leaves, torch.stack([dy, -2 * dy, 3 * dy])), "plain_grad": one_by_one}


def vmapped(y: Tensor, leaves: list[Tensor], stack: Tensor) -> Any:
    return torch.func.vmap(lambda dy: torch.autograd.grad(y, leaves, dy, retain_graph=True))(stack)


def twice(y: Tensor, leaves: list[Tensor], dy: Tensor) -> list[Tensor]:
    """The gradients, and those of their squares' sum."""
    first = torch.autograd.grad(y, leaves, dy, create_graph=True)
    return [
        *first,
        *torch.autograd.grad(sum(t.square().sum() for t in first), leaves, allow_unused=True, materialize_grads=True),
    ]


class Passing(TorchDispatchMode):
    """A mode that lets everything through: what counts operators or recomputes selected ones is such a one."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def left_behind(transform: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
    """A wrapper that a transformation made and that outlived it."""

    def make(t: Tensor) -> Tensor:
        kept: list[Tensor] = []
        transform(lambda inner: (kept.append(inner), inner.sum())[1])(t)
        return kept[0]

    return make


def distributed(t: Tensor) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    return distribute_tensor(t, init_device_mesh("cpu", (1,)), [Replicate()])


def nested(t: Tensor, **options: Any) -> Tensor:
    return torch.nested.nested_tensor(list(t.unbind()) if t.dim() > 2 else [t[:1], t[1:]], **options)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device("cpu")


def refused(subject: str) -> bool:
    return False


PARAMETERS = {
    f"{name} {kind}": Kind(parameter=name, **options)
    for name in ("weight", "bias", "sigma")
    for kind, options in {
        "negated": {"x": lambda t: torch._neg_view(-t)},
        "sliced": {"x": lambda t: torch.stack([t, t], -1)[..., 0]},
        "freed": {"x": freed, "right": refused},
        "sparse": {"x": lambda t: t.to_sparse(), "right": refused},
        "on meta": {"x": lambda t: t.to("meta"), "right": refused},
        "of a subclass": {"x": lambda t: t.as_subclass(Subclass)},
    }.items()
}
TWICE = {"grad": twice, "plain_grad": twice}
KINDS = {
    "a default device, set": Kind(around=lambda: default_device("meta")),
    "a default device, with": Kind(around=lambda: torch.device("meta")),
    "negated": Kind(x=lambda t: torch._neg_view(-t)),
    "conjugated, then its imaginary part": Kind(x=conjugated),
    "zero": Kind(x=lambda t: torch._efficientzerotensor(t.shape), values=torch.zeros_like),
    "expanded": Kind(x=spread, values=lambda t: spread(t).clone()),
    "overlapping": Kind(x=overlapping, values=overlapped),
    "sliced": Kind(x=sliced),
    "a parameter": Kind(x=torch.nn.Parameter),
    "a subclass": Kind(x=lambda t: t.as_subclass(Subclass)),
    "made under inference": Kind(around=torch.inference_mode, backward=False),
    "freed": Kind(x=freed, right=refused),
    "freed behind an offset": Kind(x=freed_behind_an_offset, right=refused),
    "shrunk": Kind(x=shrunk, right=refused),
    "shrunk and transposed": Kind(x=shrunk_and_transposed, right=refused, backward=False),
    "sparse": Kind(x=lambda t: t.to_sparse(), right=refused),
    "mkldnn": Kind(x=lambda t: t.to_mkldnn(), right=refused),
    "quantized": Kind(x=lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), right=refused),
    "complex": Kind(x=lambda t: t + 0j, right=refused),
    "whole numbers": Kind(x=lambda t: t.long(), right=refused),
    "nested": Kind(x=nested, dy=nested, right=lambda subject: subject in (*JAGGED, "LayerNorm")),
    "jagged": Kind(
        x=partial(nested, layout=torch.jagged),
        grad=lambda y, leaves, dy: torch.autograd.grad(y.values(), leaves, dy.reshape(y.values().shape)),
        right=lambda subject: subject in JAGGED,
    ),
    "left behind by vmap": Kind(x=left_behind(torch.func.vmap), right=refused, backward=False),
    "left behind by grad": Kind(x=left_behind(torch.func.grad), right=refused, backward=False),
    "fake": Kind(x=lambda t: FakeTensorMode(allow_non_fake_inputs=True).from_tensor(t), meta=True),
    "functional": Kind(x=torch._to_functional_tensor, backward=False),
    "distributed": Kind(x=distributed, dy=distributed, everywhere=True),
    "gradient zero": Kind(
        grad=lambda y, leaves, dy: torch.autograd.grad(torch.sgn(y).sum(), leaves),
        plain_grad=lambda y, leaves, dy: [torch.zeros_like(t) for t in leaves],
    ),
    "gradient negated": Kind(dy=lambda t: torch._neg_view(-t)),
    "gradient conjugated": Kind(dy=conjugated),
    "gradient expanded": Kind(dy=lambda t: t.new_ones(()).expand_as(t), dy_values=torch.ones_like),
    "gradient sparse": Kind(
        dy=lambda t: t.to_sparse(),
        right=lambda subject: subject not in ("LayerNorm", "RMSNorm", "divisive_norm, the reference"),
    ),
    "gradient of a subclass": Kind(dy=lambda t: t.as_subclass(Subclass)),
    "gradient freed": Kind(dy=freed, right=refused),
    "freed before backward": Kind(grad=freed_before(), right=refused),
    "freed before a backward to differentiate": Kind(grad=freed_before(create_graph=True), right=refused),
    "gradients batched": Kind(
        **batched(lambda y, leaves, stack: torch.autograd.grad(y, leaves, stack, is_grads_batched=True))
    ),
    "gradients under vmap": Kind(**batched(vmapped)),
    "under a dispatch mode": Kind(around=Passing),
    "differentiated twice, plain": Kind(**TWICE),
    "differentiated twice, negated": Kind(x=lambda t: torch._neg_view(-t), **TWICE),
    "differentiated twice, a subclass": Kind(x=lambda t: t.as_subclass(Subclass), **TWICE),
    "differentiated twice, under a dispatch mode": Kind(around=Passing, **TWICE),
    "differentiated twice, gradient negated": Kind(dy=lambda t: torch._neg_view(-t), **TWICE),
    "differentiated twice, distributed": Kind(x=distributed, dy=distributed, everywhere=True, **TWICE),
    **PARAMETERS,
}


def numbers(t: Any) -> Tensor:
    """The plain tensor in whatever came back."""
    if hasattr(t, "full_tensor"):
        t = t.full_tensor()
    if torch._is_functional_tensor(t):
        t = torch._from_functional_tensor(t)
    if t.is_nested:
        t = t.values() if t.layout is torch.jagged else torch.cat([part.flatten() for part in t.unbind()])
    return t.detach().as_subclass(Tensor)


class Subject:
    """A layer or a form of the function, called with the same parameters every time."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        layer = name.removesuffix(EVALUATING)
        make, self.shape = LAYERS[layer] if layer in LAYERS else (None, FORMS[name][0])
        self.x, self.dy = torch.randn(self.shape), torch.randn(self.shape)
        self.x = self.x.contiguous()
        if make is not None:
            self.layer, self.parameters = make().train(layer == name), {}
            return
        width = self.shape[1]
        self.layer = lambda x, **parameters: divisive_norm(x, **parameters, **FORMS[name][1])
        self.parameters = {"weight": torch.randn(width), "bias": torch.randn(width), "sigma": torch.rand(()) + 0.5}

    def run(self, kind: Kind, hostile: bool) -> list[Tensor]:
        """y, and where the kind goes through backward the gradients of x and of the function's parameters."""
        x = kind.values(self.x)
        parameters = dict(self.parameters)
        if hostile and kind.parameter is None:
            x = kind.x(x)
        if hostile:
            for name in parameters if kind.everywhere else [kind.parameter] if kind.parameter else []:
                parameters[name] = kind.x(parameters[name])
        leaves = [x, *parameters.values()]
        if kind.backward:
            leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in leaves]
        with kind.around() if hostile else contextlib.nullcontext():
            y = self.layer(leaves[0], **dict(zip(parameters, leaves[1:], strict=True)))
            y = y[0] if isinstance(y, tuple) else y
            if not kind.backward:
                return [y]
            dy = kind.dy(self.dy) if hostile else kind.dy_values(self.dy)
            return [y, *(kind.grad if hostile else kind.plain_grad)(y, leaves, dy)]

    def outcome(self, kind: Kind) -> str:
        """``"right"``, or what is wrong."""
        expected = self.run(kind, hostile=False)
        try:
            found = self.run(kind, hostile=True)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        for want, have in zip(expected, found, strict=True):
            if kind.meta:
                assert (have.shape, have.dtype, have.device) == (want.shape, want.dtype, want.device)
            else:
                torch.testing.assert_close(numbers(have).reshape(want.shape), numbers(want), rtol=1e-5, atol=1e-6)
        return "right"


def main(name: str) -> None:
    """Every subject with tensors of the named kind."""
    faulthandler.enable()
    warnings.simplefilter("ignore")
    kind = KINDS[name]
    # in eval mode backward is torch's, and what gradients it takes
    evaluating = [name + EVALUATING for name in LAYERS if name.startswith("BatchNorm") and kind.x is not same]
    subjects = [*FORMS] if kind.parameter is not None else [*LAYERS, *evaluating, *FORMS]
    for subject in subjects:
        print(f"# {subject}", flush=True)
        print(json.dumps([subject, Subject(subject).outcome(kind), kind.right(subject)]), flush=True)


def main_into(name: str, out: Path, errors: Path) -> None:
    """`main`, with what it prints in files."""
    for stream, path in ((sys.stdout, out), (sys.stderr, errors)):
        stream.flush()
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), stream.fileno())
    main(name)


if __name__ == "__main__":
    main(sys.argv[1])
