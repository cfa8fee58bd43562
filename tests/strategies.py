"""Hypothesis strategies over the whole space of calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from oracle import Call
from torch import Tensor

from divnorm_kernels import Span

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EXTENTS = {0: 300, 1: 300, 2: 70, 3: 12}
"""The largest extent by the number of spatial dimensions."""
CHANNELS = (1, 2, 3, 4, 5, 8, 9, 17, 33)
"""Of a group."""
LAYOUTS = ("contiguous", "channels_last", "reversed", "sliced", "shifted")


def laid_out(values: Tensor, layout: str) -> Tensor:
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
    if layout == "shifted":  # contiguous, from an address that is no multiple of sixteen bytes on
        return values.new_zeros(values.numel() + 1)[1:].view_as(values).copy_(values)
    if layout == "expanded" and values.numel():
        return values[:1].expand_as(values)
    return values


@dataclass(frozen=True)
class Recipe:
    """A call in plain values; its repr is Python that makes it again."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    options: dict[str, Any]
    layout: str = "contiguous"
    dy_layout: str = "contiguous"
    parameter_dtype: torch.dtype = torch.float64
    weight: bool = True
    bias: bool = True
    sigma: float | str = 1.0
    """A number, or a tensor: ``"scalar"`` or ``"per group"``."""
    dl1: float = 0.0
    residual: str | None = None
    """The layout of one."""
    seed: int = 0

    def call(self) -> Call:
        """The call with its tensors."""
        torch.manual_seed(self.seed)

        def affine() -> Tensor:
            return torch.randn(self.shape[1]).to(self.parameter_dtype)

        x, dy = (torch.randn(self.shape).to(self.dtype) for _ in range(2))
        weight, bias = affine() if self.weight else None, affine() if self.bias else None
        sigma = self.sigma
        if isinstance(sigma, str):
            size = () if sigma == "scalar" else (self.options["groups"],)
            sigma = (torch.rand(size) + 0.5).to(self.parameter_dtype)
        residual = None if self.residual is None else laid_out(torch.randn(self.shape).to(self.dtype), self.residual)
        return Call(
            laid_out(x, self.layout),
            weight,
            bias,
            sigma,
            laid_out(dy, self.dy_layout),
            self.dl1,
            self.options,
            residual,
            affine() if self.options.get("activation") == "tlu" else None,
        )


@st.composite
def windows(draw: st.DrawFn, dims: int, largest: int = 400) -> int | str | tuple | None:
    """Any window for ``dims`` spatial dimensions: small, even, off-centre, larger than the image, whole, absent."""
    side = st.one_of(st.just(0), st.integers(0, 12), st.integers(0, largest))
    size = st.one_of(st.integers(1, 12), st.integers(1, largest), st.builds(Span, side, side))
    entry = st.one_of(size, st.just("all"))
    return draw(st.one_of(size, st.none(), st.just("all"), st.tuples(*[entry] * dims)))


@st.composite
def recipes(
    draw: st.DrawFn,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    extents: dict[int, int] = EXTENTS,
    channels: tuple[int, ...] = CHANNELS,
    largest_window: int = 400,
    ranks: tuple[int, ...] = (2, 2, 1, 3, 0),
) -> Recipe:
    """A call: rank, sizes, fields, groups, edges, parameters, dtypes and memory layouts."""
    dims = draw(st.sampled_from(ranks))
    dtype = draw(st.sampled_from(dtypes))
    groups = draw(st.sampled_from((1, 1, 2, 3))) if dims else 1
    batch, per_group = draw(st.integers(1, 4)), draw(st.sampled_from(channels))
    largest = extents[dims]
    extent = st.one_of(st.integers(1, min(9, largest)), st.integers(1, largest))
    spatial = tuple(draw(extent) for _ in range(max(dims, 1)))
    window = windows(max(dims, 1), largest_window)
    return Recipe(
        (batch, groups * per_group, *spatial) if dims else (batch, *spatial),
        dtype,
        {
            "window": draw(window),
            "norm_window": draw(st.one_of(st.just("same"), window)),
            "groups": groups,
            "edges": draw(st.sampled_from(("valid", "zero"))),
            "over_batch": draw(st.booleans()),
            "activation": draw(st.sampled_from((None, None, None, "relu", "tlu", "silu", "gelu", "gelu_tanh"))),
            "p": draw(st.sampled_from((2, 2, 2, 1))),
            "subtract_mean": draw(st.sampled_from((True, True, True, False))),
        },
        layout=draw(st.sampled_from(LAYOUTS)),
        dy_layout=draw(st.sampled_from((*LAYOUTS, "expanded"))),
        parameter_dtype=dtype if dtype == torch.float64 or draw(st.booleans()) else torch.float32,
        weight=draw(st.booleans()),
        bias=draw(st.booleans()),
        sigma=draw(st.sampled_from((0.5, 1, 2.0, "scalar", "per group"))),
        dl1=draw(st.sampled_from((0.0, 3.0))),
        residual=draw(st.sampled_from((None, None, *LAYOUTS[:2], "sliced"))),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def calls(*args: Any, **kwargs: Any) -> st.SearchStrategy[Call]:
    """The calls of `recipes`."""
    return recipes(*args, **kwargs).map(Recipe.call)
