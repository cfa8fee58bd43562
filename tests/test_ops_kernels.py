"""The compiled module's kernels of the registered operators: what they serve, and what they leave to Python."""

import gc
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
import torch
from operator_cases import CASES, backward_arguments, forward_arguments
from process import run_python

from divnorm_kernels import DivisiveNorm2d, ops
from divnorm_kernels.backends.native import module
from divnorm_kernels.norm import Norm

forward = torch.ops.divnorm_kernels.forward
backward = torch.ops.divnorm_kernels.backward

served = pytest.mark.skipif(not ops.by_kernels, reason="the compiled module does not serve the operators here")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _calls(function):
    """What the function returns, and how many calls of forward and of backward the kernels served for it."""
    before = module.operator_calls()
    found = function()
    return found, tuple(b - a for a, b in zip(before, module.operator_calls(), strict=True))


def _assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)
        assert torch.equal(a, b)


@served
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("last", [False, True])
def test_the_kernels_do_what_python_does(name, dtype, last):
    """To the bit and to the stride, whichever arguments are there."""
    shape, norm = CASES[name]
    for parameters in {dtype, torch.float32 if dtype.itemsize == 2 else dtype}:
        full = forward_arguments(shape, norm, dtype, parameters, True)
        if last:
            full[0], full[9] = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (full[0], full[9]))
        bare = [full[0], None, None, None, 0.75, norm.text, False, False, "cpu", None, full[10]]
        for arguments in (full, bare):
            forward(*arguments)  # makes the plan known
            found, calls = _calls(lambda: forward(*arguments))  # noqa: B023
            assert calls == (1, 0)
            expected = ops._forward(*arguments)
            _assert_same(found, expected)
            given = backward_arguments(arguments, expected[1])
            backward(*given)  # has a plan of its own where it takes no residual
            found, calls = _calls(lambda: backward(*given))  # noqa: B023
            assert calls == (0, 1)
            _assert_same(found, ops._backward(*given))


@served
@pytest.mark.parametrize("needs", list(product([False, True], repeat=6)))
def test_the_kernels_give_the_gradients_that_are_needed(needs):
    for norm in (CASES["thresholds"][1], Norm(3, None, activation="tlu")):
        arguments = forward_arguments(norm=norm)
        _, maps, _ = forward(*arguments)
        given = backward_arguments(arguments, maps)
        given[10] = list(needs)
        found, calls = _calls(lambda: backward(*given))  # noqa: B023
        assert calls == (0, 1)
        _assert_same(found, ops._backward(*given))


@served
def test_the_kernels_keep_the_variance():
    arguments = forward_arguments(norm=Norm("all", groups=2))
    arguments[7] = True
    forward(*arguments)
    found, calls = _calls(lambda: forward(*arguments))
    assert calls == (1, 0)
    _assert_same(found, ops._forward(*arguments))


def _strided(arguments):
    arguments[0], arguments[9] = torch.randn(2, 4, 6, 10)[..., ::2], torch.randn(2, 4, 6, 5)


def _expanded(arguments):
    arguments[0] = torch.randn(2, 4, 6, 1).expand(2, 4, 6, 5)


def _empty(arguments):
    arguments[0], arguments[9] = arguments[0][:0], arguments[9][:0]


def _of_another_shape(arguments):
    arguments[0], arguments[9] = torch.randn(2, 4, 5, 7), torch.randn(2, 4, 5, 7)


def _of_another_norm(arguments):
    arguments[5] = Norm(5, 2).text


def _of_another_backend(arguments):
    arguments[8] = "cpu"


def _strided_weight(arguments):
    arguments[1] = torch.randn(8)[::2]


def _strided_residual(arguments):
    arguments[9] = torch.randn(2, 4, 6, 10)[..., ::2]


def _residual_in_another_format(arguments):
    arguments[9] = arguments[9].contiguous(memory_format=torch.channels_last)


def _without_a_residual(arguments):
    arguments[9] = None


def _negated(arguments):
    arguments[0] = torch.complex(torch.zeros_like(arguments[0]), arguments[0]).conj().imag


