"""Parametrized weights: against numpy and torch's weight_norm, as checkpoints, compiled, copied and folded."""

import copy
import math

import pytest
import torch
import torch._dynamo.testing
import weights_oracle as oracle
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from divnorm_kernels.weights import fold, normalize

KINDS = [
    ("wn", {}),
    ("bwn", {}),
    ("bwn", {"p": 1}),
    ("bwn", {"p": math.inf}),
    ("bwn", {"shared": True}),
    ("bwn", {"shared": True, "p": 1}),
    ("ws", {"eps": 1e-3}),
    ("sws", {"gamma": "relu"}),
]
LAYERS = {
    "linear": (lambda **to: nn.Linear(5, 4, **to), lambda: torch.randn(2, 5)),
    "embedding": (lambda **to: nn.Embedding(7, 5, padding_idx=2, **to), lambda: torch.tensor([[1, 2, 6]])),
    "conv1d": (lambda **to: nn.Conv1d(4, 6, 3, groups=2, **to), lambda: torch.randn(2, 4, 7)),
    "conv2d": (lambda **to: nn.Conv2d(2, 4, 3, **to), lambda: torch.randn(2, 2, 5, 5)),
    "conv3d": (lambda **to: nn.Conv3d(2, 3, 2, **to), lambda: torch.randn(2, 2, 3, 3, 3)),
    "transposed1d": (lambda **to: nn.ConvTranspose1d(4, 6, 3, groups=2, **to), lambda: torch.randn(2, 4, 7)),
    "transposed2d": (lambda **to: nn.ConvTranspose2d(2, 4, 3, **to), lambda: torch.randn(2, 2, 5, 5)),
    "transposed3d": (lambda **to: nn.ConvTranspose3d(2, 3, 2, **to), lambda: torch.randn(2, 2, 3, 3, 3)),
}
kinds = pytest.mark.parametrize(("kind", "options"), KINDS, ids=str)


def originals(module):
    """Gains, where there are any, and v; the gains as numpy takes them."""
    held = module.parametrizations.weight
    return (None, held.original) if held.is_tensor else (held.original0, held.original1)


def expected(module, kind, options, dim, dw):
    """The weight and the gradients of gains and v, by numpy."""
    gain, v = originals(module)
    v, dw = v.detach().double().numpy(), dw.double().numpy()
    g = None if gain is None else gain.detach().double().numpy().reshape(-1)
    if kind in ("ws", "sws"):
        eps = options.get("eps", 1e-6)
        factor = 1.0 if kind == "ws" else math.sqrt(2 * math.pi / (math.pi - 1)) / math.sqrt(v.size / g.size)
        h = factor * (oracle.rows(v, dim)[:, 0] * 0 + 1 if g is None else g)
        dv, dh = oracle.standardized_gradients(v, h, eps, dw, dim)
        return oracle.standardized(v, h, eps, dim), dh * factor, dv
    p = options.get("p", 2)
    if kind == "wn":
        dv, dg = oracle.scaled_gradients(v, g, dw, dim)
        return oracle.scaled(v, g, dim), dg, dv
    rho = module.parametrizations.weight[0].rho.double().item()
    h = oracle.rows(v, dim)[:, 0] * 0 + rho if options.get("shared") else oracle.bounded(g, rho)
    dv, dh = oracle.scaled_gradients(v, h, dw, dim, p)
    return oracle.scaled(v, h, dim, p), None if g is None else oracle.bounded_gradient(g, rho, dh), dv


def moved(module):
    """Parameters off what they start from."""
    with torch.no_grad():
        for p in originals(module):
            if p is not None:
                p.add_(torch.rand_like(p) * 0.3)
    return module


@pytest.mark.parametrize(
    ("kind", "options", "dim"),
    [
        (kind, options, dim)
        for kind, options in KINDS
        for dim in (0, 1, None)
        if dim is not None or kind != "bwn" or "shared" in options
    ],
    ids=str,
)
def test_values_and_gradients_are_the_formulas(kind, options, dim):
    module = moved(normalize(nn.Conv2d(3, 4, (2, 3), dtype=torch.float64), kind, dim, **options))
    weight = module.weight
    dw = torch.randn_like(weight)
    weight.backward(dw)
    gain, v = originals(module)
    w, dgain, dv = expected(module, kind, options, dim, dw)
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(weight.detach(), torch.from_numpy(w), **close)
    torch.testing.assert_close(v.grad, torch.from_numpy(dv), **close)
    if gain is not None:
        torch.testing.assert_close(gain.grad.reshape(-1), torch.from_numpy(dgain), **close)


