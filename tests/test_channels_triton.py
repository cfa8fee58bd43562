"""The Triton kernels of channel normalization: on the GPU where there is one, else under Triton's interpreter."""

import math
from itertools import product

import pytest
import torch
from channel_oracle import Call, exact
from hypothesis import given
from hypothesis import strategies as st
from interpreted import DEVICE, DTYPES, EXAMPLES, Traffic, laid_out, some

from divnorm_kernels.channels import Exponential, channel_norm, reference
from divnorm_kernels.channels import triton as backend
from divnorm_kernels.channels.pool import Pool
from divnorm_kernels.norm import Span

LAYOUTS = (torch.contiguous_format, torch.channels_last)
EPS = torch.finfo(torch.float32).eps
ALL = (math.nan,) * 4


def inputs(shape, dtype=torch.float32, layout=torch.contiguous_format):
    """An x and a dy."""
    return tuple(laid_out(torch.randn(shape).to(dtype), layout).to(DEVICE) for _ in range(2))


def numbers(k=1.0, a=0.3, beta=0.75, rho=0.7):
    """All of them as what a kernel is told to learn."""
    return torch.tensor([k, a, beta, rho], device=DEVICE)


def check(pool, x, dy, learned=None):
    """Compares y and the gradients with the reference in float64, number by number; returns them.

    A sum of positive numbers is off by epsilon a term, and so is each power of rho; D^-beta by beta times that, and by
    what its exponent beta * ln(D) rounds to. The difference in dx and the sums over all positions, of any sign, are off
    by as much of the sum of their terms' sizes.
    """
    wanted = (True, learned is not None)
    y = backend.forward(pool, x, learned)
    dx, dlearned = backend.backward(pool, dy, x, learned, wanted)
    for t in (y, dx):
        assert (t.dtype, t.shape, t.stride()) == (x.dtype, x.shape, x.stride())

    v, g = x.double(), dy.double()
    values = None if learned is None else learned.double()
    exact_y, exact_dx, exact_dlearned = exact(Call(pool, x, dy, learned))
    k, a, beta, rho = (values[i].item() if learns else pool.scalars[i] for i, learns in enumerate(pool.learns))
    box = pool.box

    def pooled(t, back):
        if box is None:
            return reference.decayed(t, rho)
        return reference.boxed(t, box[::-1] if back else box)

    total = pooled(v * v, False)
    divisor = k + a * total
    slope = abs(a * beta)
    terms = 2 * x.shape[1] if box is None else sum(box) + 1
    # of D, of a power of it, of a product of sums of both kinds
    off = terms + 4
    power = (abs(beta) + 1) * off + 4 * beta * divisor.log().abs().max().item() + 8
    final = EPS * (power + terms + 8)
    # a GPU rounds to the nearest, the interpreter cuts a bfloat16 off
    rounded = torch.finfo(x.dtype).eps / (1 if x.dtype == torch.bfloat16 and x.is_cpu else 2)
    least = torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps

    def close(got, want, limit):
        worst = ((got.double() - want).abs() / (limit + least)).max().item()
        assert worst <= 1, f"{worst} of what {pool} may be off on {tuple(x.shape)}, {x.dtype}"

    close(y, exact_y, exact_y.abs() * (final + rounded))
    numerator = v * v if pool.squared else v
    through = (g * numerator * divisor ** -(beta + 1)).abs()
    direct = (g * (2 * v if pool.squared else 1) * divisor**-beta).abs()
    close(dx, exact_dx, (direct + 2 * slope * v.abs() * pooled(through, True)) * (final + rounded))
    if learned is not None:
        along = reference.evaluate(pool, v, values) * g
        place = torch.arange(x.shape[1], device=x.device)
        distance = (place[:, None] - place).abs().double()
        by_rho = torch.einsum("cd,nd...->nc...", distance * rho ** (distance - 1), v * v) if box is None else 0 * v
        sizes = (
            abs(beta) * through,
            abs(beta) * through * total,
            along.abs() * (divisor.log().abs() + off / power),
            slope * through * by_rho,
        )
        sizes = torch.stack([size.sum() for size in sizes]) * torch.tensor(pool.learns, device=x.device)
        # a program's sum is one of pairs, of pairs and so on
        close(dlearned, exact_dlearned, sizes * (final + EPS * (terms + 13)))
    return y, dx, dlearned


