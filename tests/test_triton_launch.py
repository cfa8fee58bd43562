"""The host's side of the Triton backend: the order of the items, the choice of tiles, launches, autotuning."""

import gc
import sys
import weakref
from collections import Counter
from math import prod

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import windows

from divnorm_kernels.backends import triton as backend
from divnorm_kernels.backends.triton import launch
from divnorm_kernels.backends.triton.schema import STAGES_AT, Column, Header, Kind
from divnorm_kernels.backends.triton.stages import schedule
from divnorm_kernels.backends.triton.tiles import Device, candidates, choose
from divnorm_kernels.fields import Geometry, geometry
from divnorm_kernels.norm import Norm

H200 = Device("sm_90", "cuda", 132, 60 << 20)
DEVICES = [H200, Device("gfx942", "hip", 304, 4 << 20), Device("interpreter", "interpreter", 2, 1 << 14)]


def geometry_of(shape, **options) -> Geometry:
    return geometry(Norm(**{"window": 5} | options), shape)


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    dims = draw(st.integers(0, 3))
    spatial = tuple(draw(st.integers(1, (3000, 3000, 60, 12)[dims])) for _ in range(max(dims, 1)))
    groups = draw(st.sampled_from((1, 2, 5))) if dims else 1
    channels = groups * draw(st.sampled_from((1, 3, 16, 100)))
    return geometry_of(
        (draw(st.integers(1, 40)), channels, *spatial) if dims else (draw(st.integers(1, 40)), *spatial),
        window=draw(windows(max(dims, 1))),
        norm_window=draw(windows(max(dims, 1))),
        groups=groups,
        over_batch=draw(st.booleans()),
    )


def stages_of(table: tuple[int, ...]) -> list[dict[Column, int]]:
    width = len(Column)
    begins = (STAGES_AT + i * width for i in range(table[Header.STAGES]))
    return [dict(zip(Column, table[at : at + width], strict=True)) for at in begins]


@settings(max_examples=200)
@example(geometry_of((3, 100, 9), window=None), DEVICES[2], False, False)
@given(geometries(), st.sampled_from(DEVICES), st.booleans(), st.booleans())
def test_items_depend_on_items_of_lower_number_and_do_everything_once(g, device, backward, channels_last):
    tiles = choose(g, device, "backward" if backward else "forward", 4, channels_last)
    found = schedule(g, tiles, backward=backward, finish=3, sigmas=1, variance=False)
    table, stages = found.table, stages_of(found.table)
    finish = table[Header.FINISH]
    segments = list(found.order.segments())
    assert found.order.items == finish + 3
    assert [first for first, _ in segments] == [sum(count for _, count in segments[:i]) for i in range(len(segments))]
    assert sum(count for _, count in segments) == found.order.items
    assert not found.order.independent
    if tiles.single:
        assert finish == table[Header.AWAITED] == table[Header.ITEMS] <= g.batch * g.groups
        return
    done, seen = Counter(), Counter()
    for item in range(finish):
        place = item % table[Header.STEP_ITEMS]
        k = sum(stage[Column.BEGIN] <= place for stage in stages) - 1
        stage = stages[k]
        place -= stage[Column.BEGIN]
        chunk = item // table[Header.STEP_ITEMS] - stage[Column.LAG]
        if not 0 <= chunk < table[Header.CHUNKS]:
            continue
        assert place < stage[Column.COUNT]
        if k > 0:
            assert done[chunk, k - 1] == stages[k - 1][Column.COUNT], "an item would wait for one of higher number"
        done[chunk, k] += 1
        row = chunk * stage[Column.ROWS] + place // stage[Column.TILES]
        if row < stage[Column.ALL_ROWS]:
            seen[k, row, place % stage[Column.TILES]] += 1
    assert sum(count for (_, k), count in done.items() if k == len(stages) - 1) == table[Header.AWAITED]
    assert stages[-1][Column.KIND] == Kind.APPLY
    assert set(seen.values()) <= {1}
    assert len(seen) == sum(stage[Column.ALL_ROWS] * stage[Column.TILES] for stage in stages)


@given(geometries(), st.sampled_from(DEVICES), st.booleans(), st.sampled_from((2, 4)))
def test_tiles_cover_what_they_must(g, device, channels_last, element_size):
    for direction in ("forward", "backward"):
        for tiles in candidates(g, device, direction, element_size, channels_last):
            pixels, per_group = prod(g.spatial), g.channels // g.groups
            extents = (tiles.channels, tiles.pixels, tiles.window, tiles.apply_channels, tiles.apply_pixels)
            assert all(extent & (extent - 1) == 0 and extent > 0 for extent in extents)
            assert (tiles.channels == 1) == (per_group == 1)  # the statistics of a single channel are not merged
            if tiles.single:
                assert tiles.channels >= per_group
                assert tiles.pixels >= pixels
                assert not g.over_batch
            assert 1 <= tiles.chunk_samples <= g.batch
            assert 1 <= tiles.warps <= 16


