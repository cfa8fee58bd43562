"""The CUDA kernels of channel normalizations: on the GPU where there is one, else on the emulated device."""

import math
from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
from channel_oracle import Call, call, check, evaluate, exact
from emulated import DEVICE, TINY, backend, counted, module
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES

from divnorm_kernels.channels import Exponential, channel_norm
from divnorm_kernels.channels import cuda as kernels
from divnorm_kernels.norm import Span

emulated_alone = pytest.mark.skipif(DEVICE != "cpu", reason="counts on the emulated device")
SMALL, SMALLER = (replace(TINY, block_shared_bytes=size) for size in (4000, 1500))
"""Devices whose shared memory holds few positions."""
NARROW, LONG, ALL = (2, 2), (70, 9), (1 << 20, 1 << 20)
KINDS = {
    "narrow": {"box": NARROW, "beta": 0.5},
    "behind": {"box": (3, 0), "squared": True, "learns": "kab"},
    "long": {"box": LONG, "learns": "b"},
    "all": {"box": ALL, "squared": True, "beta": 1.0, "learns": "ka"},
    "exponential": {"box": None, "learns": "kabr"},
    "slow": {"box": None, "squared": True, "rho": 0.99, "learns": "kr"},
}
SHAPES = {
    "features": ((21, 96), False),
    "odd features": ((37, 33), False),
    "one channel": ((3, 1, 5), False),
    "line": ((2, 130, 43), False),
    "image": ((2, 24, 12, 12), False),
    "channels last": ((2, 24, 5, 7), True),
    "many channels": ((1, 300, 3, 3), False),
    "many, channels last": ((3, 270, 2, 2), True),
    "volume": ((2, 9, 3, 4, 5), False),
    "volume, channels last": ((2, 9, 3, 4, 5), True),
    "one position": ((5, 40, 1, 1), False),
}


LEARNERS = ["".join(some) for count in range(5) for some in combinations("kabr", count)]
"""Of a box those without rho, which it has not."""


def on_device(made: Call) -> Call:
    return Call(made.pool, *(None if t is None else t.to(DEVICE) for t in (made.x, made.dy, made.learned)))


def made(shape, dtype=torch.float32, box=NARROW, **options) -> Call:
    return on_device(call(shape, dtype, box, **options))


def cut_of(call: Call, backward: bool) -> dict:
    return kernels.channels_for(call.pool, call.x).cut(backward)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, kind, dtype):
    sizes, channels_last = SHAPES[shape]
    one = made(sizes, dtype, channels_last=channels_last, **KINDS[kind])
    with backend():
        y, dx, _ = check(kernels, one)
    assert y.stride() == dx.stride() == one.x.stride()
    assert y.dtype == dx.dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 0.75, 1.0, 2.0, -0.5])
def test_exponents(beta, kind):
    for dtype, learns in ((torch.float64, ""), (torch.float32, ""), (torch.float32, "b")):
        with backend():
            check(kernels, made((2, 20, 6), dtype, **KINDS[kind] | {"beta": beta, "learns": learns}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_every_window(dtype):
    with backend():
        for box in product(range(9), repeat=2):
            check(kernels, made((2, 9, 3), dtype, box=box, learns="a"))


@pytest.mark.parametrize("window", [*range(1, 19), Span(0, 5), Span(40, 1), Exponential(2.5)], ids=str)
def test_public_call(window):
    x, alpha = torch.randn(2, 9, 4, device=DEVICE), torch.tensor(0.2, device=DEVICE)
    with backend():
        x.requires_grad_(), alpha.requires_grad_()
        y = channel_norm(x, window, alpha=alpha, beta=0.5, backend="cuda")
        got = torch.autograd.grad(y.square().sum(), (x, alpha))
        z = channel_norm(x, window, alpha=alpha, beta=0.5, backend="reference")
        want = torch.autograd.grad(z.square().sum(), (x, alpha))
    torch.testing.assert_close((y, *got), (z, *want))


@pytest.mark.parametrize(
    ("box", "learns"), [*((NARROW, some) for some in LEARNERS if "r" not in some), *((None, some) for some in LEARNERS)]
)
def test_what_learns(box, learns):
    """Zero where it does not, and the numbers are those of the tensor where it does."""
    with backend():
        _, _, dlearned = check(kernels, made((3, 40, 5), box=box, learns=learns))
    if learns:
        assert [bool(number != 0) for number in dlearned] == [letter in learns for letter in "kabr"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device", [TINY, SMALL], ids=["shared", "far"])
def test_some_gradients_alone(kind, device):
    one = made((2, 700, 5), **KINDS[kind] | {"learns": "kabr"})
    with backend(device=device):
        _, dx, dlearned = evaluate(kernels, one)
        alone = kernels.backward(one.pool, one.dy, one.x, one.learned, (True, False))
        assert alone[1] is None
        assert torch.equal(alone[0], dx)
        alone = kernels.backward(one.pool, one.dy, one.x, one.learned, (False, True))
        assert alone[0] is None
        assert torch.equal(alone[1], dlearned)


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 5, 0), (2, 0, 3), (0, 7)], ids=str)
def test_empty(shape):
    one = made(shape, learns="k")
    with backend():
        y, dx, dlearned = evaluate(kernels, one)
    assert y.shape == dx.shape == shape
    assert torch.equal(dlearned, torch.zeros_like(dlearned))


