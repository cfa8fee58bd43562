"""The plan of a call of the Triton backend: the order of the items and the choice of tiles."""

from collections import Counter
from math import prod

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scheduled import DEVICES, H200, geometry_of
from strategies import windows

from divnorm_kernels.backends.triton.schema import STAGES_AT, Column, Header, Kind, Strategy
from divnorm_kernels.backends.triton.stages import schedule
from divnorm_kernels.backends.triton.tiles import Device, candidates, choose
from divnorm_kernels.fields import Geometry


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
        activation=draw(st.sampled_from((None, "relu", "gelu", "tlu"))),
        p=draw(st.sampled_from((2, 1))),
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
    if tiles.strategy == Strategy.SINGLE:
        assert finish == table[Header.AWAITED] == table[Header.ITEMS] <= g.batch * g.groups
        return
    if tiles.strategy == Strategy.LOOPED:
        assert finish == g.batch * g.groups
        assert table[Header.CHANNEL_BLOCKS] == tiles.channel_blocks
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
            if tiles.strategy == Strategy.SINGLE:
                assert tiles.channels >= per_group
                assert tiles.pixels >= pixels
                assert not g.over_batch
            else:
                channels, positions = (pixels, g.batch) if g.features else (per_group, pixels)
                blocks, channel_blocks = -(-positions // tiles.apply_pixels), -(-channels // tiles.apply_channels)
                piece = -(-positions // (tiles.apply_pixels * tiles.splits))
                assert (tiles.splits - 1) * piece < blocks, "a piece without a tile would leave partial sums unwritten"
                assert tiles.splits == 1 or tiles.channel_blocks == 1
                assert 1 <= tiles.channel_blocks <= channel_blocks
            if tiles.strategy == Strategy.LOOPED:
                assert not g.over_batch
                assert not tiles.ordered
                assert tiles.splits == 1
            assert 1 <= tiles.chunk_samples <= g.batch
            assert 1 <= tiles.warps <= (8 if tiles.strategy == Strategy.STAGED else 16)


def test_a_chunk_fits_the_cache_and_a_small_tensor_is_one_chunk():
    big, small = geometry_of((256, 256, 56, 56)), geometry_of((16, 256, 28, 28))
    tiles = choose(big, H200, "forward", 2, False)
    at_work = 4  # in its statistics, in the window sums of either field, in its second pass
    assert at_work * tiles.chunk_samples * 256 * 56 * 56 * 2 <= H200.cache / 2 < 256 * 256 * 56 * 56 * 2
    assert choose(small, H200, "backward", 2, False).chunk_samples == 16


@pytest.mark.parametrize(
    ("options", "lags"),
    [
        ({"window": 3}, [0, 1, 2, 3]),
        ({"window": 9}, [0, 1, 1, 2, 2, 3]),
        ({"window": 3, "norm_window": None}, [0, 1, 2]),
        ({"window": "all"}, [0, 1, 2]),
        ({"window": None}, [0]),
        ({"window": 3, "over_batch": True}, [0, 0, 0, 0, 0]),
    ],
    ids=str,
)
def test_items_wait_for_what_was_begun_in_the_step_before(options, lags):
    g = geometry_of((256, 256, 56, 56), **options)
    for direction in ("forward", "backward"):
        tiles = choose(g, H200, direction, 2, False)
        found = schedule(g, tiles, backward=direction == "backward", finish=1, sigmas=0, variance=False)
        assert [stage[Column.LAG] for stage in stages_of(found.table)] == lags


@pytest.mark.parametrize(
    ("options", "kinds", "lags"),
    [
        ({"window": 3}, "SWDWA", [0, 1, 2, 3, 4]),
        ({"window": None, "norm_window": 3}, "SWA", [0, 1, 2]),
        ({"window": "all"}, "SMDMA", [0, 1, 2, 3, 4]),
        ({"window": 3, "over_batch": True}, "SMWDMWA", [0] * 7),
        ({"window": 3, "norm_window": None}, "SWA", [0, 1, 2]),
    ],
    ids=str,
)
def test_deviations_for_p_1_wait_for_mu(options, kinds, lags):
    names = {"S": Kind.STATISTICS, "M": Kind.MERGE, "W": Kind.WINDOW, "D": Kind.DEVIATIONS, "A": Kind.APPLY}
    g = geometry_of((256, 256, 56, 56), p=1, **options)
    tiles = choose(g, H200, "forward", 2, False)
    stages = stages_of(schedule(g, tiles, backward=False, finish=1, sigmas=0, variance=False).table)
    assert [stage[Column.KIND] for stage in stages] == [names[kind] for kind in kinds]
    assert [stage[Column.LAG] for stage in stages] == lags
    backward = (
        schedule(
            geometry_of(g.shape, p=p, **options),
            choose(g, H200, "backward", 2, False),
            backward=True,
            finish=1,
            sigmas=0,
            variance=False,
        )
        for p in (1, 2)
    )
    assert next(backward).table == next(backward).table


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize(
    "shape", [(64, 256, 56, 56), (64, 512, 28, 28), (16, 1024, 14, 14), (2, 64, 224, 224)], ids=str
)
def test_both_passes_of_the_chunks_at_work_fill_the_multiprocessors(shape, element_size, direction, channels_last):
    g = geometry_of(shape)
    tiles = choose(g, H200, direction, element_size, channels_last)
    if tiles.strategy == Strategy.LOOPED:
        return
    rows, programs = min(g.batch, 2 * tiles.chunk_samples), 4 * H200.multiprocessors
    positions = prod(g.spatial)
    finest = 4 if channels_last else 128 // element_size
    assert rows * -(-positions // tiles.pixels) >= programs or tiles.pixels == finest
    assert tiles.apply_channels * tiles.apply_pixels <= 4096
    blocks, channel_blocks = -(-positions // tiles.apply_pixels), -(-g.channels // tiles.apply_channels)
    each = -(-blocks // tiles.splits) * tiles.channel_blocks
    assert each <= 8
    assert each >= min(2, blocks * (1 if channels_last else channel_blocks))


@pytest.mark.parametrize(
    ("shape", "options", "element_size", "strategies"),
    [
        ((64, 1024, 14, 14), {}, 2, ("LOOPED", "LOOPED")),
        ((64, 512, 28, 28), {}, 2, ("LOOPED", "STAGED")),
        ((64, 512, 28, 28), {}, 4, ("STAGED", "STAGED")),
        ((64, 256, 56, 56), {}, 2, ("STAGED", "STAGED")),
        ((32, 1024, 14, 14), {}, 2, ("STAGED", "STAGED")),
        ((64, 1024, 14, 14), {"over_batch": True}, 2, ("STAGED", "STAGED")),
        ((64, 1024, 14, 14), {"window": None}, 2, ("STAGED", "STAGED")),
        ((128, 16, 32, 32), {}, 2, ("SINGLE", "STAGED")),
        ((128, 64, 16, 16), {}, 2, ("SINGLE", "LOOPED")),
        ((128, 64, 14, 14), {}, 2, ("LOOPED", "LOOPED")),  # moves of 8 bytes
        ((4096, 768), {}, 4, ("SINGLE", "SINGLE")),
    ],
    ids=str,
)
def test_what_is_held_what_is_looped_over_and_what_is_cut(shape, options, element_size, strategies):
    """Small maps of rows enough are looped over, where the second-level cache holds the rows at work."""
    g, device = geometry_of(shape, **options), Device("sm_90", "cuda", 132, 50 << 20)
    found = (choose(g, device, direction, element_size, False).strategy for direction in ("forward", "backward"))
    assert tuple(strategy.name for strategy in found) == strategies