def test_a_chunk_fits_the_cache_and_a_small_tensor_is_one_chunk():
    big, small = geometry_of((256, 256, 56, 56)), geometry_of((16, 256, 28, 28))
    tiles = choose(big, H200, "forward", 2, False)
    assert 3 * tiles.chunk_samples * 256 * 56 * 56 * 2 <= H200.cache / 2 < 256 * 256 * 56 * 56 * 2
    assert choose(small, H200, "backward", 2, False).chunk_samples == 16


def kept_bytes(value: object) -> int:
    """What an object and all that it holds take, but for kernels and what is shared: types and functions."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if callable(value) or isinstance(value, Kernel):
        return 0
    if isinstance(value, dict):
        held = [*value, *value.values()]
    else:
        held = value if isinstance(value, tuple | list) else vars(value).values() if hasattr(value, "__dict__") else []
    return sys.getsizeof(value) + sum(map(kept_bytes, held))


class Kernel:
    """Records launches; stands for the compiled kernel too."""

    def __init__(self):
        self.first, self.again = [], []

    def __getitem__(self, grid):
        def run(*arguments, **options):
            (self.first if options else self.again).append((grid, arguments))
            return self

        return run


@pytest.fixture
def kernel(monkeypatch):
    found = Kernel()
    monkeypatch.setattr(launch, "forward_kernel", found)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "device_of", lambda _: H200)
    return found


def test_the_second_call_goes_straight_to_the_compiled_kernel(kernel):
    g = geometry_of((64, 64, 58, 56))
    g.cache.clear()
    x = torch.empty(g.shape, device="meta")
    for _ in range(3):
        backend.forward(g, x, None, None, 1.0, False)
    assert len(kernel.first) == 1
    assert len(kernel.again) == 2
    (grid, arguments), (again_grid, again) = kernel.first[0], kernel.again[0]
    assert again_grid == (*grid, 1, 1)
    assert len(arguments) == len(again)
    assert [type(a) for a in arguments] == [type(a) for a in again]


def test_addresses_that_are_not_aligned_go_through_triton(kernel):
    """Triton compiles for the alignment it sees; what was compiled for aligned addresses must not run on others."""
    g = geometry_of((2, 4, 6, 8))
    g.cache.clear()
    memory = torch.zeros(g.numel + 1)
    aligned, shifted = (memory[i : i + g.numel].view(g.shape) for i in (0, 1))
    for x, launches in ((shifted, 1), (aligned, 2), (shifted, 3), (aligned, 3)):
        backend.forward(g, x, None, None, 1.0, False)
        assert len(kernel.first) == launches
    assert len(kernel.again) == 1


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.arch)
@pytest.mark.parametrize(
    ("shape", "window"),
    [
        ((8, 64, 200_000), 5),
        ((64, 64, 112, 112), 5),
        ((1024, 64, 112, 112), "all"),
        ((100_000, 3, 224, 224), (101, 31)),
    ],
    ids=str,
)
def test_what_a_geometry_keeps_does_not_grow_with_its_size(shape, window, device, kernel, monkeypatch):
    monkeypatch.setattr(launch, "device_of", lambda _: device)
    g = geometry_of(shape, window=window)
    g.cache.clear()
    backend.forward(g, torch.empty(shape, device="meta"), None, None, 1.0, True)
    assert kept_bytes(g.cache) < 8192


def test_memory_is_of_the_device_of_x_whatever_the_default(kernel):
    g = geometry_of((3, 8, 20, 20), window=3)
    with torch.device("meta"):
        backend.forward(g, torch.zeros(g.shape, device="cpu"), None, None, 1.0, True)
    ((_, arguments),) = kernel.first
    assert {a.device.type for a in arguments if isinstance(a, torch.Tensor)} == {"cpu"}


@pytest.mark.parametrize("captures", [False, True])
def test_a_graphs_table_outlives_its_geometry(captures, kernel, monkeypatch):
    monkeypatch.setattr(launch, "captures", lambda _: captures)
    g = geometry_of((2, 4, 6, 10))
    g.cache.clear()
    backend.forward(g, torch.empty(g.shape, device="meta"), None, None, 1.0, False)
    (plan,) = g.cache.values()
    kept = weakref.ref(plan.table)
    del plan
    kernel.first.clear()
    g.cache.clear()
    gc.collect()
    assert (kept() is not None) == captures


def test_autotuning_keeps_the_fastest_plan(kernel, monkeypatch):
    g = geometry_of((64, 64, 60, 56))
    g.cache.clear()
    runs = []

    def do_bench(function, return_mode):
        function()
        runs.append(kernel.first[-1])
        return 1.0 if len(runs) == 3 else 2.0

    monkeypatch.setattr(launch, "AUTOTUNE", True)
    monkeypatch.setattr(launch.triton.testing, "do_bench", do_bench)
    backend.forward(g, torch.empty(g.shape, device="meta"), None, None, 1.0, False)
    assert len(runs) == len(list(candidates(g, H200, "forward", 4, False)))
    (plan,) = (found for found in g.cache.values() if isinstance(found, launch.Plan))
    assert plan.trailing == runs[2][1][-len(plan.trailing) :]
