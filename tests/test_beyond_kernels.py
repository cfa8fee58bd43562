"""What no kernel computes: which backend says so, who computes it in its place, and how tracers see it."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import divnorm_kernels as dk
from divnorm_kernels import Span, divisive_norm
from divnorm_kernels.backends import KERNELS, cpu, select, without_kernels
from divnorm_kernels.fields import geometry
from divnorm_kernels.norm import Norm
from divnorm_kernels.prepared import nothing, prepared

X, RESIDUAL, THRESHOLD = torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8), torch.randn(4)
BEYOND = {"p=1.5": {"p": 1.5}, "p=inf": {"p": math.inf}}
FAMILY = BEYOND | {
    "p=1": {"p": 1},
    "subtract_mean=False": {"subtract_mean": False},
    "a residual": {"residual": RESIDUAL},
    "activation='tlu'": {"activation": "tlu", "threshold": THRESHOLD},
}
"""What stands behind and inside the norm, with or without kernels for it."""


@pytest.mark.parametrize("name", BEYOND)
def test_a_named_kernel_backend_says_what_it_has_not(name):
    for backend in KERNELS:
        with pytest.raises(RuntimeError, match=f"^backend: got '{backend}', which cannot serve this call: {name}: ker"):
            divisive_norm(X, window=3, backend=backend, **BEYOND[name])
    plain = divisive_norm(X, window=3, backend="reference", **BEYOND[name])
    torch.testing.assert_close(divisive_norm(X, window=3, **BEYOND[name]), plain)


@pytest.mark.parametrize("name", BEYOND)
def test_no_kernel_sees_the_call(name, monkeypatch):
    """Neither directly nor by a prepared call, behind one that kernels served."""
    divisive_norm(X, window=3, activation="relu")
    divisive_norm(X, window=3)

    def refused(*args, **kwargs):
        raise AssertionError("a kernel was called")

    monkeypatch.setattr(cpu, "forward", refused)
    monkeypatch.setattr(cpu, "plan_for", refused)
    x = X.clone().requires_grad_()
    y = divisive_norm(x, window=3, **BEYOND[name])
    assert not y.grad_fn.name().startswith(("PreparedFunction", "DivisiveNormFunction"))
    torch.autograd.grad(y.sum(), x)


def test_one_place_says_what_kernels_serve():
    norm = Norm(3, p=3)
    assert without_kernels(norm) == "p=3: kernels compute 1 and 2"
    assert prepared(norm, None) is nothing
    assert select(None, geometry(norm, (2, 4, 9, 8)), X) is None
    for norm in (Norm(Span(2, 0), p=2.0, activation="relu"), Norm(3, p=1, subtract_mean=False, activation="tlu")):
        assert without_kernels(norm) is None
        assert prepared(norm, None) is not nothing
        assert select(None, geometry(norm, (2, 4, 9, 8)), X) is cpu


def test_the_raw_operators_refuse_it():
    arguments = (X, None, None, None, 1.0)
    for backend, message in ((None, "the operators run kernels only"), ("cpu", "p=3: kernels compute 1 and 2")):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.divnorm_kernels.forward(*arguments, Norm(3, p=3).text, False, False, backend)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", FAMILY)
def test_compiled(name, dynamic):
    """Forward and backward, whole graphs; with a window that the compiled code makes."""

    def call(x, residual, threshold):
        options = {**FAMILY[name], "window": (Span(2, 0), 3)}
        options |= {"residual": residual} if "residual" in options else {}
        options |= {"threshold": threshold} if "threshold" in options else {}
        return divisive_norm(x, **options)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    leaves = [t.clone().requires_grad_() for t in (X, RESIDUAL, THRESHOLD)]
    found, expected = compiled(*leaves), call(*leaves)
    torch.testing.assert_close(found, expected)
    for f, e in zip(*(torch.autograd.grad(y.sum(), leaves, allow_unused=True) for y in (found, expected)), strict=True):
        assert (f is None) == (e is None)
        if e is not None:
            torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamic", [False, True, None])
def test_spans_and_exponents_that_a_compiler_takes_for_variables(dynamic):
    def call(x, p, before, after):
        return divisive_norm(x, window=(Span(before, after), 3), p=p)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for arguments in ((2, 2, 0), (2.0, 1, 3), (2, 0, 4), (1.5, 1, 1)):
        torch.testing.assert_close(compiled(X, *arguments), call(X, *arguments))


def test_a_span_is_one_node_of_a_compiled_graph():
    torch._dynamo.reset()
    graphs = []

    def kept(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compile(lambda x: divisive_norm(x, window=Span(2, 0)), backend=kept, fullgraph=True)(X)
    calls = [str(node.target) for node in graphs[0].graph.nodes if node.op.startswith("call")]
    assert calls.count("divnorm_kernels.forward") == 1
    assert not any("unfold" in call or "pad" in call for call in calls)


class Both(nn.Module):
    """Layers of both kinds that no kernel computes."""

    def __init__(self):
        super().__init__()
        self.windows = dk.DivisiveNorm2d(4, Span(2, 0), p=1.5, activation="tlu")
        self.running = dk.BatchNorm2d(4, p=1.5, activation="silu")

    def forward(self, x, residual):
        """Each with a residual."""
        return self.running(self.windows(x, residual), residual)


def test_layers_are_compiled_exported_traced_and_recorded():
    model = Both()
    expected = model(X, RESIDUAL)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(X, RESIDUAL), expected)
    model.eval()
    torch.testing.assert_close(torch.export.export(model, (X, RESIDUAL)).module()(X, RESIDUAL), model(X, RESIDUAL))
    recorded = torch.fx.symbolic_trace(model)
    assert [node.target for node in recorded.graph.nodes if node.op == "call_module"] == ["windows", "running"]
    assert torch.equal(recorded(X, RESIDUAL), model(X, RESIDUAL))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, (X, RESIDUAL))
    others = torch.randn(3, 4, 11, 7), torch.randn(3, 4, 11, 7)
    torch.testing.assert_close(traced(*others), model(*others))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("window", [3, "all", Span(3, 0), (Span(0, 2), "all")], ids=str)
@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
def test_traces_hold_for_other_sizes(p, window):
    def call(x, residual, threshold):
        return divisive_norm(x, window=window, p=p, residual=residual, activation="tlu", threshold=threshold)

    traced = torch.jit.trace(call, (X, RESIDUAL, THRESHOLD))
    others = torch.randn(3, 4, 11, 7), torch.randn(3, 4, 11, 7), torch.randn(4)
    torch.testing.assert_close(traced(*others), call(*others))


def behind(x, residual, threshold):
    return divisive_norm(x, window=3, p=1.5, residual=residual, activation="tlu", threshold=threshold)


def test_torch_func():
    expected = behind(X, RESIDUAL, THRESHOLD)
    each = torch.func.vmap(behind, (0, 0, None))(X[:, None], RESIDUAL[:, None], THRESHOLD)
    torch.testing.assert_close(each[:, 0], expected)
    thresholds = torch.stack([THRESHOLD, THRESHOLD + 1])
    each = torch.func.vmap(behind, (None, None, 0))(X, RESIDUAL, thresholds)
    torch.testing.assert_close(each[1], behind(X, RESIDUAL, thresholds[1]))
    gradients = torch.func.grad(lambda *args: behind(*args).sum(), (0, 1, 2))(X, RESIDUAL, THRESHOLD)
    leaves = [t.clone().requires_grad_() for t in (X, RESIDUAL, THRESHOLD)]
    for found, want in zip(gradients, torch.autograd.grad(behind(*leaves).sum(), leaves), strict=True):
        torch.testing.assert_close(found, want)
    # a residual alone sends the call of a kernel's norm past the kernels too
    passed = torch.func.grad(lambda r: divisive_norm(X, window=3, residual=r, activation="relu").sum())(RESIDUAL)
    assert torch.equal(passed, (divisive_norm(X, window=3, backend="reference") + RESIDUAL > 0).float())


def test_forward_mode():
    tensors = [t.double() for t in (X, RESIDUAL, THRESHOLD)]
    tangents = [torch.randn_like(t) for t in tensors]
    with forward_ad.dual_level():
        y = behind(*(forward_ad.make_dual(t, v) for t, v in zip(tensors, tangents, strict=True)))
        tangent = forward_ad.unpack_dual(y).tangent
    step = 1e-6
    above, below = (behind(*(t + s * v for t, v in zip(tensors, tangents, strict=True))) for s in (step, -step))
    torch.testing.assert_close(tangent, (above - below) / (2 * step), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_torch_function_is_asked_by_every_tensor(which):
    seen = []

    class Asked(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    tensors = [X, RESIDUAL, THRESHOLD]
    tensors[which] = tensors[which].as_subclass(Asked)
    y = behind(*tensors)
    assert seen[0] is divisive_norm
    torch.testing.assert_close(y.as_subclass(torch.Tensor), behind(X, RESIDUAL, THRESHOLD))


def test_freed_tensors_are_refused():
    for name in ("residual", "threshold"):
        tensors = {"residual": RESIDUAL.clone(), "threshold": THRESHOLD.clone()}
        tensors[name].untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=rf"^{name}: got a Tensor of shape .* whose storage holds 0 bytes"):
            divisive_norm(X, window=3, activation="tlu", **tensors)


@pytest.mark.parametrize("name", FAMILY)
def test_empty_tensors(name):
    for shape in ((0, 4, 9, 8), (2, 4, 0, 8)):
        x = torch.empty(shape, requires_grad=True)
        options = {**FAMILY[name]}
        if "residual" in options:
            options["residual"] = torch.empty(shape)
        for over_batch in (False, True):
            y, l1 = divisive_norm(x, window=3, over_batch=over_batch, return_l1=True, **options)
            assert y.shape == shape
            assert l1 == 0
            assert torch.autograd.grad(y.sum() + l1, x)[0].shape == shape
