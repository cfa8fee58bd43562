"""The variance that whole fields hand out beside a large sigma: the cases, and what it must be."""

import pytest
import torch

from divnorm_kernels.fields import Geometry

OPTIONS = {"window": "all", "norm_window": "same", "groups": 1, "edges": "valid", "over_batch": False}
SCALES = pytest.mark.parametrize(("scale", "offset"), [(1e-4, 0.0), (1.0, 1e4)])
SHAPES = pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((3, 10, 9, 7), {"groups": 5}),
        ((3, 10, 9, 7), {"window": None, "norm_window": "all"}),
        ((5, 10, 9, 7), {"groups": 10, "over_batch": True}),
        ((4, 30, 1, 1), {"groups": 2}),
        ((4, 70), {}),
        ((40, 70), {"over_batch": True}),
    ],
    ids=str,
)


def expected_variance(g: Geometry, x: torch.Tensor) -> torch.Tensor:
    """A number a row and group, in float64."""
    rows = x.double().reshape(g.batch, g.groups, -1)
    if g.over_batch:
        rows = rows.transpose(0, 1).reshape(1, g.groups, -1)
    return rows.var(-1, unbiased=False) if g.summation else rows.square().mean(-1)


def check_variance(g: Geometry, x: torch.Tensor, maps: torch.Tensor, scale: float, offset: float) -> None:
    """The last map, to a sum's own rounding and that of a channel's mean at the offset."""
    expected = expected_variance(g, x)
    assert maps.shape == g.kept_shape(True)
    terms = x.numel() // expected.numel()
    limit = torch.finfo(torch.float32).eps * (terms + offset / scale)
    assert ((maps[-1].flatten(1).double() - expected).abs() <= limit * expected).all()
