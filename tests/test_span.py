"""Windows by their two sides: where they reach, what they equal, and that no backend lets a later position in."""

from itertools import product

import pytest
import torch
from interpreted import on_device, some, triton
from oracle import Call, check

from divnorm_kernels import DivisiveNorm1d, DivisiveNorm2d, Span, divisive_norm


def cpu(*args, **kwargs):
    return divisive_norm(*args, backend="cpu", **kwargs)


SPANS = (Span(3, 0), Span(0, 3), Span(5, 1), Span(40, 0), Span(0, 40), Span(6, 40), Span(0, 0))
"""Causal and its mirror, off the centre, one side or both beyond the extent of 9."""


EDGES = ("valid", "zero")


@pytest.mark.parametrize(
    ("function", "span", "edges"),
    [*product([cpu], SPANS, EDGES), *some(product([triton], SPANS, EDGES))],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_values_and_gradients(function, span, edges):
    for shape, window in (((2, 4, 9), span), ((2, 4, 9, 5), (span, Span(2, 0))), ((1, 2, 3, 9, 4), (2, span, "all"))):
        for norm_window in ("same", Span(1, 4)):
            options = {"window": window, "norm_window": norm_window, "edges": edges, "groups": 2}
            x, dy = torch.randn(shape), torch.randn(shape)
            call = Call(x, torch.randn(shape[1]), torch.randn(shape[1]), torch.tensor(0.8), dy, 1.0, options)
            check(function, on_device(call) if function is triton else call)


def test_an_int_is_a_span():
    x = torch.randn(2, 3, 9, 8)
    for k in (1, 2, 5, 6, 30):
        for edges in ("valid", "zero"):
            span = Span((k - 1) // 2, k // 2)
            assert torch.equal(divisive_norm(x, window=k, edges=edges), divisive_norm(x, window=span, edges=edges))
    pair = divisive_norm(x, window=(Span(1, 1), 4)), divisive_norm(x, window=(3, Span(1, 2)))
    assert torch.equal(*pair)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_causal_windows_see_nothing_later(backend):
    """To the bit, and with other sizes behind, in values and where gradients go."""
    x = torch.randn(2, 3, 20, requires_grad=True)
    options = {"window": Span(4, 0), "norm_window": Span(7, 0), "backend": backend}
    y = divisive_norm(x, **options)
    changed = x.detach().clone()
    changed[..., 11:] = 1e3
    assert torch.equal(divisive_norm(changed, **options)[..., :11], y[..., :11])
    (dx,) = torch.autograd.grad(y[..., 11].sum(), x)
    assert (dx[..., 12:] == 0).all()
    assert (dx[..., :12] != 0).any()


def test_a_span_is_a_value():
    assert len({Span(2, 0), Span(2, 0), Span(0, 2)}) == 2
    layer = DivisiveNorm2d(4, (Span(2, 0), 3), Span(0, 1))
    x = torch.randn(1, 4, 6, 6)
    assert torch.equal(layer(x), divisive_norm(x, window=(Span(2, 0), 3), norm_window=Span(0, 1)))
    assert DivisiveNorm1d(2, Span(3, 0)).window == Span(3, 0)


@pytest.mark.parametrize(
    ("layer", "printed"),
    [
        (DivisiveNorm1d(4, 5), "DivisiveNorm1d(4, window=5)"),
        (DivisiveNorm1d(4, Span(4, 0)), "DivisiveNorm1d(4, window=Span(before=4, after=0))"),
        (
            DivisiveNorm2d(4, (Span(2, 0), 3), Span(0, 1)),
            "DivisiveNorm2d(4, window=(Span(before=2, after=0), 3), norm_window=Span(before=0, after=1))",
        ),
    ],
)
def test_a_printed_layer_tells_causal_from_centred(layer, printed):
    """And is a call that makes it."""
    assert repr(layer) == printed
    assert eval(printed).norm == layer.norm


def test_spans_are_served_by_prepared_calls():
    x = torch.randn(1, 4, 6, 6, requires_grad=True)
    assert divisive_norm(x, window=(Span(2, 0), 3)).grad_fn.name() == "PreparedFunctionBackward"
    assert divisive_norm(x, window=Span(2, 0)).grad_fn.name() == "PreparedFunctionBackward"
