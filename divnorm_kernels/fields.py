"""The geometry of a call: windows, groups and layout of the statistics, parsed and checked once per shape."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import Any

import torch

Window = int | str | None | tuple[int | str, ...] | list[int | str]
"""A field's window: a size for every spatial dimension, a tuple (or list) of one each, ``"all"``, or ``None``."""

MAX_SPATIAL_DIMS = 3
LARGEST_WINDOW = 2**31 - 1
UNKNOWN = 2**31
"""Stands for an extent or a batch that a recording must not depend on: what is larger than every window."""


@dataclass(frozen=True)
class Axis:
    """One axis of a field: position p averages over p - lo .. p + hi, clipped to 0 .. extent - 1.

    Neither lo nor hi is above extent - 1. The average divides by ``divisor``, or by the number of positions inside the
    image where ``divisor`` is 0.
    """

    extent: int
    lo: int
    hi: int
    divisor: int

    @property
    def whole(self) -> bool:
        """Whether every position's window covers the whole axis."""
        return min(self.lo, self.hi) >= self.extent - 1


@dataclass(frozen=True)
class Geometry:
    """Everything about a call that follows from shapes and options, not from values or dtypes.

    ``spatial`` holds the spatial extents, ``summation`` and ``suppression`` one `Axis` per spatial dimension, or
    ``None`` where the field is absent. ``features`` marks the (N, F) form, which is computed as (N, 1, F).
    """

    batch: int
    channels: int
    spatial: tuple[int, ...]
    groups: int
    summation: tuple[Axis, ...] | None
    suppression: tuple[Axis, ...] | None
    over_batch: bool
    activation: str | None
    """What follows the affine map: ``"relu"`` or nothing."""
    features: bool
    affine_size: int
    """The number of elements of weight and bias."""
    maps_shape: tuple[int, ...]
    """The shape of the maps mean and rstd in one tensor; a map whose field is absent is left out. Where the fields are
    `whole` a map has one position."""
    numel: int
    """The number of elements of x."""
    whole: bool
    """Whether every field that is there averages over all positions, so that a row of statistics is one number."""
    options: tuple[Any, ...]
    """What the registered operators (`divnorm_kernels.ops`) take in place of a geometry."""
    cache: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    """What backends keep per geometry."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape ``(N, C, *S)`` that is computed on."""
        return (self.batch, self.channels, *self.spatial)

    @property
    def relu(self) -> bool:
        """Whether a ReLU follows."""
        return self.activation == "relu"

    def kept_shape(self, with_variance: bool) -> tuple[int, ...]:
        """The shape of the maps, with a last row for the variance where it is asked for."""
        return (self.maps_shape[0] + with_variance, *self.maps_shape[1:])


def listless(window: Window) -> Window:
    """``window`` with a tuple in place of a list."""
    return tuple(window) if isinstance(window, list) else window


def _exact(window: Window) -> bool:
    """Whether no other window equals this one: the cache tells 5.0 from 5 as an argument, but not inside a tuple."""
    return not isinstance(window, tuple) or all(type(entry) in (int, str) for entry in window)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _axes(name: str, window: Window, spatial: tuple[int, ...], edges: str) -> tuple[Axis, ...] | None:
    if window is None:
        return None
    expected = (
        f'expected a positive int, "all", None or a tuple of {len(spatial)} of the former (one per spatial dimension)'
    )
    entries = window if isinstance(window, tuple) else (window,) * len(spatial)
    if len(entries) != len(spatial):
        raise ValueError(f"{name}: got {window!r} with {len(entries)} entries, {expected}")
    axes = []
    for entry, extent in zip(entries, spatial, strict=True):
        if isinstance(entry, str):
            if entry != "all":
                raise ValueError(f"{name}: got {window!r}, {expected}")
            axes.append(Axis(extent, max(extent - 1, 0), max(extent - 1, 0), 0))
        elif not _is_int(entry):
            raise TypeError(f"{name}: got {window!r} of type {type(entry).__name__}, {expected}")
        elif entry < 1:
            raise ValueError(f"{name}: got {window!r}, {expected}")
        elif entry > LARGEST_WINDOW:
            raise ValueError(
                f'{name}: got {window!r}, expected at most {LARGEST_WINDOW}; "all" covers the whole extent'
            )
        else:
            lo, hi = (entry - 1) // 2, entry // 2
            if lo >= extent - 1:  # there is nothing further away; where this is false, hi is at most extent - 1 too
                lo = hi = max(extent - 1, 0)
            axes.append(Axis(extent, lo, hi, entry if edges == "zero" else 0))
    return tuple(axes)


