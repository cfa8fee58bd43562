"""Norms of many tensors, distributed ones too, by few operations and without a look at their values."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from ..checks import compute_dtype
from ..sharding import distributed, held_here


def norms(tensors: list[Tensor], dim: int | None = None) -> list[Tensor]:
    """The Euclidean norm of each whole tensor, of shape (), or of its rows along ``dim``, of shape (1, ..., n, ..., 1).

    Plain tensors, the same in every process: of distributed ones the norms meet in one collective a mesh and dtype, or
    one a tensor for rows. In float32, in float64 for float64 and on a CPU.
    """
    if dim is not None:
        return [_row_norms(t, dim) for t in tensors]
    batches = defaultdict(list)
    for i, t in enumerate(tensors):
        batches[_sum_dtype(t), t.device_mesh if distributed(t) else None].append(i)
    found: dict[int, Tensor] = {}
    for (dtype, mesh), indices in batches.items():
        values = torch._foreach_norm([tensors[i].detach() for i in indices], 2, dtype)
        if mesh is not None:
            values = torch.stack(values).full_tensor().unbind()
        found.update(zip(indices, values, strict=True))
    return [found[i] for i in range(len(tensors))]


def scale(tensors: list[Tensor], factors: list[Tensor]) -> None:
    """Multiplies each tensor by a plain one that broadcasts to it, in place, every process what it holds."""
    torch._foreach_mul_([held_here(t) for t in tensors], [_beside(t, f) for t, f in zip(tensors, factors, strict=True)])


def _beside(t: Tensor, factor: Tensor) -> Tensor:
    """What of ``factor`` belongs to the part of ``t`` that this process holds."""
    if factor.dim() == 0:  # in a product with a half type, a tensor without dimensions would be rounded to it
        return factor.reshape((1,) * t.dim())
    if not distributed(t):
        return factor
    from torch.distributed.tensor import DTensor, Replicate

    whole = [Replicate()] * t.device_mesh.ndim
    places = [p if p.is_shard() and factor.shape[p.dim] > 1 else Replicate() for p in t.placements]
    return DTensor.from_local(factor, t.device_mesh, whole, run_check=False).redistribute(placements=places).to_local()


def _row_norms(t: Tensor, dim: int) -> Tensor:
    others = [d for d in range(t.dim()) if d != dim]
    found = torch.linalg.vector_norm(t.detach(), 2, others, keepdim=True, dtype=_sum_dtype(t))
    return found.full_tensor() if distributed(found) else found


def _sum_dtype(t: Tensor) -> torch.dtype:
    """On a CPU torch adds squares up in a row: of 2^22 in float32 the norm is off by 1e-4."""
    return torch.float64 if t.device.type == "cpu" else compute_dtype(t)
