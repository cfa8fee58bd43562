"""GDN as a layer: CompressAI's parametrization, keys and gradients; exporters, recorders and other citizens."""

import copy
import io
import math
import pickle

import onnxruntime
import pytest
import torch
from functorch.compile import make_boxed_func
from gdn_oracle import FORMS
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F

import divnorm_kernels as dk

PEDESTAL = 2.0**-36
KEYS = [
    "beta",
    "gamma",
    "beta_reparam.pedestal",
    "beta_reparam.lower_bound.bound",
    "gamma_reparam.pedestal",
    "gamma_reparam.lower_bound.bound",
]


def double(*shape):
    return torch.randn(shape, dtype=torch.float64)


def trained(inverse=False, simplified=False, dtype=torch.float64, **options):
    """A layer with raw values on both sides of their bounds."""
    layer = dk.GDN(5, inverse, 1e-3, simplified=simplified, dtype=dtype, **options)
    with torch.no_grad():
        layer.beta.copy_(torch.tensor([1.3, 0.7, 0.02, -0.5, 1e-3**0.5]))
        layer.gamma.normal_(0.1, 0.3)
    return layer


def published(raw, least):
    """The value that a raw parameter stands for, whose bound lets through what raises it."""
    bound = (least + PEDESTAL) ** 0.5
    value = torch.maximum(raw, torch.tensor(bound, dtype=raw.dtype)) ** 2 - PEDESTAL

    def to_raw(grad):
        grad = grad * 2 * raw.clamp(min=bound)
        return torch.where((raw >= bound) | (grad < 0), grad, 0)

    return value.detach().requires_grad_(), to_raw


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_is_the_published_layer(form, backend):
    """With the gradients of raw values that are below their bounds, of either sign."""
    layer, x, dy = trained(**form, backend=backend), double(2, 5, 6, 7).requires_grad_(), double(2, 5, 6, 7)
    beta, to_raw_beta = published(layer.beta.detach(), 1e-3)
    gamma, to_raw_gamma = published(layer.gamma.detach(), 0.0)
    own = x.abs() if form["simplified"] else x**2
    d = F.conv2d(own, gamma[..., None, None], beta)
    size = d if form["simplified"] else d**0.5
    expected = x * size if form["inverse"] else x / size
    y = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=0)
    dx, dbeta, dgamma = torch.autograd.grad(expected, [x, beta, gamma], dy)
    want = dx, to_raw_beta(dbeta), to_raw_gamma(dgamma)
    got = torch.autograd.grad(y, [x, layer.beta, layer.gamma], dy)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
    below = layer.gamma < PEDESTAL**0.5
    assert {bool(g) for g in got[2][below] != 0} == {True, False}


def test_bounds_pass_what_raises_them():
    bound = dk.GDN(3, beta_min=0.25, dtype=torch.float64).beta_reparam.lower_bound
    raw = torch.tensor([0.1, 0.1, 0.1, 0.9, 0.9, float(bound.bound)], dtype=torch.float64, requires_grad=True)
    grad = torch.tensor([-2.0, 0.0, 2.0, -2.0, 2.0, 2.0], dtype=torch.float64)
    value = bound(raw)
    assert torch.equal(value, raw.detach().clamp(min=float(bound.bound)))
    assert torch.autograd.grad(value, raw, grad)[0].tolist() == [-2.0, 0.0, 0.0, -2.0, 2.0, 2.0]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_first_and_second_derivatives(form):
    """Away from the bounds, next to which the gradient is not that of the function."""
    layer, x = dk.GDN(3, **form, dtype=torch.float64), double(1, 3, 2, 2).requires_grad_()
    raw = [(torch.rand_like(p) + 0.2).requires_grad_() for p in (layer.beta, layer.gamma)]

    def call(x, beta, gamma):
        return torch.func.functional_call(layer, {"beta": beta, "gamma": gamma}, x)

    assert torch.autograd.gradcheck(call, (x, *raw))
    assert torch.autograd.gradgradcheck(call, (x, *raw))


def test_forward_mode():
    layer, x, v = trained(), double(2, 5, 3), double(2, 5, 3)
    _, tangent = torch.func.jvp(layer, (x,), (v,))
    step = 1e-5
    torch.testing.assert_close(tangent, (layer(x + step * v) - layer(x - step * v)) / (2 * step), rtol=1e-6, atol=1e-8)


