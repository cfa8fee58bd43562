"""Norms held by projections: against numpy, over many steps, on and on after a resume, and how it is done."""

import copy
import math

import numpy as np
import pytest
import torch
from projected import Operations, arrays, network, norm
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from divnorm_kernels import GDN, DivisiveNormFeatures, LayerNorm, divisive_norm
from divnorm_kernels.weights import effective_rates, normalize, project

WEIGHTS = ["0.weight", "4.weight", "7.weight", "9.weight"]
NORMS = ["1", "5", "8"]


def step(model, optimizer, seed=0):
    """One step on random numbers."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    x, dy = (torch.randn(shape, generator=generator, dtype=dtype) for shape in ((4, 2, 5, 5), (4, 3)))
    optimizer.zero_grad()
    (model(x) * dy).sum().backward()
    optimizer.step()


def pair():
    """A network with SGD and the same without a projection to come."""
    torch.manual_seed(0)
    model = network(dtype=torch.float64)
    twin = copy.deepcopy(model)
    return model, torch.optim.SGD(model.parameters(), lr=0.1), twin, torch.optim.SGD(twin.parameters(), lr=0.1)


@pytest.mark.parametrize("dim", [None, 0, 1])
@pytest.mark.parametrize("to", ["initial", 1.0, 2])
def test_a_step_and_a_projection(to, dim):
    model, optimizer, twin, plain = pair()
    before = arrays(model)
    project(optimizer, model, to, dim=dim)
    step(model, optimizer)
    step(twin, plain)
    for name, w in arrays(twin).items():
        if name in WEIGHTS:
            w = w / norm(w, dim) * (norm(before[name], dim) if to == "initial" else to)
        torch.testing.assert_close(model.get_parameter(name).detach(), torch.from_numpy(w), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("affine", ["joint", 0.25])
def test_weight_and_bias_of_norms(affine):
    model, optimizer, twin, plain = pair()
    project(optimizer, model, affine=affine)
    step(model, optimizer)
    step(twin, plain)
    have, found = arrays(model), arrays(twin)
    for name in NORMS:
        w, b = found[f"{name}.weight"], found.get(f"{name}.bias", np.zeros(0))
        if affine == "joint":
            factor = math.sqrt(w.size) / math.sqrt((w**2).sum() + (b**2).sum())
            w, b = w * factor, b * factor
        else:
            w, b = w + affine * (1 - w), b - affine * b
        np.testing.assert_allclose(have[f"{name}.weight"], w, rtol=1e-10)
        if b.size:
            np.testing.assert_allclose(have[f"{name}.bias"], b, rtol=1e-10)
    for name in ("0.bias", "4.bias", "9.bias"):
        np.testing.assert_array_equal(have[name], found[name])


def test_affine_parameters_that_stay():
    """Skipped, not the optimizer's, frozen: "joint" leaves their pair alone, a rate these alone."""

    def start():
        model = nn.Sequential(nn.Linear(4, 4), *(nn.LayerNorm(4) for _ in range(4)))
        for layer in model[1:]:
            nn.init.constant_(layer.weight, 3.0)
            nn.init.constant_(layer.bias, 2.0)
        model[3].bias.requires_grad_(False)
        parameters = [p for p in model.parameters() if p is not model[2].bias]
        return model, torch.optim.SGD(parameters, lr=0.1)

    model, optimizer = start()
    project(optimizer, model, affine="joint", skip="1.bias").apply()
    for layer in model[1:4]:
        assert (layer.weight.tolist(), layer.bias.tolist()) == ([3.0] * 4, [2.0] * 4)
    torch.testing.assert_close(torch.cat([model[4].weight, model[4].bias]).norm().item(), 2.0)
    model, optimizer = start()
    project(optimizer, model, affine=0.5, skip=["1.bias", "4.weight"]).apply()
    assert [layer.weight[0].item() for layer in model[1:]] == [2.0, 2.0, 2.0, 3.0]
    assert [layer.bias[0].item() for layer in model[1:]] == [2.0, 2.0, 2.0, 1.0]


