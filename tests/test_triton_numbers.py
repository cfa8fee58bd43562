"""The Triton kernels at the ends of float32, and what of a call an infinity or a NaN may reach."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from interpreted import (
    DEVICE,
    DTYPES,
    EXAMPLES,
    LOOPED,
    SINGLE,
    SMALL,
    SMALL_LOOPS,
    SMALL_TILES,
    STAGED,
    on_device,
    table,
    triton,
)
from oracle import Call, evaluate
from strategies import calls
from torch import Tensor
from variance import OPTIONS, expected_variance

from divnorm_kernels import fields
from divnorm_kernels.backends import triton as backend
from divnorm_kernels.norm import Norm
from divnorm_kernels.reference import divisive_norm as reference

NAN, INF = float("nan"), float("inf")
EPSILON, SUBNORMAL = torch.finfo(torch.float32).eps, 2.0**-149
CUTS = pytest.mark.parametrize("changes", [SINGLE, LOOPED, STAGED], ids=["single", "looped", "staged"])
FORMATS = ("features", "contiguous", "channels last")
FORMS = pytest.mark.parametrize("form", FORMATS[::2])
EVERYTHING = ("y", "dx", "dweight", "dbias", "dsigma")


def formed(row: list[float], form: str) -> Tensor:
    """The numbers as (N, F), or along the last dimension of an image, times another factor in each channel."""
    values = torch.tensor(row)
    if form == "features":
        return torch.stack([values, 2 * values])
    image = torch.stack([values, -values, 2 * values]).view(1, 3, 1, -1).repeat(2, 1, 2, 1)
    return image.contiguous(memory_format=torch.channels_last if form == "channels last" else torch.contiguous_format)


def called(x: list[float], dy: list[float], sigma: float, form: str, dl1: float = 0.0, **options) -> Call:
    x, dy = formed(x, form), formed(dy, form)
    affine = torch.linspace(0.5, 1.5, x.shape[1])
    return on_device(Call(x, affine, affine - 1, torch.tensor(sigma), dy, dl1, options))


def compare(call: Call, names: tuple[str, ...], tolerance: float) -> None:
    """The results named are finite where the oracle's are, and there right relative to the largest of them."""
    got, exact = evaluate(triton, call), evaluate(reference, call.in_double())
    for name in names:
        have, want = got[name].double(), exact[name]
        finite = want.isfinite()
        assert torch.equal(have.isfinite(), finite), f"{name}: {have}, expected {want}"
        error = torch.where(finite, have - want, 0.0).abs().max().item()
        assert error <= tolerance * torch.where(finite, want, 0.0).abs().max().item(), f"{name}: {have}, {want}"


@CUTS
@FORMS
@pytest.mark.parametrize("window", [3, "all"], ids=str)
@pytest.mark.parametrize(
    ("x", "sigma"),
    [
        ([0.0, 0.0, 0.0, 0.0, 0.0], 1e-13),
        ([0.0, 0.0, 0.0, 0.0, 0.0], 1e-30),
        ([0.0, 3e-13, 1e-13, 0.0, 0.0], 1e-13),
    ],
    ids=["nothing, 1/s^3 overflows", "nothing, sigma^2 underflows", "something, 1/s^3 overflows"],
)
def test_a_small_scale_overflows_nothing_that_is_representable(x, sigma, window, form, changes):
    with table(**changes):
        compare(called(x, [1.0, 0.0, 0.0, 0.0, 0.0], sigma, form, window=window), EVERYTHING, 32 * EPSILON)


@CUTS
@FORMS
def test_whole_fields_overflow_where_dx_does(form, changes):
    """P2/s^3 is 1e40 and more here, next to dx of 1e20, and dweight is in reach whatever 1/s is."""
    with table(**changes):
        call = called([0.0, 1e-21, -1e-21, 0.0, 2e-21], [1.0, 0.0, 0.0, 0.0, 1.0], 1e-20, form, window="all")
        # sigma^2 + q is subnormal: a number next to zero for the squares, and one for their sum
        compare(call, EVERYTHING, 32 * EPSILON + 32 * SUBNORMAL / 1e-40)


@CUTS
@FORMS
@pytest.mark.parametrize("window", [3, "all"], ids=str)
def test_a_sigma_of_zero_divides_by_what_there_is(window, form, changes):
    with table(**changes):
        call = called([0.0, 4e-20, 0.0], [0.0, 0.0, 0.0], 0.0, form, window=window)
        compare(call, ("y",), 32 * EPSILON + 32 * SUBNORMAL / 1.6e-39)


@CUTS
def test_a_sigma_of_zero_over_a_constant_region_is_nan(changes):
    x = torch.full((1, 2, 5, 5), 3.0)
    x[..., 3:, 3:] = torch.tensor([[1.0, 2.0], [5.0, 4.0]])
    with table(**changes):
        got = triton(x.to(DEVICE), window=3, sigma=0.0)
    assert got[..., 0, 0].isnan().all()
    assert torch.equal(got.cpu().isnan(), reference(x, window=3, sigma=0.0).isnan())