@kinds
def test_gradients_by_differences(kind, options):
    module = moved(normalize(nn.Linear(5, 3, dtype=torch.float64), kind, **options))
    parameters = [p.detach().requires_grad_() for p in originals(module) if p is not None]
    assert torch.autograd.gradcheck(module.parametrizations.weight[0], parameters)
    if options.get("p") != math.inf:
        assert torch.autograd.gradgradcheck(module.parametrizations.weight[0], parameters)


def test_the_gradient_of_ties_is_divided():
    module = normalize(nn.Linear(3, 1, bias=False, dtype=torch.float64), "bwn", shared=True, p=math.inf)
    with torch.no_grad():
        module.parametrizations.weight.original.copy_(torch.tensor([[2.0, -2.0, 1.0]]))
    module.weight[0, 2].backward()
    rho = module.parametrizations.weight[0].rho.item()
    wanted = rho / 2 * torch.tensor([[-0.25, 0.25, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(module.parametrizations.weight.original.grad, wanted)


@kinds
def test_what_it_starts_from(kind, options):
    plain = nn.Linear(50, 4, dtype=torch.float64)
    before = plain.weight.detach().clone()
    weight = normalize(plain, kind, **options).weight.detach()
    p = options.get("p", 2)
    if kind == "wn" or (kind == "bwn" and not options.get("shared")):
        torch.testing.assert_close(weight, before, rtol=1e-14, atol=0)
    elif kind == "bwn":
        wanted = before.norm(p, dim=1).mean().expand(4)
        torch.testing.assert_close(weight.norm(p, dim=1), wanted, rtol=1e-14, atol=0)
    else:
        std = 1.0 if kind == "ws" else math.sqrt(2 * math.pi / (math.pi - 1) / 50)
        var = before.var(1, correction=0)
        wanted = std * (var / (var + options.get("eps", 1e-6))).sqrt()
        torch.testing.assert_close(weight.std(1, correction=0), wanted)
        assert weight.mean(1).abs().max() < 1e-14


@kinds
@pytest.mark.parametrize("layer", LAYERS)
def test_layers(layer, kind, options):
    """Forward is the plain layer's with the parametrized weight, and every original learns."""
    make, inputs = LAYERS[layer]
    module, x = normalize(make(), kind, **options), inputs()
    before = module(x)
    before.backward(torch.randn_like(before))
    assert torch.isfinite(before).all()
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in module.parameters())
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    plain = make()
    plain.load_state_dict({"weight": module.weight, **{k: v for k, v in module.state_dict().items() if k == "bias"}})
    torch.testing.assert_close(module(x), plain(x))
    assert not torch.equal(module(x), before)


@kinds
def test_rows_of_zeros_stay_zeros(kind, options):
    """Also where torch's weight_norm gives NaN, as for the padding of an embedding."""
    module = nn.Linear(4, 3, bias=False, dtype=torch.float64)
    with torch.no_grad():
        module.weight[1] = 0
    module = normalize(module, kind, **options)
    held = module.parametrizations.weight
    assert module.weight[1].tolist() == [0] * 4
    dw = torch.randn(3, 4, dtype=torch.float64)
    module.weight.backward(dw)
    gain, v = originals(module)
    if kind in ("ws", "sws"):
        eps = options.get("eps", 1e-6)
        factor = 1.0 if kind == "ws" else held[0].gamma / 2
        wanted = factor / math.sqrt(eps) * (dw[1] - dw[1].mean())
    elif options.get("shared"):
        wanted = held[0].rho * dw[1]
    else:
        wanted = gain[1] * dw[1]  # a gain of zero
        assert gain.grad[1] == 0
    torch.testing.assert_close(v.grad[1], wanted.detach())


@pytest.mark.parametrize("dim", [0, 1, None])
def test_checkpoints_go_to_torchs_weight_norm_and_back(dim):
    ours, theirs = normalize(nn.Conv2d(3, 4, 3), "wn", dim), parametrizations.weight_norm(nn.Conv2d(3, 4, 3), dim=dim)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    moved(ours)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(theirs.weight, ours.weight)
    moved(theirs)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours.weight, theirs.weight)
    dw = torch.randn_like(ours.weight)
    for module in (ours, theirs):
        module.weight.backward(dw)
    for have, want in zip(originals(ours), originals(theirs), strict=True):
        torch.testing.assert_close(have.grad, want.grad)


def test_older_checkpoints_of_weight_norm():
    module = normalize(nn.Linear(3, 2), "wn")
    state = module.state_dict()
    old = {"bias": state["bias"], "weight_g": torch.tensor([[2.0], [3.0]]), "weight_v": torch.ones(2, 3)}
    module.load_state_dict(old)
    torch.testing.assert_close(module.weight.norm(dim=1), torch.tensor([2.0, 3.0]))


KEYS = {
    "wn": ["original0", "original1"],
    "bwn": ["original0", "original1", "0.rho"],
    "shared": ["original", "0.rho"],
    "ws": ["original"],
    "sws": ["original0", "original1"],
}


@kinds
def test_what_persists(kind, options, tmp_path):
    """The keys, and that with them another module has the same weight, also one that was made without memory."""
    module = moved(normalize(nn.Linear(5, 4), kind, **options))
    state = module.state_dict()
    keys = KEYS["shared" if options.get("shared") else kind]
    assert list(state) == ["bias", *(f"parametrizations.weight.{key}" for key in keys)]
    torch.save(state, tmp_path / "state.pt")
    other = normalize(nn.Linear(5, 4), kind, **options)
    bare = normalize(nn.Linear(5, 4, device="meta"), kind, **options)
    assert bare.weight.is_meta
    for restored in (other, bare.to_empty(device="cpu")):
        restored.load_state_dict(torch.load(tmp_path / "state.pt"))
        assert torch.equal(restored.weight, module.weight)


@kinds
def test_half_types_sum_in_float32(kind, options):
    """What is left is one rounding: 2^-8 for bfloat16, and float32's of sums of 5,000 terms beside it."""
    module = normalize(nn.Linear(5000, 3, dtype=torch.bfloat16), kind, **options)
    assert module.weight.dtype == torch.bfloat16
    w, _, _ = expected(module, kind, options, 0, torch.zeros_like(module.weight))
    torch.testing.assert_close(module.weight.double(), torch.from_numpy(w), rtol=2**-8 + 1e-4, atol=1e-6 * abs(w).max())
    module.weight.sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in originals(module) if p is not None)


