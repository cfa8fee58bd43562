"""Filter response, variance, L1 and top-k batch normalization, and what options and residuals mean to every layer."""

import copy
import io
import math

import pytest
import torch
from other_layers import EVERY
from torch import nn
from torch.nn import functional as F

import divnorm_kernels as dk
from divnorm_kernels import divisive_norm


def double(*shape):
    return torch.randn(shape, dtype=torch.float64)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("learn_eps", [False, True])
@pytest.mark.parametrize(("kind", "shape"), [("1d", (3, 4, 9)), ("2d", (3, 4, 5, 6)), ("3d", (2, 4, 3, 4, 5))])
def test_filter_response_normalization_is_the_papers(kind, shape, learn_eps):
    layer = getattr(dk, f"FilterResponseNorm{kind}")(4, eps=1e-2, learn_eps=learn_eps, dtype=torch.float64)
    assert set(layer.state_dict()) == {"weight", "bias", "threshold"} | ({"eps"} if learn_eps else set())
    for p in layer.parameters():
        nn.init.normal_(p)
    if learn_eps:
        layer.eps.data.fill_(-0.3)  # its size counts
    x = double(*shape).requires_grad_()
    eps = layer.eps.abs() if learn_eps else torch.tensor(1e-2, dtype=torch.float64)
    column = (-1, *[1] * (len(shape) - 2))
    weight, bias, threshold = (t.view(column) for t in (layer.weight, layer.bias, layer.threshold))
    mean = x.square().mean(tuple(range(2, len(shape))), keepdim=True)
    expected = torch.maximum(weight * x / (mean + eps).sqrt() + bias, threshold)
    y, dy = layer(x), double(*shape)
    close(y, expected)
    leaves = [x, *layer.parameters()]
    for got, want in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True):
        close(got, want)
    layer.reset_parameters()
    assert float(layer.eps.detach() if learn_eps else layer.eps) == pytest.approx(1e-2)
    assert layer.threshold.abs().max() == 0


def test_filter_response_normalization_by_its_options():
    assert dk.FilterResponseNorm2d(4).eps == pytest.approx(1e-6)
    assert dk.FilterResponseNorm2d(4, activation=None).threshold is None
    with pytest.raises(ValueError, match="learn_eps: got True beside sigma"):
        dk.FilterResponseNorm2d(4, learn_eps=True, learn_sigma=True)
    with pytest.raises(TypeError, match="cannot assign 'float' as parameter 'eps'"):
        dk.FilterResponseNorm2d(4, learn_eps=True).eps = 1.0
    layer = dk.FilterResponseNorm2d(4, learn_eps=True)
    twin = copy.deepcopy(layer).double()
    assert twin.eps.dtype == torch.float64
    assert twin.eps is dict(twin.named_parameters())["eps"]


@pytest.mark.parametrize(
    ("kind", "shape"), [("1d", (8, 4)), ("1d", (3, 4, 9)), ("2d", (3, 4, 5, 6)), ("3d", (2, 4, 3, 4, 5))]
)
def test_variance_normalization_is_batch_normalization_without_the_mean(kind, shape):
    layer = getattr(dk, f"VarianceNorm{kind}")(4, momentum=0.3, dtype=torch.float64)
    reference = getattr(nn, f"BatchNorm{kind}")(4, momentum=0.3, dtype=torch.float64)
    reference.load_state_dict(layer.state_dict())
    for step in range(2):
        x = double(*shape) * (step + 1) + 3
        dims = (0, *range(2, x.dim()))
        column = (-1, *[1] * (len(shape) - 2))
        y = layer(x)
        close(y, x / (x.var(dims, correction=0) + 1e-5).sqrt().view(column))
        reference(x)
    for name, buffer in reference.named_buffers():
        close(layer.state_dict()[name], buffer)
    layer.eval()
    close(layer(x), x / (layer.running_var + 1e-5).sqrt().view(column))
    wide = dk.VarianceNorm1d(4).half().eval()
    assert wide(torch.randn(3, 4).half()).dtype == torch.float16


