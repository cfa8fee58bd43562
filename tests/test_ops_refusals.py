"""What the registered operators refuse, before anything is read, after calls that their kernels served."""

import re

import pytest
import torch
from operator_cases import CASES, backward_arguments, forward_arguments
from torch._subclasses import FakeTensorMode

from divnorm_kernels import ops
from divnorm_kernels.backends.native import module
from divnorm_kernels.norm import Norm

forward = torch.ops.divnorm_kernels.forward
backward = torch.ops.divnorm_kernels.backward

served = pytest.mark.skipif(not ops.by_kernels, reason="the compiled module does not serve the operators here")


def _freed(t):
    t.untyped_storage().resize_(0)


def _shrunk(t):
    t.untyped_storage().resize_(t.untyped_storage().nbytes() - t.element_size())


@served
@pytest.mark.parametrize("spoil", [_freed, _shrunk])
@pytest.mark.parametrize(
    ("which", "name"), [(0, "x"), (1, "weight"), (2, "bias"), (3, "sigma"), (9, "residual"), (10, "threshold")]
)
def test_no_storage_that_ends_early_is_read_forward(which, name, spoil):
    arguments = forward_arguments(norm=CASES["thresholds"][1])
    forward(*arguments)
    spoil(arguments[which])
    before = module.operator_calls()
    with pytest.raises(ValueError, match=f"{name}: got a Tensor of shape"):
        forward(*arguments)
    assert module.operator_calls() == before


@served
@pytest.mark.parametrize("spoil", [_freed, _shrunk])
@pytest.mark.parametrize("which", [0, 1, 2, 3, 4, 5, 7, 12, 13])
def test_no_storage_that_ends_early_is_read_backward(which, spoil):
    arguments = forward_arguments(norm=CASES["thresholds"][1], with_l1=True)
    _, maps, _ = forward(*arguments)
    given = backward_arguments(arguments, maps)
    backward(*given)
    spoil(given[which])
    before = module.operator_calls()
    with pytest.raises(ValueError, match="expected a tensor with all of its elements in memory"):
        backward(*given)
    assert module.operator_calls() == before


@served
@pytest.mark.parametrize("which", [1, 2, 3])
def test_python_refuses_parameters_of_another_dtype(which):
    arguments = forward_arguments()
    forward(*arguments)
    name = ("weight", "bias", "sigma")[which - 1]
    arguments[which] = arguments[which].double()
    with pytest.raises(TypeError, match=f"{name}: got dtype torch.float64, expected torch.float32"):
        forward(*arguments)


@served
@pytest.mark.parametrize(
    ("which", "shape"),
    [(1, (3,)), (1, (4, 1)), (1, (0,)), (2, (5,)), (2, (0,)), (3, (2,)), (3, (1, 1)), (3, (0,)), (3, (0, 3))],
)
def test_python_refuses_parameters_of_another_shape(which, shape):
    arguments = forward_arguments()
    forward(*arguments)
    name = ("weight", "bias", "sigma")[which - 1]
    arguments[which] = torch.ones(shape)
    with pytest.raises(ValueError, match=re.escape(f"{name}: got shape {shape}, expected")):
        forward(*arguments)


UPSTREAM = {
    "dy of another shape": (
        {0: torch.ones(2, 1, 5, 6)},
        ValueError,
        "dy: got shape (2, 1, 5, 6), expected (2, 4, 5, 6)",
    ),
    "dy in double": ({0: torch.ones(2, 4, 5, 6).double()}, TypeError, "dy: got dtype torch.float64, expected torch.fl"),
    "dy on meta": ({0: torch.ones(2, 4, 5, 6, device="meta")}, ValueError, "dy: got "),
    "dl1 of a shape": ({1: torch.ones(5)}, ValueError, "dl1: got shape (5,), expected ()"),
    "maps of another call": ({3: torch.ones(2, 2, 1, 5, 5)}, ValueError, "maps: got shape (2, 2, 1, 5, 5), expected ("),
    "maps in half": ({3: torch.ones(2, 2, 1, 5, 6).half()}, TypeError, "maps: got dtype torch.float16, expected"),
    "a weight that is not there": ({4: None}, ValueError, "needs: got True for weight, which is not given"),
    "needs of five": (
        {10: [True] * 5},
        ValueError,
        "needs: got 5 entries, expected 6, for x and weight, bias, sigma, r",
    ),
    "no residual": ({12: None}, ValueError, "needs: got True for residual, which is not given"),
    "a residual in double": ({12: torch.ones(2, 4, 5, 6).double()}, TypeError, "residual: got dtype torch.float64"),
    "a residual of a shape": ({12: torch.ones(2, 4, 5, 5)}, ValueError, "residual: got shape (2, 4, 5, 5), expected "),
    "a threshold": ({13: torch.ones(4)}, ValueError, "threshold: got Tensor with activation 'relu', expected None"),
    "a residual with nothing behind": (
        {9: Norm(3).text, 12: torch.ones(2, 4, 5, 6)},
        ValueError,
        "residual: got a Tensor without an activation, expected None, for its gradient is dy",
    ),
    "sigma no number": (
        {7: None, 8: float("nan"), 10: [True] * 3 + [False] * 3},
        ValueError,
        "sigma: got nan, expected",
    ),
}


@pytest.mark.parametrize("name", UPSTREAM)
def test_what_backward_is_given_is_checked(name):
    """After a call that was served, too."""
    change, error, message = UPSTREAM[name]
    arguments = forward_arguments()
    maps = forward(*arguments)[1]
    upstream = backward_arguments(arguments, maps)
    backward(*upstream)
    for place, value in change.items():
        upstream[place] = value
    with pytest.raises(error, match="^" + re.escape(message)):
        backward(*upstream)


def test_fake_parameters_are_checked_too():
    """What a compiler sees is refused where a call would be."""
    with FakeTensorMode():
        x = torch.randn(2, 4, 5, 6)
        with pytest.raises(ValueError, match=re.escape("weight: got shape (3,), expected (4,)")):
            forward(x, torch.ones(3), None, None, 1.0, CASES["image"][1].text, False, False, None)


@pytest.mark.parametrize("text", ["", "{", "3", "{}", '{"window": 3, "colour": 1}'])
def test_a_text_that_is_no_norms_is_refused(text):
    with pytest.raises(ValueError, match=re.escape(f"norm: got {text!r}, expected the text of a Norm")):
        forward(torch.randn(2, 4, 5, 6), None, None, None, 1.0, text, False, False, None)


@served
def test_an_error_of_pythons_is_raised_as_it_is():
    x, *rest = forward_arguments()
    rest[4] = '{"window": "none of these"}'
    with pytest.raises(ValueError, match="window: got 'none of these'") as caught:
        forward(x, *rest)
    assert caught.traceback[-1].path.name == "norm.py"
