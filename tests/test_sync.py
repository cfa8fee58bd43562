"""What convert_sync changes, and what it says of the rest; what it computes is tests/distributed_step.py's."""

import warnings

import pytest
import torch
from torch import nn

import divnorm_kernels as dk


@pytest.mark.parametrize("make", [dk.BatchNorm2d, dk.KalmanNorm2d, dk.VarianceNorm2d])
def test_layers_with_batch_statistics_are_synchronized(make):
    model = nn.Sequential(make(4), nn.GroupNorm(2, 4), nn.SyncBatchNorm(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dk.convert_sync(model) is model
    assert model[0].sync
    assert model[0].process_group is None


def test_others_are_named():
    model = nn.Sequential(dk.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4)))
    with pytest.warns(UserWarning, match=r"^convert_sync: left alone: 1\.0, whose statistics are each process' own$"):
        dk.convert_sync(model)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (dk.BatchNorm2d(4, p=1), "^p: got 1 in a layer of convert_sync, expected 2"),
        (dk.TopKBatchNorm2d(4), "^k: got a layer of convert_sync, expected one by this process' batch alone"),
    ],
)
def test_what_does_not_merge_is_refused_before_anything_changes(layer, message):
    model = nn.Sequential(dk.BatchNorm2d(4), layer)
    with pytest.raises(ValueError, match=message):
        dk.convert_sync(model)
    assert not model[0].sync


def test_bad_input():
    with pytest.raises(TypeError, match=r"^model: got int, expected a torch\.nn\.Module"):
        dk.convert_sync(3)


def test_without_processes_it_changes_nothing():
    layer = dk.BatchNorm2d(4)
    x = torch.randn(3, 4, 5, 5)
    assert torch.equal(dk.convert_sync(layer)(x), dk.BatchNorm2d(4)(x))
