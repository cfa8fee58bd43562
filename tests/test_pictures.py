"""The documentation's pictures: what they show is what is computed, and the files are what is drawn."""

from itertools import product
from xml.etree import ElementTree

import pytest
import torch
from process import ROOT

from bench.pictures.__main__ import FOLDER, drawn
from bench.pictures.fields import field
from divnorm_kernels import Span, divisive_norm
from divnorm_kernels.fields import geometry
from divnorm_kernels.norm import Norm

SHAPE = (2, 4, 6, 5)


@pytest.mark.parametrize(
    "options",
    [
        {"window": 3},
        {"window": 4, "groups": 2},
        {"window": (Span(2, 0), "all"), "groups": 4},
        {"window": "all", "groups": 2},
        {"window": "all", "groups": 4, "over_batch": True},
        {"window": 9, "edges": "zero"},
    ],
    ids=str,
)
def test_a_field_is_what_the_mean_depends_on(options):
    g = geometry(Norm(**options), SHAPE)
    x = torch.zeros(SHAPE, requires_grad=True)
    mean = x - divisive_norm(x, norm_window=None, **options)
    for place in product((0, 1), (0, 3), (0, 4, 5), (0, 2, 4)):
        (dx,) = torch.autograd.grad(mean[place], x, retain_graph=True)
        assert field(g, g.summation, place) == set(map(tuple, dx.nonzero().tolist()))


def test_files_are_up_to_date(monkeypatch):
    """`python -m bench.pictures` draws them anew."""
    monkeypatch.chdir(ROOT)
    assert {path.name: path.read_text() for path in FOLDER.iterdir()} == drawn()


def test_they_are_small_and_have_no_ground_of_their_own():
    """So that they stand on white pages and on dark ones."""
    for path in (ROOT / FOLDER).iterdir():
        picture = ElementTree.parse(path).getroot()
        assert picture.find("{*}title").text
        size = picture.get("width"), picture.get("height")
        assert size not in [(part.get("width"), part.get("height")) for part in picture.iter("{*}rect")]
        assert path.stat().st_size < 50_000