def test_biases_of_norms_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    nn.init.ones_(model[1].bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    project(optimizer, model, affine=0.5, skip="1.weight").apply()
    assert (model[1].weight[0].item(), model[1].bias[0].item()) == (1.0, 0.5)


@pytest.mark.parametrize("affine", ["joint", 0.5])
def test_norms_that_share_a_weight_scale_it_once(affine):
    model = nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4), nn.RMSNorm(4))
    model[2].weight = nn.init.constant_(model[1].weight, 3.0)
    project(torch.optim.SGD(model.parameters(), lr=0.1), model, affine=affine).apply()
    torch.testing.assert_close(model[1].weight[0].item(), 1.0 if affine == "joint" else 2.0)


@pytest.mark.parametrize(
    "skip", [lambda m: "9", lambda m: ["9.weight"], lambda m: "9*", lambda m: m[9], lambda m: iter([m[9], "9.bias"])]
)
def test_skipped(skip):
    """By a name, names, a pattern, a module, and of both."""
    model, optimizer, twin, plain = pair()
    project(optimizer, model, skip=skip(model))
    step(model, optimizer)
    step(twin, plain)
    assert torch.equal(model[9].weight, twin[9].weight)
    assert not torch.equal(model[7].weight, twin[7].weight)
    assert sorted(n for n, _ in model.named_buffers() if "initial" in n) == [
        f"{index}.weight_initial_norm" for index in (0, 4, 7)
    ]


def test_a_tied_weight_is_one_weight():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.Linear(4, 5, bias=False))
    model[2].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    projection = project(optimizer, model)
    assert [n for n, _ in model.named_buffers()] == ["0.weight_initial_norm", "1.weight_initial_norm"]
    projection.remove()
    project(optimizer, model, skip=model[2])
    assert [n for n, _ in model.named_buffers()] == ["1.weight_initial_norm"]


def test_what_is_no_weight():
    """Parametrized tensors, gamma of GDN, what the optimizer has not."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), GDN(4), normalize(nn.Conv2d(4, 4, 3), "wn"), nn.Conv2d(4, 4, 3))
    optimizer = torch.optim.SGD([p for m in model[:3] for p in m.parameters()], lr=0.1)
    project(optimizer, model)
    assert [n for n, _ in model.named_buffers() if "initial" in n] == ["0.weight_initial_norm"]


def run(model, optimizer, steps):
    for seed in steps:
        step(model, optimizer, seed)


@pytest.mark.parametrize("load_first", [False, True])
@pytest.mark.parametrize(("to", "dim"), [("initial", None), ("initial", 0), (1.0, 0)])
def test_a_resumed_run_is_the_run(to, dim, load_first, tmp_path):
    """To the bit, between two projections, from another start; with the optimizer's state loaded before or after."""
    options = {"every": 3, "dim": dim, "affine": "joint"}

    def start(seed):
        torch.manual_seed(seed)
        model = network()
        return model, torch.optim.Adam(model.parameters(), lr=0.1)

    model, optimizer = start(0)
    project(optimizer, model, to, **options)
    run(model, optimizer, range(5))
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "run.pt")
    run(model, optimizer, range(5, 9))

    resumed, other = start(1)
    state, optimizer_state = torch.load(tmp_path / "run.pt")
    if load_first:
        other.load_state_dict(optimizer_state)
    project(other, resumed, to, **options)
    resumed.load_state_dict(state)
    if not load_first:
        other.load_state_dict(optimizer_state)
    run(resumed, other, range(5, 9))
    assert resumed.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_norms_are_held_over_a_thousand_steps_and_a_resume():
    """Every norm to 1e-6, in float32; that of the output layer, which is skipped, grows."""

    def start(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 8), LayerNorm(8), nn.ReLU(), nn.Linear(8, 8), LayerNorm(8), nn.Linear(8, 3))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        project(optimizer, model, affine="joint", skip="5")
        return model, optimizer

    def run(model, optimizer, steps):
        for seed in steps:
            x, dy = torch.randn(11, 4, generator=torch.Generator().manual_seed(seed)).split([8, 3])
            optimizer.zero_grad()
            (model(x.T) * dy.T).sum().backward()
            optimizer.step()
            if seed % 50 == 0:
                check(model)

    def check(model):
        have = arrays(model)
        for name in ("0.weight", "3.weight"):
            np.testing.assert_allclose(norm(have[name]), initial[name], rtol=1e-6)
        for name in ("1", "4"):
            joint = math.hypot(norm(have[f"{name}.weight"]), norm(have[f"{name}.bias"]))
            np.testing.assert_allclose(joint, math.sqrt(8), rtol=1e-6)

    model, optimizer = start(0)
    initial = {name: norm(w) for name, w in arrays(model).items()}
    run(model, optimizer, range(700))
    assert norm(arrays(model)["5.weight"]) > 2 * initial["5.weight"]
    resumed, other = start(1)
    resumed.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    run(resumed, other, range(700, 1001))


