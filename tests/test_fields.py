"""Geometries: what follows from shapes and options alone."""

from functools import partial

import pytest
import torch
from oracle import Call, check

from divnorm_kernels import Span, divisive_norm
from divnorm_kernels.fields import Axis, geometry
from divnorm_kernels.norm import Norm


@pytest.mark.parametrize(
    ("window", "edges", "expected"),
    [
        (3, "valid", Axis(6, 1, 1, 0)),
        (4, "zero", Axis(6, 1, 2, 4)),
        (11, "valid", Axis(6, 5, 5, 0)),
        (10, "valid", Axis(6, 4, 5, 0)),
        (2**31 - 1, "valid", Axis(6, 5, 5, 0)),
        (2**31 - 1, "zero", Axis(6, 5, 5, 2**31 - 1)),
        ("all", "zero", Axis(6, 5, 5, 0)),
        (Span(2, 0), "zero", Axis(6, 2, 0, 3)),
        (Span(9, 1), "valid", Axis(6, 5, 1, 0)),
        (Span(0, 9), "zero", Axis(6, 0, 5, 10)),
        (Span(5, 5), "valid", Axis(6, 5, 5, 0)),
        (Span(2**31 - 2, 0), "zero", Axis(6, 5, 0, 2**31 - 1)),
    ],
)
def test_an_axis_reaches_no_further_than_its_extent(window, edges, expected):
    g = geometry(Norm(window, edges=edges), (2, 3, 6))
    assert g.summation == (expected,)
    assert g.summation[0].whole == (window in ("all", 11, 2**31 - 1, Span(5, 5)))
    assert g.whole == (window == "all" or (g.summation[0].whole and edges == "valid"))
    assert geometry(Norm(window, edges=edges), (2, 3, 0)).summation[0].hi == 0


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("edges", ["valid", "zero"])
def test_a_window_far_beyond_the_extent(edges, backend):
    x, dy = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    options = {"window": (2**31 - 1, 2**30), "edges": edges}
    check(partial(divisive_norm, backend=backend), Call(x, torch.randn(3), torch.randn(3), 0.5, dy, 1.0, options))
    y = divisive_norm(x, **options, backend=backend)
    if edges == "valid":
        assert torch.equal(y, divisive_norm(x, window="all", backend=backend))
    else:  # averaged with so many zeros, mean and deviation are nothing
        torch.testing.assert_close(y, x)
