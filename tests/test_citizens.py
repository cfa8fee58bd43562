"""What people do to models, with every layer: compilers, export, transforms, autocast, determinism."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import divnorm_kernels as dk
from divnorm_kernels import divisive_norm

LAYERS = {
    "DivisiveNorm1d": (lambda **kw: dk.DivisiveNorm1d(4, 3, **kw), (3, 4, 5)),
    "DivisiveNorm2d": (lambda **kw: dk.DivisiveNorm2d(4, 3, **kw), (2, 4, 4, 3)),
    "DivisiveNorm3d": (lambda **kw: dk.DivisiveNorm3d(2, 2, **kw), (2, 2, 3, 2, 2)),
    "DivisiveNormFeatures": (lambda **kw: dk.DivisiveNormFeatures(5, 3, **kw), (3, 5)),
    "LocalContrastNorm2d": (lambda **kw: dk.LocalContrastNorm2d(3, 3, **kw), (2, 3, 4, 3)),
    "PositionalNorm2d": (lambda **kw: dk.PositionalNorm2d(4, sigma=0.5, **kw), (2, 4, 3, 2)),
    "BatchNorm1d": (lambda **kw: dk.BatchNorm1d(4, sigma=0.5, **kw), (5, 4)),
    "BatchNorm2d": (lambda **kw: dk.BatchNorm2d(3, sigma=0.5, **kw), (3, 3, 3, 2)),
    "BatchNorm3d": (lambda **kw: dk.BatchNorm3d(2, sigma=0.5, **kw), (2, 2, 2, 2, 2)),
    "LayerNorm": (lambda **kw: dk.LayerNorm((2, 3), sigma=0.5, **kw), (3, 2, 3)),
    "RMSNorm": (lambda **kw: dk.RMSNorm(4, sigma=0.5, **kw), (3, 2, 4)),
    "GroupNorm": (lambda **kw: dk.GroupNorm(2, 4, sigma=0.5, **kw), (2, 4, 3, 2)),
    "InstanceNorm1d": (lambda **kw: dk.InstanceNorm1d(3, sigma=0.5, **kw), (2, 3, 4)),
    "InstanceNorm2d": (lambda **kw: dk.InstanceNorm2d(3, sigma=0.5, affine=True, **kw), (2, 3, 3, 2)),
    "InstanceNorm3d": (lambda **kw: dk.InstanceNorm3d(2, sigma=0.5, **kw), (2, 2, 2, 2, 2)),
}
COMPILED = ("DivisiveNorm2d", "DivisiveNormFeatures", "BatchNorm2d", "LayerNorm", "GroupNorm")


@pytest.mark.parametrize("name", LAYERS)
def test_first_and_second_derivatives(name):
    """Through parameters, a learned sigma and the penalty too."""
    make, shape = LAYERS[name]
    layer = make(learn_sigma=True, l1_weight=0.1, dtype=torch.float64)
    names = [key for key, _ in layer.named_parameters()]
    parameters = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    torch.manual_seed(1)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def call(x, *parameters):
        y = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)
        return y, layer.l1

    assert torch.autograd.gradcheck(call, (x, *parameters))
    assert torch.autograd.gradgradcheck(call, (x, *parameters))


@pytest.mark.parametrize(
    "options", [{"window": 3, "groups": 2}, {"window": "all"}, {"window": None, "norm_window": "all"}]
)
def test_derivatives_through_the_relu(options):
    """Away from its kink."""
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert divisive_norm(x, weight, bias, **options).abs().min() > 1e-5

    def call(*inputs):
        return divisive_norm(*inputs, activation="relu", **options)

    assert torch.autograd.gradcheck(call, (x, weight, bias))
    assert torch.autograd.gradgradcheck(call, (x, weight, bias))


class Net(nn.Module):
    """A layer with something to fuse around it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        y = self.layer(x * 2)
        return y * y if self.layer.l1 is None else y * y + self.layer.l1


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_in_one_graph_for_every_batch_size(name):
    make, shape = LAYERS[name]
    torch.compiler.reset()
    model = Net(make(l1_weight=0.1, activation="relu"))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for i, batch in enumerate((5, 7, 9, 4)):
        x = torch.randn(batch, *shape[1:])
        torch._dynamo.mark_dynamic(x, 0)
        results = []
        for function in (model, compiled):
            leaf = x.clone().requires_grad_()
            torch._dynamo.mark_dynamic(leaf, 0)
            y = function(leaf)
            results.append((y, *torch.autograd.grad(y.sum(), [leaf, *model.parameters()])))
        for eager, found in zip(*results, strict=True):
            torch.testing.assert_close(eager, found, rtol=1e-5, atol=1e-5)
        assert counter.frame_count == 1, f"compiled again for the {i + 1}th batch size"


