"""What is drawn, how it is made, and what must hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from emulated import TINY as SMALL_DEVICE
from emulated import backend, loaded
from hypothesis import strategies as st
from oracle import check
from processor import once_more_if_it_erred
from strategies import Recipe, recipes

from divnorm_kernels import divisive_norm, fields
from divnorm_kernels.norm import Norm

RANKS = (3, 3, 3, 2, 2, 1, 0)
SMALL = {
    "extents": {0: 40, 1: 40, 2: 12, 3: 12},
    "channels": (1, 2, 3, 4, 5, 8, 9),
    "largest_window": 30,
    "ranks": RANKS,
}
SMALLER = {"extents": {0: 40, 1: 40, 2: 9, 3: 5}, "channels": (1, 2, 3, 5, 8), "largest_window": 12, "ranks": RANKS}
TINY = {"extents": {0: 30, 1: 30, 2: 5, 3: 3}, "channels": (1, 2, 5), "largest_window": 9, "ranks": RANKS}
LARGE = {"extents": {0: 40_000, 1: 40_000, 2: 400, 3: 30}, "channels": (1, 3, 8, 33), "largest_window": 400}
"""Several slabs of rows, teams of threads, and outputs that bypass the cache."""
ONE_IN = 400
"""Calls on the CPU that are large."""


@st.composite
def on_cpu(draw: st.DrawFn) -> tuple[Recipe]:
    """A call."""
    return (draw(recipes(**(LARGE if draw(st.integers(1, ONE_IN)) == ONE_IN - 1 else SMALL))),)


@st.composite
def in_chunks(draw: st.DrawFn, recipe: Recipe) -> Recipe:
    """As a recipe, of samples that bulk copies can move: whole sixteen bytes of each row, most often of each plane."""
    batch, *sizes = recipe.shape
    groups, step = recipe.options["groups"], draw(st.sampled_from((4, 8, 8)))
    if len(sizes) > 1:
        sizes[0] = groups * -(-sizes[0] // (groups * step)) * step * draw(st.sampled_from((1, 3, 8, 16)))
    if len(sizes) == 1 or draw(st.integers(0, 3)):
        sizes[-1] = -(-sizes[-1] // step) * step
    batch += draw(st.integers(0, 5))
    return replace(recipe, shape=(batch, *sizes), options=recipe.options | {"over_batch": False})


@st.composite
def on_emulated(
    draw: st.DrawFn, sizes: dict[str, Any], threads: tuple[int, ...], clusters: tuple[int, ...]
) -> tuple[Recipe, dict[str, Any], dict[str, Any]]:
    """A call, the table's row that cuts it, and what the device has."""
    recipe, chunks = draw(recipes(**sizes)), draw(st.booleans())
    row = {
        "cluster": draw(st.sampled_from(clusters if chunks else (0, *clusters))),
        "blocks": draw(st.sampled_from((1, 2, 42))),
        "threads": draw(st.sampled_from(threads)),
        "bytes_per_thread": draw(st.sampled_from((8, 32, 128))),
        "slice_channels": draw(st.sampled_from((1, 2, 32))),
        "stretch_bytes": draw(st.sampled_from((8, 16, 256))),
        "window_rounds": draw(st.sampled_from((0, 4, 1000))),
        "staged_threads": draw(st.sampled_from([count for count in threads if count <= 128])),
        "tile_bytes": draw(st.sampled_from((256, 2048, 24576))),
        "tile_positions": draw(st.sampled_from((8, 32, 1024))),
        "row_positions": draw(st.sampled_from((16, 100, 4096))),
        "items": draw(st.sampled_from((1, 3, 10))),
        "cache_share": draw(st.sampled_from((0.01, 0.4))),
        "finish_inside": draw(st.sampled_from((0, 1, 3, 64))),
        "pipeline": draw(st.sampled_from((64, 128, 512) if chunks else (0, 64, 1024))),
    }
    device = {
        "multiprocessors": draw(st.sampled_from((3, 8, 19))),
        "block_shared_bytes": draw(st.one_of(st.integers(3, 24), st.integers(3, 24), st.just(454))) << 9,
    }
    return draw(in_chunks(recipe)) if chunks else recipe, row, device


CALLS = {
    "cpu": on_cpu(),
    "cuda": on_emulated(SMALLER, (32, 64, 96, 256), (1, 2, 4, 8, 16)),
    "races": on_emulated(TINY, (32, 64), (1, 2, 4)),
}


def compare(recipe: Recipe, backend: str) -> None:
    """Compares every result with the oracle's; and makes the call again with as few tensors as it can have."""
    function, call = partial(divisive_norm, backend=backend), recipe.call()
    once_more_if_it_erred(lambda: check(function, call))
    inputs = list(call.inputs)
    tensors = [i for i, t in enumerate(inputs) if isinstance(t, torch.Tensor)]
    only = tensors[recipe.seed % len(tensors)]
    inputs[only] = inputs[only].detach().requires_grad_()
    keywords = call.options | {"residual": inputs[4], "threshold": inputs[5]}
    y = function(*inputs[:3], sigma=inputs[3], **keywords)
    torch.autograd.grad(y, inputs[only], call.dy, materialize_grads=True)


def maker(target: str, folder: Path) -> Callable[..., tuple[str, ...]]:
    """What makes a call of ``CALLS[target]`` with the kernels built in a folder, and names the strategies it took."""

    def on_cpu(recipe: Recipe) -> tuple[str, ...]:
        torch.set_num_threads(1 + recipe.seed % 3)
        compare(recipe, "cpu")
        return ()

    def on_emulated(recipe: Recipe, row: dict[str, Any], device: dict[str, Any]) -> tuple[str, ...]:
        torch.set_num_threads(1)
        with backend(library, replace(SMALL_DEVICE, **device), **row):
            compare(recipe, "cuda")
            kept = fields.geometry(Norm(**recipe.options), recipe.shape).cache
        return tuple(name for key, calls in kept.items() if key[0] == "CudaCalls" for name in calls.strategies)

    if target == "cpu":
        return on_cpu
    library = loaded("emulated", folder)
    return on_emulated
