"""Layers of rows on nested tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def on_rows(function: Callable[[Tensor], Tensor], x: Tensor, row: tuple[int, ...]) -> Tensor:
    """``function``, which takes rows of the shape ``row``, of those of a nested ``x``, jagged or strided.

    Raises:
        ValueError: where a part of x ends in other dimensions.
    """
    parts = [x] if x.layout is torch.jagged else x.unbind()
    for part in parts:
        if tuple(part.shape[-len(row) :]) != row:
            raise ValueError(f"x: got shape {tuple(part.shape)}, expected (..., {', '.join(map(str, row))})")
    if x.layout is torch.jagged:
        values = function(x.values())
        return torch.nested.nested_tensor_from_jagged(values, x.offsets(), x.lengths(), jagged_dim=x._ragged_idx)
    rows = [part.reshape(-1, *row) for part in parts]
    found = function(torch.cat(rows)).split([len(r) for r in rows])
    return torch.nested.as_nested_tensor([y.view(part.shape) for y, part in zip(found, parts, strict=True)])
