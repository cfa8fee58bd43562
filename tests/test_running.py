"""Running statistics of batch and instance normalization, and eval mode, which they serve: torch.nn's values."""

import pytest
import torch
from test_family import LAYERS, RUNNING, close

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