def test_inductor_agrees():
    torch.compiler.reset()
    model = nn.Sequential(nn.Conv2d(3, 8, 3), dk.DivisiveNorm2d(8, 3, activation="relu"), dk.BatchNorm2d(8))
    x = torch.randn(2, 3, 9, 9)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    model[2].reset_running_stats()
    found = torch.autograd.grad(torch.compile(model, fullgraph=True)(x).square().sum(), list(model.parameters()))
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_export_with_any_batch_size(name):
    make, shape = LAYERS[name]
    layer = make().eval()
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(layer, (torch.randn(shape),), dynamic_shapes=({0: batch},)).module()
    for n in (shape[0], shape[0] + 3):
        x = torch.randn(n, *shape[1:])
        torch.testing.assert_close(exported(x), layer(x), rtol=1e-5, atol=1e-5)


def test_transforms():
    x, weight = torch.randn(3, 4, 5, 5), torch.randn(4)

    def loss(x, weight):
        return divisive_norm(x, weight, window=3, activation="relu").square().sum()

    expected = torch.stack([torch.autograd.functional.jacobian(lambda x: loss(x, weight), one[None])[0] for one in x])
    per_sample = torch.func.vmap(torch.func.grad(lambda x, weight: loss(x[None], weight)), (0, None))(x, weight)
    torch.testing.assert_close(per_sample, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match=r"'cpu', which neither torch\.func nor forward-mode differentiation"):
        torch.func.grad(lambda x: divisive_norm(x, window=3, backend="cpu").sum())(x)
    jacobian = torch.func.jacrev(lambda w: divisive_norm(x, w, window=3).sum((0, 2, 3)))(weight)
    torch.testing.assert_close(jacobian.diagonal(), divisive_norm(x, window=3).sum((0, 2, 3)), rtol=1e-4, atol=1e-4)


def test_forward_mode():
    x, tangent = (torch.randn(2, 4, 5, 5, dtype=torch.float64) for _ in range(2))

    def call(x):
        return divisive_norm(x, window=3)

    _, dy = torch.func.jvp(call, (x,), (tangent,))
    expected = torch.autograd.functional.jvp(call, x, tangent)[1]
    torch.testing.assert_close(dy, expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(call(dual)).tangent, expected)
        with pytest.raises(RuntimeError, match=r"'cpu', which neither torch\.func nor forward-mode differentiation"):
            divisive_norm(dual, window=3, backend="cpu")


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_keeps_half_inputs_half(name):
    make, shape = LAYERS[name]
    layer = make()
    x = torch.randn(shape).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer(x)), "autocast changes nothing"
    (dx,) = torch.autograd.grad(y.float().sum(), x)
    assert dx.dtype == torch.bfloat16
    assert {p.dtype for p in layer.parameters()} <= {torch.float32}


def test_statistics_of_half_inputs_are_float32():
    x = (torch.randn(64, 3, 9, 9) * 1e-2 + 8).bfloat16()
    layer = dk.BatchNorm2d(3)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    torch.testing.assert_close(layer.running_mean, 0.1 * x.float().mean((0, 2, 3)), rtol=1e-5, atol=0)


def test_deterministic_algorithms_are_what_there_is():
    torch.use_deterministic_algorithms(True)
    try:
        for make, shape in LAYERS.values():
            layer = make()
            y = layer(torch.randn(shape).requires_grad_())
            y.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