@pytest.mark.parametrize("sliced", ["x", "dy", "both"])
def test_layouts_that_are_copied(sliced):
    one = made((2, 12, 6), learns="kab")
    wide = {name: t.repeat_interleave(2, dim=-1)[..., ::2] for name, t in (("x", one.x), ("dy", one.dy))}
    for name in ("x", "dy"):
        if sliced in (name, "both"):
            one = replace(one, **{name: wide[name]})
    with backend():
        check(kernels, one)
        check(kernels, replace(one, dy=one.dy.movedim(1, -1).contiguous().movedim(-1, 1)))


@emulated_alone
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 600, 3), (3, 1100)], ids=str)
def test_more_channels_than_shared_memory_holds(shape, kind, dtype):
    one = made(shape, dtype, **KINDS[kind])
    with backend(device=SMALL):
        check(kernels, one)
        assert cut_of(one, backward=False)["far"]
        assert cut_of(one, backward=True)["far"]


@emulated_alone
@pytest.mark.parametrize("kind", ["behind", "exponential"])
@pytest.mark.parametrize(("shape", "far"), [((3, 10, 3001), False), ((1100, 160), True)])
def test_blocks_with_several_tiles(shape, far, kind):
    """A barrier lies between two tiles, and their sums are added up."""
    one = made(shape, **KINDS[kind])
    with backend(device=SMALLER):
        check(kernels, one)
        for backward in (False, True):
            cut = cut_of(one, backward)
            assert cut["far"] == far
            assert cut["tiles"] > cut["blocks"] == (128 if far else 1024)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(3, 50, 4), (40, 50)], ids=str)
@pytest.mark.parametrize("box", [(0, 0), (2, 3), (0, 7), (20, 1), (49, 49)], ids=str)
def test_what_is_not_finite_reaches_the_windows_that_see_it(box, shape, number):
    clean = made(shape, box=box)
    for channel in (0, 7, 24, 49):
        one = replace(clean, x=clean.x.clone())
        one.x[0, 30] = one.x[1, channel] = number
        with backend():
            got, untouched = evaluate(kernels, one), evaluate(kernels, clean)
        for have, want, other in zip(got[:2], exact(one)[:2], untouched[:2], strict=True):
            assert torch.equal(have.isnan(), want.isnan())
            assert torch.equal(have.isinf(), want.isinf())
            assert torch.equal(have[2:], other[2:])


def test_the_same_bits_again_and_in_any_company():
    """A position's results do not depend on how many there are."""
    for kind, options in KINDS.items():
        one = made((5, 40, 37), torch.float32, **options)
        with backend():
            first, again = evaluate(kernels, one), evaluate(kernels, one)
            alone = kernels.forward(one.pool, one.x[3:4, :, 7:8].contiguous(), one.learned)
        for a, b in zip(first, again, strict=True):
            assert a is None or torch.equal(a, b), kind
        assert torch.equal(first[0][3:4, :, 7:8], alone), kind


@st.composite
def calls(draw):
    channels = draw(st.integers(1, 80))
    shape = (draw(st.integers(1, 5)), channels, *draw(st.lists(st.integers(1, 9), max_size=3)))
    side = st.integers(0, channels - 1)
    torch.manual_seed(draw(st.integers(0, 1 << 20)))
    return call(
        shape,
        draw(st.sampled_from(DTYPES)),
        draw(st.none() | st.tuples(side, side)),
        squared=draw(st.booleans()),
        learns=draw(st.sampled_from(["", "k", "ab", "kabr"])),
        channels_last=draw(st.booleans()) and len(shape) > 2,
        beta=draw(st.sampled_from([0.5, 0.75, 1.0, 0.3, 1.5])),
        rho=draw(st.sampled_from([0.0, 0.2, 0.95])),
    )


