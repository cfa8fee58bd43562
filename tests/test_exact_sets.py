"""An Inf or NaN in x or in dy makes exactly those results non-finite that the reference in float64 has non-finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from oracle import Call, evaluate
from strategies import calls
from torch import Tensor

from divnorm_kernels import divisive_norm
from divnorm_kernels.reference import divisive_norm as reference

SPOILERS = (math.inf, -math.inf, math.nan)


def cpu(*args, **kwargs):
    return divisive_norm(*args, backend="cpu", **kwargs)


def _with(t: Tensor, where: int, value: float) -> Tensor:
    t = t.clone(memory_format=torch.preserve_format)
    t[torch.unravel_index(torch.tensor(where % t.numel()), t.shape)] = value
    return t


@st.composite
def spoiled(draw: st.DrawFn, whole: st.SearchStrategy[Call]) -> Call:
    """A call with one number of x or of dy that is not finite."""
    call, value, where = draw(whole), draw(st.sampled_from(SPOILERS)), draw(st.integers(0, 2**31))
    if draw(st.booleans()):
        return replace(call, x=_with(call.x, where, value))
    if call.options.get("activation") in ("relu", "tlu"):
        # next to a threshold, rounding decides whether the number is let through
        y = evaluate(reference, call.in_double().bare())["y"]
        least = 0 if call.threshold is None else call.threshold.double()
        y = y - least if y.dim() == 2 or call.threshold is None else y - least.view(-1, *[1] * (y.dim() - 2))
        assume(y.flatten()[where % y.numel()].abs() > 0.01)
    return replace(call, dy=_with(call.dy, where, value))


def check_sets(function: Callable[..., Any], call: Call) -> dict[str, Tensor]:
    """Compares which results of ``function`` are finite with the oracle's; returns the results."""
    got, want = evaluate(function, call), evaluate(reference, call.in_double())
    for name, expected in want.items():
        have, should = got[name].isfinite(), expected.isfinite()
        assert torch.equal(have, should), (
            f"{name}: finite where it should not be: {(have & ~should).nonzero().tolist()}, "
            f"not finite where it should be: {(~have & should).nonzero().tolist()} for {call.options}"
        )
    return got


NEAR_NAN = torch.tensor([[[0, math.nan, 0, 0]]])
ONE_DY = torch.tensor([[[0, 0, 0, 1.0]]])


@given(spoiled(calls()))
@example(Call(NEAR_NAN, None, None, 1.0, ONE_DY, 0.0, {"window": None}))
@example(Call(NEAR_NAN, None, None, 1.0, ONE_DY, 0.0, {"window": 3, "norm_window": None}))
@example(Call(NEAR_NAN, None, None, 1.0, ONE_DY, 3.0, {"window": 3, "norm_window": None}))
@example(Call(NEAR_NAN, None, None, 1.0, ONE_DY, 0.0, {"window": "all", "norm_window": None, "activation": "relu"}))
def test_cpu(call: Call):
    check_sets(cpu, call)


MEAN_ONLY = {
    "window": ({"window": 3}, (4,), [0, 0, -0.5, 0.5]),
    "whole": ({"window": "all"}, (4,), [-0.25, -0.25, -0.25, 0.75]),
    "whole plane": ({"window": "all"}, (2, 2), [-0.25, -0.25, -0.25, 0.75]),
    "no mean": ({"window": None}, (4,), [0, 0, 0, 1]),
    "groups": ({"window": 3, "groups": 5}, (4,), [0, 0, -0.5, 0.5]),
    "over the batch": ({"window": 3, "over_batch": True}, (4,), [0, 0, -0.5, 0.5]),
    "over the batch, whole": ({"window": "all", "over_batch": True}, (4,), [-0.25, -0.25, -0.25, 0.75]),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("name", MEAN_ONLY)
def test_without_suppression_dx_does_not_depend_on_x(name, channels_last, dtype):
    """Not even on a number that is not finite; every channel alike, so that a group's mean is each channel's."""
    options, spatial, expected = MEAN_ONLY[name]
    for channels in (1, 5, 40):
        if channels % options.get("groups", 1):
            continue
        shape = (1, channels, *spatial)
        for value in SPOILERS:
            x, dy = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
            x.flatten(2)[..., 1], dy.flatten(2)[..., 3] = value, 1
            if channels_last:
                x, dy = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, dy))
            dx = evaluate(cpu, Call(x, None, None, 1.0, dy, 0.0, options | {"norm_window": None}))["dx"]
            assert torch.equal(dx.flatten(2), torch.tensor(expected, dtype=dtype).expand(1, channels, 4))


@pytest.mark.parametrize("options", [{"window": 3}, {"window": "all"}, {"window": None}], ids=str)
def test_without_suppression_dx_of_features_does_not_depend_on_x(options):
    x, dy = torch.randn(5, 70), torch.randn(5, 70)
    options |= {"norm_window": None}
    expected = evaluate(cpu, Call(x, None, None, 1.0, dy, 0.0, options))["dx"]
    for value in SPOILERS:
        call = Call(_with(x, 99, value), None, None, 1.0, dy, 0.0, options)
        assert torch.equal(evaluate(cpu, call)["dx"], expected)
