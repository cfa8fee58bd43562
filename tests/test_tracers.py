"""What records a call and runs it again: torch.jit.trace, ONNX by tracing, torch.fx. Right for other sizes too."""

import copy
import io
import pickle

import onnxruntime
import pytest
import torch
from test_citizens import LAYERS
from torch import fx, nn

import divnorm_kernels as dk
from divnorm_kernels import Span, divisive_norm

WINDOWED = {
    "window": (lambda: dk.DivisiveNorm2d(4, 3), (2, 4, 5, 6), (3, 4, 9, 4)),
    "larger than the example": (lambda: dk.DivisiveNorm2d(4, 9), (2, 4, 4, 3), (1, 4, 21, 13)),
    "divided by the window": (lambda: dk.DivisiveNorm1d(4, 6, edges="zero"), (2, 4, 5), (3, 4, 11)),
    "a dimension whole": (lambda: dk.DivisiveNorm2d(4, (3, "all"), groups=2), (2, 4, 5, 6), (2, 4, 6, 5)),
    "one position": (lambda: dk.DivisiveNorm2d(4, 3), (2, 4, 1, 1), (3, 4, 5, 4)),
    "whole": (lambda: dk.GroupNorm(2, 4), (2, 4, 5, 6), (3, 4, 9, 4)),
    "rows": (lambda: dk.LayerNorm(6), (2, 4, 6), (3, 5, 6)),
}
"""A layer, the example it is recorded with, and what the recording is run on."""


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_jit_trace_of_a_layer(name, grad):
    make, shape = LAYERS[name]
    layer = make().eval()
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(layer, torch.randn(shape))
    x = torch.randn(shape[0] + 2, *shape[1:])
    close(traced(x), layer(x))
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert not kinds & {"aten::empty_like", "prim::PythonOp"}, "what only the kernels wrote to"


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", WINDOWED)
def test_jit_trace_holds_for_other_sizes(name):
    make, example, shape = WINDOWED[name]
    layer = make()
    traced = torch.jit.trace(layer, torch.randn(example))
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    close(traced(x), y)
    close(torch.autograd.grad(traced(x).square().sum(), x)[0], torch.autograd.grad(y.square().sum(), x)[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WINDOWED)
def test_onnx_by_tracing_holds_for_other_sizes(name, capsys):
    make, example, shape = WINDOWED[name]
    layer, file = make().eval(), io.BytesIO()
    axes = {i: f"d{i}" for i, (one, other) in enumerate(zip(example, shape, strict=True)) if one != other}
    with capsys.disabled():
        torch.onnx.export(
            layer,
            (torch.randn(example),),
            file,
            dynamo=False,
            input_names=["x"],
            output_names=["y"],
            dynamic_axes={"x": axes, "y": axes},
            opset_version=17,
        )
    x = torch.randn(shape)
    (y,) = onnxruntime.InferenceSession(file.getvalue()).run(None, {"x": x.numpy()})
    close(torch.from_numpy(y), layer(x).detach())


@pytest.mark.parametrize(
    ("layer", "least"),
    [
        (dk.DivisiveNorm1d(2, 3), 3),
        (dk.DivisiveNorm1d(2, 5), 4),
        (dk.DivisiveNorm1d(2, 6), 4),
        (dk.DivisiveNorm1d(2, Span(4, 0)), 6),
        (dk.DivisiveNorm1d(2, Span(0, 4)), 5),
        (dk.DivisiveNorm1d(2, 3, 9), 6),
        (dk.GDN(2, window=5), 4),
    ],
    ids=str,
)
def test_least_extents_that_are_exported(layer, least):
    def exported(least):
        extent = torch.export.Dim("extent", min=least, max=64)
        return torch.export.export(layer, (torch.randn(1, 2, 16),), dynamic_shapes=({2: extent},)).module()

    program = exported(least)
    for extent in (least, 16, 64):
        x = torch.randn(1, 2, extent)
        close(program(x), layer(x))
    with pytest.raises(Exception, match=f"min={least}"):
        exported(least - 1)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_fx_takes_a_layer_for_one_node(name, training):
    make, shape = LAYERS[name]
    model = nn.Sequential(nn.Identity(), make()).train(training)
    graph = fx.symbolic_trace(model)
    graph.graph.lint()
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0", "1"]
    x = torch.randn(shape)
    assert torch.equal(graph(x), copy.deepcopy(model)(x))
    assert torch.equal(pickle.loads(pickle.dumps(graph)).eval()(x), model.eval()(x))


@pytest.mark.parametrize("name", LAYERS)
def test_fx_takes_a_layer_alone(name):
    make, shape = LAYERS[name]
    layer = make()
    graph = fx.symbolic_trace(layer)
    x = torch.randn(shape)
    assert torch.equal(graph(x), layer(x))
    assert [id(p) for p in graph.parameters()] == [id(p) for p in layer.parameters()]


def test_fx_records_the_function():
    graph = fx.symbolic_trace(lambda x, w: divisive_norm(x, w, window=3, activation="relu") * 2)
    x, weight = torch.randn(2, 4, 5, 6), torch.randn(4)
    assert torch.equal(graph(x, weight), divisive_norm(x, weight, window=3, activation="relu") * 2)


def test_features_are_extracted_by_the_names_of_modules():
    """As torchvision's create_feature_extractor does, whose tracer notes the module that each node comes from."""

    class Tracer(fx.Tracer):
        def __init__(self):
            super().__init__()
            self.nodes, self.path = {}, ""

        def call_module(self, m, forward, args, kwargs):
            outer, self.path = self.path, self.path_of_module(m)
            try:
                if not self.is_leaf_module(m, self.path):
                    return forward(*args, **kwargs)
                return self.create_proxy("call_module", self.path, args, kwargs)
            finally:
                self.path = outer

        def create_proxy(self, *args, **kwargs):
            proxy = super().create_proxy(*args, **kwargs)
            self.nodes[self.path] = proxy.node
            return proxy

    model = nn.Sequential(nn.Conv2d(3, 4, 3), dk.DivisiveNorm2d(4, 3, activation="relu"), dk.BatchNorm2d(4)).eval()
    tracer = Tracer()
    graph = tracer.trace(model)
    (output,) = (node for node in graph.nodes if node.op == "output")
    output.args = (tracer.nodes["1"],)
    extractor = fx.GraphModule(model, graph)
    extractor.graph.eliminate_dead_code()
    extractor.recompile()
    x = torch.randn(2, 3, 8, 9)
    assert torch.equal(extractor(x), model[:2](x))
