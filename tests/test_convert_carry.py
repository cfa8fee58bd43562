"""What a replaced layer leaves to the one in its place: every option of every layer, and what others hold of it."""

import copy
import pickle
import warnings
from functools import partial
from inspect import signature

import pytest
import torch
from torch import nn

import divnorm_kernels as dk
from divnorm_kernels import convert_norm

pytestmark = pytest.mark.filterwarnings("ignore:convert_norm. not carried over:UserWarning")

CHANNELS = 8
BATCH = {"eps": 1e-2, "momentum": 0.01, "affine": False, "bias": False, "track_running_stats": False}
INSTANCE = {"eps": 1e-2, "affine": True, "track_running_stats": True}
OURS = {"sigma": 0.3, "learn_sigma": True, "l1_weight": 0.1, "activation": "relu", "backend": "reference"}
WINDOWED = {"affine": False, "bias": False, **OURS}
LAYER = {"eps": 1e-2, "elementwise_affine": False, "bias": False}
RMS = {"eps": 1e-2, "elementwise_affine": False}

OPTIONS = {
    **{getattr(nn, f"BatchNorm{n}d"): BATCH for n in (1, 2, 3)},
    nn.SyncBatchNorm: {key: BATCH[key] for key in ("eps", "momentum", "affine", "track_running_stats")},
    **{getattr(nn, f"InstanceNorm{n}d"): INSTANCE for n in (1, 2, 3)},
    partial(nn.GroupNorm, 2): {"eps": 1e-2, "affine": False},
    nn.LayerNorm: LAYER,
    nn.RMSNorm: RMS,
    **{getattr(dk, f"BatchNorm{n}d"): BATCH | OURS for n in (1, 2, 3)},
    **{getattr(dk, f"InstanceNorm{n}d"): INSTANCE | OURS for n in (1, 2, 3)},
    partial(dk.GroupNorm, 2): {"eps": 1e-2, "affine": False, "bias": False, **OURS},
    dk.LayerNorm: LAYER | OURS,
    partial(dk.RMSNorm, sigma=0.1): {"elementwise_affine": False, **OURS},
    dk.PositionalNorm2d: WINDOWED,
    dk.LocalContrastNorm2d: WINDOWED,
    dk.DivisiveNormFeatures: WINDOWED,
    **{kind: WINDOWED for kind in (dk.DivisiveNorm, dk.DivisiveNorm1d, dk.DivisiveNorm2d, dk.DivisiveNorm3d)},
}
FAMILIES = ("bn", "ln", "gn", "in", "rms", "dn", "dn-mean-only")


def described(make):
    return make.func if isinstance(make, partial) else make


def takes(make, option):
    """Older torch's layers have no option ``bias``."""
    return option in signature(described(make)).parameters or option in OURS


ROWS = [(make, option) for make, options in OPTIONS.items() for option in options if takes(make, option)]


def family(layer):
    kinds = {"BatchNorm": "bn", "SyncBatchNorm": "bn", "InstanceNorm": "in", "GroupNorm": "gn", "LayerNorm": "ln"}
    kinds |= {"PositionalNorm": "ln", "RMSNorm": "rms"}
    return kinds.get(type(layer).__name__.rstrip("123d"), "dn")