def l1(x, eps):
    dims = (0, *range(2, x.dim()))
    v = x - x.mean(dims, keepdim=True)
    return v / (math.sqrt(math.pi / 2) * v.abs().mean(dims, keepdim=True) + eps)


def test_batch_normalization_with_p_1_is_l1_batch_normalization():
    layer = dk.BatchNorm2d(4, 0.1, p=1, momentum=0.3, dtype=torch.float64)
    assert layer.sigma == 0.1
    expected = torch.ones(4, dtype=torch.float64)
    for step in range(3):
        x = double(8, 4, 5, 6) * (step + 1) + 3
        close(layer(x), l1(x, 0.1))
        size = (x - x.mean((0, 2, 3), keepdim=True)).abs().mean((0, 2, 3))
        expected = 0.7 * expected + 0.3 * math.pi / 2 * size.square()
    close(layer.running_var, expected)
    layer.eval()
    deviation = expected.sqrt() + 0.1
    close(layer(x), (x - layer.running_mean.view(-1, 1, 1)) / deviation.view(-1, 1, 1))
    assert math.isnan(layer.eps), "what reads torch's attributes must not take it for batch normalization"


def test_eval_mode_rounds_once():
    """Of half types, a residual and an activation before the rounding of y."""
    layer = dk.BatchNorm2d(4, activation="silu").eval()
    layer.running_mean.normal_()
    x, residual = torch.randn(2, 3, 4, 9, 9).bfloat16()
    exact = copy.deepcopy(layer).double()(x.double(), residual.double())
    error = (layer(x, residual).double() - exact).abs()
    assert (error <= torch.finfo(torch.bfloat16).eps / 2 * exact.abs() + 1e-5).all()


@pytest.mark.parametrize("p", [1, 1.5, 3, math.inf])
def test_eval_mode_divides_by_what_training_did(p):
    """With a momentum of 1, on a batch whose variance is not corrected."""
    for make in (dk.BatchNorm2d, lambda *args, **kw: dk.InstanceNorm2d(*args, track_running_stats=True, **kw)):
        layer = make(4, p=p, momentum=1.0, sigma=0.5, learn_sigma=True, activation="silu", dtype=torch.float64)
        x = double(1, 4, 5, 6) * 3
        y = layer(x)
        close(layer.eval()(x), y)


def test_checkpoints_go_from_one_p_to_another():
    """On normal numbers, whose deviation both estimate."""
    one, two = dk.BatchNorm2d(3, p=1, momentum=1.0), dk.BatchNorm2d(3, momentum=1.0)
    x = torch.randn(64, 3, 32, 32) * 4 + 1
    for first, second in ((one, two), (two, one)):
        first(x)
        second.load_state_dict(first.state_dict())
        torch.testing.assert_close(second.eval()(x), first.eval()(x), rtol=1e-2, atol=1e-2)
        one.train(), two.train()


@pytest.mark.parametrize("k", [1, 3, 10, 10_000])
@pytest.mark.parametrize(
    ("kind", "shape"), [("1d", (8, 4)), ("1d", (3, 4, 9)), ("2d", (3, 4, 5, 6)), ("3d", (2, 4, 3, 4, 5))]
)
def test_top_k_batch_normalization_is_the_papers(kind, shape, k):
    layer = getattr(dk, f"TopKBatchNorm{kind}")(4, k, 0.1, momentum=1.0, l1_weight=1.0, dtype=torch.float64)
    x = double(*shape).requires_grad_()
    rows = x.transpose(0, 1).flatten(1)
    n = rows.shape[1]
    v = rows - rows.mean(1, keepdim=True)
    scale = (1 + math.sqrt(math.pi * math.log(4))) / (2 * math.sqrt(2 * math.log(n)))
    deviation = scale * v.abs().sort(1, descending=True).values[:, :k].mean(1)
    column = (-1, *[1] * (len(shape) - 2))
    centred = x - rows.mean(1).view(column)
    expected = centred / (deviation.view(column) + 0.1)
    y, dy = layer(x), double(*shape)
    close(y, expected)
    close(*(torch.autograd.grad(z, x, dy, retain_graph=True)[0] for z in (y, expected)))
    close(layer.l1, v.abs().mean())
    close(layer.running_var, deviation.square())
    close(layer.eval()(x), expected)
    assert layer.state_dict().keys() == nn.BatchNorm2d(4).state_dict().keys()


