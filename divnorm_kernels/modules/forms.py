"""What shapes of x a layer takes, and the form that the operator sees them in."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ..checks import check_size

_OPERATORS_DIMS = 5
"""The most dimensions that the operator takes."""


@dataclass(frozen=True)
class Images:
    """(N, C, *S) of ``dims`` dimensions, as the operator takes it."""

    dims: tuple[int, ...]
    channels: int
    shapes_parameters = False

    def __post_init__(self) -> None:
        check_size("num_channels", self.channels)

    def __call__(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """``shape``; a ValueError where it is none of these."""
        if len(shape) not in self.dims:
            forms = {2: "(N, C)", 3: "(N, C, L)", 4: "(N, C, H, W)", 5: "(N, C, D, H, W)"}
            expected = " or ".join(f"{dims}, {forms[dims]}" for dims in self.dims)
            raise ValueError(f"x: got {len(shape)} dimensions, expected {expected}")
        if shape[1] != self.channels:
            raise ValueError(f"x: got {shape[1]} channels, expected num_channels, {self.channels}")
        return shape


@dataclass(frozen=True)
class Channels:
    """(N, C, ...) of any dimensions; what the operator has no form for is (N, C, L) to it."""

    channels: int
    shapes_parameters = False

    def __post_init__(self) -> None:
        check_size("num_channels", self.channels)

    def __call__(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The operator's form of ``shape``; a ValueError where it is none of these."""
        if len(shape) < 2 or shape[1] != self.channels:
            raise ValueError(f"x: got shape {tuple(shape)}, expected (N, {self.channels}, ...), num_channels second")
        if 2 < len(shape) <= _OPERATORS_DIMS:
            return shape
        return (shape[0], shape[1], math.prod(shape[2:]))


@dataclass(frozen=True)
class Rows:
    """(..., *row), whose rows are samples of features to the operator."""

    row: tuple[int, ...]
    name: str = "normalized_shape"
    """Of ``row``, to the layer."""
    leading: int = 0
    """The least number of dimensions before the row."""
    shapes_parameters = True

    def __post_init__(self) -> None:
        row = tuple(self.row) if isinstance(self.row, Iterable) else (self.row,)
        if not row:
            raise ValueError(f"{self.name}: got (), expected at least one dimension")
        for size in row:
            check_size(self.name, size)
        object.__setattr__(self, "row", row)

    @property
    def size(self) -> int:
        """The number of elements of a row."""
        return math.prod(self.row)

    def __call__(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """``(N, F)``; a ValueError where ``shape`` does not end in a row."""
        dims = len(self.row)
        if len(shape) < dims + self.leading or tuple(shape[-dims:]) != self.row:
            least = "N, " * self.leading
            expected = f"({least}..., {', '.join(map(str, self.row))}), {self.name} last"
            raise ValueError(f"x: got shape {tuple(shape)}, expected {expected}")
        return (math.prod(shape[:-dims]), self.size)
