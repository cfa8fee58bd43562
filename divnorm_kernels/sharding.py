"""How the registered operators take distributed tensors: whole on every process, or cut along the batch."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

from .constant import constant


@constant
def register() -> None:
    """Tells DTensor once how to shard the operators, if anything in this process has imported it."""
    if "torch.distributed.tensor" in sys.modules:
        _register()


@cache
def _register() -> None:
    import torch
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    def alike(arguments: tuple[Any, ...], tensors: tuple[Any, ...]) -> list[Any]:
        """``tensors`` of the leading arguments that are there, and nothing for the others."""
        given = [placement if a is not None else None for a, placement in zip(arguments, tensors, strict=False)]
        return [*given, *[None] * (len(arguments) - len(tensors))]

    whole = Replicate()

    @register_sharding(torch.ops.divnorm_kernels.forward.default)
    def _forward(*arguments: Any) -> list[tuple[list[Any], list[Any]]]:
        over_batch, with_l1 = arguments[9], arguments[11]
        ways = [([whole] * 3, alike(arguments, (whole,) * 4))]
        if not over_batch and not with_l1:  # l1 is an average: those of unequal shares do not add up
            ways.append(([Shard(0), Shard(1), whole], alike(arguments, (Shard(0), whole, whole, whole))))
        return ways

    @register_sharding(torch.ops.divnorm_kernels.backward.default)
    def _backward(*arguments: Any) -> list[tuple[list[Any], list[Any]]]:
        dl1, over_batch = arguments[1], arguments[13]
        dy_to_bias, sigma = (whole,) * 6, (None, whole)
        ways = [([whole] * 4, alike(arguments, (*dy_to_bias, *sigma)))]
        if not over_batch and dl1 is None:
            inputs = (Shard(0), None, Shard(0), Shard(1), whole, whole, *sigma)
            ways.append(([Shard(0), Partial(), Partial(), Partial()], alike(arguments, inputs)))
        return ways
