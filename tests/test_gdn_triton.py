"""Generalized divisive normalization's Triton kernels, through Triton's interpreter where there is no GPU."""

import pytest
import torch
from gdn_oracle import FORMS, call_of, check, evaluate

from divnorm_kernels import gdn
from divnorm_kernels.backends.triton import INTERPRETED
from divnorm_kernels.gdn.form import Form

triton_language = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
triton = pytest.importorskip("divnorm_kernels.gdn.triton")
triton_kernels = pytest.importorskip("divnorm_kernels.gdn.triton_kernels")

DEVICE = "cpu" if INTERPRETED else "cuda"
CASES = {
    "tiles of positions": ((2, 5, 9, 5), False),
    "tiles of channels": ((1, 66, 3), False),
    "channels side by side": ((2, 33, 7), True),
    "rows": ((3, 18), False),
}


def by_triton(x, beta, gamma, **options):
    y = gdn(x.to(DEVICE), beta.to(DEVICE), gamma.to(DEVICE), backend="triton", **options)
    return y.to(x.device)


@pytest.mark.parametrize(
    ("name", "form"), [*(("tiles of positions", form) for form in FORMS), *zip(CASES, FORMS, strict=True)][1:]
)
def test_values_and_gradients(name, form):
    shape, channels_last = CASES[name]
    check(by_triton, call_of(shape, channels_last=channels_last, **form))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types(dtype):
    for parameters in (dtype, torch.float32):
        check(by_triton, call_of((1, 6, 10), dtype, parameters=parameters))


@pytest.mark.parametrize("channels_last", [False, True])
def test_backward_in_pieces(channels_last, monkeypatch):
    """Each of whose products for dgamma is cut once more; the last pieces are no whole tiles."""
    monkeypatch.setattr(triton, "_SPLIT", 64)
    monkeypatch.setattr(triton, "_PIECES", 2)
    check(by_triton, call_of((2, 5, 9, 11), channels_last=channels_last))


def test_backward_makes_what_is_needed():
    call = call_of((2, 5, 7))
    full = evaluate(by_triton, call)
    for place, name in enumerate(("dx", "dbeta", "dgamma")):
        inputs = list(call.inputs)
        inputs[place] = inputs[place].requires_grad_()
        (found,) = torch.autograd.grad(by_triton(*inputs), inputs[place], call.dy)
        assert torch.equal(found, full[name])
        inputs[place].requires_grad_(False)


def test_a_zero_in_the_mean_of_signs():
    """The simplified form's abs(x) is flat at zero, as torch's."""
    call = call_of((1, 3, 6), simplified=True)
    call.x[0, 1, 2] = 0
    check(by_triton, call)


@triton_language.jit
def _place(out, pid, WIDE: tl.constexpr):
    tl.store(out + tl.arange(0, 64), triton_kernels.place(pid, 64, WIDE, 64).to(tl.int64))


def test_positions_beyond_32_bits():
    """Counted in 64 before a program's reach them, where it begins and where it ends."""
    found = torch.empty(64, dtype=torch.int64, device=DEVICE)
    _place[(1,)](found, 2**25, True)
    assert torch.equal(found.cpu(), 2**31 + 64 + torch.arange(64))
    for numbers, wide in ((2**31 - triton._SPLIT, False), (2**31 - triton._SPLIT + 1, True)):
        x = torch.empty((1, 1, numbers), device="meta")
        assert triton._Launch(Form(False, False, ""), x)._constants["WIDE"] == wide


def test_precision_is_what_torch_allows_its_products(monkeypatch):
    kernel, seen = triton_kernels.forward_kernel, []

    class Spy:
        def __getitem__(self, grid):
            def run(*arguments, **constants):
                seen.append(constants["PRECISION"])
                return kernel[grid](*arguments, **constants)

            return run

    monkeypatch.setattr(triton_kernels, "forward_kernel", Spy())
    call, before = call_of((1, 3, 4)), torch.get_float32_matmul_precision()
    try:
        for name in ("highest", "high"):
            torch.set_float32_matmul_precision(name)
            by_triton(*call.inputs)
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["ieee", "tf32"]


def test_empty():
    call = call_of((2, 4, 0))
    results = evaluate(by_triton, call)
    assert results["y"].shape == (2, 4, 0)
    assert not results["dgamma"].any()


def test_what_it_refuses():
    call = call_of((1, 3, 4, 4))
    refusal = r"^backend: got 'triton', which cannot serve this call: "
    with pytest.raises(RuntimeError, match=refusal + "it has a window"):
        by_triton(*call.inputs, window=3)
    with pytest.raises(RuntimeError, match=refusal + "x has dtype torch.float64"):
        by_triton(*(t.double() for t in call.inputs))
    with pytest.raises(RuntimeError, match=refusal + "x is on meta"):
        gdn(*(t.to("meta") for t in call.inputs), backend="triton")