@pytest.mark.parametrize("before", some(range(10)))
def test_every_box(before):
    """Windows that lie in one block of four channels, reach into the next ones, or over whole ones; cut at the ends."""
    for after in range(10):
        layout = LAYOUTS[(before + after) % 2]
        check(Pool((before, after), False, (1.0, 0.3, 0.75, 0.0)), *inputs((2, 10, 3, 1), layout=layout))


@pytest.mark.parametrize(("dtype", "layout"), some(product(DTYPES, LAYOUTS)), ids=str)
def test_every_dtype_and_layout(dtype, layout):
    x, dy = inputs((2, 37, 3, 5), dtype, layout)
    exponents = ((0.5, False), (0.75, True), (1.0, False), (0.6, True))
    for i, (box, (beta, squared)) in enumerate(product(((2, 2), (21, 35), None), exponents)):
        if (i + i // 4) % 2:
            check(Pool(box, squared, (math.nan, math.nan, beta, math.nan)), x, dy, numbers(beta=beta))
        else:
            check(Pool(box, squared, (1.0, 0.3, beta, 0.8)), x, dy)


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("squared", [False, True])
def test_one_number_that_learns(which, squared):
    """The others have no gradient, and what is in their places is not read."""
    learned, scalars = numbers(), [0.9, 0.2, 0.6, 0.5]
    scalars[which] = math.nan
    learned[[i for i in range(4) if i != which]] = math.nan
    pool = Pool(None if which == 3 else (1, 3), squared, tuple(scalars))
    x, dy = inputs((3, 6, 7))
    y, dx = backend.forward(pool, x, learned), backend.backward(pool, dy, x, learned, (True, True))
    filled = learned.nan_to_num(7.0)
    for got, want in zip((y, *dx), check(pool, x, dy, filled), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((5, 1), torch.contiguous_format),
        ((3, 130), torch.contiguous_format),
        ((2, 5, 600), torch.contiguous_format),
        ((2, 3, 4, 5, 6), torch.contiguous_format),
        ((2, 6, 4, 5, 6), torch.channels_last),
        ((700, 4, 1, 1), torch.channels_last),
        ((2, 260, 1, 3), torch.contiguous_format),
    ],
    ids=str,
)
def test_every_extent(shape, layout):
    """Single channels and positions, tiles of several samples, several tiles a sample, many channels."""
    x, dy = inputs(shape, layout=layout)
    most = min(40, shape[1] - 1)
    check(Pool((most, most // 2), False, (2.0, 0.1, 0.75, 0.0)), x, dy)
    check(Pool(None, False, ALL), x, dy, numbers(rho=0.9))


def test_as_many_channels_as_can_be():
    check(Pool((1300, 40), False, (2.0, 0.01, 0.75, 0.0)), *inputs((2, backend.MOST_CHANNELS)))
    pool, (x, _) = Pool(None, False, (2.0, 0.01, 0.5, 0.999)), inputs((1, backend.MOST_CHANNELS // 2 + 1))
    exact = reference.evaluate(pool, x.double(), None)
    torch.testing.assert_close(backend.forward(pool, x, None).double(), exact, rtol=2 * x.shape[1] * EPS, atol=0)


calls = st.fixed_dictionaries(
    {
        "shape": st.tuples(st.integers(1, 4), st.integers(1, 70), st.integers(1, 9), st.integers(1, 9)),
        "spatial": st.integers(0, 2),
        "sides": st.tuples(st.integers(0, 69), st.integers(0, 69)),
        "exponential": st.booleans(),
        "squared": st.booleans(),
        "learns": st.booleans(),
        "beta": st.sampled_from((0.5, 0.75, 1.0, 0.3, 1.4, -0.5)),
        "layout": st.sampled_from(LAYOUTS),
        "dtype": st.sampled_from(DTYPES),
    }
)


@EXAMPLES
@given(calls)
def test_values_and_gradients(call):
    x, dy = inputs(call["shape"][: 2 + call["spatial"]], call["dtype"], call["layout"])
    box = None if call["exponential"] else tuple(min(side, x.shape[1] - 1) for side in call["sides"])
    learned = numbers(beta=call["beta"]) if call["learns"] else None
    check(Pool(box, call["squared"], ALL if call["learns"] else (1.0, 0.3, call["beta"], 0.8)), x, dy, learned)


def test_through_the_public_call():
    """All of it as a user has it: windows of every kind, tensors that learn, strides of x and of a gradient."""
    x = torch.randn(5, 6, 4, 7, device=DEVICE).transpose(2, 3)[:, :, ::2].requires_grad_()
    dy = torch.randn(x.shape, device=DEVICE).contiguous(memory_format=torch.channels_last)
    alpha, beta, k, scale = (torch.tensor(t, device=DEVICE, requires_grad=True) for t in (0.5, 0.75, 2.0, 3.0))
    for window in (1, 4, 5, 12, Span(4, 0), Exponential(2.0), Exponential(scale)):
        learns = isinstance(window, Exponential) and window.scale is scale
        y = channel_norm(x, window, alpha=alpha, beta=beta, k=k, backend="triton")
        same = Exponential(scale.double()) if learns else window
        doubled = {"alpha": alpha.double(), "beta": beta.double(), "k": k.double()}
        exact = channel_norm(x.double(), same, **doubled, backend="reference")
        torch.testing.assert_close(y.double(), exact, rtol=64 * EPS, atol=0)
        wanted = (x, alpha, beta, k, scale) if learns else (x, alpha, beta, k)
        for got, want in zip(
            torch.autograd.grad(y, wanted, dy), torch.autograd.grad(exact, wanted, dy.double()), strict=True
        ):
            # sums over all positions of numbers of any sign
            limit = 64 * EPS * max(1.0, want.abs().max().item()) * (1 if want.dim() else dy.abs().sum().item())
            torch.testing.assert_close(got, want, rtol=0, atol=limit)


def test_through_the_dispatcher():
    x, dy = inputs((2, 6, 5))
    pool, learned = Pool((1, 2), True, ALL), numbers()
    rest = ([1, 2], True, list(ALL), "triton")
    y = torch.ops.divnorm_kernels.channel_forward(x, learned, *rest)
    dx, dlearned = torch.ops.divnorm_kernels.channel_backward(dy, x, learned, [True, True], *rest)
    want = backend.forward(pool, x, learned), *backend.backward(pool, dy, x, learned, (True, True))
    assert all(torch.equal(got, expected) for got, expected in zip((y, dx, dlearned), want, strict=True))


def test_gradients_that_are_not_needed():
    x, dy = inputs((2, 6, 5))
    pool, learned = Pool(None, False, ALL), numbers()
    dx, dlearned = backend.backward(pool, dy, x, learned, (True, True))
    alone, nothing = backend.backward(pool, dy, x, learned, (True, False))
    assert torch.equal(alone, dx)
    assert nothing is None
    nothing, alone = backend.backward(pool, dy, x, learned, (False, True))
    assert torch.equal(alone, dlearned)
    assert nothing is None


def test_places_behind_the_last_channel_are_in_no_sum():
    """With k = 0 they have a divisor of zero."""
    x, dy = inputs((3, 5, 7))
    check(Pool((1, 1), False, (math.nan, 0.4, 0.75, 0.0)), x, dy, numbers(k=0.0))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("box", [(2, 2), (0, 5), (9, 1), (3, 11)], ids=str)
def test_non_finite_values_reach_the_channels_that_see_them(box, layout, value):
    """Elsewhere y has the same bits, and dx where no channel within reach sees the value."""
    pool = Pool(box, False, (1.0, 0.3, 0.75, 0.0))
    x, dy = inputs((2, 23, 1, 3), layout=layout)
    before, after = box
    for channel in (0, 10, 22):
        spoiled = x.clone()
        spoiled[1, channel, 0, 2] = value
        y, clean = backend.forward(pool, spoiled, None), backend.forward(pool, x, None)
        want = reference.evaluate(pool, spoiled, None)
        assert torch.equal(y.isnan(), want.isnan())
        assert torch.equal(y.isfinite(), want.isfinite())
        seen = torch.zeros_like(x, dtype=torch.bool)
        seen[1, max(0, channel - after) : channel + before + 1, 0, 2] = True
        assert torch.equal(y[~seen], clean[~seen])
        dx, clean = (backend.backward(pool, dy, t, None, (True, False))[0] for t in (spoiled, x))
        reach = torch.zeros_like(seen)
        reach[1, max(0, channel - before - after) : channel + before + after + 1, 0, 2] = True
        assert torch.equal(dx[~reach], clean[~reach])


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 4, 0), (0, 7), (3, 0)], ids=str)
def test_empty(shape):
    x, dy = inputs(shape)
    y = backend.forward(Pool(None, False, ALL), x, numbers())
    dx, dlearned = backend.backward(Pool(None, False, ALL), dy, x, numbers(), (True, True))
    assert y.shape == dx.shape == shape
    assert torch.equal(dlearned, torch.zeros(4, device=DEVICE))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_wide_offsets(layout, monkeypatch):
    """What tensors of more than 2^31 elements take."""
    monkeypatch.setattr(backend, "_INT32", 1)
    check(Pool((1, 2), False, ALL), *inputs((3, 6, 7, 5), layout=layout), numbers())


def test_addresses_that_are_not_aligned():
    """A call like one that was compiled for aligned addresses."""
    memory = torch.randn(2, 2 * 4 * 6 * 8 + 1, device=DEVICE)
    for i in (0, 1):
        x, dy = (m[i : i + 2 * 4 * 6 * 8].view(2, 4, 6, 8) for m in memory)
        check(Pool((1, 1), False, (1.0, 0.3, 0.75, 0.0)), x, dy)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter runs one program after the other")
def test_same_bits_on_every_run():
    x, dy = inputs((40, 64, 9, 9))
    pool, learned = Pool(None, False, ALL), numbers()
    once, again = (backend.backward(pool, dy, x, learned, (True, True)) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(once, again, strict=True))


def test_refusals():
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"'triton', which cannot serve this call: x has dtype torch\.float64"):
        channel_norm(x, 3, backend="triton")
    with pytest.raises(RuntimeError, match="x is on meta"):
        channel_norm(torch.empty(2, 4, 5, 5, device="meta"), 3, backend="triton")
    wide = torch.zeros(1, backend.MOST_CHANNELS + 1, device=DEVICE)
    with pytest.raises(RuntimeError, match="x has 4097 channels, a program holds at most 4096"):
        channel_norm(wide, 3, backend="triton")


@pytest.mark.skipif(DEVICE != "cpu", reason="only the interpreter can be watched")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("box", [(2, 2), (40, 40), None], ids=str)
def test_reads_and_writes(box, layout, monkeypatch):
    """One read of x and of dy, one write of y and of dx, and four numbers a program beside them."""
    x, dy = inputs((2, 41, 5, 7), layout=layout)
    traffic = Traffic(monkeypatch)
    y = backend.forward(Pool(box, False, ALL), x, numbers())
    assert (traffic.of("load", x), traffic.of("store", y)) == (1, 1)
    dx, _ = backend.backward(Pool(box, False, ALL), dy, x, numbers(), (True, True))
    assert (traffic.of("load", x), traffic.of("load", dy), traffic.of("store", dx)) == (2, 1, 1)
    elements = sum(at.size for at in traffic.addresses["store"]) - 2 * x.numel()
    assert elements == 4 * backend._programs(x, backend.tile_of(x))
