"""Launches: what is known of a call before it, found once per geometry and kept with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...fields import Geometry
from .backward_kernel import backward_kernel
from .forward_kernel import forward_kernel
from .schema import FINISH_COLUMNS, Activation
from .stages import Order, Schedule, schedule
from .tiles import Device, Tiles, candidates, choose, most_registers

AUTOTUNE = os.environ.get("DIVNORM_TRITON_AUTOTUNE", "0") == "1"
"""Whether the first call of a geometry times several tilings and keeps the fastest."""
INTERPRETED = triton.knobs.runtime.interpret
_INTERPRETER = Device("interpreter", "interpreter", 2, 1 << 14)
_ALIGNMENT = 16
_INT32 = 2**31


@cache
def device_of(device: torch.device) -> Device:
    """What the choice of tiles needs to know of a device."""
    if INTERPRETED:
        return _INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
        return Device(name, "hip", properties.multi_processor_count, properties.L2_cache_size)
    name = f"sm_{properties.major}{properties.minor}"
    return Device(name, "cuda", properties.multi_processor_count, properties.L2_cache_size)


def _unit(number: int) -> int:
    """The largest power of two up to the alignment that divides ``number``."""
    return min(number & -number, _ALIGNMENT)


def constants(g: Geometry, tiles: Tiles, channels_last: bool) -> dict[str, Any]:
    """The compile-time arguments of either kernel, in order."""
    per_group, pixels = g.channels // g.groups, prod(g.spatial)
    return {
        "CHANNEL_UNIT": _unit(per_group),
        "PIXEL_UNIT": _unit(pixels),
        # where nothing divides there is no exponent, and without a mean nothing to subtract
        "P": g.norm.p if g.suppression is not None else 2,
        "SUBTRACT_MEAN": g.norm.subtract_mean or g.summation is None,
        "STRATEGY": int(tiles.strategy),
        "ORDERED": tiles.ordered,
        "SUMMATION": g.summation is not None,
        "SUPPRESSION": g.suppression is not None,
        "WHOLE": g.whole,
        "OVER_BATCH": g.over_batch,
        "FEATURES": g.features,
        "ACTIVATION": int(Activation[(g.norm.activation or "none").upper()]),
        "CHANNELS_LAST": channels_last,
        "INDEX": tl.int64 if (g.numel if g.features else g.channels * pixels) >= _INT32 else tl.int32,
        "CHANNELS": tiles.channels,
        "PIXELS": tiles.pixels,
        "WINDOW": tiles.window,
        "APPLY_CHANNELS": tiles.apply_channels,
        "APPLY_PIXELS": tiles.apply_pixels,
    }


_captured: set[Tensor] = set()
"""The tables of launches that CUDA graphs hold: a replay reads them, whatever geometries are kept by then."""


def captures(x: Tensor) -> bool:
    """Whether launches on x are recorded for a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


@dataclass
class Plan:
    """One direction of one kind of call: the order of its items, the kernel compiled for it, its constant arguments."""

    kernel: Any
    order: Order
    ordered: bool
    options: dict[str, int]
    table: Tensor
    trailing: tuple[Any, ...]
    """The arguments behind ``first``."""
    compiled: Any = field(default=None, init=False)

    def run(
        self, leading: Callable[[Tensor | None, Tensor | None], tuple[Any, ...]], like: Tensor, aligned: bool
    ) -> None:
        """Launches the kernel. ``leading`` gives the arguments before the table for a scratch memory and counters.

        ``aligned``: whether every address is a multiple of 16, as those of the first such call, which compiled it.
        """
        scratch = like.new_empty(self.order.scratch, dtype=torch.float32) if self.order.scratch else None
        counters = like.new_zeros(self.order.counters, dtype=torch.int32) if self.ordered else None
        arguments = leading(scratch, counters)
        for first, count in ((0, self.order.items),) if self.ordered else self.order.segments():
            self._launch(count, (*arguments, self.table, first, *self.trailing), aligned)

        if captures(like):
            _captured.add(self.table)

    def _launch(self, items: int, arguments: tuple[Any, ...], aligned: bool) -> None:
        if aligned and self.compiled is not None:
            self.compiled[(items, 1, 1)](*arguments)
            return
        compiled = self.kernel[(items,)](*arguments, **self.options)
        if aligned and not INTERPRETED:
            self.compiled = compiled


def _options(tiles: Tiles, wide: bool) -> dict[str, int]:
    """What the compiler is told beside the arguments; wide offsets take registers of their own."""
    options = {"num_warps": tiles.warps, "enable_fp_fusion": True}
    if tiles.registers is None:
        return options
    return {**options, "maxnreg": most_registers(tiles.warps) if wide else tiles.registers}


def planned(
    kernel: Any,
    g: Geometry,
    x: Tensor,
    channels_last: bool,
    tiles: Tiles,
    found: Schedule,
    taken: Container[str] | None = None,
) -> Plan:
    """The plan of a schedule; ``taken``: which of the `constants` the kernel takes, if not all."""
    known = constants(g, tiles, channels_last)
    units = (g.channels // g.groups // known["CHANNEL_UNIT"], prod(g.spatial) // known["PIXEL_UNIT"])
    # the kernel adds to the table's numbers in their type, up to the end of the scratch memory
    table_type = torch.int64 if max(*found.table, found.order.scratch) >= _INT32 else torch.int32
    # a single stage without a finish has items that are all independent
    ordered = tiles.ordered and not found.order.independent
    known = {**known, "ORDERED": ordered}
    return Plan(
        kernel,
        found.order,
        ordered,
        _options(tiles, known["INDEX"] == tl.int64),
        torch.tensor(found.table, dtype=table_type, device=x.device),
        (*units, *(value for name, value in known.items() if taken is None or name in taken)),
    )


def plans(
    g: Geometry,
    x: Tensor,
    channels_last: bool,
    *,
    backward: bool,
    residual: bool,
    affine: bool,
    sigmas: int,
    l1: bool,
    variance: bool,
) -> Iterable[Plan]:
    """The plan of the table's choice, or to choose from under autotuning, several.

    ``affine``, ``sigmas`` and ``l1`` say which sums over all positions are wanted, ``variance`` that those of rows are,
    ``residual`` that one is read.
    """
    columns = -(-g.affine_size // FINISH_COLUMNS) if affine else 0
    finish = columns + sigmas if backward else int(l1)
    direction = "backward" if backward else "forward"
    arguments = (g, device_of(x.device), direction, x.element_size(), channels_last, residual)
    chosen = candidates(*arguments) if AUTOTUNE and not INTERPRETED else [choose(*arguments)]
    wanted = {"backward": backward, "finish": finish, "sigmas": sigmas, "variance": variance}
    kernel = backward_kernel if backward else forward_kernel
    return (planned(kernel, g, x, channels_last, t, schedule(g, t, **wanted)) for t in chosen)


def fastest(plans: Iterable[Plan], run: Callable[[Plan], None]) -> Plan:
    """The plan that takes the least time, or the only one."""
    plans = list(plans)
    if len(plans) == 1:
        return plans[0]
    return min(plans, key=lambda plan: triton.testing.do_bench(lambda: run(plan), return_mode="median"))
