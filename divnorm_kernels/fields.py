"""The geometry of a call: what a normalization (`divnorm_kernels.norm`) is on a shape, worked out once per shape."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import Any

import torch

from .norm import Norm, Span, Window

MAX_SPATIAL_DIMS = 3
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
    """A normalization of a shape: everything about a call that does not follow from values or dtypes.

    ``spatial`` holds the spatial extents, ``summation`` and ``suppression`` one `Axis` per spatial dimension, or
    ``None`` where the field is absent. ``features`` marks the (N, F) form, which is computed as (N, 1, F).
    """

    norm: Norm
    batch: int
    channels: int
    spatial: tuple[int, ...]
    summation: tuple[Axis, ...] | None
    suppression: tuple[Axis, ...] | None
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
    cache: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    """What backends keep per geometry."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape ``(N, C, *S)`` that is computed on."""
        return (self.batch, self.channels, *self.spatial)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of x: ``(N, F)`` or ``(N, C, *S)``."""
        return (self.batch, *self.spatial) if self.features else self.shape

    @property
    def groups(self) -> int:
        """The number of equal groups that the channels form."""
        return self.norm.groups

    @property
    def over_batch(self) -> bool:
        """Whether the statistics are averaged over the batch too."""
        return self.norm.over_batch

    def kept_shape(self, with_variance: bool) -> tuple[int, ...]:
        """The shape of the maps, with a last row for the variance where it is asked for."""
        return (self.maps_shape[0] + with_variance, *self.maps_shape[1:])


def _axes(name: str, window: Window, spatial: tuple[int, ...], edges: str) -> tuple[Axis, ...] | None:
    if window is None:
        return None
    entries = window if isinstance(window, tuple) else (window,) * len(spatial)
    if len(entries) != len(spatial):
        raise ValueError(
            f"{name}: got {window!r} with {len(entries)} entries, expected {len(spatial)}, one per spatial dimension"
        )
    axes = []
    for entry, extent in zip(entries, spatial, strict=True):
        if entry == "all":
            axes.append(Axis(extent, max(extent - 1, 0), max(extent - 1, 0), 0))
        else:
            span = entry if isinstance(entry, Span) else Span((entry - 1) // 2, entry // 2)
            furthest = max(extent - 1, 0)
            # in this form sizes that a compiler knows nothing of are compared no more than once for an int's two sides
            lo = span.before if span.before < extent - 1 else furthest
            hi = span.after if span.after <= extent - 1 else furthest
            axes.append(Axis(extent, lo, hi, span.size if edges == "zero" else 0))
    return tuple(axes)


def geometry(norm: Norm, shape: tuple[int, ...]) -> Geometry:
    """The geometry of a normalization of ``x`` of ``shape``, ``(N, C, *S)`` or ``(N, F)``; the latest are kept.

    Raises:
        ValueError: where they do not fit, naming the argument, what it got and what was expected.
    """
    if torch.compiler.is_compiling():
        return _build(norm, shape)
    try:
        return _built(norm, shape)
    except TypeError:  # under tracing a symbolic size, which has no hash
        return _build(norm, shape)


def _build(norm: Norm, shape: tuple[int, ...]) -> Geometry:
    dims = len(shape)
    if not 2 <= dims <= 2 + MAX_SPATIAL_DIMS:
        raise ValueError(
            f"x: got {dims} dimensions, shape {tuple(shape)}, expected (N, F), (N, C, L), (N, C, H, W) "
            "or (N, C, D, H, W)"
        )
    features = dims == 2
    batch, channels, spatial = (shape[0], 1, tuple(shape[1:])) if features else (shape[0], shape[1], tuple(shape[2:]))
    if channels % norm.groups != 0:
        what = "1 for x of shape (N, F)" if features else f"a positive divisor of the {channels} channels of x"
        raise ValueError(f"groups: got {norm.groups}, expected {what}")
    summation = _axes("window", norm.window, spatial, norm.edges)
    suppression = _axes("norm_window", norm.suppression, spatial, norm.edges)
    axes = (axis for field in (summation, suppression) if field is not None for axis in field)
    whole = all(axis.whole and axis.divisor in (0, axis.extent) for axis in axes)
    maps = (summation is not None) + (suppression is not None), 1 if norm.over_batch else batch, norm.groups
    return Geometry(
        norm,
        batch,
        channels,
        spatial,
        summation,
        suppression,
        features,
        affine_size=spatial[0] if features else channels,
        maps_shape=(*maps, *([1] * len(spatial) if whole else spatial)),
        numel=batch * channels * prod(spatial),
        whole=whole,
    )


_built = lru_cache(maxsize=512)(_build)
"""An entry is about 1.5 KB whatever the shape, all of them under 1 MB; what backends keep with it adds to that."""
