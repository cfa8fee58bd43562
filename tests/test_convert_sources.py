"""Which modules are normalization layers: those of other libraries by what they compute, and what is left alone."""

import warnings
from functools import partial

import pytest
import torch
from other_norms import (
    ActBeforeDropNorm,
    AlwaysEvaluatingNorm,
    BatchNormAct2d,
    BiasedRMSNorm,
    DetachedLayerNorm,
    DetachedRMSNorm,
    DoublingNorm,
    FrozenBatchNorm2d,
    GatedRMSNorm,
    GemmaRMSNorm,
    GroupNormOfAnySize,
    HalfTrackedNorm,
    LayerNorm2d,
    LayerNorm32,
    LayerNormNd,
    LlamaRMSNorm,
    LpNorm,
    OtherEpsNorm,
    RmsNorm2d,
    SlowBatchNorm2d,
    StandardizedInstanceNorm1d,
)
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import divnorm_kernels as dk
from divnorm_kernels import convert_norm

pytestmark = pytest.mark.filterwarnings("ignore:convert_norm. not carried over:UserWarning")


def randomized(layer):
    for name, t in (*layer.named_parameters(), *layer.named_buffers()):
        if t.is_floating_point():
            nn.init.uniform_(t, 0.5, 1.5) if "var" in name else nn.init.normal_(t)
    return layer


FOUND = [
    (LlamaRMSNorm(8), "rms", dk.RMSNorm, (2, 3, 8)),
    (LayerNorm2d(8, eps=1e-3), "ln", dk.PositionalNorm2d, (2, 8, 3, 5)),
    (LayerNorm2d(8, bias=False), "ln", dk.PositionalNorm2d, (2, 8, 3, 5)),
    (LayerNormNd(8, eps=1e-3), "ln", dk.DivisiveNorm, (2, 8, 5)),
    (RmsNorm2d(8, eps=1e-3), "rms", dk.DivisiveNorm2d, (2, 8, 3, 5)),
    (RmsNorm2d(8), "rms", dk.DivisiveNorm2d, (2, 8, 3, 5)),
    (LayerNorm32(8, eps=1e-3), "ln", dk.LayerNorm, (2, 3, 8)),
    (LayerNorm32((4, 5)), "ln", dk.LayerNorm, (2, 4, 5)),
    (LayerNorm32(8, elementwise_affine=False), "ln", dk.LayerNorm, (2, 3, 8)),
    (GroupNormOfAnySize(2, 8), "gn", dk.GroupNorm, (2, 8, 5)),
    (StandardizedInstanceNorm1d(8, eps=1e-3), "in", dk.InstanceNorm1d, (2, 8, 5)),
    (BatchNormAct2d(8, momentum=None), "bn", dk.BatchNorm2d, (2, 8, 3, 5)),
    (BatchNormAct2d(8, track_running_stats=False), "bn", dk.BatchNorm2d, (2, 8, 3, 5)),
    (BatchNormAct2d(8, act=nn.ReLU(inplace=True)), "bn", dk.BatchNorm2d, (2, 8, 3, 5)),
    (BatchNormAct2d(8, act=nn.SiLU(inplace=True)), "bn", dk.BatchNorm2d, (2, 8, 3, 5)),
    (BatchNormAct2d(8, act=nn.PReLU(), affine=False), "bn", dk.BatchNorm2d, (2, 8, 3, 5)),
    (BatchNormAct2d(8, drop=nn.Hardtanh(), act=nn.ReLU()), "bn", dk.BatchNorm2d, (2, 8, 3, 5)),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("layer", "to", "kind", "shape"), FOUND, ids=[f"{type(f[0]).__name__}-{i}" for i, f in enumerate(FOUND)]
)
def test_another_librarys_layer_is_known_by_what_it_computes(layer, to, kind, shape, training):
    layer = randomized(layer).train(training)
    new = convert_norm(layer, to, inplace=False, report=None)
    assert type(new) is kind
    for scale in (1.0, 1e-2):
        x = (torch.randn(shape) + 0.5) * scale
        torch.testing.assert_close(new(x), layer(x), rtol=1e-4, atol=1e-5)
    assert new.state_dict().keys() == layer.state_dict().keys()
    for key, t in layer.state_dict().items():
        torch.testing.assert_close(new.state_dict()[key], t)


def test_what_follows_goes_along():
    act, drop = nn.SiLU(), nn.Dropout(0.5)
    new = convert_norm(BatchNormAct2d(8, drop, act), "dn", report=None)
    assert new.drop is drop
    assert new.act is act
    x = torch.randn(2, 8, 3, 5)
    plain = dk.DivisiveNorm2d(8)
    torch.testing.assert_close(new.eval()(x), F.silu(plain(x)))
    again = convert_norm(new, "bn", report=None)
    assert (again.act, again.followed_by) == (act, ("drop", "act"))
    assert again.eps != again.eps, "NaN: more than eps tells"
    bare = convert_norm(again, "none", report=None)
    torch.testing.assert_close(bare(x), F.silu(x))
    foreign = convert_norm(BatchNormAct2d(8, act=act), nn.InstanceNorm2d, report=None)
    torch.testing.assert_close(foreign(x), F.silu(F.instance_norm(x)))
    other = convert_norm(BatchNormAct2d(8, act=act), "dn", activation="relu", report=None)
    torch.testing.assert_close(other(x), plain(x).relu())
    fused = convert_norm(BatchNormAct2d(8, act=nn.ReLU()), "dn", report=None)
    assert (fused.activation, fused.followed_by) == ("relu", ())
    torch.testing.assert_close(convert_norm(fused, "none", report=None)(x), x.relu())
    watched = nn.ReLU()
    watched.register_forward_hook(lambda *_: None)
    assert convert_norm(BatchNormAct2d(8, act=watched), "dn", report=None).act is watched


