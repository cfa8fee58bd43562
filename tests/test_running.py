"""Running statistics of batch and instance normalization, and eval mode, which they serve: torch.nn's values."""

import copy
import itertools

import pytest
import torch
from test_family import LAYERS, RUNNING, close, pair

from divnorm_kernels import BatchNorm2d, InstanceNorm2d

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
HALF = (torch.bfloat16, torch.float16)


def tracking(name, **options):
    """A layer that tracks whole batches, as a mean of all it has seen."""
    ours, _, arguments, _ = LAYERS[name]
    return ours(*arguments, momentum=1.0, affine=True, track_running_stats=True, **options)


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize(("offset", "deviation"), [(0.0, 1e-4), (1e4, 1.0), (-100.0, 1e-2)])
@pytest.mark.parametrize("name", RUNNING)
def test_the_variance_is_that_of_the_values_however_large_sigma_is(name, offset, deviation, learn_sigma):
    layer = tracking(name, sigma=1.0, learn_sigma=learn_sigma)
    x = torch.randn(LAYERS[name][3]) * deviation + offset
    layer(x)
    values = x.double().transpose(0, 1) if "no batch" not in name else x.double().unsqueeze(1)
    if "Instance" in name:
        mean, variance = (t.mean(1) for t in reversed(torch.var_mean(values.flatten(2), 2)))
    else:
        variance, mean = torch.var_mean(values.flatten(1), 1)
    eps = torch.finfo(torch.float32).eps
    depth, shift = eps * values[0].numel(), 4 * eps * abs(offset)  # of the sums; of the mean, by its rounding in place
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=0, atol=shift + depth * deviation)
    torch.testing.assert_close(layer.running_var.double(), variance, rtol=depth, atol=shift**2)


@pytest.mark.parametrize("dtype", HALF)
def test_the_average_of_many_batches_counts_all_of_them_in_half_types(dtype):
    """A count of 70,000 is infinite in float16."""
    layer = LAYERS["BatchNorm1d"][0](6, momentum=None, dtype=dtype)
    layer.num_batches_tracked.fill_(69_999)
    x = torch.randn(4, 6, 9).to(dtype) + 300
    layer(x)
    expected = x.double().mean((0, 2)) / 70_000
    torch.testing.assert_close(layer.running_mean.double(), expected, rtol=torch.finfo(dtype).eps, atol=0)


def test_statistics_of_half_activations_are_tracked_by_a_float_layer_unrounded():
    layer = tracking("BatchNorm1d", sigma=1.0)
    x = (torch.randn(4, 6, 9) * 1e-3 + 1).bfloat16()
    layer(x)
    exact = x.double().transpose(0, 1).flatten(1).var(1)
    torch.testing.assert_close(layer.running_var.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", RUNNING)
def test_a_functionalized_layer_moves_its_statistics(name):
    """As torch.nn's, whose buffers are not made functional either."""
    layer, reference = pair(name, track_running_stats=True, momentum=0.3)
    x = torch.randn(LAYERS[name][3], dtype=torch.float64)
    close(torch.func.functionalize(layer)(x), torch.func.functionalize(reference)(x))
    for buffer in ("running_mean", "running_var"):
        close(getattr(layer, buffer), getattr(reference, buffer))


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("absent", [n for k in range(4) for n in itertools.combinations(BUFFERS, k)], ids="+".join)
@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "InstanceNorm2d"])
def test_buffers_and_tracking_taken_away_after_construction(name, absent, momentum, track):
    layers = pair(name, momentum=momentum, track_running_stats=True)
    for layer in layers:
        for buffer in absent:
            setattr(layer, buffer, None)
        layer.track_running_stats = track
    for training in (True, True, False, True, False):
        x = torch.randn(LAYERS[name][3], dtype=torch.float64) + 2
        results = []
        for layer in layers:
            try:
                results.append(layer.train(training)(x))
            except (ValueError, RuntimeError) as error:
                results.append(type(error))
        if isinstance(results[1], type):
            assert results[0] is results[1]
            continue
        close(*results)
        for buffer in BUFFERS:
            close(*(getattr(layer, buffer) for layer in layers))


def test_what_is_absent_is_named():
    layer = LAYERS["BatchNorm1d"][0](6)
    layer.running_var = None
    with pytest.raises(ValueError, match=r"^running_var: got None, expected a Tensor, or None for both"):
        layer(torch.randn(4, 6))
    with pytest.raises(RuntimeError, match=r"^running_var: got None in eval mode, expected a Tensor"):
        layer.eval()(torch.randn(4, 6))
    layer.reset_running_stats()
    assert layer.running_mean.abs().max() == 0


@pytest.mark.parametrize("name", RUNNING)
def test_one_value_per_channel_raises_wherever_it_normalizes_itself(name):
    layers = pair(name, track_running_stats=False)
    shape = LAYERS[name][3]
    x = torch.ones(6, 1) if "no batch" in name else torch.ones(1, *shape[1:2], *[1] * (len(shape) - 2))
    for layer in layers:
        with pytest.raises(ValueError, match="xpected more than 1"):
            layer.eval()(x.double())


def test_checkpoints_from_before_batches_were_counted():
    for absent in ((), ("num_batches_tracked",)):
        layer = LAYERS["BatchNorm1d"][0](6, device="meta")
        for buffer in absent:
            setattr(layer, buffer, None)
        old = {key: torch.full((6,), 2.0) for key in ("weight", "bias", "running_mean", "running_var")}
        with torch.device("meta"):
            layer.load_state_dict(old, assign=True)
        assert {t.device.type for t in (*layer.parameters(), *layer.buffers())} == {"cpu"}


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("affine", [torch.float32, "x's", None])
@pytest.mark.parametrize("buffers", [torch.float32, "x's"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_eval_mode_rounds_only_its_result(dtype, buffers, affine, learn_sigma):
    layer = LAYERS["BatchNorm1d"][0](1, sigma=0.5, learn_sigma=learn_sigma, affine=affine is not None)
    if dtype == torch.float64:
        layer.double()
    elif affine == "x's":
        layer.to(dtype)
    statistics = dtype if buffers == "x's" or dtype == torch.float64 else buffers
    layer.running_mean, layer.running_var = (torch.tensor([t], dtype=statistics) for t in (100.0, 1.0))
    x = torch.full((2, 1, 3), 101.0, dtype=dtype)
    expected = torch.full_like(x, 1.25**-0.5)
    y = layer.eval()(x)
    compute = torch.promote_types(dtype, torch.float32)  # torch.nn's scales 101 and 100 apart, there
    torch.testing.assert_close(y, expected, rtol=torch.finfo(dtype).eps, atol=101 * torch.finfo(compute).eps)
    if dtype in HALF:
        with torch.autocast("cpu", dtype=dtype):
            assert torch.equal(layer(x), y)


def test_eval_mode_of_a_learned_sigma_far_from_zero():
    layer = LAYERS["BatchNorm2d"][0](6, sigma=0.5, learn_sigma=True).eval()
    layer.running_mean.fill_(1e4)
    x = torch.randn(2, 6, 3, 4) + 1e4
    expected = (x.double() - 1e4) / 1.25**0.5
    torch.testing.assert_close(layer(x).double(), expected, rtol=4 * torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize(
    "layer", [BatchNorm2d(4), InstanceNorm2d(4, track_running_stats=True)], ids=["batch", "instance"]
)
def test_freed_statistics_are_an_error(layer, name, training):
    layer = copy.deepcopy(layer).train(training)
    getattr(layer, name).untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"{name}: got a Tensor of shape .4,. whose storage holds 0 bytes"):
        layer(torch.randn(2, 4, 5, 5))
