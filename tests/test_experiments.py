"""The experiments beyond the paper's own: what their networks compute, and what they are trained and judged on."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import divnorm_kernels as dk
from bench.evidence import plan
from bench.training import cifar, deep, dense, loop, placing, samples, stream
from bench.training.images import textures
from bench.training.networks import CONSTANTS, Convolutional
from bench.training.settings import ClassSettings
from bench.training.sigma import sigma_share, sigma_shares

pytestmark = pytest.mark.usefixtures("torchs_defaults")


@pytest.fixture
def small(monkeypatch):
    """Forty training and twenty test pictures in place of the textures."""
    images = textures(40, 20)
    monkeypatch.setattr(cifar, "pictures", lambda path: images)
    return images


def test_layers_of_other_papers_are_what_their_names_say():
    x = torch.randn(4, 6, 9, 8)
    made = {}
    for name in ("topk", "l1bn", "bn"):
        made[name] = placing.behind(nn.Conv2d(3, 6, 3), name, CONSTANTS[10], None, window=3)
    rows = x.transpose(0, 1).flatten(1)
    centred = (rows - rows.mean(1, keepdim=True)).abs()
    count = rows.shape[1]
    scale = (1 + math.sqrt(math.pi * math.log(4))) / (2 * math.sqrt(2 * math.log(count)))
    deviations = {
        "topk": scale * centred.topk(10).values.mean(1) + 0.01,
        "l1bn": math.sqrt(math.pi / 2) * centred.mean(1) + 0.01,
        "bn": (centred.square().mean(1) + 1e-4).sqrt(),
    }
    for name, deviation in deviations.items():
        mean = rows.mean(1).view(1, 6, 1, 1)
        torch.testing.assert_close(made[name](x), ((x - mean) / deviation.view(1, 6, 1, 1)).relu())
        assert made[name].weight is not None


@pytest.mark.parametrize("norm", placing.BOUNDED)
def test_normalized_weights_start_from_the_network_without_a_norm(norm):
    x = torch.randn(3, 3, 32, 32)
    scores = []
    for name in ("none", norm):
        torch.manual_seed(0)
        network = Convolutional(name, 10, he=True)
        scores.append(network(x))
    torch.testing.assert_close(*scores)
    bounded = network.features[0].parametrizations.weight
    assert ("rho" in dict(bounded[0].named_buffers())) == (norm != "weight-norm")


def test_kalman_norms_have_priors_behind_the_first():
    """Without its prior the second norm would give what batch normalization gives."""
    torch.manual_seed(0)
    network = Convolutional(placing.KALMAN, 10, he=True)
    norms = [m for m in network.modules() if isinstance(m, dk.KalmanNorm2d)]
    assert len(norms) == 3
    seen = []
    for norm in norms:
        norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1:]))
    network(torch.randn(2, 3, 32, 32))
    assert [bool(inputs and inputs[0] is not None) for inputs in seen] == [False, True, True]


def test_initial_values_of_he_keep_the_scale():
    torch.manual_seed(0)
    network = Convolutional("none", 10, he=True)
    for layer in (network.features[3], network.features[6]):
        fan_in = layer.weight[0].numel()
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.05)


def test_a_held_out_run_never_sees_the_test_set(small, monkeypatch):
    """A test set of NaNs and classes that do not exist changes nothing, and what is held out is not trained on."""
    settings = ClassSettings("cnn-he", None, 4, batch=10, held_out=10)
    poisoned = replace(small, test=torch.full((20, 3, 32, 32), math.nan), test_classes=torch.full((20,), -1))
    found = []
    for images in (small, poisoned):
        monkeypatch.setattr(cifar, "pictures", lambda path, images=images: images)
        torch.manual_seed(0)
        task = cifar.Classification(settings, "ln", 0)
        losses = [float(task.loss(step).detach()) for step in range(3)]
        task.model.eval()
        with torch.no_grad():
            found.append((losses, task.evaluate(True)))
    assert found[0] == found[1]
    assert torch.equal(task.test, small.train[30:])
    used = torch.cat([task._chosen(step) for step in range(3)])
    assert sorted(used.tolist()) == list(range(30))


def test_batches_of_a_pass_are_all_pictures_once(small):
    task = cifar.Classification(ClassSettings("cnn", None, 10, batch=8), "none", 3)
    first, second = (torch.cat([task._chosen(step) for step in range(at, at + 5)]) for at in (0, 5))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(40))
    assert not torch.equal(first, second)


def test_half_precision_is_that_of_activations(small):
    """Convolutions give bfloat16; weights stay float32, and so do scores and loss."""
    task = cifar.Classification(ClassSettings("cnn-he", None, 4, batch=10, precision="bfloat16"), "l1bn", 0)
    seen = []
    task.model.features[3].register_forward_hook(lambda module, inputs, y: seen.append(y.dtype))
    loss = task.loss(0)
    loss.backward()
    assert seen == [torch.bfloat16]
    assert loss.dtype == task.model.features[0].weight.grad.dtype == torch.float32


def _trained(task, steps, rate=0.05):
    optimizer = torch.optim.SGD(task.model.parameters(), lr=rate, momentum=0.9)
    task.attach(optimizer)
    for step in range(steps):
        optimizer.zero_grad()
        task.loss(step).backward()
        optimizer.step()
    task.model.eval()
    with torch.no_grad():
        return task.evaluate(True)


@pytest.mark.parametrize("norm", ["ln", "dn"])
def test_projection_holds_the_weights_scale(norm, small):
    free, projected = (
        _trained(cifar.Classification(ClassSettings("cnn-he", None, 4, batch=10, projected=on), norm, 0), 8)
        for on in (False, True)
    )
    assert projected["growth"] == pytest.approx(1, abs=1e-5)
    assert abs(free["growth"] - 1) > 1e-3


@pytest.mark.parametrize("name", ["ln-s", "bn-s", "dn"])
def test_the_share_of_sigma_is_that_of_its_square(name):
    x = 2 * torch.randn(5, 8, 12, 11, dtype=torch.float64) + 1
    layer = dk.convert_norm(nn.BatchNorm2d(8), name, sigma=1.5, report=None, **({"window": 3} if name == "dn" else {}))
    if name == "dn":
        centred = dk.divisive_norm(x, window=3, norm_window=None)
    else:
        dims = (1, 2, 3) if name == "ln-s" else (0, 2, 3)
        centred = x - x.mean(dims, keepdim=True)
    expected = 1.5**2 / (1.5**2 + centred.square().mean().item())
    assert sigma_share(layer, x) == pytest.approx(expected, rel=1e-5)
    assert sigma_share(layer, 100 * x) < 1e-3
    model = nn.Sequential(layer.double(), nn.ReLU(), dk.TopKBatchNorm2d(8).double())
    assert sigma_shares(model, lambda: model(x)) == [sigma_share(layer, x)]
    assert not layer._forward_pre_hooks


def test_a_stream_permutes_labels_anew_in_every_task(small):
    settings = stream.StreamSettings("cnn-he", None, 12, batch=10, tasks=3, pictures=40)
    task = stream.LabelStream(settings, "ln", 0)
    assert task.plan.optimizer == "adam"
    assert [task.plan.evaluates_after(step) for step in range(12)] == [step in (3, 7, 11) for step in range(12)]
    labels = []
    for step in range(12):
        task.loss(step)
        labels.append(task._labels())
    for at in range(12):
        assert torch.equal(labels[at], labels[4 * (at // 4)])
    for one, other in ((0, 4), (4, 8), (0, 8)):
        pairs = set(zip(labels[one].tolist(), labels[other].tolist(), strict=True))
        assert len(pairs) == len({a for a, _ in pairs})  # the same pictures still share a label
        assert any(a != b for a, b in pairs)


def test_the_accuracy_of_a_stream_is_the_mean_over_its_tasks(small, tmp_path):
    settings = stream.StreamSettings("cnn-he", None, 8, batch=10, tasks=4, pictures=20)
    log = loop.train(lambda: stream.LabelStream(settings, "ln", 0), {}, 0, tmp_path, lambda step: None)
    fitted = [record["fitted"] for record in log["records"] if "fitted" in record]
    assert len(fitted) == 4
    assert log["figures"]["accuracy"] == pytest.approx(sum(fitted) / 4)


def test_a_stream_of_uneven_tasks_is_refused(small):
    with pytest.raises(ValueError, match="got 10, expected a multiple of the 4 tasks"):
        stream.LabelStream(stream.StreamSettings("cnn-he", None, 10, tasks=4), "ln", 0)


class _Killed(Exception):
    pass


@pytest.mark.parametrize("kind", ["stream", "dense", "projected"])
def test_a_run_that_was_stopped_gives_what_one_in_one_go_gives(kind, small, tmp_path):
    made = {
        "stream": lambda: stream.LabelStream(
            stream.StreamSettings("cnn-he", None, 8, batch=10, tasks=2, pictures=40, checkpoint_every=3), "ln", 0
        ),
        "dense": lambda: dense.DenseClassification(
            dense.DenseSettings("wine", None, 8, evaluations=2, checkpoint_every=3, depth=2), "selu", 0
        ),
        "projected": lambda: cifar.Classification(
            ClassSettings("cnn-he", None, 8, evaluations=2, checkpoint_every=3, batch=10, projected=True), "ln", 0
        ),
    }[kind]

    def stop(step):
        if step == 7:
            raise _Killed

    with pytest.raises(_Killed):
        loop.train(made, {}, 0, tmp_path / "stopped", stop)
    steps = []
    whole = loop.train(made, {}, 0, tmp_path / "whole", lambda step: None)
    resumed = loop.train(made, {}, 0, tmp_path / "stopped", steps.append)
    assert steps == [6, 7, 8]
    for log in (whole, resumed):
        del log["seconds_per_step"]
    assert resumed == whole


class Falling(loop.Task):
    """A validation figure as given, and beside it the number of the evaluation."""

    def __init__(self, figures, patience, decays):
        self.model = nn.Linear(1, 1)
        count = len(figures)
        self.plan = loop.Plan(count, 0.1, decays, evaluations=count, lowest="valid", patience=patience)
        self.figures, self.at = figures, 0

    def loss(self, step):
        self.at = step
        return self.model(torch.ones(1, 1)).square().mean()

    def evaluate(self, final):
        return {"valid": self.figures[self.at], "test": float(self.at)}

    def places(self):
        return {"all": self.model}

    def probe(self):
        self.model(torch.ones(2, 1))


@pytest.mark.parametrize(
    ("figures", "patience", "decays", "counts", "evaluated"),
    [
        ([5, 4, 3, 2], 2, (), 3, 4),
        ([5, 3, 4, 4, 1], 2, (), 1, 4),
        ([5, 3, 4, 2, 3], 2, (), 3, 5),
        ([5, 3, 4, 4, 4], None, (), 1, 5),
        ([5, 3, 4, 4, 4, 4, 1, 1], 2, ((1 / 2, 0.5),), 1, 6),
        ([5, 3, 4, 4, 4, 2, 3, 3], 2, ((1 / 2, 0.5),), 5, 8),
    ],
)
def test_the_evaluation_with_the_lowest_figure_counts(figures, patience, decays, counts, evaluated, tmp_path):
    """The patience begins where the rate has fallen."""
    log = loop.train(lambda: Falling(figures, patience, decays), {}, 0, tmp_path, lambda step: None)
    assert log["finished"]
    assert len(log["records"]) == evaluated
    assert log["figures"] == {"valid": figures[counts], "test": counts}


def test_splits_are_by_class_and_disjoint():
    classes = torch.arange(3).repeat_interleave(torch.tensor([50, 25, 10]))
    train, test = samples.parts(classes, 0, 0.0)
    assert sorted(torch.cat([train, test]).tolist()) == list(range(85))
    assert [(classes[test] == c).sum().item() for c in range(3)] == [10, 5, 2]
    kept, held = samples.parts(classes, 0, 0.25)
    assert sorted(torch.cat([kept, held]).tolist()) == sorted(train.tolist())
    assert len(held) == 17
    assert sorted(samples.parts(classes, 1, 0.0)[1].tolist()) == sorted(test.tolist())  # whatever is chosen by
    other = samples.parts(classes, 1, 0.25)[1]
    assert sorted(other.tolist()) != sorted(held.tolist())
    assert not {*other.tolist(), *held.tolist()} & {*test.tolist()}


def test_features_are_scaled_by_the_training_samples_alone():
    found = samples.load("wine", 0, 0.0)
    torch.testing.assert_close(found.train.mean(0), torch.zeros(13), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.train.std(0), torch.ones(13), atol=1e-5, rtol=0)
    assert found.test.mean(0).abs().max() > 0.01
    assert found.classes == 3


def test_self_normalizing_networks_keep_mean_and_variance():
    torch.manual_seed(0)
    network = dense.Dense(dense.SELF_NORMALIZING, 64, 32, 10).eval()
    with torch.no_grad():
        y = network.hidden(torch.randn(2000, 64))
    assert abs(y.mean().item()) < 0.1
    assert y.var().item() == pytest.approx(1, abs=0.3)
    plain = dense.Dense("none", 64, 32, 10).eval()
    assert any(isinstance(m, nn.SELU) for m in network.modules())
    assert not any(isinstance(m, nn.SELU) for m in plain.modules())


@pytest.mark.parametrize("norm", dense.CONSTANTS)
def test_dense_networks_have_a_norm_behind_every_layer(norm):
    network = dense.Dense(norm, 30, 4, 2)
    norms = [m for m in network.modules() if isinstance(m, dk.NormalizationLayer)]
    assert len(norms) == 4
    assert {m.sigma for m in norms} == {dense.CONSTANTS[norm].sigma}
    assert {m.l1_weight for m in norms} == {dense.CONSTANTS[norm].l1_weight}
    kind = {"b": dk.BatchNorm1d, "l": dk.LayerNorm, "d": dk.DivisiveNormFeatures}[norm[0]]
    assert all(isinstance(m, kind) for m in norms)
    with pytest.raises(ValueError, match="got 'gn', expected one of none, selu"):
        dense.check_norm("gn")


def test_deep_runs_keep_the_probes_of_the_initial_network(small, tmp_path):
    settings = ClassSettings("plain", None, 2, evaluations=1, batch=10)
    logs = [
        loop.train(
            lambda rate=rate: deep.DeepClassification(replace(settings, rate=rate), "bn", 0),
            {},
            0,
            tmp_path / str(rate),
            lambda step: None,
        )
        for rate in (0.001, 0.1)
    ]
    assert logs[0]["probes"] == logs[1]["probes"]
    assert logs[0]["records"] != logs[1]["records"]
    assert {len(values) for values in logs[0]["probes"].values()} == {deep.DEPTH + 1}
    assert json.loads(json.dumps(logs[0]["probes"])) == logs[0]["probes"]


def test_groups_of_the_experiments_are_of_four_channels():
    network = Convolutional("gn", 10)
    assert [m.num_groups for m in network.modules() if isinstance(m, nn.GroupNorm)] == [8, 8, 16]


def test_layers_of_a_deep_network_have_a_bias_each_and_groups_of_one_size():
    """Of the norm where that has one, else of the convolution: dn's, and those that weights are normalized for."""
    for norm in plan.STUDIED:
        features = deep.DeepClassifier(norm, 10, None, residual=False).features
        for convolution, layer in zip(features.convolutions, features.norms, strict=True):
            own = dict(layer.named_parameters()).get("bias")
            assert (convolution.bias is None) == (own is not None), norm
            bias = convolution.bias if own is None else own
            assert bias.shape == (deep.WIDTH,), norm
            assert not bias.any(), norm
        if norm in ("gn", "evo-s0"):
            layer.train()
            x = torch.randn(2, deep.WIDTH, 6, 5)
            far = x.clone()
            far[:, deep.GROUP :] += 3  # other groups than the first, which has channels 0 to 3
            torch.testing.assert_close(layer(far)[:, : deep.GROUP], layer(x)[:, : deep.GROUP])
            near = x.clone()
            near[:, deep.GROUP - 1] *= 3
            assert not torch.allclose(layer(near)[:, 0], layer(x)[:, 0])
        assert (norm == "frn") == any("threshold" in name for name, _ in layer.named_parameters())