def test_what_counts_operations_sees_a_value_being_read():
    with pytest.raises(AssertionError, match="_local_scalar_dense"), Operations():
        torch.ones(1).item()


@pytest.mark.parametrize(("to", "dim"), [("initial", None), (1.0, None), ("initial", 0)])
@pytest.mark.parametrize("affine", [None, "joint", 0.1])
def test_no_value_is_read_and_operations_do_not_grow_with_weights(to, dim, affine):
    """But for views, one norm a weight where they are of rows, and one stack a normalization layer."""
    each = {"aten::view", "aten::detach"} | ({"aten::linalg_vector_norm"} if dim == 0 else set())
    each |= {"aten::stack"} if affine == "joint" else set()
    counts = []
    for depth in (2, 5):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(depth)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        projection = project(optimizer, model, to, dim=dim, affine=affine)
        model(torch.randn(2, 4)).sum().backward()
        with Operations() as operations:
            projection(optimizer, (), {})
        counts.append([name for name in operations.names if name not in each])
    assert counts[0] == counts[1]
    assert all(name.startswith("aten::_foreach_") for name in counts[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("to", "dim", "affine"), [("initial", None, "joint"), (1.0, 0, 0.1)])
def test_nothing_waits_for_a_gpu(to, dim, affine):
    model = network(device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    projection = project(optimizer, model, to, dim=dim, affine=affine)
    torch.cuda.set_sync_debug_mode("error")
    try:
        projection.apply()
        effective_rates(model, optimizer)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if to == 1.0:
        torch.testing.assert_close(model[4].weight.norm(dim=1), torch.ones(8, device="cuda"))


def test_removed():
    """The optimizer steps without it, the model has its keys again, and the hook was one."""
    model, optimizer, twin, plain = pair()
    keys = list(model.state_dict())
    projection = project(optimizer, model, every=2)
    step(model, optimizer)
    assert len(optimizer._optimizer_step_post_hooks) == 1
    assert list(model.state_dict()) != keys
    projection.remove()
    assert not optimizer._optimizer_step_post_hooks
    assert list(model.state_dict()) == keys
    assert optimizer.state_dict().keys() == plain.state_dict().keys()
    assert optimizer.param_groups[0].keys() == plain.param_groups[0].keys()
    for seed in (0, 1):
        step(twin, plain, seed)
    step(model, optimizer, 1)
    assert torch.equal(model[0].weight, twin[0].weight)


def test_norms_that_a_model_has_already_are_kept():
    """Such as those of a copy, for another optimizer."""
    model, optimizer, _, _ = pair()
    project(optimizer, model)
    before = model[0].weight_initial_norm.clone()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].weight.mul_(3)
    project(torch.optim.SGD(twin.parameters(), lr=0.1), twin).apply()
    assert torch.equal(twin[0].weight_initial_norm, before)
    torch.testing.assert_close(twin[0].weight.norm(), before)


class _Products(TorchDispatchMode):
    """The types that products of half types are taken in."""

    def __init__(self):
        super().__init__()
        self.types = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name == "aten::_foreach_mul_" and args[0][0].dtype == torch.bfloat16:
            self.types += map(torch.result_type, *args)
        return function(*args, **(kwargs or {}))


def test_half_types_are_multiplied_by_an_unrounded_factor():
    """Halfway between two of bfloat16, where rounding it would cost 2^-8; that of 4,096 products is 2^-8 by chance."""
    model = nn.Linear(64, 64, dtype=torch.bfloat16)
    target = model.weight.double().norm().item() * (1.375 + 2**-8)
    projection = project(torch.optim.SGD(model.parameters(), lr=0.1), model, to=target)
    with _Products() as products:
        projection.apply()
    deviation = 2**-8 / 3**0.5 / 4096**0.5
    assert abs(model.weight.double().norm().item() / target - 1) < 6 * deviation
    assert products.types == [torch.float64]  # a CPU would not round a factor of no dimension, a GPU does


def test_zeros_stay_zeros():
    model = nn.Sequential(nn.Embedding(5, 4, padding_idx=1), nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    projection = project(optimizer, model, dim=0)
    projection.apply()
    projection.remove()
    project(optimizer, model, 1.0, dim=0).apply()
    assert model[0].weight[1].tolist() == [0] * 4
    torch.testing.assert_close(model[0].weight[[0, 2, 3, 4]].norm(dim=1), torch.ones(4))


def test_large_weights_on_a_cpu():
    """Where torch's sum in float32 would be off by more than the promise."""
    model = nn.Linear(2048, 1024, bias=False)
    weight = model.weight.detach()
    project(torch.optim.SGD(model.parameters(), lr=0.1), model, 1.0).apply()
    assert abs(weight.double().norm().item() - 1) < 1e-6


def test_a_step_that_a_scaler_leaves_out_projects_nothing():
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    project(optimizer, model, 1.0)
    before = model.weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.randn(2, 4)).sum() * math.inf).backward()
    scaler.step(optimizer)
    assert torch.equal(model.weight, before)