def test_graphs_of_a_layer_with_what_follows():
    model = nn.Sequential(convert_norm(BatchNormAct2d(4, act=nn.SiLU(inplace=True)), "dn", report=None))
    x = torch.randn(2, 4, 5, 5)
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    exported = torch.export.export(model, (x,)).module()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for graph in (traced, exported, compiled):
        torch.testing.assert_close(graph(x), model(x))
        torch.testing.assert_close(
            torch.autograd.grad(graph(x).sum(), list(graph.parameters())),
            torch.autograd.grad(model(x).sum(), list(model.parameters())),
        )


def on_the_instance():
    layer = nn.BatchNorm2d(4)
    layer.forward = lambda x: x
    return layer


def with_a_module():
    layer = nn.BatchNorm2d(4)
    layer.adapter = nn.Linear(4, 4)
    return layer


def with_a_parameter():
    layer = LayerNorm2d(4)
    layer.gate = nn.Parameter(torch.ones(4))
    return layer


UNKNOWN = "computes no normalization that has a name here"
LEFT = [
    (lambda: GemmaRMSNorm(8), UNKNOWN),
    (lambda: OtherEpsNorm(8, eps=1e-6), UNKNOWN),
    (lambda: GatedRMSNorm(8), UNKNOWN),
    (lambda: SlowBatchNorm2d(8), UNKNOWN),
    (lambda: HalfTrackedNorm(8), UNKNOWN),
    (lambda: ActBeforeDropNorm(8), UNKNOWN),
    (LpNorm, UNKNOWN),
    (lambda: DetachedLayerNorm(8), UNKNOWN),
    (lambda: DetachedRMSNorm(8), UNKNOWN),
    (lambda: AlwaysEvaluatingNorm(8), "has methods of its own, train"),
    (lambda: DoublingNorm(8), "has methods of its own, __call__"),
    (lambda: nn.LocalResponseNorm(3), UNKNOWN),
    (nn.LazyBatchNorm2d, "is lazy: run the model once first"),
    (on_the_instance, "has a forward set on the instance"),
    (with_a_module, "has modules of its own, adapter"),
    (with_a_parameter, "has parameters or buffers of its own, gate"),
]


@pytest.mark.parametrize(("make", "reason"), LEFT, ids=[make().__class__.__name__ for make, _ in LEFT])
def test_what_is_not_known_is_left_and_named(make, reason):
    layer = make()
    model = nn.Sequential(layer, nn.Sequential(make()))
    with pytest.warns(
        UserWarning, match=rf"^convert_norm: left as it is: {type(layer).__name__} \(0, 1\.0\) {reason}$"
    ):
        convert_norm(model, "dn", report=None)
    assert model[0] is layer


def test_a_bias_stays_in_a_root_mean_square_normalization():
    layer, x = BiasedRMSNorm(8), torch.randn(3, 5, 8)
    for p in layer.parameters():
        nn.init.normal_(p)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new = convert_norm(layer, "rms", report=None)
    torch.testing.assert_close(new(x), layer(x), rtol=1e-5, atol=1e-6)
    assert new.bias is layer.bias


def test_parametrized_layers_are_left():
    layer = nn.BatchNorm1d(4)
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Softplus())
    with pytest.warns(UserWarning, match=r"left as it is: ParametrizedBatchNorm1d \(model\) is parametrized"):
        assert convert_norm(layer, "dn", report=None) is layer
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.BatchNorm1d(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_norm(model, "dn", report=None)


def test_a_lazy_layer_that_has_run():
    model = nn.Sequential(nn.LazyBatchNorm2d())
    model(torch.randn(2, 4, 3, 3))
    assert type(convert_norm(model, "bn", report=None)[0]) is dk.BatchNorm2d


def test_statistics_that_never_move():
    frozen, x = FrozenBatchNorm2d(8), torch.randn(2, 8, 3, 5)
    for to in ("bn", nn.BatchNorm2d, partial(nn.BatchNorm2d, momentum=0.2)):
        with pytest.warns(UserWarning, match=r"FrozenBatchNorm2d \(model\) has statistics that never move"):
            assert convert_norm(frozen, to, report=None) is frozen
    new = convert_norm(frozen, "gn", report=None)
    torch.testing.assert_close(new(x), F.group_norm(x, 8, frozen.weight, frozen.bias, 1e-3), rtol=1e-4, atol=1e-5)
    assert all(p.requires_grad for p in new.parameters())


def test_nothing_found():
    with pytest.warns(
        UserWarning, match="nothing to replace; modules that look like normalization: BatchNorm1d, LlamaRMSNorm"
    ):
        convert_norm(nn.Sequential(nn.BatchNorm1d(4), LlamaRMSNorm(4)), "dn", only="layer1.*", report=None)
    with pytest.warns(UserWarning, match="nothing to replace; modules that look like normalization: none"):
        convert_norm(nn.Linear(3, 3), "dn", report=None)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_looking_changes_nothing(device):
    """The module is not called, and random numbers are what they were."""
    layer = BatchNormAct2d(8, act=nn.SiLU(), device=device)
    for module in (layer, layer.act):
        module.register_forward_hook(lambda *_: pytest.fail("called"))
    before, state = {key: t.clone() for key, t in layer.state_dict().items()}, torch.get_rng_state()
    with torch.device("meta"):
        new = convert_norm(layer, "bn", report=None)
    assert type(new) is dk.BatchNorm2d
    assert {t.device.type for t in new.state_dict().values()} == {device}
    assert torch.equal(torch.get_rng_state(), state)
    for key, t in layer.state_dict().items():
        assert t.is_meta or torch.equal(t, before[key])
