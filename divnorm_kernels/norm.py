"""Which normalization: everything about a call that is neither a tensor nor follows from one, as one value."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from json import dumps, loads

import torch

from .constant import constant

Window = int | str | None | tuple[int | str, ...] | list[int | str]
"""A field's window: a size for every spatial dimension, a tuple (or list) of one each, ``"all"``, or ``None``."""

LARGEST_WINDOW = 2**31 - 1
_EDGES = ("valid", "zero")
_ACTIVATIONS = (None, "relu")


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
        if not isinstance(self.over_batch, bool):
            raise TypeError(f"over_batch: got {self.over_batch!r} of type {_type(self.over_batch)}, expected a bool")
        if self.activation is not None and not isinstance(self.activation, str):
            got = f"{self.activation!r} of type {_type(self.activation)}"
            raise TypeError(f'activation: got {got}, expected None or "relu"')
        if self.activation not in _ACTIVATIONS:
            raise ValueError(f'activation: got {self.activation!r}, expected None or "relu"')

    @property
    def suppression(self) -> Window:
        """The window of the suppression field."""
        return self.window if self.norm_window == "same" else self.norm_window

    @property
    def relu(self) -> bool:
        """Whether a ReLU follows."""
        return self.activation == "relu"

    @property
    def text(self) -> str:
        """As the registered operators carry it; `parsed` is the way back."""
        window, norm_window, groups = map(_settled, (self.window, self.norm_window, self.groups))
        return _text(window, norm_window, groups, self.edges, self.over_batch, self.activation)


def norm_of(
    window: Window,
    norm_window: Window = "same",
    groups: int = 1,
    edges: str = "valid",
    over_batch: bool = False,
    activation: str | None = None,
) -> Norm:
    """The `Norm` of these options; the latest are kept."""
    options = window, norm_window, groups, edges, over_batch, activation
    if exact(window) and exact(norm_window) and not torch.compiler.is_compiling():
        try:
            return _kept(*options)
        except TypeError:  # a list, which has no hash, or a bad type, which raises again
            pass
    return Norm(*options)


@lru_cache(maxsize=256)
def parsed(text: str) -> Norm:
    """The `Norm` that was written."""
    try:
        options = loads(text)
    except (ValueError, RecursionError):
        options = None
    names = {field.name for field in fields(Norm)}
    if not (isinstance(options, dict) and "window" in options and options.keys() <= names):
        raise ValueError(f"norm: got {text!r}, expected the text of a Norm")
    return Norm(**options)


_kept = lru_cache(maxsize=256, typed=True)(Norm)


@constant
def _text(*options: object) -> str:
    return _written(Norm(*options))


@lru_cache(maxsize=256)
def _written(norm: Norm) -> str:
    return dumps(asdict(norm))


def exact(window: Window) -> bool:
    """Whether no other window equals this one: a cache tells 5.0 from 5 as an argument, but not inside a tuple."""
    return not isinstance(window, tuple) or all(type(entry) in (int, str) for entry in window)


def _check_window(name: str, window: Window) -> None:
    if window is None:
        return
    expected = 'expected a positive int, "all", None or a tuple of the former, one per spatial dimension'
    for entry in window if isinstance(window, tuple) else (window,):
        if isinstance(entry, str):
            if entry != "all":
                raise ValueError(f"{name}: got {window!r}, {expected}")
        elif not _is_int(entry):
            raise TypeError(f"{name}: got {window!r} of type {_type(entry)}, {expected}")
        elif entry < 1:
            raise ValueError(f"{name}: got {window!r}, {expected}")
        elif entry > LARGEST_WINDOW:
            raise ValueError(
                f'{name}: got {window!r}, expected at most {LARGEST_WINDOW}; "all" covers the whole extent'
            )


def _settled(value: Window) -> Window:
    """``value`` with numbers for numbers: those that a compiler takes for variables, a range makes it settle."""
    if isinstance(value, tuple):
        return tuple(_settled(entry) for entry in value)
    return range(value).stop if _is_int(value) else value


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _type(value: object) -> str:
    return type(value).__name__
