"""Which normalization: everything about a call that is neither a tensor nor follows from one, as one value."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from json import dumps, loads
from typing import Any

import torch

from .constant import constant

LARGEST_WINDOW = 2**31 - 1


@dataclass(frozen=True)
class Span:
    """A window, or an entry of its tuple, by its two sides: position p sees ``p - before`` to ``p + after``.

    ``Span(k - 1, 0)`` is causal: no position sees a later one. An int k is centred: ``Span((k - 1) // 2, k // 2)``.

    Args:
        before, after: ints of at least 0, together with the position itself at most 2^31 - 1.

    Raises:
        TypeError, ValueError: on any others, naming the argument, what it got and what was expected.
    """

    before: int
    after: int

    def __post_init__(self) -> None:
        for name, value in (("before", self.before), ("after", self.after)):
            if not _is_int(value):
                raise TypeError(f"{name}: got {value!r} of type {_type(value)}, expected an int of at least 0")
            if value < 0:
                raise ValueError(f"{name}: got {value}, expected an int of at least 0")
        if self.size > LARGEST_WINDOW:
            raise ValueError(f"before, after: got {self!r} of size {self.size}, {_TOO_LARGE}")

    def __repr__(self) -> str:
        return f"Span(before={self.before}, after={self.after})"

    @property
    def size(self) -> int:
        """How many positions it covers."""
        return self.before + self.after + 1


Window = int | str | Span | None | tuple[int | str | Span, ...] | list[int | str | Span]
"""The window of a field, which is a size or a `Span` for every spatial dimension, a tuple (or list) of one each,
``"all"`` or ``None``."""

_TOO_LARGE = f'expected at most {LARGEST_WINDOW}; "all" covers the whole extent'
_EDGES = ("valid", "zero")
ACTIVATIONS = (None, "relu", "tlu", "silu", "gelu", "gelu_tanh")
_EXPECTED = f"expected None or one of {', '.join(map(repr, ACTIVATIONS[1:]))}"


@dataclass(frozen=True)
class Norm:
    """The options of `divnorm_kernels.divisive_norm`, checked as far as no shape is needed; see there what they mean.

    Raises:
        TypeError, ValueError: on an option out of its domain, naming it, what it got and what was expected.
    """

    window: Window
    norm_window: Window = "same"
    groups: int = 1
    edges: str = "valid"
    over_batch: bool = False
    activation: str | None = None
    p: float = 2
    subtract_mean: bool = True

    def __post_init__(self) -> None:
        for name in ("window", "norm_window"):
            value = getattr(self, name)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, name, value)
            if not (name == "norm_window" and isinstance(value, str) and value == "same"):
                _check_window(name, value)
        if not _is_int(self.groups):
            raise TypeError(f"groups: got {self.groups!r} of type {_type(self.groups)}, expected a positive int")
        if self.groups < 1:
            raise ValueError(f"groups: got {self.groups}, expected a positive int")
        if not isinstance(self.edges, str):
            raise TypeError(f"edges: got {self.edges!r} of type {_type(self.edges)}, expected a str")
        if self.edges not in _EDGES:
            raise ValueError(f'edges: got {self.edges!r}, expected "valid" or "zero"')
        for name in ("over_batch", "subtract_mean"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"{name}: got {value!r} of type {_type(value)}, expected a bool")
        if self.activation is not None and not isinstance(self.activation, str):
            raise TypeError(f"activation: got {self.activation!r} of type {_type(self.activation)}, {_EXPECTED}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation: got {self.activation!r}, {_EXPECTED}")
        object.__setattr__(self, "p", _exponent(self.p))

    @property
    def suppression(self) -> Window:
        """The window of the suppression field."""
        return self.window if self.norm_window == "same" else self.norm_window

    @property
    def root(self) -> float:
        """Sigma to which power stands in the sum that s is the root of: p; 1 for p = inf, where there is no root."""
        return 1 if self.p == math.inf else self.p

    @property
    def text(self) -> str:
        """As the registered operators carry it; `parsed` is the way back."""
        window, norm_window, groups = map(_settled, (self.window, self.norm_window, self.groups))
        return _text(
            window, norm_window, groups, self.edges, self.over_batch, self.activation, self.p, self.subtract_mean
        )


def norm_of(
    window: Window,
    norm_window: Window = "same",
    groups: int = 1,
    edges: str = "valid",
    over_batch: bool = False,
    activation: str | None = None,
    p: float = 2,
    subtract_mean: bool = True,
) -> Norm:
    """The `Norm` of these options; the latest are kept."""
    options = window, norm_window, groups, edges, over_batch, activation, p, subtract_mean
    if exact(window, norm_window) and not torch.compiler.is_compiling():
        try:
            return _kept(*options)
        except TypeError:  # a list, which has no hash, or a bad type, which raises again
            pass
    return Norm(*options)


@lru_cache(maxsize=256)
def parsed(text: str) -> Norm:
    """The `Norm` that was written."""
    try:
        options = loads(text, object_hook=_read)
    except (TypeError, ValueError, RecursionError):
        options = None
    names = {field.name for field in fields(Norm)}
    if not (isinstance(options, dict) and "window" in options and options.keys() <= names):
        raise ValueError(f"norm: got {text!r}, expected the text of a Norm")
    return Norm(**options)


_kept = lru_cache(maxsize=256, typed=True)(Norm)


@constant
def _text(window: Any, norm_window: Any, *options: Any) -> str:
    return _written(Norm(_restored(window), _restored(norm_window), *options))


@lru_cache(maxsize=256)
def _written(norm: Norm) -> str:
    # JSON has no infinity
    return dumps({**asdict(norm), "p": None if norm.p == math.inf else norm.p})


def _read(value: dict[str, Any]) -> Any:
    """An object of the text as what it was: a `Span`, or the options themselves."""
    if value.keys() == {"before", "after"}:
        return Span(**value)
    return {**value, "p": math.inf} if value.get("p", 2) is None else value


def exact(window: Window, norm_window: Window) -> bool:
    """Whether no others equal these windows: a cache tells 5.0 from 5 as an argument, but not inside a tuple."""
    if not isinstance(window, tuple) and not isinstance(norm_window, tuple):
        return True
    entries = (entry for field in (window, norm_window) if isinstance(field, tuple) for entry in field)
    return all(type(entry) in (int, str, Span) for entry in entries)


def _exponent(p: object) -> float:
    """``p`` as an int where it is one, so that equal exponents are written alike."""
    expected = "expected a number of at least 1, or inf"
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"p: got {p!r} of type {_type(p)}, {expected}")
    if not p >= 1:  # NaN too
        raise ValueError(f"p: got {p!r}, {expected}")
    if p == math.inf:
        return math.inf
    if p > sys.float_info.max:
        raise ValueError(f"p: got an int of {p.bit_length()} bits, {expected}")
    return range(int(p)).stop if p == p // 1 else float(p)  # settled, see below


def _check_window(name: str, window: Window) -> None:
    if window is None:
        return
    expected = 'expected a positive int, a Span, "all", None or a tuple of the former, one per spatial dimension'
    for entry in window if isinstance(window, tuple) else (window,):
        if isinstance(entry, str):
            if entry != "all":
                raise ValueError(f"{name}: got {window!r}, {expected}")
        elif isinstance(entry, Span):
            continue  # checked where it was made
        elif not _is_int(entry):
            raise TypeError(f"{name}: got {window!r} of type {_type(entry)}, {expected}")
        elif entry < 1:
            raise ValueError(f"{name}: got {window!r}, {expected}")
        elif entry > LARGEST_WINDOW:
            raise ValueError(f"{name}: got {window!r}, {_TOO_LARGE}")


def _settled(value: Window) -> Any:
    """``value`` with numbers for numbers: those that a compiler takes for variables, a range makes it settle.

    And with a text for a `Span`: what the code it compiles makes is no constant to it. `_restored` is the way back.
    """
    if isinstance(value, tuple):
        return tuple(_settled(entry) for entry in value)
    if isinstance(value, Span):
        return f"{_settled(value.before)}:{_settled(value.after)}"
    return range(value).stop if _is_int(value) else value


def _restored(value: Any) -> Window:
    if isinstance(value, tuple):
        return tuple(_restored(entry) for entry in value)
    return Span(*map(int, value.split(":"))) if isinstance(value, str) and ":" in value else value


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _type(value: object) -> str:
    return type(value).__name__
