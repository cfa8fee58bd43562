"""Which kernels compute the two halves of a normalization by whole fields, in both directions.

Rows are those of the statistics: tensors of a number a row have the shape of one map, ``g.maps_shape[1:]``, and the
dtype of the computation. A backend is a module with

- ``refusal(g, x)``: why it cannot serve this call, or ``None``;
- ``statistics(g, x)``: mean and biased variance of the rows;
- ``normalize(g, x, rows, weight, bias, with_l1, residual, threshold)``: ``(y, l1)``, by ``rows``: mean and 1/s;
- ``sums(g, dy, l1_scale, x, rows, weight, bias, needs, residual, threshold)``: what the gradients of the rows are made
  of, ``(3, rows)``: the sums of g, of g times the numerator and, for l1, of the signs of x - mean; then dweight, dbias
  and dthreshold, ``None`` where ``needs`` says no. There g is weight times the gradient in front of the activation.
  ``l1_scale``, a tensor of one number or ``None``, is that of l1 over the numbers of x;
- ``gradient(g, dy, l1_scale, x, rows, slopes, weight, bias, residual, threshold, needs)``: the gradients of x, ``g / s
  - slope (x - mean) / s - shift + l1_scale sign(x - mean)`` where ``slopes``, (2, rows), has slope and shift, and of a
  residual in front of an activation; ``None`` where ``needs`` says no.

Tensors are in memory, x of any strides; so are dy and the residual. ``rows`` is one tensor, (2, rows), without gaps.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from ..backends import serving
from ..fields import Geometry
from . import cpu, cuda, triton

KERNELS: dict[str, ModuleType] = {"cpu": cpu, "cuda": cuda, "triton": triton}
"""In the order in which they are tried."""


def has_halves(g: Geometry) -> bool:
    """Whether a normalization is by mean and variance of whole fields."""
    return g.whole and g.summation is not None and g.suppression is not None and g.norm.p == 2


def select(name: str | None, g: Geometry, x: Tensor) -> ModuleType | None:
    """As `divnorm_kernels.backends.serving`."""
    return serving(KERNELS, name, g, x)
