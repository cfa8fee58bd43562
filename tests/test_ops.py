"""The registered operators: opcheck, fake tensors, compilation, dispatch modes and torch.func."""

import pytest
import torch
from operator_cases import CASES
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from divnorm_kernels import divisive_norm
from divnorm_kernels.norm import Norm

forward = torch.ops.divnorm_kernels.forward
backward = torch.ops.divnorm_kernels.backward


@pytest.mark.parametrize("backend", ["cpu", None])
@pytest.mark.parametrize("name", CASES)
def test_opcheck(name, backend):
    shape, norm = CASES[name]
    x = torch.randn(shape, requires_grad=True)
    weight, bias = (torch.randn(shape[1], requires_grad=True) for _ in range(2))
    sigma = (torch.rand(norm.groups) + 0.5).requires_grad_()
    residual = torch.randn(shape, requires_grad=True)
    threshold = torch.randn(shape[1], requires_grad=True) if norm.activation == "tlu" else None
    behind = (residual, threshold)
    torch.library.opcheck(forward, (x, weight, bias, sigma, 0.0, norm.text, True, False, backend, *behind))
    torch.library.opcheck(forward, (x, None, None, None, 0.5, norm.text, False, False, backend, None, threshold))
    x, weight, bias, sigma, residual = (t.detach() for t in (x, weight, bias, sigma, residual))
    threshold = None if threshold is None else threshold.detach()
    _, maps, _ = forward(x, weight, bias, sigma, 0.0, norm.text, True, False, backend, residual, threshold)
    gradients = (torch.randn_like(x), torch.randn(()))
    residual = residual if norm.activation else None
    needs = [True, True, True, True, residual is not None, threshold is not None]
    biased = (bias if norm.activation else None, bias.dtype)
    rest = (sigma, 0.0, norm.text, needs, backend, residual, threshold)
    torch.library.opcheck(backward, (*gradients, x, maps, weight, *biased, *rest))


def test_operators_refuse_the_reference():
    with pytest.raises(
        RuntimeError,
        match="backend: got 'reference', which is no kernel for this call, and the operators run kernels only",
    ):
        forward(torch.ones(1, 2, 3), None, None, None, 1.0, Norm(3).text, False, False, "reference")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_fake_tensors_have_the_real_metadata(memory_format):
    x = torch.randn(2, 4, 5, 6).bfloat16().contiguous(memory_format=memory_format)
    real = divisive_norm(x, window=3, return_l1=True)
    with FakeTensorMode() as mode:
        fake = divisive_norm(mode.from_tensor(x), window=3, return_l1=True)
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


@pytest.mark.parametrize("return_l1", [False, True])
def test_compiled_equals_eager(return_l1):
    """In one graph, gradients and all."""
    inputs = [torch.randn(2, 4, 7, 6), torch.randn(4), torch.randn(4), torch.rand(()) + 0.5]

    def step(x, weight, bias, sigma):
        out = divisive_norm(x * 2, weight, bias, window=3, sigma=sigma, return_l1=return_l1)
        y, l1 = out if return_l1 else (out, 0.0)
        return (y * y).sum() + 3 * l1

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in inputs]
        loss = function(*leaves)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-5, atol=1e-5)


def test_dispatch_modes_see_the_operator():
    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    with Recorder():
        y = divisive_norm(x, window=3)
    assert forward.default in seen
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    plain = torch.autograd.grad(divisive_norm(x, window=3).square().sum(), x)[0]
    assert torch.equal(dx, plain)


def test_torch_function_overrides_are_asked():
    class Tagged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return (
                "overridden" if function is divisive_norm else super().__torch_function__(function, types, args, kwargs)
            )

    assert divisive_norm(torch.randn(2, 4, 5, 5).as_subclass(Tagged), window=3) == "overridden"


def test_export_is_plain_aten():
    class Model(torch.nn.Module):
        def forward(self, x):
            return divisive_norm(x, window=3)

    x = torch.randn(2, 4, 6, 5)
    exported = torch.export.export(Model(), (x,))
    names = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert names
    assert not any("divnorm" in name for name in names)
    torch.testing.assert_close(exported.module()(x), divisive_norm(x, window=3), rtol=1e-5, atol=1e-6)
