"""The CPU's kernels of channel normalization: values and gradients against the reference in float64."""

import math

import pytest
import torch
from channel_oracle import Call, call, check, evaluate, limits, reference
from hypothesis import given
from hypothesis import strategies as st

from divnorm_kernels.backends.cpu import instruction_set, instruction_sets, use_instruction_set
from divnorm_kernels.channels import cpu

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Any rank, format, dtype, window, exponent and set of learned numbers."""
    channels, dims = draw(st.integers(1, 70)), draw(st.integers(0, 3))
    most = {0: 1, 1: 150, 2: 20, 3: 7}[dims]
    shape = (
        draw(st.integers(1, 150 if dims == 0 else 3)),
        channels,
        *(draw(st.integers(1, most)) for _ in range(dims)),
    )
    sides = st.integers(0, channels + 1)
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    return call(
        shape,
        draw(st.sampled_from(DTYPES)),
        draw(st.one_of(st.none(), st.tuples(sides, sides))),
        squared=draw(st.booleans()),
        learns="".join(draw(st.sets(st.sampled_from("kabr")))),
        channels_last=draw(st.booleans()),
        k=draw(st.sampled_from((0.5, 1.0, 2.0))),
        a=draw(st.sampled_from((0.0, 1e-4, 0.3, 5.0))),
        beta=draw(st.sampled_from((0.5, 0.75, 1.0, 0.6, 2.5, -0.5, 0.0))),
        rho=draw(st.sampled_from((0.0, 0.3, 0.9, 0.99))),
    )


@given(calls())
def test_values_and_gradients(case: Call):
    y, dx, _ = check(cpu, case)
    assert y.stride() == dx.stride() == case.x.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ((3, 96, 61, 83), (2, 2)),
        ((2, 2000, 3, 3), (40, 300)),
        ((2, 2000, 3, 3), None),
        ((9, 512, 49), (7, 0)),
        ((2, 64, 64, 256), (2, 1)),
        ((2, 64, 64, 256), None),
    ],
    ids=str,
)
def test_large_activations(shape, box, channels_last, dtype):
    """Several tiles, threads and streaming stores, with and without rows that these may reach."""
    check(cpu, call(shape, dtype, box, learns="ka", channels_last=channels_last))


@pytest.mark.parametrize("name", instruction_sets())
def test_instruction_sets(name):
    before = instruction_set()
    use_instruction_set(name)
    try:
        for beta in (0.5, 0.75, 1.0, 0.3):
            for box in ((1, 3), None):
                for dtype in DTYPES:
                    check(cpu, call((3, 21, 13), dtype, box, beta=beta, learns="kr", channels_last=True))
                    check(cpu, call((3, 21, 13), dtype, box, beta=beta))
    finally:
        use_instruction_set(before)


@pytest.mark.parametrize("beta", [0.5, 0.75, 1.0, 0.6])
@pytest.mark.parametrize("size", [1e-17, 1e-15, 1e15, 1e18])
def test_divisors_far_from_one(size, beta):
    """Where quick roots and exponentials do not serve, beside numbers where they do: as these are without them."""
    case = call((2, 9, 40), torch.float32, (1, 1), k=0.0, a=1.0, beta=beta)
    before = cpu.forward(case.pool, case.x, None)
    case.x[:, :, ::3] *= size
    if beta == 0.5:  # of others the gradient has powers that float32 has not
        check(cpu, case)
    y = cpu.forward(case.pool, case.x, None)
    exact = reference(case.pool, case.x.double(), None)
    assert bool(((y - exact).abs() <= limits(case, (exact, exact, None))[0]).all())
    beside = [i for i in range(40) if i % 3]
    assert torch.equal(y[:, :, beside], before[:, :, beside])


def test_powers_beyond_float32():
    """Zero and infinity where the power is: none that something smaller ends at."""
    case = call((1, 2, 9), torch.float32, (0, 0), k=0.0, a=1.0, beta=5.0)
    case.x.copy_(torch.tensor([1e-5, 1e-1, 1.0, 1e3, 1e4, 1e10, 1e18, 1e-18, 2.0]).expand(1, 2, 9))
    y = cpu.forward(case.pool, case.x, None)
    expected = (case.x.double() * (case.x.double() ** 2) ** -5.0).float()
    torch.testing.assert_close(y, expected, rtol=200 * torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_reaches_its_windows_alone(bad, channels_last, dtype):
    case = call((1, 30, 11), dtype, (3, 2), channels_last=channels_last)
    case.x[0, 12, 4] = bad
    y, dx, _ = evaluate(cpu, case)
    touched = torch.zeros(1, 30, 11, dtype=torch.bool)
    touched[0, 12 - 2 : 12 + 3 + 1, 4] = True
    clean = case.x.clone()
    clean[0, 12, 4] = 0
    expected = cpu.forward(case.pool, clean, None)
    assert torch.equal(y[~touched], expected[~touched])
    zero = (y[touched] == 0) & math.isinf(bad)  # x over an infinite divisor, but inf / inf
    assert bool((zero | y[touched].isnan()).all())
    assert bool(dx[0, :, [i for i in range(11) if i != 4]].isfinite().all())


def test_results_do_not_depend_on_threads_or_on_what_is_beside():
    torch.manual_seed(0)
    case = call((5, 48, 300), torch.float32, None, learns="kabr")
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            found.append(evaluate(cpu, case))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    alone = cpu.forward(case.pool, case.x[:, :, 7:8].contiguous(), case.learned)
    assert torch.equal(found[0][0][:, :, 7:8], alone)


@pytest.mark.parametrize("channels_last", [False, True])
def test_rows_of_any_alignment(channels_last):
    """Results that bypass the cache, or may not for their address."""
    case = call((3, 40, 20000), torch.float32, (2, 2), channels_last=channels_last)
    check(cpu, case)
    room = torch.empty(case.x.numel() + 1)
    x = room[1:].view(3, 20000, 40).movedim(-1, 1) if channels_last else room[1:].view(case.x.shape)
    x.copy_(case.x)
    check(cpu, Call(case.pool, x, case.dy, None))


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0), (0, 0)])
def test_nothing(shape):
    case = call(shape, torch.float32, (1, 1) if shape[1] > 1 else (0, 0), learns="k")
    y, dx, dlearned = evaluate(cpu, case)
    assert y.shape == dx.shape == shape
    assert dlearned.tolist() == [0.0] * 4


def test_only_what_is_needed():
    case = call((3, 7, 5), torch.float32, None, learns="r")
    _, dx, dlearned = evaluate(cpu, case)
    alone, absent = cpu.backward(case.pool, case.dy, case.x, case.learned, (True, False))
    assert absent is None
    assert torch.equal(alone, dx)
    absent, alone = cpu.backward(case.pool, case.dy, case.x, case.learned, (False, True))
    assert absent is None
    assert torch.equal(alone, dlearned)