def test_sigma_by_the_scale_of_its_input():
    """DN_sigma(c z) = DN_(sigma/c)(z)."""
    z = torch.randn(3, 20, dtype=torch.float64)
    for c in (0.1, 10.0):
        torch.testing.assert_close(
            divisive_norm(c * z, window=5, sigma=0.7), divisive_norm(z, window=5, sigma=0.7 / c), rtol=1e-10, atol=1e-10
        )


@pytest.mark.parametrize("projected", [False, True])
def test_sigma_vanishes_where_weights_grow_and_stays_where_they_are_held(projected):
    """Its effect: how far y is from what sigma = 0 gives. Growing tenfold divides it by a hundred."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32, bias=False), DivisiveNormFeatures(32, 5, sigma=0.5))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    if projected:
        project(optimizer, model)

    def effect():
        z = model[0](torch.randn(64, 16, generator=torch.Generator().manual_seed(1))).detach()
        bare = divisive_norm(z, window=5, sigma=0.0)
        return ((divisive_norm(z, window=5, sigma=0.5) - bare).norm() / bare.norm()).item()

    start, size = effect(), model[0].weight.norm().item()
    for _ in range(200):
        optimizer.zero_grad()
        (model(torch.randn(8, 16)) * torch.randn(8, 32)).sum().backward()
        optimizer.step()
    if projected:
        assert 0.5 * start < effect() < 2 * start
    else:
        assert model[0].weight.norm() > 3 * size
        assert effect() < start / 5