def test_top_k_batch_normalization_says_what_it_is_not():
    layer = dk.TopKBatchNorm2d(4, backend="cpu")
    with pytest.raises(RuntimeError, match="backend: got 'cpu', which cannot serve this call: it is plain PyTorch"):
        layer(torch.randn(2, 4, 3, 3))
    with pytest.raises(ValueError, match="k: got 0, expected a positive int"):
        dk.TopKBatchNorm2d(4, 0)


OPTIONS = (
    {"activation": "tlu"},
    {"activation": "silu"},
    {"activation": "tlu", "p": 1, "learn_sigma": True, "sigma": 0.7},
    {"activation": "gelu", "subtract_mean": False, "l1_weight": 0.1},
)


def settled(make, options):
    """The options that a layer leaves open."""
    return {name: value for name, value in options.items() if name not in make()._settled}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_residuals_and_thresholds_of_every_layer(name, options, training):
    """The same layer without them, and torch's functions behind it; with state_dict, repr, copies and a reset."""
    make, shape, column = EVERY[name]
    options = settled(make, options)
    layer = make(**options, dtype=torch.float64).train(training)
    plain = make(**{**options, "activation": None}, dtype=torch.float64).train(training)
    assert ("threshold" in layer.state_dict()) == (options["activation"] == "tlu")
    for p in layer.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    plain.load_state_dict({key: t for key, t in layer.state_dict().items() if key != "threshold"})
    x, residual = double(*shape).requires_grad_(), double(*shape).requires_grad_()
    y, expected = layer(x, residual), plain(x) + residual
    if options["activation"] == "tlu":
        assert layer.weight is None or layer.threshold.shape == layer.weight.shape
        tau = layer.threshold.view(column)
        expected = torch.maximum(expected, tau)
    else:
        expected = {"silu": F.silu, "gelu": F.gelu}[options["activation"]](expected)
    close(y, expected)
    dy = double(*shape)
    own = list(plain.parameters())
    paired = [p for key, p in layer.named_parameters() if key != "threshold"]
    got = torch.autograd.grad(y, [x, residual, *paired], dy)
    for g, w in zip(got, torch.autograd.grad(expected, [x, residual, *own], dy), strict=True):
        close(g, w)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    twin = eval(f"dk.{layer!r}", {"dk": dk, "Span": dk.Span}).double().train(training)
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert repr(twin) == repr(layer)
    close(twin(x, residual=residual), copy.deepcopy(layer)(x, residual))
    layer.reset_parameters()
    if options["activation"] == "tlu":
        assert layer.threshold.abs().max() == 0


@pytest.mark.parametrize("name", EVERY)
def test_a_residual_of_another_shape_is_refused_by_every_layer(name):
    make, shape, _ = EVERY[name]
    layer, x = make(), torch.randn(shape)
    for residual in (x[:1].expand_as(x)[..., :1], x.flatten()):
        with pytest.raises(ValueError, match=r"^residual: got shape"):
            layer(x, residual)
    with pytest.raises(TypeError, match=r"^residual: got dtype torch.float64, expected that of x, torch.float32"):
        layer(x, x.double())


def test_an_activation_that_is_set_brings_its_threshold_and_takes_it_along():
    layer = dk.DivisiveNorm2d(4, 3, dtype=torch.float64)
    layer.activation = "tlu"
    assert layer.threshold.dtype == torch.float64
    assert repr(layer) == repr(dk.DivisiveNorm2d(4, 3, activation="tlu"))
    x = double(2, 4, 5, 5)
    close(layer(x), divisive_norm(x, window=3).relu())
    layer.activation = "relu"
    assert layer.threshold is None
    assert "threshold" not in layer.state_dict()