def test_a_published_checkpoint_loads():
    """Keys, shapes and types as CompressAI writes them, with bounds of its own."""
    layer = dk.GDN(5)
    assert list(layer.state_dict()) == KEYS
    assert [tuple(t.shape) for t in layer.state_dict().values()] == [(5,), (5, 5), (1,), (1,), (1,), (1,)]
    assert [name for name, _ in layer.named_parameters()] == KEYS[:2]
    state = {key: torch.rand_like(t) + 0.5 for key, t in layer.state_dict().items()}
    state["beta_reparam.pedestal"] = state["gamma_reparam.pedestal"] = torch.tensor([PEDESTAL])
    state["beta_reparam.lower_bound.bound"] = torch.tensor([0.8])
    state["gamma_reparam.lower_bound.bound"] = torch.tensor([PEDESTAL**0.5])
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    layer.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(2, 5, 4)
    d = torch.einsum("ij,njp->nip", state["gamma"] ** 2 - PEDESTAL, x * x)
    d = d + (state["beta"].clamp(min=0.8) ** 2 - PEDESTAL)[:, None]
    torch.testing.assert_close(layer(x), x / d.sqrt())


def test_initial_values():
    for dtype in (torch.float32, torch.float64):
        layer = dk.GDN(4, gamma_init=0.3, dtype=dtype)
        state = layer.state_dict()
        expected = {
            "beta": torch.ones(4, dtype=torch.float64),
            "gamma": 0.3 * torch.eye(4, dtype=torch.float64),
            "beta_reparam.lower_bound.bound": torch.tensor([1e-6], dtype=torch.float64),
            "gamma_reparam.lower_bound.bound": torch.tensor([0.0], dtype=torch.float64),
        }
        for name, value in expected.items():
            torch.testing.assert_close(state[name], (value + PEDESTAL).sqrt().to(dtype), rtol=1e-6, atol=0)
        assert torch.equal(layer.beta_reparam.pedestal, torch.tensor([PEDESTAL], dtype=dtype))
        nn.init.normal_(layer.gamma)
        layer.reset_parameters()
        assert torch.equal(layer.gamma, state["gamma"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reset_fills_what_was_made_on_meta(dtype):
    layer = dk.GDN(4, beta_min=0.01, device="meta", dtype=dtype).to_empty(device="cpu")
    for t in (*layer.parameters(), *layer.buffers()):
        t.detach().fill_(math.nan)  # fresh memory may be right by chance
    layer.reset_parameters()
    for name, value in dk.GDN(4, beta_min=0.01, dtype=dtype).state_dict().items():
        assert torch.equal(layer.state_dict()[name], value), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_parameters_compute_in_float32(dtype):
    layer = trained(dtype=torch.float32).to(dtype)
    x = torch.randn(2, 5, 6).to(dtype)
    exact = copy.deepcopy(layer).double()(x.double())
    y = layer(x)
    assert y.dtype == dtype
    assert ((y.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs()).all()
    y.sum().backward()
    assert layer.gamma.grad.dtype == dtype


def test_what_changes_y_in_place_behind_the_layer():
    """Is torch's error, but beside half types, whose y is not kept."""
    model, x = nn.Sequential(dk.GDN(4, backend="cpu"), nn.ReLU(inplace=True)), torch.randn(2, 4, 3)
    y = model(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    model.bfloat16()(x.bfloat16()).sum().backward()
    assert model[0].gamma.grad.any()


MODELS = {"plain": {}, "inverse": {"inverse": True}, "simplified": {"simplified": True}, "window": {"window": (3, 2)}}


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", MODELS)
def test_jit_trace_holds_for_other_sizes(name):
    layer, x = trained(dtype=torch.float32, **MODELS[name]).eval(), torch.randn(3, 5, 9, 4)
    traced = torch.jit.trace(layer, torch.randn(2, 5, 6, 7))
    close(traced(x), layer(x))
    assert not any("divnorm" in node.kind() for node in traced.inlined_graph.nodes())


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_with_a_window(dynamic):
    torch.compiler.reset()
    layer, x = trained(dtype=torch.float32, window=3), torch.randn(2, 5, 6, 7)
    close(torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="eager")(x), layer(x))


def test_exported_in_plain_operators_for_other_sizes():
    layer, x = trained(dtype=torch.float32, window=(3, 2)).eval(), torch.randn(3, 5, 9, 4)
    dim = torch.export.Dim
    dynamic = ({0: dim("n", min=1, max=64), 2: dim("h", min=3, max=64), 3: dim("w", min=3, max=64)},)
    program = torch.export.export(layer, (torch.randn(2, 5, 6, 7),), dynamic_shapes=dynamic)
    assert not any("divnorm" in str(node.target) for node in program.graph.nodes if node.op == "call_function")
    close(program.module()(x), layer(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "dynamo"), [*((name, False) for name in MODELS), ("inverse", True)])
def test_onnx(name, dynamo, capsys):
    layer, x, file = trained(dtype=torch.float32, **MODELS[name]).eval(), torch.randn(2, 5, 6, 7), io.BytesIO()
    with capsys.disabled():
        torch.onnx.export(layer, (x,), file, dynamo=dynamo, input_names=["x"], opset_version=18, verbose=False)
    (y,) = onnxruntime.InferenceSession(file.getvalue()).run(None, {"x": x.numpy()})
    close(torch.from_numpy(y), layer(x).detach())


def test_fx_takes_a_layer_for_one_node():
    layer, x = trained(), double(2, 5, 6)
    model = nn.Sequential(nn.Identity(), layer)
    graph = fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0", "1"]
    assert torch.equal(pickle.loads(pickle.dumps(graph))(x), model(x))
    assert torch.equal(fx.symbolic_trace(layer)(x), layer(x))


def test_compiled_with_its_parametrization():
    """Whose normalization is one node forward and one backward, for every size."""
    graphs = []

    def keep(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph)

    torch.compiler.reset()
    layer = trained()
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for shape in ((2, 5, 6), (3, 5, 4)):
        x, dy = double(*shape).requires_grad_(), double(*shape)
        wanted = [x, *layer.parameters()]
        for one, other in zip(
            torch.autograd.grad(compiled(x), wanted, dy), torch.autograd.grad(layer(x), wanted, dy), strict=True
        ):
            torch.testing.assert_close(one, other)
    for names, kind in zip(graphs, ("forward", "backward"), strict=True):
        assert [name for name in names if "divnorm" in name] == [f"divnorm_kernels.gdn_{kind}.default"]
        assert not any(word in name for name in names for word in ("mm", "einsum", "sqrt"))


def test_copies_and_words():
    layer = trained(inverse=True, window=3)
    x = double(2, 5, 6)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    assert layer.extra_repr() == "5, inverse=True, beta_min=0.001, window=3"
    assert dk.GDN(5).extra_repr() == "5"


BAD = {
    "channels": ({"in_channels": 0}, ValueError, "in_channels: got 0, expected a positive int"),
    "a float": ({"in_channels": 4.0}, TypeError, "in_channels: got 4.0 of type float"),
    "inverse": ({"inverse": 1}, TypeError, "inverse: got 1 of type int, expected a bool"),
    "simplified": ({"simplified": "no"}, TypeError, "simplified: got 'no'"),
    "beta_min": ({"beta_min": -1.0}, ValueError, "beta_min: got -1.0, expected a float of at least 0"),
    "gamma_init": ({"gamma_init": None}, TypeError, "gamma_init: got None"),
    "window": ({"window": -3}, ValueError, "window: got -3"),
    "backend": ({"backend": "gpu"}, ValueError, "backend: got 'gpu'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    options, error, message = BAD[name]
    with pytest.raises(error, match=f"^{message}"):
        dk.GDN(**{"in_channels": 4, **options})


def test_a_backend_is_checked_where_it_is_set():
    layer = dk.GDN(4, backend="cpu")
    layer.backend = "reference"
    assert layer.extra_repr() == "4, backend='reference'"
    with pytest.raises(ValueError, match=r"^backend: got 'gpu'"):
        layer.backend = "gpu"


def test_bad_input():
    layer = dk.GDN(4)
    with pytest.raises(ValueError, match=r"^x: got shape \(2, 3, 5\), expected \(N, 4, ...\)"):
        layer(torch.randn(2, 3, 5))
    with pytest.raises(TypeError, match=r"^x: got list, expected a Tensor"):
        layer([1.0])
    with pytest.raises(TypeError, match=r"^beta: got dtype torch.float32, expected torch.float64"):
        layer(torch.randn(2, 4, 5).double())
