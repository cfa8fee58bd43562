"""The operator over the whole space of calls: values and all gradients against the reference in float64."""

import pytest
import torch
from hypothesis import example, given
from oracle import Call, check
from strategies import Recipe, calls

from divnorm_kernels import divisive_norm
from divnorm_kernels.reference import divisive_norm as reference


def cpu(*args, **kwargs):
    return divisive_norm(*args, backend="cpu", **kwargs)


V_IS_ZERO = Recipe((1, 9, 9), torch.bfloat16, {"window": 3}, weight=False, bias=False, sigma=0.5, dl1=3.0, seed=1143410)
"""Where the kernel's x - mu is 0 and the oracle's -1e-17: |x - mu| has no slope there."""


def even(shape, **options) -> Call:
    return Recipe(shape, torch.float64, options=options).call()


@given(calls())
@example(even((1, 1, 1, 4, 6), window=(1, 2, 3), norm_window=(2, 2, 9)))  # found by tests/fuzz.py: memory overrun
@example(even((3, 5, 1, 5, 6), window=(8, 2, 9), norm_window=(10, 9, 8)))
@example(even((3, 6, 1, 4, 6), window=(8, 1, 3), norm_window=(2, 2, 9), groups=2, edges="zero"))
@example(V_IS_ZERO.call())
def test_values_and_gradients(call: Call):
    check(cpu, call)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 64, 224, 224), {"window": 5}),
        ((9, 96, 61, 83), {"window": 7, "groups": 3}),
        ((2, 16, 300, 301), {"window": (31, 4), "norm_window": (2, 45), "edges": "zero"}),
        ((3, 512, 7, 7), {"window": 11}),
        ((600, 130, 3, 3), {"window": 3, "norm_window": "all"}),
        ((1, 64, 224, 224), {"window": "all", "activation": "relu"}),
        ((9, 96, 61, 83), {"window": "all", "groups": 48}),
        ((300, 64, 9, 9), {"window": "all", "groups": 64, "over_batch": True, "activation": "relu"}),
        ((1, 64, 224, 224), {"window": 5, "p": 1, "activation": "silu"}),
        ((9, 96, 61, 83), {"window": "all", "groups": 48, "p": 1, "subtract_mean": False, "activation": "tlu"}),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_large_activations(shape, options, dtype, memory_format):
    """Several slabs, tiles, teams and streaming stores, which small cases never reach."""
    x, dy = (torch.randn(shape).to(dtype).contiguous(memory_format=memory_format) for _ in range(2))
    weight, bias, threshold = (torch.randn(shape[1]) for _ in range(3))
    behind = (dy.flip(0), threshold if options.get("activation") == "tlu" else None)
    got = check(cpu, Call(x, weight, bias, torch.tensor(0.8), dy, 2.0, options, *behind))
    assert got["y"].is_contiguous(memory_format=memory_format)
    assert got["dx"].is_contiguous(memory_format=memory_format)


def test_large_features():
    x, dy = torch.randn(3000, 250), torch.randn(3000, 250)
    for options in ({"window": 60}, {"window": "all"}, {"window": "all", "over_batch": True}):
        check(cpu, Call(x, torch.randn(250), torch.randn(250), 1.0, dy, 1.0, options | {"activation": "relu"}))
    x, dy = torch.randn(3, 50000), torch.randn(3, 50000)
    check(cpu, Call(x, torch.randn(50000), torch.randn(50000), 1.0, dy, 1.0, {"window": "all"}))


def test_large_volume():
    x, dy = torch.randn(2, 24, 20, 30, 31), torch.randn(2, 24, 20, 30, 31)
    options = {"window": (3, 9, 5), "norm_window": (12, 1, 40), "groups": 2}
    check(cpu, Call(x, torch.randn(24), None, torch.rand(2) + 0.5, dy, 0.0, options))


@given(calls())
def test_gradients_are_computed_only_where_needed(call: Call):
    """Leaving gradients out changes none of the others."""
    inputs = call.inputs
    tensors = [i for i, t in enumerate(inputs) if isinstance(t, torch.Tensor)]

    def gradients(which):
        chosen = [t.detach().requires_grad_(i in which) if i in tensors else t for i, t in enumerate(inputs)]
        x, weight, bias, sigma, residual, threshold = chosen
        keywords = call.options | {"residual": residual, "threshold": threshold}
        y = cpu(x, weight, bias, sigma=sigma, **keywords)
        return torch.autograd.grad(y, [chosen[i] for i in which], call.dy)

    together = gradients(tensors)
    for i, expected in zip(tensors, together, strict=True):
        (alone,) = gradients([i])
        assert torch.equal(alone, expected)


def test_backend_of_a_cpu_tensor_is_the_native_one():
    x = torch.randn(2, 8, 9, 9)
    y, native = divisive_norm(x, window=5), divisive_norm(x, window=5, backend="cpu")
    assert torch.equal(y, native)
    assert not torch.equal(y, reference(x, window=5)), "the reference rounds otherwise: this would not tell them apart"
