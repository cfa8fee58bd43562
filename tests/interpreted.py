"""The Triton backend as the tests call it: where it runs, what is small enough for it, and how its calls are cut."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from caches import forget
from hypothesis import settings
from oracle import Call
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from divnorm_kernels import divisive_norm
from divnorm_kernels.backends.triton import tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = {0: 60, 1: 60, 2: 12, 3: 5}
"""Extents that the interpreter gets through in a second or two."""
EXAMPLES = settings(max_examples=max(5, settings.default.max_examples // 60))
"""Of a profile's, for the interpreter takes a second for each."""


def some(cases: Iterable[Any]) -> list[Any]:
    """Those of DIVNORM_INTERPRETED: one in as many; without it all."""
    return list(cases)[:: int(os.environ.get("DIVNORM_INTERPRETED", "1"))]


def triton(*args, **kwargs):
    """The operator on this backend."""
    return divisive_norm(*args, backend="triton", **kwargs)


def on_device(call: Call) -> Call:
    """The call where the kernels run."""
    return call.to(DEVICE)


def laid_out(t: Tensor, memory_format: torch.memory_format) -> Tensor:
    """The same numbers; where they have positions, in that order."""
    if memory_format != torch.channels_last or t.dim() == 2:
        return t
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


class Traffic:
    """Counts the elements that kernels under the interpreter read from and write to a tensor.

    What kernels were given stays allocated meanwhile, so that an address is never another tensor's.
    """

    def __init__(self, monkeypatch):
        given, launch = [], GridExecutor.__call__

        def kept(executor, *args, **kwargs):
            given.extend(args)
            return launch(executor, *args, **kwargs)

        monkeypatch.setattr(GridExecutor, "__call__", kept)
        self.addresses = {"load": [], "store": []}
        for kind in self.addresses:
            name = f"create_masked_{kind}"
            original = getattr(InterpreterBuilder, name)

            def counted(builder, ptrs, *rest, kind=kind, original=original):
                mask = rest[0] if kind == "load" else rest[1]
                self.addresses[kind].append(ptrs.data[mask.data])
                return original(builder, ptrs, *rest)

            monkeypatch.setattr(InterpreterBuilder, name, counted)

    def of(self, kind: str, t: Tensor) -> float:
        """How often an element of ``t`` was loaded or stored, on average."""
        begin, end = t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()
        return sum(int(((at >= begin) & (at < end)).sum()) for at in self.addresses[kind]) / t.numel()


@contextmanager
def table(**changes) -> Iterator[None]:
    """The table's rows with some entries replaced, for calls that have not been planned yet."""
    before = tiles.ROWS
    tiles.ROWS = [{**row, **changes} for row in before]
    forget()
    yield
    tiles.ROWS = before
    forget()


SINGLE, STAGED = {}, {"single": 0, "single_narrow": 0, "single_whole": 0}
LOOPED = {**STAGED, "looped": 1 << 20, "looped_rows": 0, "looped_share": float("inf")}
UNORDERED = {"ordered": False}
SMALL_TILES = {**STAGED, "tile": 64, "apply": 64, "window": 32, "programs": 4, "cache_share": 0.1}
"""Several tiles along every axis, several chunks, and pieces of the positions in the second pass."""
SMALL_LOOPS = {**LOOPED, "looped_tile": 64, "window": 32}
"""Several tiles along every axis."""
