"""Distributed tensors: each process computes on what it holds of x, where that is whole samples or whole rows.

What is cut along the batch is gathered for statistics over the batch alone; what is cut within a sample, always.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .constant import constant

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

_Result = tuple[Tensor, Tensor | None, tuple[Tensor, ...] | None]


@constant
def _imported() -> bool:
    return "torch.distributed.tensor" in sys.modules


def distributed(x: Any) -> bool:
    """Whether ``x`` is a DTensor, for which something in this process must have imported them."""
    if not _imported():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def on_shards(
    function: Callable[..., _Result],
    x: DTensor,
    residual: DTensor | None,
    parameters: dict[str, Tensor | float | None],
    over_batch: bool = False,
) -> _Result:
    """``function(x, residual, *parameters)`` of what every process holds of ``x`` (N, C, ...), and whole parameters.

    ``residual``, of x's shape, is cut as x is. The function returns ``(y, average, statistics)``: y of x's shape, the
    average of something over x, and numbers of each sample or of the batch. So does this: y as a DTensor, the average
    over all of x, and plain tensors of all samples'.

    Raises:
        ValueError: on an x that is cut along its channels, and on parameters that are not distributed as x is.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    _check_whole(x, 1, 2, "the batch")
    mesh, whole = x.device_mesh, [Replicate()] * x.device_mesh.ndim
    cut = [not over_batch and _is_cut(p) and p.dim == 0 for p in x.placements]
    places = [Shard(0) if c else Replicate() for c in cut]
    pending = [Partial() if c else Replicate() for c in cut]
    x = _placed(x, places)
    own = x.to_local()
    added = None if residual is None else _placed(residual, places).to_local()
    y, average, statistics = function(own, added, *(_own(name, t, x, pending) for name, t in parameters.items()))
    y = DTensor.from_local(y, mesh, places, shape=x.shape, stride=_strides(x))
    if average is not None:
        share = own.numel() / max(x.numel(), 1) if any(cut) else 1.0
        average = DTensor.from_local(average * share, mesh, pending).redistribute(placements=whole)
    if statistics is not None and any(cut):
        statistics = tuple(_gathered(t, x, places) for t in statistics)
    return y, average, statistics


def by_rows(
    function: Callable[[DTensor, DTensor | None], DTensor], x: DTensor, residual: DTensor | None, dims: int
) -> DTensor:
    """``function`` of ``x`` and a residual as rows of x's trailing ``dims`` dimensions, cut as x along leading ones.

    Every process keeps the rows that it holds. How many these are does not follow from their number in all, as the
    shapes of a DTensor's views do, so that ``function`` must take no views.

    Raises:
        ValueError: on an x that is cut within its rows.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    leading = x.dim() - dims
    _check_whole(x, leading, x.dim(), "leading dimensions")
    mesh = x.device_mesh
    x = _placed(x, [p if _is_cut(p) else Replicate() for p in x.placements])
    own, size = x.to_local(), prod(x.shape[leading:])
    places = [Shard(0) if _is_cut(p) else p for p in x.placements]
    shape = torch.Size((prod(x.shape[:leading]), size))

    def rows(own: Tensor) -> DTensor:
        return DTensor.from_local(own.reshape(-1, size), mesh, places, shape=shape, stride=(size, 1))

    added = None if residual is None else rows(_placed(residual, list(x.placements)).to_local())
    y = function(rows(own), added).to_local().view(own.shape)
    stride = torch.empty(x.shape, device="meta").stride()
    return DTensor.from_local(y, mesh, x.placements, shape=x.shape, stride=stride)


def reshard(model: nn.Module) -> None:
    """Puts the parameters back where `fully_shard` has left gathered ones, as behind a forward without a backward."""
    if "torch.distributed.fsdp" not in sys.modules:
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def held_here(t: Tensor) -> Tensor:
    """What this process holds of a tensor, be it a DTensor or not."""
    return t.to_local() if distributed(t) else t


def _is_cut(p: Placement) -> bool:
    """Whether of each process' piece it is known what it is: others than `Shard` interleave."""
    from torch.distributed.tensor import Shard

    return type(p) is Shard


def _placed(t: DTensor, places: list[Placement]) -> DTensor:
    return t if t.placements == tuple(places) else t.redistribute(placements=places)


def _check_whole(x: DTensor, first: int, last: int, expected: str) -> None:
    """Raises where ``x`` is cut along one of the dimensions from ``first`` to before ``last``."""
    for p in x.placements:
        dim = getattr(p, "dim", None)
        if dim is not None and first <= dim < last:
            raise ValueError(
                f"x: got a DTensor sharded along channels (dimension {dim}), expected one that is sharded along "
                f"{expected} or replicated (redistribute() makes it so)"
            )


def _own(name: str, t: Tensor | float | None, x: DTensor, pending: list[Placement]) -> Tensor | float | None:
    """The whole of a parameter, whose gradient here is ``pending`` the sum over the processes that share x."""
    from torch.distributed.tensor import Replicate

    if not isinstance(t, Tensor):
        return t
    if not distributed(t):
        if t.requires_grad and torch.is_grad_enabled() and any(p.is_partial() for p in pending):
            raise ValueError(
                f"{name}: got a {type(t).__name__} beside an x that is sharded, expected a DTensor "
                "(torch.distributed.tensor.distribute_module makes parameters such)"
            )
        return t
    if t.device_mesh != x.device_mesh:
        raise ValueError(f"{name}: got a DTensor on {t.device_mesh}, expected it on that of x, {x.device_mesh}")
    whole = [Replicate()] * len(pending)
    # where a gradient is pending, its way back adds it up even if nothing is to be done forward
    t = _placed(t, whole) if pending == whole else t.redistribute(placements=whole)
    return t.to_local(grad_placements=pending)


def _gathered(t: Tensor, x: DTensor, places: list[Placement]) -> Tensor:
    """All samples' numbers, of which each process has computed those of its own."""
    from torch.distributed.tensor import DTensor

    shape = torch.Size((x.shape[0], *t.shape[1:]))
    return DTensor.from_local(t, x.device_mesh, places, shape=shape, stride=t.stride()).full_tensor()


def _strides(x: DTensor) -> tuple[int, ...]:
    """Those of a result that lies as ``x`` does, without gaps."""
    return torch.empty_like(torch.empty_strided(x.shape, x.stride(), device="meta")).stride()
