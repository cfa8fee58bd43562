"""The inputs with which torch tests its own layers, through ours of the same name: values, gradients and buffers."""

from inspect import signature

import pytest
import torch
from torch import nn
from torch.testing._internal.common_modules import module_db

import divnorm_kernels as dk

ROWS = [
    (info, training, i)
    for info in module_db
    if isinstance(getattr(dk, info.module_cls.__name__, None), type)
    for training in (True, False)
    for i in range(len(info.module_inputs_func(info, "cpu", torch.float64, True, training)))
]


def ran(make, row, seed):
    """What a layer of a row gives in two calls: everything that a user may look at, by name."""
    info, training, i = row
    torch.manual_seed(seed)
    given = info.module_inputs_func(info, "cpu", torch.float64, True, training)[i]
    constructor, forward = given.constructor_input, given.forward_input
    factory = {"dtype": torch.float64} if "dtype" in signature(info.module_cls).parameters else {}
    layer = make(*constructor.args, **constructor.kwargs | factory).train(training)
    for t in layer.state_dict().values():
        if t.is_floating_point():
            t.uniform_(0.5, 2.0)
    found = {}
    for call in range(2):
        y = layer(*forward.args, **forward.kwargs)
        leaves = {"x": forward.args[0], **dict(layer.named_parameters())}
        gradients = torch.autograd.grad(y, leaves.values(), torch.randn_like(y), allow_unused=True)
        found[f"y, call {call}"] = y
        found |= {f"d{name}, call {call}": t for name, t in zip(leaves, gradients, strict=True)}
    return found | layer.state_dict()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0].name}-{'train' if row[1] else 'eval'}-{row[2]}")
def test_torchs_own_inputs(row):
    theirs = row[0].module_cls
    ours = getattr(dk, theirs.__name__)
    assert issubclass(ours, theirs)
    expected = ran(theirs, row, seed=0)
    found = ran(ours, row, seed=0)
    assert list(found) == list(expected)
    for name, t in expected.items():
        if t is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(found[name], t, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_all_of_torchs_layers_that_we_have_are_among_them():
    names = {row[0].module_cls for row in ROWS}
    kinds = {f"{kind}{dims}d" for kind in ("BatchNorm", "InstanceNorm") for dims in "123"}
    assert names == {getattr(nn, name) for name in (*kinds, "GroupNorm", "LayerNorm", "LocalResponseNorm", "RMSNorm")}
