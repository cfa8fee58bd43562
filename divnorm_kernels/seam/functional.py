"""The call with something between the two halves: checks its arguments, picks a backend, runs it under autograd."""

from __future__ import annotations

from torch import Tensor

from .. import flops
from ..addresses import check_alive, check_held
from ..arguments import by_reference, checked, eager
from ..backends import check_name
from ..checks import check_flag
from ..fields import Geometry
from ..layout import dense
from ..norm import Norm
from ..reference import OnStatistics, Rows, row_statistics
from ..sharding import distributed
from ..states import recorded, unless_transformed
from . import ops
from .backends import has_halves, select


def normalize(
    norm: Norm,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sigma: Tensor | float,
    residual: Tensor | None,
    threshold: Tensor | None,
    on_statistics: OnStatistics,
    with_l1: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor | None]:
    """`divnorm_kernels.divisive_norm` by a `Norm`, with ``on_statistics``: ``(y, l1)``, l1 where it is asked for."""
    check_name(backend)
    g, x, residual = checked(norm, x, weight, bias, sigma, residual, threshold)
    check_flag("return_l1", with_l1)
    _check(on_statistics, g)
    sigma = sigma if isinstance(sigma, Tensor) else float(sigma)
    kernels = unless_transformed(select(backend, g, x), backend)
    given = {"weight": weight, "bias": bias, "sigma": sigma, "residual": residual, "threshold": threshold}
    if eager():
        check_held(x=x, **given)
    if kernels is None or recorded() or distributed(x):
        if kernels is not None and backend is not None and distributed(x):
            raise RuntimeError(f'backend: got {backend!r} for a DTensor, expected None or "reference"')
        rows = _replaced(on_statistics, *row_statistics(g, x))
        y, l1 = by_reference(g, x, with_l1, rows, **given)
        return y, l1 if with_l1 else None
    if eager():
        check_alive(x=x, **given)
    flops.register()
    x = dense(x)
    mean, variance, *messages = ops.statistics(norm, x, residual if norm.activation else None, backend)
    rows = _replaced(on_statistics, mean, variance)
    if eager():
        check_alive(mean=rows[0], variance=rows[1])
    return ops.normalized(norm, messages, x, rows, **given, with_l1=with_l1, backend=backend)


def _check(on_statistics: object, g: Geometry) -> None:
    if not callable(on_statistics):
        raise TypeError(f"on_statistics: got {type(on_statistics).__name__}, expected a callable or None")
    expected = "expected fields that are whole and both there, with p=2"
    norm = g.norm
    if not has_halves(g):
        got = f"window={norm.window!r}, norm_window={norm.norm_window!r}, edges={norm.edges!r}, p={norm.p}"
        raise ValueError(f"on_statistics: got a callable with {got}, {expected}")


def _replaced(on_statistics: OnStatistics, mean: Tensor, variance: Tensor) -> Rows:
    """What ``on_statistics`` makes of the rows' statistics."""
    found = on_statistics(mean, variance)
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        raise TypeError(f"on_statistics: gave {type(found).__name__}, expected a tuple of mean and variance")
    for name, t in zip(("mean", "variance"), found, strict=True):
        if not isinstance(t, Tensor):
            raise TypeError(f"on_statistics: gave {type(t).__name__} for the {name}, expected a Tensor")
        if t.shape != mean.shape:
            raise ValueError(f"on_statistics: gave a {name} of shape {tuple(t.shape)}, expected {tuple(mean.shape)}")
        if t.dtype != mean.dtype or t.device != mean.device:
            got = f"{t.dtype} on {t.device}"
            raise TypeError(f"on_statistics: gave a {name} of {got}, expected {mean.dtype} on {mean.device}")
    return tuple(found)