def converted(layer, to, **options):
    """The new layer, and the words of the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        new = convert_norm(layer, to, report=None, **options)
    return new, " ".join(str(w.message) for w in caught)


def must_be_carried(layer, option, to):
    """By the table of the page on recipes."""
    source, target = family(layer), to.removesuffix("-mean-only")
    if option in ("momentum", "track_running_stats"):
        return source == target
    if option in ("eps", "sigma"):
        return (source == "dn") == (target == "dn")
    return True


def value(layer, option):
    if option in ("affine", "elementwise_affine", "bias"):
        return getattr(layer, "bias" if option == "bias" else "weight") is not None
    if option in ("eps", "sigma") and isinstance(layer, dk.NormalizationLayer):
        return layer.initial_sigma if option == "sigma" else layer.initial_sigma**2
    return getattr(layer, option, None)


@pytest.mark.parametrize(
    ("make", "option"), ROWS, ids=[f"{described(m).__module__[:5]}-{described(m).__name__}-{o}" for m, o in ROWS]
)
def test_every_option_is_carried_or_named(make, option):
    for to in FAMILIES:
        layer = make(CHANNELS, **{option: OPTIONS[make][option]})
        last = hasattr(layer, "normalized_shape") or isinstance(layer, dk.DivisiveNormFeatures)
        if last and to in ("gn", "in"):
            continue
        had = value(layer, option)
        new, words = converted(copy.deepcopy(layer), to)
        if must_be_carried(layer, option, to):
            assert value(new, option) == pytest.approx(had), (to, new)
            assert f"{option}=" not in words
        elif value(new, option) != had:
            if option == "eps" and isinstance(layer, dk.NormalizationLayer):
                option, had = "sigma", layer.sigma
            assert f"{option}={had!r}" in words, (to, new, words)


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, dk.BatchNorm2d, partial(nn.InstanceNorm2d, track_running_stats=True)])
def test_no_momentum_is_one_too(kind):
    layer = kind(4, momentum=None)
    assert convert_norm(layer, family(layer), report=None).momentum is None


FIELDS = {"window": 3, "norm_window": 7, "edges": "zero", "sigma": 0.3}
WINDOWS = [
    (partial(dk.DivisiveNorm, **FIELDS, groups=2), "dn"),
    (partial(dk.DivisiveNorm1d, **FIELDS, groups=2), "dn"),
    (partial(dk.DivisiveNorm2d, **FIELDS, groups=2), dk.DivisiveNorm2d),
    (partial(dk.DivisiveNorm3d, **FIELDS, groups=2), "dn"),
    (partial(dk.DivisiveNormFeatures, **FIELDS), "dn"),
    (partial(dk.LocalContrastNorm2d, **FIELDS), dk.LocalContrastNorm2d),
    (partial(dk.DivisiveNorm2d, window=3, norm_window=None, sigma=0.3), "dn-mean-only"),
    (partial(dk.DivisiveNorm2d, window=3, norm_window=None, sigma=0.3), dk.DivisiveNorm2d),
]


@pytest.mark.parametrize(("make", "to"), WINDOWS, ids=lambda v: getattr(getattr(v, "func", v), "__name__", v))
def test_windows_go_to_windows(make, to):
    layer = make(CHANNELS)
    new = convert_norm(layer, to, report=None)
    assert new is not layer
    assert repr(new) == repr(layer)


def test_windows_of_a_channel_become_windows_of_all():
    new = convert_norm(dk.LocalContrastNorm2d(4, window=3), "dn", report=None)
    assert (new.window, new.groups) == (3, 1)


def test_groups_go_to_groups_and_what_was_asked_for_comes_first():
    assert convert_norm(nn.GroupNorm(4, 64), "gn", report=None).num_groups == 4
    assert convert_norm(nn.GroupNorm(4, 64), dk.GroupNorm, report=None).num_groups == 4
    assert convert_norm(nn.GroupNorm(4, 64), partial(dk.GroupNorm, 8), report=None).num_groups == 8
    assert convert_norm(nn.GroupNorm(4, 64), "gn", num_groups=2, report=None).num_groups == 2
    assert convert_norm(nn.BatchNorm2d(64), dk.GroupNorm, report=None).num_groups == 32
    old = dk.BatchNorm2d(4, sigma=0.3, momentum=0.01, l1_weight=0.2, activation="relu")
    new, words = converted(old, "bn*", momentum=0.5, activation=None)
    assert (new.sigma, new.momentum, new.l1_weight, new.activation) == (1.0, 0.5, 0.01, None)
    assert not words
    new = convert_norm(
        nn.BatchNorm2d(4, eps=0.1, affine=False), partial(dk.BatchNorm2d, affine=True, eps=0.2), report=None
    )
    assert new.eps == pytest.approx(0.2)
    assert torch.equal(new.weight, torch.ones(4))
    assert convert_norm(nn.BatchNorm2d(4), "bn*", eps=0.25, report=None).sigma == 0.5
    assert convert_norm(nn.BatchNorm2d(4), partial(dk.BatchNorm2d, eps=0.2), sigma=0.3, report=None).sigma == 0.3
    both = convert_norm(nn.Sequential(nn.LayerNorm(4), nn.GroupNorm(2, 4)), "ln", affine=False, report=None)
    assert [layer.weight for layer in both] == [None, None]
    assert convert_norm(nn.RMSNorm(4), "rms", report=None).sigma is None


def test_a_learned_sigma_is_the_same_parameter():
    old = dk.LayerNorm(4, sigma=0.3, learn_sigma=True)
    parameter = old.sigma
    parameter.data.fill_(0.7)
    for to in ("bn", "ln", "rms", "dn"):
        new = convert_norm(copy.copy(old), to, report=None)
        assert new.sigma is parameter
        assert new.initial_sigma == 0.3
    assert convert_norm(copy.copy(old), "dn", learn_sigma=False, report=None).sigma == pytest.approx(0.7)
    assert convert_norm(copy.copy(old), "ln-s", report=None).sigma.item() == 1.0


def test_what_other_classes_have_not_is_named():
    new, words = converted(nn.BatchNorm2d(4, momentum=0.01, eps=1e-3), nn.BatchNorm2d)
    assert type(new) is nn.BatchNorm2d
    assert "not carried over: eps=0.001, momentum=0.01 of BatchNorm2d -> BatchNorm2d (model)" in words
    assert not converted(nn.BatchNorm2d(4, momentum=0.01), partial(nn.BatchNorm2d, momentum=0.01))[1]
    assert "not carried over: bias of LayerNorm -> RMSNorm" in converted(nn.LayerNorm(4), "rms")[1]
    assert "not carried over: weight, bias of" in converted(nn.LayerNorm((4, 5, 5)), "bn")[1]
    new, words = converted(dk.BatchNorm2d(4, activation="relu", l1_weight=0.1), nn.BatchNorm2d)
    assert [type(m) for m in new] == [nn.BatchNorm2d, nn.ReLU]
    assert "l1_weight=0.1" in words


def network():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=0.01), nn.Conv2d(8, 4, 1), nn.GroupNorm(2, 4))


@pytest.mark.parametrize("to", ["bn", "gn", "ln*", "dn", "rms"])
def test_an_optimizer_made_before_trains_the_new_layers(to):
    model, x = network(), torch.randn(4, 3, 8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(x).square().sum().backward()
    optimizer.step()
    held = list(model.parameters())
    model[1].bias.requires_grad_(False)
    convert_norm(model, to, report=None)
    assert all(a is b for a, b in zip(model.parameters(), held, strict=True))
    assert not model[1].bias.requires_grad
    before = model[1].weight.clone()
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()
    assert (model[1].weight - before).abs().min() > 0


@pytest.mark.parametrize("to", ["bn", "dn", nn.BatchNorm2d])
def test_hooks_stay_and_their_handles_remove_them(to):
    model, x, calls = network(), torch.randn(4, 3, 8, 8), []
    layer = model[1]
    handles = [
        layer.register_forward_pre_hook(lambda m, args: calls.append("before")),
        layer.register_forward_hook(lambda m, args, kwargs, y: calls.append("behind"), with_kwargs=True),
        layer.register_full_backward_hook(lambda m, dx, dy: calls.append("gradient")),
        layer.register_state_dict_pre_hook(lambda m, prefix, keep: calls.append("state")),
        layer.register_load_state_dict_pre_hook(lambda m, *_: calls.append(f"load into {type(m).__name__}")),
    ]
    convert_norm(model, to, only="1", report=None)
    assert model[1] is not layer
    kind = type(model[1]).__name__
    del layer
    everything = ["before", "behind", "gradient", "state", f"load into {kind}"]
    for expected in (everything, []):
        model(x).sum().backward()
        model.load_state_dict(model.state_dict())
        assert calls == expected
        calls.clear()
        for handle in handles:
            handle.remove()


def test_names_and_copies():
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GroupNorm(2, 8), nn.SyncBatchNorm(8))
    kept = {"0.weight", "0.bias", "1.weight", "2.weight", "2.bias", "3.weight", "3.bias"}
    statistics = {f"{at}.{name}" for at in "13" for name in ("running_mean", "running_var", "num_batches_tracked")}
    for to in ("dn", "bn", "dn-mean-only", "rms", "bn"):
        convert_norm(model, to, only=lambda name, _: name in "13", report=None)
        keys = set(model.state_dict())
        assert keys - {"1.bias"} == kept | (statistics if to == "bn" else set())
    again = pickle.loads(pickle.dumps(copy.deepcopy(model))).train()
    x = torch.randn(5, 6)
    torch.testing.assert_close(again(x), model.train()(x))


def test_one_layer_of_a_model_in_eval_mode_stays_there():
    model = network().train()
    model[1].eval()
    convert_norm(model, "bn", report=None)
    assert [m.training for m in model] == [True, False, True, True]


def test_statistics_of_another_dtype_stay_so():
    layer = nn.BatchNorm2d(4).bfloat16()
    layer.running_mean = torch.full((4,), 1 / 3)
    for to, options, dtype in (("bn", {}, torch.float32), (nn.BatchNorm2d, {"dtype": torch.float64}, torch.float64)):
        new = convert_norm(layer, to, inplace=False, report=None, **options)
        assert new.running_mean.dtype == dtype
        torch.testing.assert_close(new.running_mean, layer.running_mean, check_dtype=False)
        assert new.weight.dtype == options.get("dtype", torch.bfloat16)
