"""Functions that torch.compile calls once, while it traces: it sees into none of them, and the answer stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

_F = TypeVar("_F", bound=Callable[..., object])


def constant(function: _F) -> _F:
    """`torch.compiler.assume_constant_result`, which is this line after an import of Dynamo, and with it of Triton."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
