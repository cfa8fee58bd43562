"""The layers of Kalman normalization against numpy, gradients and running averages too."""

import pickle

import kalman_oracle as oracle
import numpy as np
import pytest
import torch
from hostile import freed
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from divnorm_kernels import KalmanNorm1d, KalmanNorm2d, KalmanNorm3d, KalmanState

C = 3
CASES = {
    "features": (KalmanNorm1d, (5, C)),
    "1d": (KalmanNorm1d, (2, C, 7)),
    "2d": (KalmanNorm2d, (2, C, 4, 5)),
    "3d": (KalmanNorm3d, (1, C, 2, 3, 4)),
}


def close(found, expected, tolerance=1e-10):
    expected = torch.as_tensor(np.asarray(expected), dtype=torch.float64)
    torch.testing.assert_close(found.detach().double(), expected, rtol=tolerance, atol=tolerance)


def drawn(name, p=0.9, dtype=torch.float64, **options):
    """A layer with random parameters, an x, and a prior not far from it."""
    kind, shape = CASES[name]
    layer = kind(C, p, dtype=torch.float64, **options)
    for t in (layer.weight, layer.bias):
        if t is not None:
            nn.init.uniform_(t, 0.5, 2.0)
    x = (torch.randn(shape, dtype=torch.float64) * torch.rand(C, *[1] * (len(shape) - 2)).add(0.5) + 2).to(dtype)
    prior = KalmanState(torch.randn(C, dtype=torch.float64) + 2, torch.rand(C, dtype=torch.float64) + 0.3)
    return layer, x.requires_grad_(), KalmanState(*(t.requires_grad_() for t in prior))


def arrays(*tensors):
    return [None if t is None else t.detach().double().numpy().copy() for t in tensors]