@settings(max_examples=max(30, settings.default.max_examples // 5))
@given(calls().map(on_device), st.sampled_from([1500, 4000, 227 << 10]))
def test_any_call(one, shared_bytes):
    with backend(device=replace(TINY, block_shared_bytes=shared_bytes)):
        check(kernels, one)


def test_refusals():
    x = torch.zeros(2, 3, 4, device=DEVICE)
    with backend():
        assert kernels.refusal(x) is None
        assert kernels.refusal(x.to("meta")) == f"x is on meta, this backend computes on {DEVICE} devices"
        assert kernels.refusal(x.int()) == "x has dtype torch.int32"
        most = kernels.cuda.library.cuda_most_channels
        assert kernels.refusal(x[:1, :1, :1].expand(1, most, 1)) == f"x has {most} or more channels"
        assert kernels.refusal(x[:1, :1, :1].expand(1, most - 1, 1)) is None


# What they read and write.


@pytest.fixture
def moved():
    """Runs a call of a direction and gives the bytes read and written: of each tensor given, and of all else."""

    def run(function, *tensors):
        module().forget_traffic()
        for t in tensors:
            module().watch(t.data_ptr(), t.numel() * t.element_size())
        function()
        return [module().traffic_of(t.data_ptr()) for t in tensors], module().traffic_elsewhere()

    yield run
    module().forget_traffic()


@emulated_alone
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ["odd features", "line", "channels last", "many channels"])
def test_one_sweep(shape, kind, dtype, moved):
    """Forward reads x and writes y; backward reads x and dy and writes dx; no number is touched twice."""
    sizes, channels_last = SHAPES[shape]
    one = made(sizes, dtype, channels_last=channels_last, **KINDS[kind] | {"learns": "kabr"})
    y, dx, dlearned = torch.empty_like(one.x), torch.empty_like(one.x), torch.zeros_like(one.learned)
    once = one.x.numel() * one.x.element_size()
    with backend():
        channels = kernels.channels_for(one.pool, one.x)
        scratch = [torch.empty(size, dtype=torch.uint8) for size in channels.scratch_bytes]
        address = [t.data_ptr() for t in (one.x, y, one.dy, dx, one.learned, dlearned)]
        x_at, y_at, dy_at, dx_at, learned_at, dlearned_at = address

        def backward(dx_at, dlearned_at):
            given = one.pool.scalars, learned_at, scratch[1].data_ptr(), 0
            return lambda: channels.backward(dy_at, x_at, dx_at, dlearned_at, *given)

        forward = lambda: channels.forward(x_at, y_at, one.pool.scalars, learned_at, scratch[0].data_ptr(), 0)  # noqa: E731
        assert moved(forward, one.x, y, scratch[0])[0] == [(once, 0), (0, once), (0, 0)]
        activations = [(once, 0), (once, 0), (0, once)]
        assert moved(backward(dx_at, 0), one.x, one.dy, dx, scratch[1])[0] == [*activations, (0, 0)]
        assert moved(backward(0, dlearned_at), one.x, one.dy, dx)[0] == [*activations[:2], (0, 0)]
        found, rest = moved(backward(dx_at, dlearned_at), one.x, one.dy, dx, dlearned, scratch[1])
        sums = 4 * cut_of(one, backward=True)["blocks"] * one.learned.element_size()
        assert found == [*activations, (0, dlearned.nbytes), (sums, sums)]
        assert rest[1] == 0


@emulated_alone
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", [96, 400, 100, 401])
@pytest.mark.parametrize("shape", [(8,), (2, 40)], ids=["channels of a position", "positions of a channel"])
def test_accesses_are_as_wide_as_the_rows_allow(shape, row, dtype):
    """Sixteen bytes by each lane where all rows begin at a multiple, else eight, else a number."""
    one = made((*shape, row), dtype)
    size = one.x.element_size()
    width = next((width for width in (16, 8) if row * size % width == 0), size)
    with backend():
        module().keep_costs(1 << 20)
        try:
            kernels.forward(one.pool, one.x, None)
            done = sum(phase.done for phase in module().costs())
        finally:
            module().keep_costs(0)
    assert done * width == 2 * one.x.nbytes


@pytest.fixture
def costs():
    """The phases of a direction of a call, with accesses to shared memory."""

    def run(one, direction):
        with backend(counted()):
            counted().keep_costs(4)
            if direction == "forward":
                kernels.forward(one.pool, one.x, one.learned)
            else:
                kernels.backward(one.pool, one.dy, one.x, None, (True, False))
            return counted().costs()

    yield run
    counted().keep_costs(0)


def wavefronts(phases):
    """Those of shared memory, and how many it would be if no two threads of a warp met in a bank."""
    return sum(phase.wavefronts for phase in phases), sum(phase.least for phase in phases)


@emulated_alone
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("shape", [(1 << 14, 64), (1 << 14, 96), (64, 64, 256)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("box", [NARROW, None], ids=["box", "exponential"])
def test_threads_meet_in_no_bank_of_shared_memory(box, dtype, shape, direction, costs):
    taken, least = wavefronts(costs(made(shape, dtype, box=box), direction))
    assert taken == least


@emulated_alone
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("shape", [(1024, 160), (4, 160, 256)], ids=str)
def test_segments_of_few_positions_hardly_meet_either(shape, direction, costs):
    """A warp has four of them, out of step at the first and the last, whose windows are cut."""
    one = made(shape)
    with backend():
        assert cut_of(one, direction == "backward")["positions"] == 8
    taken, least = wavefronts(costs(one, direction))
    assert taken <= 1.01 * least


@emulated_alone
@pytest.mark.parametrize("box", [(0, 0), (2, 2), (8, 7), (40, 0), (60, 67), (255, 255), None], ids=str)
def test_the_work_does_not_grow_with_the_window(box, costs):
    """Accesses to shared memory: five for the sums, three for y from them, one for their parts, two for the copies."""
    one = made((16, 256), box=box)
    phases = costs(one, "forward")
    assert 0 < sum(phase.shared_bytes for phase in phases) <= 11 * one.x.nbytes
