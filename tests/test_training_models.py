"""The experiments' parts: norms in their places, recurrent layers against torch's, activations' statistics."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn

import divnorm_kernels as dk
from bench.training import activations, cells, text
from bench.training.networks import CONSTANTS, Convolutional, ResNet32
from bench.training.norms import Constants, OverTime, check_norm, image_norm
from bench.training.superres import Network
from bench.training.text import over_time


def test_norms_over_images_are_what_their_names_say():
    x = torch.randn(4, 6, 9, 8)
    made = partial(image_norm, channels=6, constants=CONSTANTS[10], window=3, norm_window=5, edges="zero")
    by_hand = {
        "none": torch.relu(x),
        "none*": torch.relu(x),
        "dn": dk.divisive_norm(x, window=3, norm_window=5, sigma=0.5, edges="zero").relu(),
        "dn*": dk.divisive_norm(x, window=3, norm_window=5, sigma=0.5, edges="zero").relu(),
        "dn-mean-only": dk.divisive_norm(x, window=3, norm_window=None, sigma=0.5, edges="zero").relu(),
        "ln": nn.functional.layer_norm(x, (6, 9, 8), eps=1e-4).relu(),
        "ln*": nn.functional.layer_norm(x, (6, 9, 8), eps=0.25).relu(),
        "bn": nn.functional.batch_norm(x, None, None, training=True, eps=1e-4).relu(),
        "bn*": nn.functional.batch_norm(x, None, None, training=True, eps=1.0).relu(),
    }
    for name, expected in by_hand.items():
        layer = made(name)
        torch.testing.assert_close(layer(x), expected, msg=lambda m, name=name: f"{name}: {m}")
        penalty = dk.l1_penalty(layer).item()
        if name.endswith("*"):
            assert penalty == pytest.approx((0.01 if name == "none*" else 0.005) * layer.l1.item())
            assert penalty > 0
        else:
            assert penalty == 0
        assert (getattr(layer, "weight", None) is not None) == (name in ("bn", "bn*", "ln"))
    torch.testing.assert_close(dk.l1_penalty(_called(made("none*"), x)), 0.01 * x.abs().mean())


def _called(layer, x):
    layer(x)
    return layer


@pytest.mark.parametrize("name", ["dnn", "none-s", "bn**", ""])
def test_unknown_norms_are_refused(name):
    with pytest.raises(ValueError, match="expected"):
        check_norm(name)


def test_sigma_is_learned_where_it_is_part_of_the_model():
    names = {
        name: [key for key, _ in ResNet32(name, 10).named_parameters() if key.endswith("sigma")]
        for name in ("none", "bn", "bn-s", "ln*", "dn")
    }
    assert {name: len(keys) for name, keys in names.items()} == {"none": 0, "bn": 0, "bn-s": 31, "ln*": 31, "dn": 31}


@pytest.mark.parametrize("name", ["dn*", "ln*", "none*"])
def test_a_norm_on_parts_at_once_is_one_norm_on_each(name):
    constants = {name: Constants(0.7, 0.3)}
    together = OverTime(name, 10, 4, constants, window=3)
    alone = [OverTime(name, 10, 1, constants, window=3) for _ in range(4)]
    sequence = torch.randn(5, 6, 40)
    for layer in (together, *alone):
        layer.begin(len(sequence))
    with dk.collect_l1(together) as penalty, dk.collect_l1(torch.nn.ModuleList(alone)) as expected:
        for x in sequence:
            parts = [layer(part.contiguous()) for layer, part in zip(alone, x.chunk(4, 1), strict=True)]
            torch.testing.assert_close(together(x), torch.cat(parts, 1))
    torch.testing.assert_close(penalty(), expected())


def test_the_penalty_of_a_sequence_is_the_mean_over_its_steps():
    norm = OverTime("dn*", 8, 1, {"dn*": Constants(1.0, 0.5)}, window=3)
    for sequence in (torch.randn(5, 6, 8), torch.randn(2, 6, 8)):
        norm.begin(len(sequence))
        with dk.collect_l1(norm) as penalty:
            for x in sequence:
                norm(x)
        each = [dk.divisive_norm(x, window=3, return_l1=True)[1] for x in sequence]
        torch.testing.assert_close(penalty(), 0.5 * torch.stack(each).mean())


def _none(units, parts):
    return OverTime("none", units, parts, {}, window=3)


@pytest.mark.parametrize("kind", ["tanh", "relu", "lstm"])
def test_recurrent_layers_without_a_norm_are_torchs(kind):
    own = cells.make(kind, 5, 7, _none).double()
    theirs = nn.LSTM(5, 7).double() if kind == "lstm" else nn.RNN(5, 7, nonlinearity=kind).double()
    order = [0, 1, 3, 2] if kind == "lstm" else [0]  # torch: take, forget, new, give

    def torchs(values):
        return torch.cat([values.chunk(len(order))[i] for i in order])

    with torch.no_grad():
        theirs.weight_ih_l0.copy_(torchs(own.input.weight))
        theirs.weight_hh_l0.copy_(torchs(own.hidden.weight))
        theirs.bias_ih_l0.copy_(torchs(own.input.bias))
        theirs.bias_hh_l0.zero_()
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    start = tuple(torch.randn(3, 7, dtype=torch.float64) for _ in range(own.STATES))
    y, state = own(x, start)
    expected, after = theirs(x, tuple(s[None] for s in start) if kind == "lstm" else start[0][None])
    torch.testing.assert_close(y, expected)
    for s, e in zip(state, after if kind == "lstm" else (after,), strict=True):
        torch.testing.assert_close(s, e[0])
    direction = torch.randn_like(y)
    (gradient,) = torch.autograd.grad((y * direction).sum(), own.hidden.weight)
    (wanted,) = torch.autograd.grad((expected * direction).sum(), theirs.weight_hh_l0)
    torch.testing.assert_close(torchs(gradient), wanted)


def test_gates_and_cell_of_the_lstm_are_normalized_each_by_itself():
    """One step by the formulas, with the operator called five times."""
    layer = cells.make("lstm", 5, 60, partial(over_time, "dn", "lstm", None)).double()
    x, h, c = torch.randn(1, 3, 5).double(), torch.randn(3, 60).double(), torch.randn(3, 60).double()
    y, (h_after, c_after) = layer(x, (h, c))
    norm = partial(dk.divisive_norm, window=30, backend="reference")
    take, forget, give, new = (norm(a) for a in (layer.input(x[0]) + layer.hidden(h)).chunk(4, 1))
    cell = forget.sigmoid() * c + take.sigmoid() * new.tanh()
    torch.testing.assert_close(c_after, cell)
    torch.testing.assert_close(h_after, give.sigmoid() * norm(cell).tanh())
    assert torch.equal(y[0], h_after)


def test_batch_statistics_of_a_recurrent_layer_are_kept_for_evaluation():
    norm = OverTime("bn", 6, 1, {"bn": Constants(0.01)}, window=3)
    steps = [centre + spread * torch.randn(500, 6) for centre, spread in ((3, 2), (-1, 4), (5, 0.5))]
    for x in steps:
        norm(x)
    mean = torch.stack([x.mean(0) for x in steps]).mean(0)
    variance = torch.stack([x.var(0) for x in steps]).mean(0)
    torch.testing.assert_close(norm.eval()(steps[0]), (steps[0] - mean) / (variance + 1e-4).sqrt())


def test_networks_have_the_papers_sizes():
    x = torch.randn(2, 3, 32, 32)
    cnn = Convolutional("dn", 10)
    assert cnn(x).shape == (2, 10)
    assert sum(p.numel() for p in cnn.parameters()) == 32 * 76 + 32 * 801 + 64 * 801 + 1025 * 64 + 650
    assert [m.window for m in cnn.modules() if isinstance(m, dk.DivisiveNorm2d)] == [5, 3, 3]
    resnet = ResNet32("dn", 10)
    assert resnet(x).shape == (2, 10)
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in resnet.modules()) == 32
    assert sorted({m.window for m in resnet.modules() if isinstance(m, dk.DivisiveNorm2d)}) == [5, 7]
    network = Network("dn*")
    assert network(torch.randn(2, 1, 33, 33)).shape == (2, 1, 17, 17)
    fields = [(m.window, m.norm_window) for m in network.modules() if isinstance(m, dk.DivisiveNorm2d)]
    assert fields == [(5, 7), (5, 7)]


def test_sparsity_and_correlation_of_known_activations():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(20_000, 1, generator=generator, dtype=torch.float64)
    independent = torch.randn(20_000, 1, generator=generator, dtype=torch.float64)
    assert activations.correlation(torch.cat([base, -2 * base + 3], 1)) == pytest.approx(1.0)
    assert activations.correlation(torch.cat([base, independent], 1)) < 3 / math.sqrt(20_000)
    # two pairs of three have correlation sqrt(1/2), one has none
    mixed = torch.cat([base, independent, base + independent], 1)
    assert activations.correlation(mixed) == pytest.approx(2 / 3 * math.sqrt(0.5), abs=0.02)
    assert activations.correlation(torch.cat([base, torch.zeros_like(base)], 1)) == 0
    assert activations.sparsity(torch.ones(1000, 2, dtype=torch.float64)) == 0
    lone = torch.zeros(1000, 1, dtype=torch.float64)
    lone[3] = 5.0
    assert activations.sparsity(lone) == pytest.approx(1.0)
    # a normal variable: mean |y|^2 / mean y^2 = 2 / pi
    assert activations.sparsity(base) == pytest.approx(1 - 2 / math.pi, abs=0.02)


def test_activations_are_measured_behind_the_named_modules():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    x = torch.randn(10, 1, 8, 8)
    measured = activations.measure({"first": model[1], "last": model[3]}, lambda: model(x))
    rows = model[1](model[0](x)).movedim(1, -1).reshape(-1, 4).double().detach()
    assert measured["first"]["zeros"] == float((rows == 0).double().mean())
    assert measured["first"]["sparsity"] == activations.sparsity(rows)
    assert measured["first"]["correlation"] == pytest.approx(float((rows.T.corrcoef().abs().sum() - 4) / 12))
    assert measured["last"]["correlation"] == activations.correlation(model(x).detach().double())
    assert not model[1]._forward_hooks


@pytest.mark.parametrize(("norm", "model"), [("bn", "lstm"), ("bn*", "relu")])
def test_an_evaluation_takes_batch_statistics_of_the_model_that_there_is(norm, model):
    """Over training text; what training has left in their place changes nothing, and training goes on as without."""
    settings = text.TextSettings(model, None, 5, vocabulary=50)
    found = []
    for poison in (0.0, 1e6):
        torch.manual_seed(0)
        task = text.Language(settings, norm, 0)
        task.loss(0)
        before = copy.deepcopy(task.states)
        for name, buffer in task.model.named_buffers():
            if "running" in name:
                buffer.add_(poison)
        task.model.eval()
        with torch.no_grad():
            found.append(task.evaluate(False))
        assert not task.model.training
        torch.testing.assert_close(task.states, before, rtol=0, atol=0)
    assert found[0] == found[1]
    norm = next(module for module in task.model.modules() if isinstance(module, dk.BatchNorm1d))
    running, means = norm.running_mean.clone(), []
    norm.register_forward_hook(lambda module, inputs, y: means.append(inputs[0].mean(0)))
    states = task.model.train().start(text.BATCH)
    with torch.no_grad():
        for at in range(min(text.ESTIMATED, task.pieces)):
            _, states = task.model(task.train[at * text.STEPS : (at + 1) * text.STEPS], states)
    torch.testing.assert_close(running, torch.stack(means).mean(0))
