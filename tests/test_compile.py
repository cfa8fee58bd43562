"""torch.compile: the kernels are what compiled models run, one node forward and one backward, whatever the layer."""

import operator
from contextlib import nullcontext

import emulated
import pytest
import torch
from caches import forget
from functorch.compile import make_boxed_func
from process import ROOT, run_python
from test_citizens import LAYERS
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

from divnorm_kernels import DivisiveNorm2d, divisive_norm, functional
from divnorm_kernels.backends import KERNELS, cuda, name_of, native, preference, select, triton

FORWARD = torch.ops.divnorm_kernels.forward.default
BACKWARD = torch.ops.divnorm_kernels.backward.default
LAYOUT = {"alias", "clone", "detach", "expand", "permute", "squeeze", "t", "transpose", "unsqueeze", "view"}
"""What may stand beside our nodes on tensors as large as x: views and copies, no arithmetic."""

FORMS = {
    "window": ((2, 4, 6, 5), {"window": 3}),
    "window per dimension": ((2, 4, 6, 5), {"window": (2, "all"), "norm_window": 4, "groups": 2, "edges": "zero"}),
    "larger than the image": ((2, 4, 3, 4), {"window": 11}),
    "mean only": ((2, 4, 9), {"window": 3, "norm_window": None}),
    "no mean": ((2, 2, 3, 4, 3), {"window": None, "norm_window": 2}),
    "features": ((4, 9), {"window": 4}),
    "whole": ((2, 4, 6, 5), {"window": "all", "groups": 2}),
    "over the batch": ((4, 4, 3, 3), {"window": "all", "groups": 4, "over_batch": True}),
    "with a ReLU": ((2, 4, 6, 5), {"window": 3, "activation": "relu"}),
    "with l1": ((2, 4, 6, 5), {"window": 3, "return_l1": True}),
    "with a learned sigma": ((2, 4, 6, 5), {"window": 3, "sigma": torch.tensor([0.5, 0.7]), "groups": 2}),
    "with a residual": ((2, 4, 6, 5), {"window": 3, "residual": torch.randn(2, 4, 6, 5)}),
    "with a residual and a threshold": (
        (2, 4, 6, 5),
        {"window": 3, "activation": "tlu", "residual": torch.randn(2, 4, 6, 5), "threshold": torch.randn(4)},
    ),
    "mean deviation": ((2, 4, 6, 5), {"window": 3, "p": 1, "return_l1": True}),
    "x kept": ((2, 4, 6, 5), {"window": "all", "p": 1, "subtract_mean": False}),
}


class Graphs:
    """A compiler that keeps what AOTAutograd hands on, and runs it as it stands."""

    def __init__(self):
        self.seen = []
        self.backend = aot_autograd(fw_compiler=self._keep, bw_compiler=self._keep)

    def _keep(self, graph, inputs):
        self.seen.append(graph)
        return make_boxed_func(graph.forward)

    def check(self, numel):
        """One node of ours in each direction; beside them nothing is computed on ``numel`` elements or more."""
        nodes = [node for graph in self.seen for node in graph.graph.nodes if node.op == "call_function"]
        ours = [node.target for node in nodes if node.target in (FORWARD, BACKWARD)]
        assert ours == [FORWARD, BACKWARD], [graph.graph for graph in self.seen]
        for node in nodes:
            value = node.meta.get("val")
            large = isinstance(value, torch.Tensor) and value.numel() >= numel
            name = getattr(node.target, "overloadpacket", node.target).__name__.lstrip("_")
            assert not large or node.target is operator.getitem or name in LAYOUT, f"{node.target} beside our nodes"


def outcome(function, x, parameters):
    """Results and gradients of all leaves, with a random upstream gradient."""
    x = x.clone().requires_grad_()
    out = function(x)
    out = out if isinstance(out, tuple) else (out,)
    torch.manual_seed(1)
    upstream = [torch.randn_like(t) for t in out]
    leaves = [x, *(p for p in parameters if p.requires_grad)]
    return [*out, *torch.autograd.grad(out, leaves, upstream)]


