"""What is kept between calls does not grow with the number or the size of the shapes seen."""

import sys
from pathlib import Path

import pytest
import torch
from process import run_python

import divnorm_kernels as dk
from divnorm_kernels import fields
from divnorm_kernels.norm import Norm

LENGTHS = 10_000
LIMIT = 16 << 20
"""Bytes: what is kept, some megabytes, and the allocator's own for the largest activations, 0.2 MB each."""
LAYERS = {"DivisiveNorm1d": lambda: dk.DivisiveNorm1d(2, 5), "GroupNorm": lambda: dk.GroupNorm(1, 2)}


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def growth(name: str) -> int:
    """Bytes by which this process grows over the lengths of a text model, after the longest of them."""
    layer = LAYERS[name]()

    def step(length: int) -> None:
        layer(torch.randn(1, 2, length, requires_grad=True)).sum().backward()

    longest = 2 * LENGTHS
    for _ in range(3):
        step(longest)
    before = resident()
    for length in range(longest - LENGTHS, longest):
        step(length)
    return resident() - before


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.parametrize("name", LAYERS)
def test_memory_stays_flat_over_ten_thousand_lengths(name):
    grown = int(run_python(__file__, name))
    assert grown < LIMIT, f"{grown / 1e6:.0f} MB more after {LENGTHS} lengths"


def test_the_number_of_geometries_kept_is_bounded():
    for length in range(1, 1200):
        fields.geometry(Norm(3), (1, 2, length))
    assert fields._built.cache_info().currsize <= 512


if __name__ == "__main__":
    print(growth(sys.argv[1]))