def test_compiled_without_a_break():
    """All kinds, one graph."""
    model = nn.Sequential(*(moved(normalize(nn.Linear(5, 5), kind, **options)) for kind, options in KINDS))
    x = torch.randn(2, 5)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend=counter, fullgraph=True)
    for call in (model, compiled):
        call(x).square().sum().backward()
    assert counter.frame_count == 1
    torch.testing.assert_close(compiled(x), model(x))
    for have, want in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(have.grad, want.grad)


@kinds
def test_copies_go_on_alike(kind, options):
    """Of the module, and of the state of an optimizer."""
    module, x = normalize(nn.Linear(5, 4), kind, **options), torch.randn(2, 5)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)

    def step(module, optimizer):
        optimizer.zero_grad()
        module(x).square().sum().backward()
        optimizer.step()

    step(module, optimizer)
    twin = copy.deepcopy(module)
    another = torch.optim.Adam(twin.parameters(), lr=0.1)
    another.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch would share the state
    step(module, optimizer)
    assert not torch.equal(twin.weight, module.weight)
    step(twin, another)
    assert torch.equal(twin.weight, module.weight)


@pytest.mark.parametrize(("kind", "options"), [("ws", {}), ("bwn", {"shared": True})])
def test_an_optimizer_made_before_goes_on(kind, options):
    module = nn.Linear(5, 4)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    before = normalize(module, kind, **options).weight.detach().clone()
    module(torch.randn(2, 5)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(module.weight, before)


def test_recurrent_weights_and_assignment():
    module, x = normalize(nn.LSTM(3, 2), "wn", name="weight_hh_l0"), torch.randn(4, 1, 3)
    assert "parametrizations.weight_hh_l0.original0" in module.state_dict()
    wanted = torch.randn(8, 2)
    module.weight_hh_l0 = wanted
    torch.testing.assert_close(module.weight_hh_l0, wanted)
    module(x)[0].sum().backward()
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    before = module(x)[0].detach()
    torch.testing.assert_close(fold(module)(x)[0], before)
    assert not torch.allclose(module.weight_hh_l0, wanted)


@kinds
def test_folded(kind, options):
    """As torch does it; a copy without harm to the original, and frozen parameters stay parameters."""
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    plain, x = list(model.state_dict()), torch.randn(2, 5)
    for layer in (model[0], model[2]):
        moved(normalize(layer, kind, **options))
    theirs = copy.deepcopy(model)
    before = [model[i].weight.detach().clone() for i in (0, 2)]
    folded = fold(copy.deepcopy(model))
    assert sorted(folded.state_dict()) == sorted(plain)
    assert type(folded[0]) is nn.Linear
    torch.testing.assert_close(folded(x), model(x))
    model.requires_grad_(False)
    names = sorted(name for name, _ in fold(model).named_parameters())
    assert names == sorted(plain)
    assert not any(p.requires_grad for p in model.parameters())
    for index, value in zip((0, 2), before, strict=True):
        parametrize.remove_parametrizations(theirs[index], "weight", leave_parametrized=True)
        assert torch.equal(folded[index].weight, theirs[index].weight)
        assert torch.equal(folded[index].weight, value)
        assert torch.equal(model[index].weight, value)
        assert folded[index].weight.requires_grad


@pytest.mark.parametrize(("kind", "options"), [("ws", {}), ("bwn", {"shared": True})])
def test_a_weight_that_is_tied_to_a_folded_one_stays(kind, options):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    before, value = model[1].weight.detach().clone(), normalize(model[0], kind, **options).weight.detach()
    fold(model)
    assert torch.equal(model[1].weight, before)
    assert torch.equal(model[0].weight, value)
    assert not torch.equal(value, before)


def test_what_others_have_parametrized_is_folded_too():
    module = parametrizations.orthogonal(nn.Linear(4, 4), "weight")
    module.register_buffer("shift", torch.ones(2))
    parametrize.register_parametrization(module, "shift", nn.Softplus())
    weight, shift = module.weight.detach().clone(), module.shift.clone()
    fold(module)
    assert torch.equal(module.weight, weight)
    assert torch.equal(module.shift, shift)
    assert list(dict(module.named_buffers())) == ["shift"]
    assert fold(module) is module


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("linear", "wn"), {}, "module: got str, expected a torch.nn.Module"),
        ((nn.Linear(2, 2), "wm"), {}, "kind: got 'wm', expected one of 'wn', 'bwn', 'ws', 'sws'"),
        ((nn.Linear(2, 2), ["wn"]), {}, r"kind: got \['wn'\], expected one of 'wn', 'bwn', 'ws', 'sws'"),
        ((nn.Linear(2, 2), "wn"), {"p": 1}, "p: got 1 for 'wn', which has no such option"),
        ((nn.Linear(2, 2), "ws"), {"gamma": 1.0}, "gamma: got 1.0 for 'ws', which has no such option"),
        ((nn.Linear(2, 2), "bwn"), {"p": 3}, "p: got 3, expected 1, 2 or math.inf"),
        ((nn.Linear(2, 2), "bwn"), {"shared": 0}, "shared: got 0 of type int, expected a bool"),
        ((nn.Linear(2, 2), "bwn", None), {}, "dim: got None, expected a dimension or shared=True"),
        ((nn.Linear(2, 2), "ws"), {"eps": -1.0}, "eps: got -1.0, expected a number of at least 0"),
        ((nn.Linear(2, 2), "sws"), {"gamma": "gelu"}, "gamma: got 'gelu' of type str, expected a number or \"relu\""),
        ((nn.Linear(2, 2), "wn"), {"name": "scale"}, "name: got 'scale', expected a parameter of Linear"),
        ((nn.Linear(2, 2), "wn", -1), {}, r"dim: got -1, expected None or 0 to 1 for \(2, 2\)"),
        ((nn.Linear(2, 2), "wn", 0.0), {}, "dim: got 0.0 of type float, expected an int or None"),
        ((nn.LazyLinear(2), "wn"), {}, "module: got a LazyLinear without a size yet; run the model once"),
        ((nn.BatchNorm2d(2), "wn"), {}, r"module: got 'weight' of shape \(2,\), expected two dimensions or more"),
        (
            (nn.Linear(2, 2, dtype=torch.complex64), "wn"),
            {},
            "module: got 'weight' of torch.complex64, expected one of",
        ),
        (
            (parametrizations.orthogonal(nn.Linear(2, 2)), "wn"),
            {},
            "module: got one whose 'weight' is parametrized already, expected a plain parameter",
        ),
    ],
)
def test_bad_arguments(arguments, options, message):
    before = list(arguments[0].state_dict()) if isinstance(arguments[0], nn.Module) else None
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        normalize(*arguments, **options)
    assert before is None or before == list(arguments[0].state_dict())


def test_folding_what_is_no_module():
    with pytest.raises(TypeError, match=r"^model: got list, expected a torch\.nn\.Module"):
        fold([nn.Linear(2, 2)])
