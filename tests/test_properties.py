"""Properties of deep networks at their initial values, and what a norm costs in a recurrent layer."""

import json
import math

import numpy as np
import pytest
import torch
from bench_command import run
from torch import nn

from bench import properties, recurrent
from bench.training import norms, placing, probes, text
from bench.training.deep import Deep
from bench.training.images import textures

pytestmark = pytest.mark.usefixtures("torchs_defaults")


def test_similarity_of_known_activations():
    y = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    assert probes.similarity(y) == pytest.approx((0 + 2 * math.sqrt(0.5)) / 3)
    assert probes.similarity(torch.ones(4, 3, 2)) == pytest.approx(1)


def test_variance_and_stable_rank_of_known_activations():
    y = torch.tensor([[[1.0, 3.0], [0.0, 0.0]], [[5.0, 7.0], [0.0, 4.0]]])  # (N, C, L)
    assert probes.variance(y) == pytest.approx((5 + 3) / 2)
    assert probes.stable_rank(torch.eye(3)[:, :, None]) == pytest.approx(3)
    assert probes.stable_rank(torch.ones(4, 3, 2)) == pytest.approx(1)
    assert probes.stable_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0]))) == pytest.approx((4 + 1 + 1) / 4)
    random = torch.randn(5, 3, 4, 2, dtype=torch.float64)
    rows = random.numpy().reshape(5, -1)
    assert probes.stable_rank(random) == pytest.approx((rows**2).sum() / np.linalg.svd(rows)[1][0] ** 2, rel=1e-10)
    channels = random.numpy().transpose(1, 0, 2, 3).reshape(3, -1)
    assert probes.variance(random) == pytest.approx(channels.var(1).mean(), rel=1e-10)


def test_properties_of_a_network_without_norms_follow_from_its_formula():
    """One layer by hand: scales and gradients of relu(W x), and of x + relu(W x)."""
    x, direction = torch.randn(3, 3, 8, 8), torch.randn(3, 4, 4, 4)
    for residual in (False, True):
        network = Deep("none", 1, 4, residual)
        measured = probes.measure(network, x, direction)
        first = network.stem(x).detach().requires_grad_()
        inner = network.convolutions[0](first).relu()
        last = first + inner if residual else inner
        (gradient,) = torch.autograd.grad((last * direction).sum(), first)

        def size(y):
            return y.detach().square().mean().sqrt().item()

        assert measured["scale"] == pytest.approx([size(first), size(last)], rel=1e-5)
        assert measured["gradient"] == pytest.approx([size(gradient) / size(direction), 1.0], rel=1e-5)
        assert measured["rank"][1] == pytest.approx(probes.stable_rank(last.detach()), rel=1e-5)
        assert measured["variance"][1] == pytest.approx(probes.variance(last.detach()), rel=1e-5)
        assert measured["similarity"][1] == pytest.approx(probes.similarity(last.detach()), rel=1e-5)


@pytest.mark.parametrize("norm", ["evo-s0", "ln"])
def test_layers_of_a_backend(norm):
    assert Deep(norm, 1, 8, False, backend="reference").norms[0].backend == "reference"


@pytest.mark.parametrize("norm", placing.BY_WEIGHTS)
def test_normalized_weights_keep_the_variance_of_normal_numbers(norm):
    """What a convolution gives of its activation has variance 1, by N samples whose squares vary by 2 each."""
    count, width = 4096, 64
    network = Deep(norm, 1, width, residual=False)
    y = nn.functional.conv2d(network.norms[0](torch.randn(count, width, 3, 3)), network.convolutions[0].weight)
    assert abs(y.square().mean().item() - 1) < 5 * math.sqrt(2 / count)


@pytest.mark.parametrize("norm", ["evo-b0", "wn"])
def test_experiments_have_no_place_for_what_is_no_layer_of_the_operator(norm):
    placing.check_norm(norm)
    for check in (norms.check_norm, text.check_norm):
        with pytest.raises(ValueError, match=f"^norm: got '{norm}', expected one that is a layer of the operator"):
            check(norm)


def test_layer_normalization_makes_activations_alike_and_batch_normalization_less_so():
    """The finding of "Beyond BatchNorm" on plain networks, at a size that runs in seconds."""
    rows = properties.measure_all(["bn", "ln"], textures(10, 40), 12, 32, 24, 1, None, lambda: None)
    last = {row["norm"]: row["similarity"][-1] for row in rows if row["network"] == "plain"}
    assert last["ln"] > 2 * last["bn"]


def test_properties_are_written_and_drawn(tmp_path):
    arguments = ("--depth", 2, "--channels", 4, "--batch", 3, "--seeds", 1)
    output = run("properties", *arguments, "--norm", "dn", "--norm", "none", "--out", tmp_path)
    assert "residual" in output
    rows = json.loads((tmp_path / "properties.json").read_text())["rows"]
    assert {(row["network"], row["norm"]) for row in rows} == {
        (k, n) for k in properties.NETWORKS for n in ("dn", "none")
    }
    assert all(len(row["scale"]) == 3 for row in rows)
    assert (tmp_path / "properties.png").stat().st_size > 10_000


def test_cells_are_timed_against_torchs_layer_norm(tmp_path, monkeypatch):
    monkeypatch.setattr(recurrent, "STEPS", 2)
    arguments = ("--cell", "lstm", "--norm", "dn*", "--norm", recurrent.TORCH, "--seconds", 0.01, "--out", tmp_path)
    output = run("cells", *arguments)
    assert "us a token" in output
    rows = json.loads((tmp_path / "cells.json").read_text())["rows"]
    assert [row["norm"] for row in rows] == ["dn*", recurrent.TORCH]
    assert all(row["times"]["both"] > 0 for row in rows)


def test_torchs_layer_norm_stands_where_ours_does():
    ours, theirs = (recurrent._norm(name, "tanh")(30, 2) for name in ("ln", recurrent.TORCH))
    x = torch.randn(4, 60)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-3, rtol=1e-3)  # eps 1e-4 and 1e-5
