"""What a caller puts between the statistics of whole fields and their use."""

import math
from collections import Counter

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import LAYOUTS, laid_out, recipes
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._python_dispatch import TorchDispatchMode

import divnorm_kernels as dk
from divnorm_kernels import divisive_norm
from divnorm_kernels.reference import divisive_norm as reference
from divnorm_kernels.seam import backends

WHOLE = {"window": "all", "norm_window": "same", "edges": "valid", "p": 2}
BATCH = {"window": "all", "over_batch": True, "groups": 3, "sigma": 0.5}


def double(*shape):
    return torch.randn(shape, dtype=torch.float64)


def as_they_are(mean, variance):
    return mean, variance


def mixed(prior):
    """Something that both statistics, and tensors of the caller's, come into twice."""

    def on_statistics(mean, variance):
        step = mean - prior[0]
        return mean - 0.1 * step + 0.01 * variance, 0.8 * variance + 0.2 * prior[1].exp() + 0.05 * step.square()

    return on_statistics


def between(*args, **keywords):
    """The operator by kernels, with a seam that changes nothing."""
    return divisive_norm(*args, on_statistics=as_they_are, backend="cpu", **keywords)


class Operators(TorchDispatchMode):
    """Counts this package's operators."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "divnorm_kernels":
            self.seen[function.__name__.partition(".")[0]] += 1
        return function(*args, **kwargs or {})


@given(recipes(extents={0: 300, 1: 90, 2: 20, 3: 7}))
def test_what_changes_nothing_changes_nothing(recipe):
    recipe.options.update(WHOLE)
    oracle.check(between, recipe.call())


@given(
    st.sampled_from([(3, 6, 5, 4), (2, 6, 40), (4, 6, 3, 2, 3), (5, 33), (1, 6, 1, 1), (2, 12, 70, 3)]),
    st.sampled_from((None, "relu", "tlu", "silu", "gelu", "gelu_tanh")),
    st.sampled_from(LAYOUTS),
    st.sampled_from((1, 2, 6)),
    st.sampled_from((0.5, "scalar", "per group")),
    *[st.booleans()] * 6,
)
def test_gradients_go_through_it(
    shape, activation, layout, groups, sigma, over_batch, subtract_mean, weight, bias, residual, with_l1
):
    groups = 1 if len(shape) == 2 else groups
    size = shape[1]
    x = laid_out(double(*shape) * 2 + 3, layout)
    if isinstance(sigma, str):
        sigma = torch.rand(() if sigma == "scalar" else (groups,), dtype=torch.float64) + 0.2
    rows = 1 if over_batch else shape[0], groups, *[1] * max(len(shape) - 2, 1)
    inputs = {
        "x": x,
        "weight": double(size) if weight else None,
        "bias": double(size) if bias else None,
        "sigma": sigma,
        "residual": double(*shape) if residual else None,
        "threshold": double(size) if activation == "tlu" else None,
    }
    options = {"groups": groups, "over_batch": over_batch, "activation": activation, "subtract_mean": subtract_mean}
    prior, dy = double(2, *rows), double(*shape)
    found = []
    for function in (divisive_norm, reference):
        own = {k: t.detach().requires_grad_() if isinstance(t, torch.Tensor) else t for k, t in inputs.items()}
        mine = prior.clone().requires_grad_()
        y, l1 = function(**own, window="all", on_statistics=mixed(mine), return_l1=True, **options)
        wanted = [mine, *(t for t in own.values() if isinstance(t, torch.Tensor))]
        loss = (y * dy).sum() + (3 * l1 if with_l1 else 0)
        found.append([y, l1, *torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * max(1.0, float(want.detach().abs().max())))


def test_each_half_is_one_call_of_a_kernel():
    x = torch.randn(4, 6, 5, 5, requires_grad=True)
    weight = torch.randn(6, requires_grad=True)
    with Operators() as operators:
        y = divisive_norm(x, weight, on_statistics=as_they_are, **BATCH)
        assert operators.seen == {"row_statistics": 1, "row_norm": 1}
        y.square().sum().backward()
    assert operators.seen == {"row_statistics": 1, "row_norm": 1, "row_sums": 1, "row_gradient": 1}


def test_which_kernels_run(monkeypatch):
    cpu, called = backends.KERNELS["cpu"], []
    for name in ("statistics", "normalize", "sums", "gradient"):
        kernel = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *a, name=name, kernel=kernel, **k: called.append(name) or kernel(*a, **k))
    x = torch.randn(4, 6, 5, 5, requires_grad=True)
    divisive_norm(x, on_statistics=as_they_are, **BATCH).sum().backward()
    assert called == ["statistics", "normalize", "sums", "gradient"]


@pytest.mark.parametrize("activation", [None, "relu"])
def test_nothing_of_the_size_of_x_is_kept_but_what_backward_reads(activation):
    x, residual = torch.randn(8, 6, 16, 16, requires_grad=True), torch.randn(8, 6, 16, 16)
    options = {"activation": activation, "residual": residual, "on_statistics": as_they_are}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        divisive_norm(x, torch.ones(6), **options, **BATCH)
    large = {t.data_ptr() for t in kept if t.untyped_storage().nbytes() >= x.numel()}
    assert large == ({x.data_ptr(), residual.data_ptr()} if activation else {x.data_ptr()})


def test_any_number_of_threads_gives_the_same_bits():
    x = torch.randn(16, 6, 33, 31)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        leaf = x.clone().requires_grad_()
        weight = torch.randn(6, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = divisive_norm(leaf, weight, on_statistics=as_they_are, **BATCH)
        y.square().sum().backward()
        results.append((y, leaf.grad, weight.grad))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dynamic", [False, True])
def test_it_traces(dynamic):
    prior = double(2, 1, 3, 1, 1).requires_grad_()
    torch.compiler.reset()
    graphs, made = [], 0

    def call(x, prior):
        return divisive_norm(x, activation="relu", on_statistics=mixed(prior), **BATCH)

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    compiled = torch.compile(call, backend=backend, fullgraph=True, dynamic=dynamic)
    for shape in ((4, 6, 5, 7), (2, 6, 8, 3))[: 1 + dynamic]:
        x = double(*shape).requires_grad_()
        dy = double(*shape)
        for got, want in zip(
            torch.autograd.grad(compiled(x, prior), (x, prior), dy),
            torch.autograd.grad(call(x, prior), (x, prior), dy),
            strict=True,
        ):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        made = made or len(graphs)
    assert len(graphs) == made
    named = [str(node.target) for node in graphs[-1].graph.nodes if "divnorm" in str(node.target)]
    assert [name.split(".")[1] for name in named] == ["row_statistics", "row_norm"]


def test_it_is_differentiable_twice():
    x, prior, weight = (t.requires_grad_() for t in (double(2, 4, 3), double(2, 1, 2, 1), double(4)))
    sigma, residual = torch.tensor([0.7, 0.9], dtype=torch.float64).requires_grad_(), double(2, 4, 3)

    def call(x, prior, weight, sigma, residual):
        options = {"groups": 2, "over_batch": True, "activation": "silu", "return_l1": True, "residual": residual}
        return divisive_norm(x, weight, window="all", sigma=sigma, on_statistics=mixed(prior), **options)

    inputs = x, prior, weight, sigma, residual.requires_grad_()
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_exported_it_is_plain_operators():
    class Layer(nn.Module):
        def forward(self, x):
            return divisive_norm(x, on_statistics=lambda mean, variance: (mean, 2 * variance), **BATCH)

    x = torch.randn(4, 6, 5, 5)
    exported = torch.export.export(Layer(), (x,))
    assert not [n for n in exported.graph.nodes if "divnorm" in str(n.target)]
    torch.testing.assert_close(exported.module()(x), Layer()(x))


def test_a_call_without_values():
    x = torch.empty(0, 6, 5, 5, requires_grad=True)
    weight = torch.ones(6, requires_grad=True)
    seen = []
    y = divisive_norm(x, weight, on_statistics=lambda *rows: seen.extend(rows) or rows, **BATCH)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert all(t.abs().max() == 0 for t in (*seen, weight.grad))


def test_a_penalty_without_values():
    prior, x = torch.zeros(1, 3, 1, 1, requires_grad=True), torch.empty(0, 6, 5, 5, requires_grad=True)
    y, l1 = divisive_norm(x, on_statistics=lambda m, v: (m + prior, v), return_l1=True, **BATCH)
    (y.sum() + 3 * l1).backward()
    assert torch.equal(prior.grad, torch.zeros_like(prior))


@pytest.mark.parametrize("inputs", ["residual", "weight", "x"])
def test_gradients_of_gradients_of_some_inputs(inputs):
    x, residual, weight = (t.requires_grad_(name in inputs) for name, t in _inputs().items())
    options = {"residual": residual, "activation": "silu", "return_l1": True, "on_statistics": as_they_are, **BATCH}
    (wanted,) = [t for t in (x, residual, weight) if t.requires_grad]
    found = []
    for function in (divisive_norm, reference):
        y, l1 = function(x, weight, **options)
        (first,) = torch.autograd.grad(y.square().sum() + l1, wanted, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), wanted)
        found.append((first, second))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def _inputs():
    return {"x": double(4, 6, 5, 5), "residual": double(4, 6, 5, 5), "weight": double(6)}


def test_the_statistics_alone_have_gradients_too():
    x = double(4, 6, 5, 5).requires_grad_()
    seen = []
    divisive_norm(x, on_statistics=lambda *rows: seen.extend(rows) or rows, **BATCH)
    (dx,) = torch.autograd.grad((seen[0] * seen[1]).sum(), x)
    rows = x.unflatten(1, (3, 2))
    variance, mean = torch.var_mean(rows, (0, 2, 3, 4), correction=0)
    torch.testing.assert_close(dx, torch.autograd.grad((variance * mean).sum(), x)[0], rtol=1e-12, atol=1e-14)
    assert not dx.requires_grad


def test_a_variance_without_end_lets_nothing_back():
    x = (torch.randn(4, 6, 5, 5) * 1e20).requires_grad_()
    y = divisive_norm(x, on_statistics=as_they_are, **BATCH)
    y.backward(torch.ones_like(y) * torch.arange(5.0))
    assert x.grad.abs().max() == 0


def test_it_may_change_them_in_place():
    x = double(4, 6, 5, 5).requires_grad_()
    y = divisive_norm(x, on_statistics=lambda m, v: (m.mul_(0.5), v.add_(1)), **BATCH)
    torch.testing.assert_close(y, reference(x, on_statistics=lambda m, v: (m * 0.5, v + 1), **BATCH))


def test_a_sparse_gradient():
    x = torch.randn(4, 6, 5, 5, requires_grad=True)
    y = divisive_norm(x, on_statistics=as_they_are, **BATCH)
    y.backward(torch.ones_like(y).to_sparse())
    dense = torch.autograd.grad(divisive_norm(x, on_statistics=as_they_are, **BATCH).sum(), x)[0]
    assert torch.equal(x.grad, dense)


def freed(like):
    t = torch.ones_like(like).detach()
    t.untyped_storage().resize_(0)
    return t


@pytest.mark.parametrize(
    ("which", "backend"), [("dy", "cpu"), ("mean", "cpu"), ("dmean", "cpu"), ("dl1", "cpu"), ("dy", "reference")]
)
def test_freed_storage_is_not_read(which, backend):
    x, seen = torch.randn(4, 6, 5, 5, requires_grad=True), []

    def between(mean, variance):
        seen.append(mean)
        return freed(mean) if which == "mean" else mean, variance

    def call():
        y, l1 = divisive_norm(x, on_statistics=between, return_l1=True, backend=backend, **BATCH)
        of = {"dy": y, "dmean": seen[0], "dl1": l1}[which]
        of.backward(freed(of))

    with pytest.raises(ValueError, match=rf"^{which}: got a Tensor of shape .* whose storage holds 0 bytes"):
        call()


def test_what_is_not_finite_stays_in_its_row():
    x = torch.randn(4, 6, 5, 5)
    clean = x.clone().requires_grad_()
    x[1, 2, 3, 3] = math.inf
    x.requires_grad_()
    for t in (x, clean):
        divisive_norm(t, on_statistics=as_they_are, **BATCH).square().sum().backward()
    assert x.grad[:, 2:4].isnan().all()
    assert torch.equal(x.grad[:, [0, 1, 4, 5]], clean.grad[:, [0, 1, 4, 5]])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"on_statistics": 3}, TypeError, "on_statistics: got int, expected a callable or None"),
        ({"window": 3}, ValueError, "on_statistics: got a callable with window=3"),
        ({"norm_window": None}, ValueError, "expected fields that are whole and both there, with p=2"),
        ({"window": None, "norm_window": "all"}, ValueError, "expected fields that are whole and both there"),
        ({"p": 1}, ValueError, "p=1, expected fields that are whole and both there, with p=2"),
        ({"on_statistics": lambda m, v: m}, TypeError, "on_statistics: gave Tensor, expected a tuple of mean and"),
        ({"on_statistics": lambda m, v: (m, 1.0)}, TypeError, "gave float for the variance, expected a Tensor"),
        ({"on_statistics": lambda m, v: (m[0], v)}, ValueError, r"gave a mean of shape \(3, 1, 1\), expected \(1, 3"),
        ({"on_statistics": lambda m, v: (m.half(), v)}, TypeError, "gave a mean of torch.float16 on cpu, expected"),
        ({"weight": torch.ones(5)}, ValueError, r"weight: got shape \(5,\), expected \(6,\)"),
    ],
)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        divisive_norm(torch.randn(4, 6, 5, 5), **{"on_statistics": as_they_are, **BATCH, **options})


def test_synchronized_statistics_take_one_collective_each_way(monkeypatch, tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    seen = Counter()
    for name in ("all_gather", "all_reduce"):
        call = getattr(torch.distributed, name)

        def counted(*args, name=name, call=call, **keywords):
            seen[name] += 1
            return call(*args, **keywords)

        monkeypatch.setattr(torch.distributed, name, counted)
    try:
        layer = dk.convert_sync(dk.BatchNorm2d(6, activation="relu"))
        x = torch.randn(4, 6, 5, 5, requires_grad=True)
        with Operators() as operators:
            y = layer(x)
            assert seen == {"all_gather": 1}
            y.sum().backward()
        assert seen == {"all_gather": 1, "all_reduce": 1}
        assert operators.seen == {"row_statistics": 1, "row_norm": 1, "row_sums": 1, "row_gradient": 1}
    finally:
        torch.distributed.destroy_process_group()