@served
@pytest.mark.parametrize(
    "change",
    [
        _strided,
        _expanded,
        _empty,
        _of_another_shape,
        _of_another_norm,
        _of_another_backend,
        _strided_weight,
        _strided_residual,
        _residual_in_another_format,
        _without_a_residual,
    ],
)
def test_python_serves_what_is_unusual(change):
    arguments = forward_arguments((2, 4, 6, 5))
    forward(arguments[0].contiguous(memory_format=torch.channels_last), *arguments[1:])
    forward(*arguments)
    change(arguments)
    found, calls = _calls(lambda: forward(*arguments))
    assert calls == (0, 0)
    _assert_same(found, ops._forward(*arguments))


@served
def test_a_negated_tensor_is_resolved_on_the_way():
    arguments = forward_arguments()
    forward(*arguments)
    _negated(arguments)
    assert arguments[0].is_neg()
    found = forward(*arguments)
    arguments[0] = arguments[0].resolve_neg()
    _assert_same(found, ops._forward(*arguments))


@served
def test_python_serves_unusual_gradients():
    arguments = forward_arguments()
    _, maps, _ = forward(*arguments)
    usual = backward_arguments(arguments, maps)
    gaps = list(usual)
    gaps[0] = torch.randn(2, 4, 5, 12)[..., ::2]
    absent = list(usual)
    absent[:2] = None, torch.rand(())
    for given in (gaps, absent):
        found, calls = _calls(lambda: backward(*given))  # noqa: B023
        assert calls == (0, 0)
        _assert_same(found, ops._backward(*given))
    for which, value in ((0, usual[0].double()), (3, maps[..., :1]), (3, maps.double()), (10, [True] * 3)):
        given = list(usual)
        given[which] = value
        before = module.operator_calls()
        with pytest.raises((ValueError, TypeError)):
            backward(*given)
        assert module.operator_calls() == before


@served
def test_a_compiled_model_calls_the_kernels():
    torch._dynamo.reset()
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), DivisiveNorm2d(4, 3))
    x = torch.randn(2, 3, 8, 8)
    step = torch.compile(model, fullgraph=True)
    step(x).sum().backward()
    model.zero_grad()
    _, calls = _calls(lambda: step(x).square().sum().backward())
    assert calls == (1, 1)
    compiled = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    for a, p in zip(compiled, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-4)


@served
def test_calls_leave_no_memory_behind():
    """Neither served ones nor those that Python serves, nor those that fail."""
    usual = forward_arguments(with_l1=True)
    _, maps, _ = forward(*usual)
    given = backward_arguments(usual, maps)
    unusual = list(usual)
    _strided(unusual)
    failing = list(usual)
    failing[5] = '{"window": "none of these"}'

    def work(count):
        for _ in range(count):
            forward(*usual)
            backward(*given)
        for _ in range(count // 10):
            forward(*unusual)
            with pytest.raises(ValueError):
                forward(*failing)
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    work(2000)
    start = work(2000)
    assert work(20_000) - start < 1 << 20  # a string that is forgotten takes 3 MB, an empty tensor more


@served
def test_threads_share_the_plans():
    """They look plans up without the GIL, while another thread makes all of them known anew, and drops them."""
    arguments = forward_arguments()
    expected = ops._forward(*arguments)
    given = backward_arguments(arguments, expected[1])
    gradients = ops._backward(*given)

    def work(number):
        for i in range(300):
            if number == 0:
                other = forward_arguments((1, 4, 2, 3 + i))
                for _ in range(2):
                    _assert_same(forward(*other), ops._forward(*other))
            _assert_same(forward(*arguments), expected)
            _assert_same(backward(*given), gradients)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))


@served
def test_the_plans_are_bounded():
    for n in range(1, 300):
        forward(*forward_arguments((1, 4, n)))
        assert module.operator_plans() <= 256


def test_without_torchs_functions_python_serves_all_calls():
    """As with a torch that lacks one of them: here the library that they are looked for in has none."""
    found = run_python(
        "-c",
        """
import _ctypes
import torch

torch._C.__file__ = _ctypes.__file__
from divnorm_kernels import ops
from divnorm_kernels.backends.native import module
from divnorm_kernels.norm import Norm

x = torch.randn(2, 4, 5, 6, requires_grad=True)
for _ in range(2):
    y, _, _ = torch.ops.divnorm_kernels.forward(x, None, None, None, 1.0, Norm(3).text, False, False, None)
    y.sum().backward()
print(ops.by_kernels, module and module.operator_calls())
""",
    )
    assert found.strip() in ("False (0, 0)", "False None")
