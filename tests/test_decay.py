"""Which parameters decay: by name, shared and frozen ones, and what one step of an optimizer does to them."""

import pytest
import torch
from other_norms import LlamaRMSNorm
from torch import nn

from divnorm_kernels import GDN, BatchNorm2d, DivisiveNorm2d, no_decay_groups
from divnorm_kernels.weights import normalize


class NormalizedLinear(nn.Module):
    """Has a name like a norm's, and weights that are none."""

    def __init__(self):
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.dn = DivisiveNorm2d(4, 3, sigma=0.5, learn_sigma=True)
        self.bn = BatchNorm2d(4)
        self.gdn = GDN(4)
        self.torchs = nn.ModuleList([nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm((4, 2, 2)), nn.RMSNorm(4)])
        self.lrn = nn.LocalResponseNorm(2)
        self.theirs = LlamaRMSNorm(4)
        self.linear = NormalizedLinear()
        self.attention = nn.MultiheadAttention(4, 2)
        self.gate = nn.PReLU()
        self.frozen = nn.Linear(4, 4)
        self.frozen.weight.requires_grad_(False)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.linear.weight


DECAYED = {"conv.weight", "linear.weight", "linear.scale", "attention.in_proj_weight", "gate.weight"} | {
    "attention.out_proj.weight"
}
BIASES = {"conv.bias", "attention.in_proj_bias", "attention.out_proj.bias", "frozen.bias", "tied.bias"}
NORMS = {"dn.weight", "dn.bias", "dn.sigma", "bn.weight", "bn.bias", "gdn.beta", "gdn.gamma", "theirs.weight"} | {
    f"torchs.{i}.{name}" for i in range(4) for name in ("weight", "bias") if (i, name) != (3, "bias")
}


@pytest.mark.parametrize("biases", [False, True])
def test_groups_by_name(biases):
    model = Model()
    name_of = {id(p): name for name, p in model.named_parameters()}
    decayed, kept = no_decay_groups(model, 0.1, biases=biases)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    names = [[name_of[id(p)] for p in group["params"]] for group in (decayed, kept)]
    expected = [DECAYED | BIASES, NORMS] if biases else [DECAYED, NORMS | BIASES]
    assert [sorted(group) for group in names] == [sorted(group) for group in expected]


def test_a_parameter_that_a_norm_shares_does_not_decay():
    model = nn.Sequential(nn.PReLU(4), DivisiveNorm2d(4, bias=False))
    model[0].weight = model[1].weight
    decayed, kept = no_decay_groups(model, 0.1)
    assert decayed["params"] == []
    assert len(kept["params"]) == 1
    assert kept["params"][0] is model[1].weight


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("kind", ["wn", "bwn", "sws", "ws", "torch's"])
def test_gains_of_parametrized_weights_do_not_decay(kind, dim):
    layer = nn.Linear(3, 4, bias=False)
    if kind == "torch's":
        nn.utils.parametrizations.weight_norm(layer, dim=dim)
    else:
        normalize(layer, kind, dim)
    decayed, kept = no_decay_groups(layer, 0.1)
    assert [p.shape for p in decayed["params"]] == [(4, 3)]
    gains = [] if kind == "ws" else [(4, 1) if dim == 0 else (1, 3)]
    assert [p.shape for p in kept["params"]] == gains


def test_matrices_in_the_place_of_gains_decay():
    """As those of a parametrization by two factors."""

    class Product(nn.Module):
        def forward(self, a, b):
            return a @ b

        def right_inverse(self, w):
            return w[:, :2].clone(), w[:2].clone()

    layer = nn.Linear(4, 3, bias=False)
    nn.utils.parametrize.register_parametrization(layer, "weight", Product())
    decayed, kept = no_decay_groups(layer, 0.1)
    assert (len(decayed["params"]), len(kept["params"])) == (2, 0)


def test_a_step_of_adamw():
    """Without gradients' share: by lr * weight_decay, or not at all."""
    model = Model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(no_decay_groups(model, 0.5), lr=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (1 - 0.1 * 0.5 if name in DECAYED else 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([nn.Parameter(torch.ones(1))], 0.1), "model: got list, expected a torch.nn.Module"),
        ((nn.Linear(1, 1), "0.1"), "weight_decay: got '0.1' of type str, expected a number of at least 0"),
        ((nn.Linear(1, 1), -0.1), "weight_decay: got -0.1, expected a number of at least 0"),
        ((nn.Linear(1, 1), 0.1, 1), "biases: got 1 of type int, expected a bool"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        no_decay_groups(*arguments)