@CUTS
@pytest.mark.parametrize(
    ("form", "over_batch", "window"),
    [(form, False, window) for form in FORMATS for window in (3, "all")]
    + [("channels last", True, 3), ("channels last", True, "all"), ("contiguous", False, None)],
)
@pytest.mark.parametrize("value", [NAN, -INF], ids=str)
def test_without_division_no_number_of_x_reaches_dx(value, form, over_batch, window, changes):
    x, dy = [0.0, value, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]
    # not by way of l1 either, whose slope is zero at a NaN
    call = called(x, dy, 1.0, form, dl1=2.0, window=window, norm_window=None, over_batch=over_batch)
    with table(**changes):
        compare(call, ("y", "dx", "dbias"), 8 * EPSILON)


@CUTS
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_types_without_division(dtype, changes):
    call = called([0.0, NAN, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0], 1.0, "contiguous", window=3, norm_window=None)
    call = replace(call, x=call.x.to(dtype), dy=call.dy.to(dtype))
    with table(**changes):
        compare(call, ("y", "dx"), torch.finfo(dtype).eps)


@CUTS
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("window", [3, "all"], ids=str)
def test_what_tiles_hold_beside_the_channels_overflows_into_nothing(window, activation, changes):
    """Three channels in tiles of four: in the fourth, x - mu over s is infinite here, and no activation is smooth."""
    x, dy = torch.full((2, 3, 5, 7), 2.0**67), torch.randn(2, 3, 5, 7)
    call = Call(x, None, torch.linspace(-1, 1, 3), 2.0**-64, dy, 0.0, {"window": window, "activation": activation})
    with table(**changes):
        compare(on_device(call), ("y", "dx", "dbias"), 32 * EPSILON)


VARIANCES = {
    "group": ({"groups": 2}, (2, 6, 5, 7)),
    "over the batch": ({"groups": 6, "over_batch": True}, (3, 6, 5, 7)),
    "no mean": ({"window": None, "norm_window": "all"}, (2, 6, 5, 7)),
    "features": ({}, (3, 40)),
}


@pytest.mark.parametrize(
    "changes", [SINGLE, SMALL_LOOPS, STAGED, SMALL_TILES], ids=["single", "looped", "staged", "small tiles"]
)
@pytest.mark.parametrize("name", VARIANCES)
@pytest.mark.parametrize(("deviation", "offset"), [(1e-4, 0.0), (1.0, 1e4)], ids=str)
def test_the_variance_of_whole_fields_is_kept_as_it_is(deviation, offset, name, changes):
    """Next to a sigma of 1 nothing is left in 1/s of a variance of 1e-8; and means at 1e4 are rounded by 2^-11."""
    options, shape = VARIANCES[name]
    x = deviation * torch.randn(shape, device=DEVICE) + offset
    with table(**changes):
        g = fields.geometry(Norm(**OPTIONS | options), shape)
        y, maps, _ = backend.forward(g, x, None, None, 1.0, False, with_variance=True)
        expected_y, expected_maps, _ = backend.forward(g, x, None, None, 1.0, False)
    expected = expected_variance(g, x)
    assert torch.equal(y, expected_y)
    assert torch.equal(maps[:-1], expected_maps)
    error = (maps[-1].flatten(1) - expected).abs() / expected
    assert error.max() <= EPSILON * (sum(shape) + 8)  # the sums, one axis after the other


@EXAMPLES
@given(
    calls(dtypes=DTYPES, extents=SMALL),
    st.sampled_from((INF, -INF, NAN)),
    st.integers(0, 2**31),
    st.sampled_from(("x", "dy")),
    st.sampled_from((SINGLE, SMALL_LOOPS, STAGED, SMALL_TILES)),
)
def test_results_are_finite_where_the_oracles_are(call: Call, value: float, where: int, spoiled: str, changes: dict):
    """Gradients too, with one number of x or of dy that is not finite."""
    at = torch.unravel_index(torch.tensor(where % call.x.numel()), call.x.shape)
    t = getattr(call, spoiled).clone(memory_format=torch.preserve_format)
    t[at] = value
    call = replace(call, **{spoiled: t})
    if call.options["activation"] in ("relu", "tlu") and spoiled == "dy":
        # next to the threshold, rounding decides whether the number is let through
        tau = 0.0 if call.threshold is None else call.threshold[at[1]]
        assume((evaluate(reference, call.in_double().bare())["y"][at] - tau).abs() > 0.01)
    with table(**changes):
        got = evaluate(triton, on_device(call))
    for name, want in evaluate(reference, call.in_double()).items():
        assert torch.equal(got[name].cpu().isfinite(), want.isfinite()), name
