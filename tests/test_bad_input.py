"""Bad input raises before any kernel runs, and the message names the argument, what it got and what was expected."""

import math
import re

import pytest
import torch

from divnorm_kernels import (
    BatchNorm2d,
    DivisiveNorm1d,
    DivisiveNorm2d,
    DivisiveNorm3d,
    DivisiveNormFeatures,
    GroupNorm,
    LayerNorm,
    LocalContrastNorm2d,
    Span,
    divisive_norm,
)

X = torch.randn(2, 6, 5, 5)


def meta(*shape):
    return torch.empty(shape, device="meta")


CALLS = {
    "x is no tensor": ({"x": [1.0]}, TypeError, "x: got list, expected a Tensor"),
    "x of integers": (
        {"x": torch.ones(2, 3, 4, dtype=torch.int64)},
        TypeError,
        "x: got dtype torch.int64, expected one of",
    ),
    "x of too few dimensions": ({"x": torch.ones(3)}, ValueError, "x: got 1 dimensions, shape (3,), expected (N, F)"),
    "x of too many dimensions": ({"x": torch.ones(1, 1, 1, 1, 1, 1)}, ValueError, "x: got 6 dimensions"),
    "window zero": ({"window": 0}, ValueError, "window: got 0, expected a positive int"),
    "window negative in a tuple": ({"window": (3, -1)}, ValueError, "window: got (3, -1), expected a positive int"),
    "window of too many entries": ({"window": (3, 3, 3)}, ValueError, "window: got (3, 3, 3) with 3 entries, expected"),
    "window a float": ({"window": 3.0}, TypeError, "window: got 3.0 of type float, expected a positive int"),
    "window a bool": ({"window": True}, TypeError, "window: got True of type bool, expected a positive int"),
    "window a word": ({"window": "same"}, ValueError, "window: got 'same', expected a positive int"),
    "window a list with a float": ({"window": [3, 3.0]}, TypeError, "window: got (3, 3.0) of type float, expected"),
    "window a long list": ({"window": [3, 3, 3]}, ValueError, "window: got (3, 3, 3) with 3 entries, expected"),
    "window a dict": ({"window": {3: 3}}, TypeError, "window: got {3: 3} of type dict, expected a positive int"),
    "window huge": ({"window": 10**30}, ValueError, f'window: got {10**30}, expected at most 2147483647; "all" covers'),
    "window None in a tuple": ({"window": (3, None)}, TypeError, "window: got (3, None) of type NoneType"),
    "norm_window zero": ({"norm_window": 0}, ValueError, "norm_window: got 0, expected a positive int"),
    "norm_window a float": ({"norm_window": 2.5}, TypeError, "norm_window: got 2.5 of type float, expected"),
    "norm_window huge in a tuple": (
        {"norm_window": (3, 2**31)},
        ValueError,
        "norm_window: got (3, 2147483648), expected at most 2147483647",
    ),
    "norm_window a word": ({"norm_window": "full"}, ValueError, "norm_window: got 'full', expected a positive int"),
    "groups do not divide": ({"groups": 4}, ValueError, "groups: got 4, expected a positive divisor of the 6 channels"),
    "groups zero": ({"groups": 0}, ValueError, "groups: got 0, expected a positive int"),
    "groups a float": ({"groups": 2.0}, TypeError, "groups: got 2.0 of type float, expected a positive int"),
    "groups of features": (
        {"x": torch.ones(2, 6), "groups": 2},
        ValueError,
        "groups: got 2, expected 1 for x of shape (N, F)",
    ),
    "edges": ({"edges": "same"}, ValueError, 'edges: got \'same\', expected "valid" or "zero"'),
    "edges a list": ({"edges": ["valid"]}, TypeError, "edges: got ['valid'] of type list"),
    "over_batch": ({"over_batch": 1}, TypeError, "over_batch: got 1 of type int, expected a bool"),
    "activation": ({"activation": "selu"}, ValueError, "activation: got 'selu', expected None or one of 'relu', 'tlu'"),
    "activation a bool": ({"activation": True}, TypeError, "activation: got True of type bool, expected None or"),
    "p below one": ({"p": 0.5}, ValueError, "p: got 0.5, expected a number of at least 1, or inf"),
    "p not a number": ({"p": math.nan}, ValueError, "p: got nan, expected a number of at least 1, or inf"),
    "p a bool": ({"p": True}, TypeError, "p: got True of type bool, expected a number of at least 1, or inf"),
    "p a word": ({"p": "inf"}, TypeError, "p: got 'inf' of type str, expected a number of at least 1, or inf"),
    "p a tensor": ({"p": torch.tensor(2)}, TypeError, "p: got tensor(2) of type Tensor, expected a number of at least"),
    "p beyond a float": ({"p": 10**400}, ValueError, "p: got an int of 1329 bits, expected a number of at least 1"),
    "subtract_mean": ({"subtract_mean": 1}, TypeError, "subtract_mean: got 1 of type int, expected a bool"),
    "residual no tensor": ({"residual": 1.0}, TypeError, "residual: got float, expected a Tensor or None"),
    "residual of another shape": (
        {"residual": X[:1]},
        ValueError,
        "residual: got shape (1, 6, 5, 5), expected that of x, (2, 6, 5, 5)",
    ),
    "residual in half": (
        {"residual": X.half()},
        TypeError,
        "residual: got dtype torch.float16, expected that of x, torch",
    ),
    "residual elsewhere": (
        {"residual": meta(2, 6, 5, 5)},
        ValueError,
        "residual: got device meta, expected that of x,",
    ),
    "residual sparse": (
        {"residual": X.to_sparse()},
        TypeError,
        "residual: got layout torch.sparse_coo, expected torch.",
    ),
    "threshold absent": (
        {"activation": "tlu"},
        ValueError,
        'threshold: got None, expected a Tensor of shape (6,) for activation "tlu"',
    ),
    "threshold of nothing": (
        {"threshold": torch.ones(6), "activation": "relu"},
        ValueError,
        "threshold: got Tensor with activation 'relu', expected None",
    ),
    "threshold of another size": (
        {"threshold": torch.ones(5), "activation": "tlu"},
        ValueError,
        "threshold: got shape (5,), expected (6,), one per channel of x",
    ),
    "threshold no tensor": (
        {"threshold": 0.0, "activation": "tlu"},
        TypeError,
        "threshold: got float, expected a Tensor of shape",
    ),
    "threshold in half": (
        {"threshold": torch.ones(6).half(), "activation": "tlu"},
        TypeError,
        "threshold: got dtype torch.float16, expected torch.float32",
    ),
    "return_l1": ({"return_l1": 1}, TypeError, "return_l1: got 1 of type int, expected a bool"),
    "weight of another size": (
        {"weight": torch.ones(5)},
        ValueError,
        "weight: got shape (5,), expected (6,), one per channel of x",
    ),
    "weight without numbers": ({"weight": torch.ones(0)}, ValueError, "weight: got shape (0,), expected (6,)"),
    "bias without numbers": ({"bias": torch.ones(0)}, ValueError, "bias: got shape (0,), expected (6,)"),
    "sigma without numbers": ({"sigma": torch.ones(0)}, ValueError, "sigma: got shape (0,), expected () or (1,)"),
    "weight of another rank": ({"weight": torch.ones(6, 1)}, ValueError, "weight: got shape (6, 1), expected (6,)"),
    "weight of features": (
        {"x": torch.ones(2, 7), "weight": torch.ones(1)},
        ValueError,
        "weight: got shape (1,), expected (7,), one per feature of x",
    ),
    "weight no tensor": ({"weight": 1.0}, TypeError, "weight: got float, expected a Tensor or None"),
    "weight in double": (
        {"weight": torch.ones(6).double()},
        TypeError,
        "weight: got dtype torch.float64, expected torch.float32 for x of torch.float32",
    ),
    "weight in another half": (
        {"x": X.bfloat16(), "weight": torch.ones(6).half()},
        TypeError,
        "weight: got dtype torch.float16, expected torch.bfloat16 or torch.float32",
    ),
    "weight elsewhere": ({"weight": meta(6)}, ValueError, "weight: got device meta, expected that of x, cpu"),
    "bias of another size": (
        {"bias": torch.ones(7)},
        ValueError,
        "bias: got shape (7,), expected (6,), one per channel of x",
    ),
    "bias no tensor": ({"bias": [0.0]}, TypeError, "bias: got list, expected a Tensor or None"),
    "bias in half": (
        {"bias": torch.ones(6).half()},
        TypeError,
        "bias: got dtype torch.float16, expected torch.float32",
    ),
    "bias elsewhere": ({"bias": meta(6)}, ValueError, "bias: got device meta, expected that of x, cpu"),
    "sigma of another shape": (
        {"sigma": torch.ones(3), "groups": 2},
        ValueError,
        "sigma: got shape (3,), expected () or (2,), one per group",
    ),
    "sigma in double": (
        {"sigma": torch.ones(()).double()},
        TypeError,
        "sigma: got dtype torch.float64, expected torch.float32",
    ),
    "sigma elsewhere": ({"sigma": meta()}, ValueError, "sigma: got device meta, expected that of x, cpu"),
    "sigma a word": ({"sigma": "1"}, TypeError, "sigma: got '1' of type str, expected a float or a Tensor"),
    "sigma beyond a float": ({"sigma": 10**400}, ValueError, "sigma: got an int of 1329 bits, expected a float or a"),
    "sigma not a number": ({"sigma": math.nan}, ValueError, "sigma: got nan, expected a float or a Tensor"),
    "sigma None": ({"sigma": None}, TypeError, "sigma: got None of type NoneType, expected a float or a Tensor"),
    "backend unknown": ({"backend": "gpu"}, ValueError, "backend: got 'gpu', expected None or one of 'cpu'"),
    "backend a module": ({"backend": 3}, TypeError, "backend: got 3 of type int, expected a str or None"),
    "backend missing": ({"backend": "cuda"}, RuntimeError, "backend: got 'cuda', which cannot serve this call: "),
    "backend of another device": (
        {"x": meta(2, 6, 5, 5), "backend": "cpu"},
        RuntimeError,
        "backend: got 'cpu', which cannot serve this call: x is on meta",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_call(name):
    arguments, error, message = CALLS[name]
    arguments = {"x": X, "window": 3, **arguments}
    with pytest.raises(error, match="^" + re.escape(message)):
        divisive_norm(**arguments)


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ({"window": 5}, {"window": 5.0}),
        ({"window": 1}, {"window": True}),
        ({"norm_window": 1}, {"norm_window": True}),
        ({"window": (5, 3)}, {"window": (5.0, 3)}),
        ({"window": (5, 1)}, {"window": (5, True)}),
        ({"window": [5, 3]}, {"window": [5.0, 3]}),
        ({"norm_window": ("all", 1)}, {"norm_window": ("all", 1.0)}),
        ({"groups": 1}, {"groups": True}),
        ({"groups": 2}, {"groups": 2.0}),
        ({"over_batch": True}, {"over_batch": 1}),
        ({"over_batch": False}, {"over_batch": 0.0}),
        ({"p": 1}, {"p": True}),
        ({"subtract_mean": True}, {"subtract_mean": 1}),
    ],
    ids=str,
)
def test_an_equal_argument_of_another_type_is_refused_after_a_good_one(good, bad):
    divisive_norm(X, **{"window": 3, **good})
    (name,) = bad
    with pytest.raises(TypeError, match=f"^{name}: got "):
        divisive_norm(X, **{"window": 3, **bad})


