"""A residual of another dtype than x's: refused with a remedy, and under autocast taken as torch's own sum takes it."""

import copy

import pytest
import torch
from other_layers import EVERY

import divnorm_kernels as dk
from divnorm_kernels import divisive_norm

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
MIXED = [(BF16, F32), (F32, BF16), (F16, F32), (BF16, F16)]
WITH_FLOAT64 = [(F64, F32), (F32, F64), (BF16, F64)]
SHAPE = (2, 4, 6, 5)


def pair(dtypes, shape=SHAPE):
    """Of these dtypes: x and a residual."""
    return [torch.randn(shape).to(dtype).requires_grad_() for dtype in dtypes]


def autocast(enabled=True):
    return torch.autocast("cpu", BF16, enabled=enabled)


def check_is_float32s(call, y, x, residual, parameters=()):
    """That ``y`` has the bits of a call on the same numbers in float32, and so have gradients, in their own dtypes."""
    wide = [t.detach().float().requires_grad_() for t in (x, residual)]
    expected = call(*wide)
    assert torch.equal(y, expected)
    dy, leaves = torch.randn_like(expected), [x, residual, *parameters]
    found = torch.autograd.grad(y, leaves, dy)
    for g, wanted, leaf in zip(found, torch.autograd.grad(expected, [*wide, *parameters], dy), leaves, strict=True):
        assert g.dtype == leaf.dtype
        assert torch.equal(g, wanted.to(leaf.dtype))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtypes", MIXED, ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_layers_under_autocast(name, dtypes, training):
    make, shape, _ = EVERY[name]
    layer = make(activation="silu").train(training)
    x, residual = pair(dtypes, shape)
    with autocast():
        assert (copy.deepcopy(layer)(x) + residual).dtype == F32, "what torch's own addition gives"
        y = layer(x, residual)
    check_is_float32s(layer, y, x, residual, list(layer.parameters()))


@pytest.mark.parametrize("dtypes", MIXED, ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_the_function_under_autocast(compiled, dtypes):
    def call(x, residual):
        return divisive_norm(x, window=3, residual=residual, activation="relu")

    torch._dynamo.reset()
    x, residual = pair(dtypes)
    with autocast():
        y = (torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call)(x, residual)
    if not compiled:
        assert y.grad_fn.name() == "DivisiveNormFunctionBackward", "by kernels"
    check_is_float32s(call, y, x, residual)


def test_of_one_dtype_autocast_changes_nothing():
    x, residual = pair((BF16, BF16))
    with autocast():
        y = divisive_norm(x, window=3, residual=residual)
    assert y.dtype == BF16
    assert torch.equal(y, divisive_norm(x, window=3, residual=residual))


@pytest.mark.parametrize("dtypes", [*MIXED, *WITH_FLOAT64], ids=str)
def test_refused_outside_of_it(dtypes):
    """Where it is switched off too; and float64, which autocast leaves alone, inside."""
    x, residual = pair(dtypes)
    parameters = F64 if x.dtype == F64 else F32
    message = (
        rf"^residual: got dtype {dtypes[1]}, expected that of x, {dtypes[0]} \(residual\.to\(x\.dtype\) makes it so\)"
    )
    for enabled in (False, True) if F64 in dtypes else (False,):
        with autocast(), autocast(enabled):
            for call in (dk.GroupNorm(2, 4, dtype=parameters), lambda x, r: divisive_norm(x, window=3, residual=r)):
                with pytest.raises(TypeError, match=message):
                    call(x, residual)
                call(x, residual.to(x.dtype))


def test_refused_beside_parameters_of_a_half_type():
    """Float32 takes parameters of float32 alone."""
    x, residual = pair((BF16, F32))
    with autocast(), pytest.raises(TypeError, match=r"^residual: got dtype torch\.float32, expected that of x"):
        dk.GroupNorm(2, 4, dtype=BF16)(x, residual)
    for name in ("weight", "bias", "threshold", "sigma"):
        given = {name: torch.ones(() if name == "sigma" else 4, dtype=BF16)}
        given |= {"activation": "tlu"} if name == "threshold" else {}
        with autocast(), pytest.raises(TypeError, match=r"^residual: got dtype torch\.float32, expected that of x"):
            divisive_norm(x, window=3, residual=residual, **given)


@pytest.mark.parametrize("freed", ["x", "residual"])
def test_no_freed_memory_is_read(freed):
    x, residual = (t.detach().clone() for t in pair((BF16, F32)))
    {"x": x, "residual": residual}[freed].untyped_storage().resize_(0)
    with autocast():
        for call in (dk.GroupNorm(2, 4), lambda x, r: divisive_norm(x, window=3, residual=r)):
            with pytest.raises(ValueError, match=rf"^{freed}: got a Tensor of shape .* whose storage holds 0 bytes"):
                call(x, residual)


def test_on_a_device_that_autocast_does_not_know():
    x, residual = (torch.empty(SHAPE, device="meta", dtype=dtype) for dtype in (BF16, F32))
    with autocast(), pytest.raises(TypeError, match=r"^residual: got dtype torch\.float32"):
        divisive_norm(x, window=3, residual=residual, backend="reference")
