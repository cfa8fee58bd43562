"""Hypothesis strategies over the whole space of calls."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from oracle import Call
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EXTENTS = {0: 300, 1: 300, 2: 70, 3: 12}
"""The largest extent by the number of spatial dimensions."""


@st.composite
def windows(draw: st.DrawFn, dims: int) -> int | str | tuple | None:
    """Any window for ``dims`` spatial dimensions: small, even, larger than the image, rectangular, whole, absent."""
    size = st.one_of(st.integers(1, 12), st.integers(1, 400))
    entry = st.one_of(size, st.just("all"))
    return draw(st.one_of(size, st.none(), st.just("all"), st.tuples(*[entry] * dims)))


def _laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    dims = values.dim()
    if layout == "channels_last" and dims > 2:
        order = (0, *range(2, dims), 1)
        back = (0, dims - 1, *range(1, dims - 1))
        return values.permute(order).contiguous().permute(back)
    if layout == "reversed":
        order = tuple(reversed(range(dims)))
        return values.permute(order).contiguous().permute(order)
    if layout == "sliced":
        wide = values.new_full((*values.shape[:-1], 2 * values.shape[-1] + 1), float("nan"))
        wide[..., 1::2] = values
        return wide[..., 1::2]
    if layout == "expanded" and values.numel():
        return values[:1].expand_as(values)
    return values


@st.composite
def calls(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES, extents: dict[int, int] = EXTENTS) -> Call:
    """A call: rank, sizes, fields, groups, edges, parameters, dtypes and memory layouts."""
    dims = draw(st.sampled_from((2, 2, 1, 3, 0)))
    dtype = draw(st.sampled_from(dtypes))
    groups = draw(st.sampled_from((1, 1, 2, 3))) if dims else 1
    batch, per_group = draw(st.integers(1, 4)), draw(st.sampled_from((1, 2, 3, 4, 5, 8, 9, 17, 33)))
    spatial = tuple(draw(st.one_of(st.integers(1, 9), st.integers(1, extents[dims]))) for _ in range(max(dims, 1)))
    shape = (batch, groups * per_group, *spatial) if dims else (batch, *spatial)
    affine = shape[1]
    options = {
        "window": draw(windows(max(dims, 1))),
        "norm_window": draw(st.one_of(st.just("same"), windows(max(dims, 1)))),
        "groups": groups,
        "edges": draw(st.sampled_from(("valid", "zero"))),
        "over_batch": draw(st.booleans()),
        "activation": draw(st.sampled_from((None, None, "relu"))),
    }
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    parameter = dtype if dtype == torch.float64 or draw(st.booleans()) else torch.float32
    layouts = st.sampled_from(("contiguous", "channels_last", "reversed", "sliced"))

    def affine_parameter() -> Tensor | None:
        return torch.randn(affine).to(parameter) if draw(st.booleans()) else None

    sigma = draw(
        st.one_of(
            st.sampled_from((0.5, 1, 2.0)),
            st.just("scalar"),
            st.just("per group"),
        )
    )
    if isinstance(sigma, str):
        sigma = (torch.rand(() if sigma == "scalar" else (groups,)) + 0.5).to(parameter)
    return Call(
        _laid_out(torch.randn(shape).to(dtype), draw(layouts)),
        affine_parameter(),
        affine_parameter(),
        sigma,
        _laid_out(torch.randn(shape).to(dtype), draw(st.one_of(layouts, st.just("expanded")))),
        draw(st.sampled_from((0.0, 3.0))),
        options,
    )