@pytest.mark.parametrize(
    ("sides", "error", "message"),
    [
        ((-1, 0), ValueError, "before: got -1, expected an int of at least 0"),
        ((0, 2.0), TypeError, "after: got 2.0 of type float, expected an int of at least 0"),
        ((True, 0), TypeError, "before: got True of type bool, expected an int of at least 0"),
        (
            (2**31 - 2, 1),
            ValueError,
            "before, after: got Span(before=2147483646, after=1) of size 2147483648, expected at most",
        ),
    ],
    ids=str,
)
def test_span(sides, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        Span(*sides)


def test_window_is_required():
    with pytest.raises(TypeError, match="window"):
        divisive_norm(X)


LAYERS = {
    "num_channels zero": (lambda: DivisiveNorm2d(0), ValueError, "num_channels: got 0, expected a positive int"),
    "num_channels a float": (
        lambda: DivisiveNorm2d(4.0),
        TypeError,
        "num_channels: got 4.0 of type float, expected a positive int",
    ),
    "num_features negative": (
        lambda: DivisiveNormFeatures(-1, 3),
        ValueError,
        "num_features: got -1, expected a positive int",
    ),
    "window": (lambda: DivisiveNorm2d(4, window=0), ValueError, "window: got 0, expected a positive int"),
    "window of too many entries": (
        lambda: DivisiveNorm1d(4, window=(3, 3)),
        ValueError,
        "window: got (3, 3) with 2 entries, expected",
    ),
    "norm_window": (lambda: DivisiveNorm3d(4, 5, 2.0), TypeError, "norm_window: got 2.0 of type float"),
    "groups": (
        lambda: DivisiveNorm2d(6, groups=4),
        ValueError,
        "groups: got 4, expected a positive divisor of the 6 channels",
    ),
    "edges": (lambda: DivisiveNorm2d(6, edges="reflect"), ValueError, "edges: got 'reflect', expected"),
    "sigma": (lambda: DivisiveNorm2d(6, sigma="1"), TypeError, "sigma: got '1' of type str, expected a float"),
    "l1_weight negative": (
        lambda: DivisiveNorm2d(6, l1_weight=-1.0),
        ValueError,
        "l1_weight: got -1.0, expected a number of at least 0",
    ),
    "l1_weight a word": (
        lambda: DivisiveNorm2d(6, l1_weight="1"),
        TypeError,
        "l1_weight: got '1' of type str, expected a number",
    ),
    "backend": (lambda: DivisiveNorm2d(6, backend="gpu"), ValueError, "backend: got 'gpu', expected None or one of"),
    "learn_sigma": (
        lambda: DivisiveNorm2d(6, learn_sigma=1),
        TypeError,
        "learn_sigma: got 1 of type int, expected a bool",
    ),
    "affine": (lambda: DivisiveNorm2d(6, affine=None), TypeError, "affine: got None of type NoneType, expected a bool"),
    "input of another rank, 1d": (
        lambda: DivisiveNorm1d(4)(torch.ones(2, 4)),
        ValueError,
        "x: got 2 dimensions, expected 3, (N, C, L)",
    ),
    "input of another rank, 2d": (
        lambda: DivisiveNorm2d(4)(torch.ones(2, 4, 3)),
        ValueError,
        "x: got 3 dimensions, expected 4, (N, C, H, W)",
    ),
    "input of another rank, 3d": (
        lambda: DivisiveNorm3d(4)(torch.ones(2, 4)),
        ValueError,
        "x: got 2 dimensions, expected 5, (N, C, D, H, W)",
    ),
    "input of another rank, features": (
        lambda: DivisiveNormFeatures(4, 3)(torch.ones(4)),
        ValueError,
        "x: got shape (4,), expected (N, ..., 4), num_features last",
    ),
    "normalized_shape a float": (
        lambda: LayerNorm(2.5),
        TypeError,
        "normalized_shape: got 2.5 of type float, expected a positive int",
    ),
    "normalized_shape of floats": (lambda: LayerNorm((2, 2.0)), TypeError, "normalized_shape: got 2.0 of type float"),
    "momentum": (lambda: BatchNorm2d(4, momentum="a"), TypeError, "momentum: got 'a' of type str, expected a float or"),
    "local contrast": (lambda: LocalContrastNorm2d(0), ValueError, "num_channels: got 0, expected a positive int"),
    "input a list": (lambda: DivisiveNorm2d(4)([1.0]), TypeError, "x: got list, expected a Tensor"),
    "input of whole numbers in eval mode": (
        lambda: BatchNorm2d(4).eval()(torch.ones(2, 4, 3, 3, dtype=torch.long)),
        TypeError,
        "x: got dtype torch.int64, expected one of torch.float32",
    ),
    "input of another width": (
        lambda: DivisiveNorm2d(4)(torch.ones(2, 5, 3, 3)),
        ValueError,
        "x: got 5 channels, expected num_channels, 4",
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    make, error, message = LAYERS[name]
    with pytest.raises(error, match="^" + re.escape(message)):
        make()


SET = {
    "l1_weight": (DivisiveNorm2d(6), -1.0, ValueError, "l1_weight: got -1.0, expected a number of at least 0"),
    "l1_weight a word": (BatchNorm2d(6), "1", TypeError, "l1_weight: got '1' of type str, expected a number"),
    "num_channels": (DivisiveNorm2d(6), 0, ValueError, "num_channels: got 0, expected a positive int"),
    "num_channels of groups": (GroupNorm(2, 6), 6.0, TypeError, "num_channels: got 6.0 of type float, expected a"),
    "num_features": (DivisiveNormFeatures(6, 3), -2, ValueError, "num_features: got -2, expected a positive int"),
    "normalized_shape": (LayerNorm(6), 2.5, TypeError, "normalized_shape: got 2.5 of type float, expected a positive"),
    "normalized_shape empty": (LayerNorm(6), (), ValueError, "normalized_shape: got (), expected at least one"),
    "num_features of groups": (BatchNorm2d(6), 0, ValueError, "num_features: got 0, expected a positive int"),
    "num_groups": (GroupNorm(2, 6), 0, ValueError, "num_groups: got 0, expected a positive int"),
    "eps": (DivisiveNorm2d(6), -0.5, ValueError, "eps: got -0.5, expected a float of at least 0"),
}


@pytest.mark.parametrize("name", SET)
def test_what_is_set_on_a_layer(name):
    """As what it is made with; it stays what it was."""
    layer, value, error, message = SET[name]
    before = repr(layer)
    with pytest.raises(error, match="^" + re.escape(message)):
        setattr(layer, name.split()[0], value)
    assert repr(layer) == before


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("running", "error", "message"),
    [
        (torch.zeros(5), ValueError, "got shape (5,), expected (4,), one per channel of x"),
        (torch.zeros(4, dtype=torch.long), TypeError, "got dtype torch.int64, expected a floating one"),
        (meta(4), ValueError, "got device meta, expected that of x, cpu"),
        (torch.zeros(4).to_sparse(), TypeError, "got layout torch.sparse_coo, expected torch.strided"),
        (torch.zeros(4).requires_grad_(), ValueError, "got a tensor that requires grad, expected one that does not"),
    ],
)
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_running_statistics(name, running, error, message, training):
    layer = BatchNorm2d(4).train(training)
    setattr(layer, name, running)
    before = layer.num_batches_tracked.clone()
    with pytest.raises(error, match="^" + re.escape(f"{name}: {message}")):
        layer(torch.ones(2, 4, 3, 3))
    assert torch.equal(layer.num_batches_tracked, before)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("wide", [("running_mean",), ("running_var",), ("running_mean", "running_var")])
def test_running_statistics_of_another_width(wide, affine):
    """They train, so they are good in eval mode too."""
    layer, expected = BatchNorm2d(4, affine=affine), BatchNorm2d(4, affine=affine)
    for name in wide:
        setattr(layer, name, getattr(layer, name).double())
    x = torch.randn(3, 4, 5, 5)
    layer(x), expected(x)
    torch.testing.assert_close(layer.eval()(x), expected.eval()(x))