def test_nested_tensors_take_no_residual():
    rows = torch.nested.nested_tensor([torch.randn(2, 6), torch.randn(3, 6)], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"^residual: got one beside an x that is nested"):
        dk.LayerNorm(6)(rows, rows)


def test_conversions_between_them_keep_what_they_are_made_of():
    learned = dk.FilterResponseNorm2d(4, 1e-3, learn_eps=True)
    with torch.no_grad():
        learned.eps.fill_(0.5)
    (again,) = dk.convert_norm(nn.Sequential(learned), "frn", inplace=False, report=None)
    assert again.learn_eps
    assert again.eps.item() == 0.5
    (plain,) = dk.convert_norm(nn.Sequential(dk.FilterResponseNorm2d(4, 1e-3)), "frn", report=None)
    assert math.isclose(plain.eps, 1e-3)
    with pytest.warns(UserWarning, match="learn_eps=True"):
        dk.convert_norm(nn.Sequential(learned), "dn", window=3, inplace=False, report=None)
    (made,) = dk.convert_norm(nn.Sequential(dk.BatchNorm2d(4)), "frn", learn_eps=True, report=None)
    assert (made.activation, made.learn_eps) == ("tlu", True)
    (top,) = dk.convert_norm(nn.Sequential(dk.TopKBatchNorm2d(4, 3)), dk.TopKBatchNorm2d, report=None)
    assert top.k == 3
    with pytest.warns(UserWarning, match="k=3"):
        (norm,) = dk.convert_norm(nn.Sequential(top), "ln", report=None)
    assert norm.p == 2


def test_a_learned_eps_in_a_replica():
    layer = dk.FilterResponseNorm2d(3, learn_eps=True)
    x = torch.randn(2, 3, 5, 5)
    replica = layer._replicate_for_data_parallel()
    for name in ("weight", "bias", "threshold", "eps"):
        setattr(replica, name, getattr(layer, name).detach().clone())
    torch.testing.assert_close(replica(x), layer(x))


def test_what_they_refuse():
    with pytest.raises(TypeError, match=r"^subtract_mean: got True, expected none"):
        dk.VarianceNorm2d(4, subtract_mean=True)
    with pytest.raises(TypeError, match=r"^p: got 2, expected none: TopKBatchNorm2d has its own"):
        dk.TopKBatchNorm2d(4, p=2)
    with pytest.raises(ValueError, match=r"^eps: got 0 beside learn_eps"):
        dk.FilterResponseNorm2d(4, 0.0, learn_eps=True)


def test_top_k_of_an_empty_batch():
    layer = dk.TopKBatchNorm2d(4, l1_weight=0.1)
    assert layer(torch.zeros(0, 4, 3, 3)).shape == (0, 4, 3, 3)
    assert layer.l1 == 0


def test_an_activation_that_is_set_is_of_the_layers_dtype():
    layer = dk.BatchNorm2d(4, affine=False).double()
    layer.activation = "tlu"
    assert layer.threshold.dtype == torch.float64


@pytest.mark.parametrize(
    "make",
    [
        lambda: dk.BatchNorm2d(3).eval(),
        lambda: dk.BatchNorm2d(3, activation="relu"),
        lambda: dk.TopKBatchNorm2d(3),
        lambda: dk.FilterResponseNorm2d(3),
        lambda: dk.GroupNorm(1, 3),
    ],
)
def test_freed_residuals_are_refused(make):
    x, residual = torch.randn(2, 2, 3, 5, 5)
    residual = residual.clone()
    residual.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"^residual: got a Tensor of shape .* whose storage holds 0 bytes"):
        make()(x, residual)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: dk.FilterResponseNorm2d(3, learn_eps=True), "eps"),
        (lambda: dk.TopKBatchNorm2d(3, learn_sigma=True), "sigma"),
        (lambda: dk.BatchNorm2d(3, learn_sigma=True).eval(), "sigma"),
    ],
)
def test_freed_scalars_are_refused(make, name):
    layer = make()
    getattr(layer, name).untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=rf"^{name}: got a (Tensor|Parameter) of shape .* whose storage holds 0 bytes"):
        layer(torch.randn(2, 3, 5, 5))