@pytest.mark.parametrize("p", [0.0, 0.05, 0.9, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_the_formulas(name, p):
    layer, x, prior = drawn(name, p)
    y, state = layer(x, prior)
    given = arrays(x)[0], arrays(*prior), p, layer.eps
    expected, of_state = oracle.forward(*given, *arrays(layer.weight, layer.bias))
    close(y, expected)
    for found, wanted in zip(state, of_state, strict=True):
        close(found, wanted)
    upstream = [torch.randn_like(t) for t in (y, *state)]
    inputs = [x, layer.weight, layer.bias, *prior]
    gradients = torch.autograd.grad([y, *state], inputs, upstream)
    for found, wanted in zip(gradients, oracle.backward(*given, *arrays(layer.weight, *upstream)), strict=True):
        close(found, wanted)


@pytest.mark.parametrize("affine", [True, False])
def test_gradients_are_the_differences(affine):
    layer, x, prior = drawn("2d", affine=affine, track_running_stats=False)
    x = x[:, :, :2, :2].detach().requires_grad_()

    def call(x, mean, variance):
        y, state = layer(x, (mean, variance))
        return y, *state

    assert torch.autograd.gradcheck(call, (x, *prior))
    assert torch.autograd.gradgradcheck(call, (x, *prior), fast_mode=True)


@pytest.mark.parametrize("name", CASES)
def test_without_a_prior_it_is_batch_normalization(name):
    layer, x, _ = drawn(name)
    y, state = layer(x)
    expected = nn.functional.batch_norm(x, None, None, layer.weight, layer.bias, True)
    close(y, expected.detach())
    for found, wanted in zip(state, oracle.posterior(*arrays(x, None), 0.9), strict=True):
        close(found, wanted)
    dy = torch.randn_like(y)
    for found, wanted in zip(
        *(torch.autograd.grad(t, [x, layer.weight, layer.bias], dy) for t in (y, expected)), strict=True
    ):
        close(found, wanted.detach())


@pytest.mark.parametrize(("ratio", "counts"), [(99.9, True), (100.1, False)])
def test_a_prior_of_far_larger_variances_does_not_count(ratio, counts):
    """By the mean over the channels: single ones may be larger."""
    layer, x, prior = drawn("2d")
    spread = torch.tensor([0.1, 0.4, 2.5], dtype=torch.float64)
    variance = (ratio * spread * torch.as_tensor(oracle.channels(x.detach().numpy()).var(1))).requires_grad_()
    y, state = layer(x, (prior.mean, variance))
    given = arrays(x)[0], arrays(prior.mean, variance), 0.9, layer.eps
    assert oracle.counts(*given[:2]) == counts
    close(y, oracle.forward(*given, *arrays(layer.weight, layer.bias))[0])
    upstream = [torch.randn_like(t) for t in (y, *state)]
    gradients = torch.autograd.grad([y, *state], [x, layer.weight, layer.bias, prior.mean, variance], upstream)
    for found, wanted in zip(gradients, oracle.backward(*given, *arrays(layer.weight, *upstream)), strict=True):
        close(found, wanted)


@pytest.mark.parametrize("prior_variance", [0.0, 0.5])
def test_one_constant_channel_makes_the_layer_go_by_the_batch_alone(prior_variance):
    """The prior's variance over that channel's is infinite or NaN."""
    layer, x, prior = drawn("2d")
    constant = torch.cat([x.detach()[:, :2], torch.full_like(x[:, :1], 3.0)], 1).requires_grad_()
    variance = torch.tensor([0.5, 0.5, prior_variance], dtype=torch.float64, requires_grad=True)
    y, state = layer(constant, (prior.mean, variance))
    alone, by_batch = layer(constant)
    assert torch.equal(y, alone)
    assert all(map(torch.equal, state, by_batch))
    assert torch.equal(y[:, 2], layer.bias[2].expand_as(y[:, 2]))
    dx, dmean, dvariance = torch.autograd.grad(y.square().sum(), [constant, prior.mean, variance])
    (wanted,) = torch.autograd.grad(alone.square().sum(), constant)
    assert torch.equal(dx, wanted)
    assert not dmean.any()
    assert not dvariance.any()


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_prior_that_is_not_finite_does_not_reach_the_gradients(bad):
    layer, x, _ = drawn("2d")
    prior = torch.full((2, C), bad, dtype=torch.float64, requires_grad=True)
    y, _ = layer(x, tuple(prior.unbind()))
    assert torch.equal(y, layer(x)[0])
    for gradient in torch.autograd.grad(y.square().sum(), [x, prior]):
        assert gradient.isfinite().all()


class NoNumberIsRead(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("momentum", [0.1, None])
def test_no_number_is_read_back(momentum):
    layer, x, prior = drawn("2d", momentum=momentum)
    with NoNumberIsRead():
        y, state = layer(x, prior)
        torch.autograd.backward([y, *state], [torch.ones_like(t) for t in (y, *state)])


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_averages_are_of_the_posterior(momentum):
    layer, _, _ = drawn("2d", momentum=momentum)
    mean, variance = np.zeros(C), np.ones(C)
    for step in range(1, 4):
        _, x, prior = drawn("2d")
        layer(x, prior if step != 2 else None)
        mu, v = oracle.posterior(arrays(x)[0], arrays(*prior) if step != 2 else None, 0.9)
        share = 1 / step if momentum is None else momentum
        mean, variance = (1 - share) * mean + share * mu, (1 - share) * variance + share * v
        close(layer.running_mean, mean)
        close(layer.running_var, variance)
        assert layer.num_batches_tracked == step


@pytest.mark.parametrize("name", CASES)
def test_in_eval_mode_running_averages_normalize_and_are_the_state(name):
    layer, x, prior = drawn(name)
    layer(x, prior)
    layer.eval()
    y, state = layer(x, prior)
    with_none, _ = layer(x)
    assert torch.equal(y, with_none)
    weight, bias, mean, variance = arrays(layer.weight, layer.bias, layer.running_mean, layer.running_var)
    centred = arrays(x)[0] - oracle.along(mean, x)
    close(y, centred / np.sqrt(oracle.along(variance, x) + layer.eps) * oracle.along(weight, x) + oracle.along(bias, x))
    layer.train()(x, prior)
    close(state.mean, mean)  # which a later call leaves alone
    close(state.variance, variance)


def test_what_is_not_tracked_takes_the_batch_in_eval_mode_too():
    layer, x, prior = drawn("2d", track_running_stats=False)
    assert torch.equal(layer(x, prior)[0], layer.eval()(x, prior)[0])
    assert layer.running_mean is None


def test_checkpoints_are_batch_normalizations():
    ours, torchs = KalmanNorm2d(C), nn.BatchNorm2d(C)
    torchs(torch.randn(2, C, 3, 3))
    ours.load_state_dict(torchs.state_dict())
    assert list(ours.state_dict()) == list(torchs.state_dict())
    torchs.load_state_dict(ours.state_dict())
    x = torch.randn(2, C, 3, 3)
    close(ours.eval()(x)[0], torchs.eval()(x).detach(), 4 * torch.finfo(torch.float32).eps)
    assert str(pickle.loads(pickle.dumps(ours))) == "KalmanNorm2d(3)"
    assert str(KalmanNorm2d(C, 0.05, bias=False, momentum=None)) == (
        "KalmanNorm2d(3, prior_weight=0.05, momentum=None, bias=False)"
    )


def test_torchs_tools_find_it():
    layer = KalmanNorm2d(C)
    batches = [torch.randn(4, C, 5, 5) for _ in range(3)]
    torch.optim.swa_utils.update_bn(batches, layer)
    close(layer.running_mean, torch.stack(batches).mean((0, 1, 3, 4)).double(), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_have_states_of_float32(dtype):
    layer, x, prior = drawn("2d", dtype=dtype)
    layer = layer.float()
    prior = KalmanState(*(t.detach().float() for t in prior))
    y, state = layer(x, prior)
    assert y.dtype == dtype
    assert state.mean.dtype == state.variance.dtype == torch.float32
    expected, of_state = oracle.forward(arrays(x)[0], arrays(*prior), 0.9, layer.eps, *arrays(layer.weight, layer.bias))
    # sums of 40 numbers of size 4 and the few operations behind them; y is rounded once more
    rounding = 64 * 4 * torch.finfo(torch.float32).eps
    for found, wanted in zip(state, of_state, strict=True):
        close(found, wanted, rounding)
    close(y, expected, rounding + torch.finfo(dtype).eps)
    layer.eval()(x)[0].sum().backward()
    assert x.grad.dtype == dtype


def test_averages_of_a_half_type_round_once():
    half = torch.finfo(torch.bfloat16).eps / 2 + 1e-5  # and what the sums in float32 err by
    for _ in range(20):
        layer, x, prior = drawn("2d", dtype=torch.bfloat16)
        layer = layer.to(torch.bfloat16)
        prior = KalmanState(*(t.detach().float() for t in prior))
        layer(x, prior)
        mu, v = oracle.posterior(arrays(x)[0], arrays(*prior), 0.9)
        for running, exact in ((layer.running_mean, 0.1 * mu), (layer.running_var, 0.9 + 0.1 * v)):
            assert running.dtype == torch.bfloat16
            assert (np.abs(arrays(running)[0] - exact) <= half * np.abs(exact)).all()


OPTIONS = {
    "num_features": (0, ValueError, "got 0, expected a positive int"),
    "prior_weight": (1.5, ValueError, "got 1.5, expected a number from 0 to 1"),
    "eps": (-1.0, ValueError, "got -1.0, expected a float of at least 0"),
    "momentum": ("much", TypeError, "got 'much' of type str"),
    "affine": (1, TypeError, "got 1 of type int"),
    "track_running_stats": (1, TypeError, "got 1 of type int"),
    "bias": (None, TypeError, "got None of type NoneType"),
    "backend": ("tpu", ValueError, "got 'tpu'"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_options(name):
    value, error, message = OPTIONS[name]
    with pytest.raises(error, match=f"^{name}: {message}"):
        KalmanNorm2d(**{"num_features": C, name: value})


X, ROW = torch.zeros(2, C, 4, 4), torch.ones(C)
INPUTS = {
    "x of other dimensions": ((X[0], None), ValueError, "x: got 3 dimensions, expected 4"),
    "x of other channels": ((X[:, :2], None), ValueError, "x: got 2 channels, expected num_features, 3"),
    "x of ints": ((X.int(), None), TypeError, "x: got dtype torch.int32"),
    "no x": ((None, None), TypeError, "x: got NoneType, expected a Tensor"),
    "one value": ((X[:1, :, :1, :1], None), ValueError, "x: got shape (1, 3, 1, 1), expected more than 1 value"),
    "no values": ((X[:0], None), ValueError, "x: got shape (0, 3, 4, 4), expected more than 1 value"),
    "freed x": ((freed(X.clone()), None), ValueError, "x: got a Tensor of shape (2, 3, 4, 4) whose storage"),
    "no pair": ((X, ROW), TypeError, "prior: got Tensor, expected a pair"),
    "three": ((X, (ROW, ROW, ROW)), TypeError, "prior: got tuple, expected a pair"),
    "numbers": ((X, (0.0, 1.0)), TypeError, "prior: got float for the mean, expected a Tensor"),
    "other channels": ((X, (ROW, ROW[:2])), ValueError, "prior: got a variance of shape (2,), expected (3,)"),
    "scalars": ((X, (ROW[0], ROW[0])), ValueError, "prior: got a mean of shape (), expected (C,)"),
    "another dtype": (
        (X, (ROW.double(), ROW)),
        TypeError,
        "prior: got a mean of torch.float64, expected torch.float32",
    ),
    "ints": ((X, (ROW.int(), ROW)), TypeError, "prior: got a mean of torch.int32, expected a floating one"),
    "another device": ((X, (ROW, ROW.to("meta"))), ValueError, "prior: got a variance on meta, expected one on cpu"),
    "freed prior": (
        (X, (ROW, freed(ROW.clone()))),
        ValueError,
        "prior variance: got a Tensor of shape (3,) whose storage",
    ),
}


@pytest.mark.parametrize("name", INPUTS)
def test_bad_input_is_told_before_anything_moves(name):
    (x, prior), error, message = INPUTS[name]
    layer = KalmanNorm2d(C)
    with pytest.raises(error) as raised:
        layer(x, prior)
    assert str(raised.value).startswith(message)
    assert layer.num_batches_tracked == 0


def test_one_statistic_taken_away():
    layer = KalmanNorm2d(C)
    layer.running_var = None
    with pytest.raises(ValueError, match=r"^running_mean, running_var: got None for one of them"):
        layer(X)
