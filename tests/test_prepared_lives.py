"""Prepared calls over time: what they keep and let go of, and threads that share them."""

import gc
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
from caches import forget

import divnorm_kernels as dk
from divnorm_kernels import divisive_norm, fields
from divnorm_kernels.norm import Norm
from divnorm_kernels.prepared import prepared

SHAPE = (2, 4, 5, 6)


def test_plans_that_a_call_keeps_are_bounded():
    forget()
    layer = dk.DivisiveNorm1d(2, 3)
    kept = []
    for length in range(3, 103):
        layer(torch.randn(1, 2, length))
        kept.append(weakref.ref(fields.geometry(layer.norm, (1, 2, length))))
    forget()
    gc.collect()
    assert sum(ref() is not None for ref in kept) <= 32


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_nothing_is_left_of_ten_thousand_steps():
    """No reference to an argument, and no memory."""
    layer, x = dk.DivisiveNorm2d(4, 3, l1_weight=0.1), torch.randn(SHAPE, requires_grad=True)
    dy, sigma = torch.randn(SHAPE), 0.7654321

    def step():
        y = layer(x)
        torch.autograd.grad([y, layer.l1], [x, layer.weight, layer.bias], [dy, torch.ones(())])
        divisive_norm(x, layer.weight, window=3, sigma=sigma)
        prepared(Norm(3), "cpu", None)([x], None, None, 1.0)

    for _ in range(500):
        step()
    objects = (x, layer.weight, layer.bias, dy, sigma, layer.norm, layer._prepared)
    gc.collect()
    counts, before = [sys.getrefcount(o) for o in objects], resident()
    for _ in range(10_000):
        step()
    gc.collect()
    assert [sys.getrefcount(o) for o in objects] == counts
    assert resident() - before < 4 << 20


def test_eight_threads():
    """On one layer, each with shapes of its own, and large enough for some to let the others run."""
    layer = dk.DivisiveNorm1d(4, 5)
    shapes = [(2, 4, length) for length in range(30, 430, 5)]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    expected = [torch.autograd.grad(layer(x).square().sum(), x)[0] for x in inputs]
    wrong = []

    def work(first):
        for _ in range(3):
            for i in range(first, len(inputs), 3):
                (dx,) = torch.autograd.grad(layer(inputs[i]).square().sum(), inputs[i])
                if not torch.equal(dx, expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
