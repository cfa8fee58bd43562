"""What only a GPU can show, of every backend that serves it: real sizes, graphs, streams, no synchronisation."""

import copy

import pytest
import torch
from oracle import Call, check, evaluate

import divnorm_kernels as dk
from bench.gpu import side_stream
from divnorm_kernels import divisive_norm
from divnorm_kernels.backends import KERNELS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BACKENDS = [name for name, kernels in KERNELS.items() if name != "cpu" and kernels.missing() is None]
FORMATS = [torch.contiguous_format, torch.channels_last]


def on(backend):
    return lambda *args, **kwargs: divisive_norm(*args, backend=backend, **kwargs)


@pytest.fixture(params=BACKENDS)
def gpu(request):
    return on(request.param)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((64, 256, 56, 56), {"window": 5}),
        ((64, 2048, 7, 7), {"window": 3}),
        ((128, 16, 32, 32), {"window": 11}),
        ((1, 64, 224, 224), {"window": 31}),
        ((9, 96, 61, 83), {"window": 7, "groups": 3, "activation": "relu"}),
        ((64, 512, 7, 7), {"window": "all", "groups": 512}),
        ((16, 256, 56, 56), {"window": "all", "activation": "relu"}),
        ((64, 256, 28, 28), {"window": "all", "groups": 32}),
        ((64, 64, 56, 56), {"window": "all", "groups": 64, "over_batch": True}),
        ((40, 24, 30, 30), {"window": 3, "over_batch": True}),
    ],
    ids=str,
)
def test_real_sizes(gpu, shape, options, dtype, memory_format):
    x, dy = (torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=memory_format) for _ in range(2))
    weight, bias = torch.randn(shape[1], device="cuda"), torch.randn(shape[1], device="cuda")
    check(gpu, Call(x, weight, bias, torch.tensor(0.8, device="cuda"), dy, 2.0, options))


@pytest.mark.parametrize("shape", [(64, 64, 56, 56), (64, 32, 8, 8), (300, 30000)], ids=str)
def test_same_bits_on_every_run(gpu, shape):
    x, dy = (torch.randn(shape, device="cuda") for _ in range(2))
    affine = torch.randn(shape[1], device="cuda")
    call = Call(x, affine, affine, torch.tensor(1.0, device="cuda"), dy, 1.0, {"window": 5})
    first = evaluate(gpu, call)
    for _ in range(20):
        again = evaluate(gpu, call)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("shape", [(16, 64, 56, 56), (64, 32, 8, 8)], ids=str)
def test_graph_capture(gpu, shape):
    x, weight = torch.randn(shape, device="cuda", requires_grad=True), torch.ones(shape[1], device="cuda")
    dy = torch.randn(shape, device="cuda")

    def step():
        y = gpu(x, weight, window=5)
        return y, *torch.autograd.grad(y, x, dy)

    with side_stream():
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for _ in range(3):
        with torch.no_grad():
            x.copy_(torch.randn(shape))
        graph.replay()
        assert all(torch.equal(got, want) for got, want in zip(results, step(), strict=True))


def test_no_synchronisation(gpu):
    x = torch.randn(16, 64, 56, 56, device="cuda", requires_grad=True)
    sigma = torch.ones((), device="cuda", requires_grad=True)

    def step():
        y, l1 = gpu(x, window=5, sigma=sigma, return_l1=True)
        torch.autograd.grad(y.sum() + l1, (x, sigma))

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_callers_stream(gpu):
    x = torch.zeros(64, 64, 56, 56, device="cuda")
    expected = gpu(torch.ones_like(x), window=5, norm_window=None, bias=torch.ones(64, device="cuda"))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x.fill_(1.0)
        y = gpu(x, window=5, norm_window=None, bias=torch.ones(64, device="cuda"))
    stream.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("make", [dk.BatchNorm2d, lambda c: dk.GroupNorm(8, c), dk.DivisiveNorm2d, dk.InstanceNorm2d])
def test_layers_under_autocast_and_in_a_graph(make, memory_format):
    """Half in, half out, and the same as on the CPU; running statistics move on with every replay."""
    layer = make(64).cuda()
    alone = copy.deepcopy(layer).cpu().double()
    x = torch.randn(16, 64, 28, 28, device="cuda").bfloat16().contiguous(memory_format=memory_format)

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            return layer(x)

    with side_stream():
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    graph.replay()
    for _ in range(2):
        expected = alone(x.double().cpu())
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(y.double().cpu(), expected, rtol=2**-7, atol=2**-7)
    for name, buffer in layer.named_buffers():
        torch.testing.assert_close(
            buffer.double().cpu(), dict(alone.named_buffers())[name].double(), rtol=1e-4, atol=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(33, 64, 1024, 1024), (1, 64, 5800, 5800), (2**16 + 1, 2**15)], ids=str)
def test_more_than_2_to_the_31_elements(gpu, shape):
    """The last sample, or of a single one the last rows, are computed where they lie."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    x = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    last, near = (x[-1:], x[-1:]) if shape[0] > 1 else (x[..., -16:, :], x[..., -32:, :])
    last.copy_(torch.randn(last.shape))
    x.requires_grad_()
    y = gpu(x, window=3)
    (dx,) = torch.autograd.grad(y, x, y.detach())
    part = near.detach().clone().requires_grad_()
    expected = gpu(part, window=3)
    (expected_dx,) = torch.autograd.grad(expected, part, expected.detach())
    rows = slice(None) if shape[0] > 1 else slice(-16, None)
    for whole, alone in ((y, expected), (dx, expected_dx)):
        torch.testing.assert_close(whole[-1:][..., rows, :], alone[..., rows, :], rtol=2**-7, atol=2**-7)