def encode(window: Window, dims: int) -> list[int] | None:
    """A window as the registered operators take it, for ``dims`` spatial dimensions: 0 stands for ``"all"``."""
    if window is None:
        return None
    entries = window if isinstance(window, tuple) else (window,) * dims
    return [0 if entry == "all" else entry for entry in entries]


def decode(window: list[int] | None) -> Window:
    """The window that was encoded."""
    return None if window is None else tuple("all" if entry == 0 else entry for entry in window)


def geometry(
    shape: tuple[int, ...],
    window: Window,
    norm_window: Window,
    groups: int,
    edges: str,
    over_batch: bool,
    activation: str | None = None,
) -> Geometry:
    """The geometry of a call on ``x`` of ``shape``, ``(N, C, *S)`` or ``(N, F)``; the latest are kept.

    Raises:
        TypeError, ValueError: on an argument out of its domain, naming it, what it got and what was expected.
    """
    if isinstance(window, (tuple, list)) or isinstance(norm_window, (tuple, list)):
        window, norm_window = listless(window), listless(norm_window)
        if not (_exact(window) and _exact(norm_window)):
            return _build(shape, window, norm_window, groups, edges, over_batch, activation)
    if torch.compiler.is_compiling():
        return _build(shape, window, norm_window, groups, edges, over_batch, activation)
    try:
        return _built(shape, window, norm_window, groups, edges, over_batch, activation)
    except TypeError:  # a bad type, which raises again, or under tracing a symbolic size, which has no hash
        return _build(shape, window, norm_window, groups, edges, over_batch, activation)


def _build(
    shape: tuple[int, ...],
    window: Window,
    norm_window: Window,
    groups: int,
    edges: str,
    over_batch: bool,
    activation: str | None,
) -> Geometry:
    dims = len(shape)
    if not 2 <= dims <= 2 + MAX_SPATIAL_DIMS:
        raise ValueError(
            f"x: got {dims} dimensions, shape {tuple(shape)}, expected (N, F), (N, C, L), (N, C, H, W) "
            "or (N, C, D, H, W)"
        )
    if not isinstance(edges, str):
        raise TypeError(f"edges: got {edges!r} of type {type(edges).__name__}, expected a str")
    if edges not in ("valid", "zero"):
        raise ValueError(f'edges: got {edges!r}, expected "valid" or "zero"')
    if not isinstance(over_batch, bool):
        raise TypeError(f"over_batch: got {over_batch!r} of type {type(over_batch).__name__}, expected a bool")
    if activation is not None and not isinstance(activation, str):
        raise TypeError(f'activation: got {activation!r} of type {type(activation).__name__}, expected None or "relu"')
    if activation not in (None, "relu"):
        raise ValueError(f'activation: got {activation!r}, expected None or "relu"')
    if not _is_int(groups):
        raise TypeError(f"groups: got {groups!r} of type {type(groups).__name__}, expected a positive int")
    features = dims == 2
    batch, channels, spatial = (shape[0], 1, tuple(shape[1:])) if features else (shape[0], shape[1], tuple(shape[2:]))
    if groups < 1 or (channels % groups != 0):
        what = "1 for x of shape (N, F)" if features else f"a positive divisor of the {channels} channels of x"
        raise ValueError(f"groups: got {groups}, expected {what}")
    if norm_window == "same":
        norm_window = window
    summation, suppression = _axes("window", window, spatial, edges), _axes("norm_window", norm_window, spatial, edges)
    axes = (axis for field in (summation, suppression) if field is not None for axis in field)
    whole = all(axis.whole and axis.divisor in (0, axis.extent) for axis in axes)
    maps = (window is not None) + (norm_window is not None), 1 if over_batch else batch, groups
    return Geometry(
        batch,
        channels,
        spatial,
        groups,
        summation,
        suppression,
        over_batch,
        activation,
        features,
        affine_size=spatial[0] if features else channels,
        maps_shape=(*maps, *([1] * len(spatial) if whole else spatial)),
        numel=batch * channels * prod(spatial),
        whole=whole,
        options=(
            encode(window, len(spatial)),
            encode(norm_window, len(spatial)),
            groups,
            edges,
            over_batch,
            activation,
        ),
    )


_built = lru_cache(maxsize=512, typed=True)(_build)
"""An entry is about 1.5 KB whatever the shape, all of them under 1 MB; what backends keep with it adds to that."""