def compare(eager, compiled, x, parameters, dynamic):
    graphs = Graphs()
    torch.compiler.reset()
    function = torch.compile(compiled, fullgraph=True, dynamic=dynamic, backend=graphs.backend)
    for one, other in zip(outcome(eager, x, parameters[0]), outcome(function, x, parameters[1]), strict=True):
        assert torch.equal(one, other)
    graphs.check(x.numel())


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_one_node_each_way(name, dynamic):
    make, shape = LAYERS[name]
    eager, compiled = make(), make()
    compare(eager, compiled, torch.randn(shape), (list(eager.parameters()), list(compiled.parameters())), dynamic)
    for one, other in zip(eager.buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_a_call_is_one_node_each_way(name, dynamic):
    shape, options = FORMS[name]
    parameters = [torch.randn(shape[1], requires_grad=True) for _ in range(2)]
    tensors = {k: v.clone().requires_grad_() for k, v in options.items() if isinstance(v, torch.Tensor)}
    parameters += tensors.values()

    def call(x):
        return divisive_norm(x, *parameters[:2], **options | tensors)

    compare(call, call, torch.randn(shape), (parameters, parameters), dynamic)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("window", [3, "all"])
@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
def test_a_named_backend_is_what_runs(backend, window, dynamic, monkeypatch):
    """In eager and compiled alike: the module's own functions are called, or the compiled module with its plans."""
    x = torch.randn(2, 4, 5, 6, device=emulated.DEVICE if backend == "cuda" else "cpu")
    kernels, called = KERNELS[backend], []

    def spy(direction):
        function = getattr(kernels, direction)
        monkeypatch.setattr(kernels, direction, lambda *a, **k: (called.append(direction), function(*a, **k))[1])

    def call(x):
        return divisive_norm(x, window=window, backend=backend)

    for name in ("forward", "backward", "plan_for"):
        spy(name)
    before = native.module.operator_calls()
    with emulated.backend() if backend == "cuda" else nullcontext():
        forget()
        compare(call, call, x, ([], []), dynamic)
    by_operators = [after - b for after, b in zip(native.module.operator_calls(), before, strict=True)]
    for direction, calls in zip(("forward", "backward"), by_operators, strict=True):
        if backend == "triton":  # of Python's, twice
            assert called.count(direction) == 2
        else:  # compiled
            assert called.count(direction) + (calls if backend == "cpu" else 0) == 1
    assert "plan_for" in called  # eager


def test_new_sizes_compile_nothing_new():
    """After the first change of a size, which makes it dynamic."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = DivisiveNorm2d(4, 3)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for size in (8, 9, 12, 17, 31):
        x = torch.randn(2, 4, size, size + 1)
        torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count <= 2


def test_a_distributed_tensor_may_come_compiled_first():
    code = """
import torch
from hostile import distributed
from divnorm_kernels import divisive_norm
x = torch.randn(2, 3, 5, 4)
compiled = torch.compile(lambda x: divisive_norm(x, window=3), backend="aot_eager", fullgraph=True)
print(torch.equal(compiled(distributed(x)).full_tensor(), divisive_norm(x, window=3)))
"""
    assert run_python("-c", code, cwd=ROOT / "tests").strip() == "True"


def test_vmap_inside_compile_goes_through_the_reference():
    def call(x):
        return torch.func.vmap(lambda one: divisive_norm(one[None], window=3)[0])(x)

    x = torch.randn(3, 4, 5, 6)
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), call(x))


class Library:
    """As much of a module with CUDA kernels as the choice of a backend asks."""

    CudaCalls = object
    cuda_archs = "sm_90"
    cuda_most_positions = 1 << 30
    cuda_versions = staticmethod(lambda: (13000, 13000))


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(("window", "taken"), [(3, "cuda"), ("all", "triton")])
def test_a_gpu_is_chosen_for_without_being_traced(window, taken, monkeypatch):
    """Dynamo sees into neither the compiled module nor torch.cuda, and warns of caches. The GPU is a fake tensor's."""
    monkeypatch.setattr(cuda, "library", Library)
    monkeypatch.setattr(cuda, "missing", lambda: None)
    monkeypatch.setattr(cuda, "device_of", lambda index: emulated.HOPPER)
    monkeypatch.setattr(triton, "INTERPRETED", False)
    monkeypatch.setattr(preference, "arch", lambda index: "sm_90")
    chosen, graphs = [], []
    monkeypatch.setattr(functional, "select", lambda *a: (chosen.append(name_of(select(*a))), select(*a))[1])

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    with FakeTensorMode():
        x = torch.empty(2, 4, 5, 6, device="cuda")
        torch.compile(lambda x: divisive_norm(x, window=window), fullgraph=True, backend=keep)(x)
    nodes = [node.target for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert nodes.count(FORWARD.overloadpacket) == 1
    assert set(chosen) == {taken}


def test_layers_of_several_sigmas_in_one_graph_each():
    """A second value of a float makes the compiler take it for a variable."""
    torch.compiler.reset()
    x = torch.randn(2, 4, 5, 5)
    for sigma in (0.5, 1.5, 2.5):
        layer = DivisiveNorm2d(4, 3, sigma=sigma)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), layer(x))
