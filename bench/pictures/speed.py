"""Results of the benchmark on one small picture: time against others, and how near to what the bytes allow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import log, prod

from ..results import best_of_ours, headline, machine_name, ratio, settings_of, share_of_limit
from ..subjects import PEERS
from .svg import BLUE, ORANGE, Picture

_COLORS = (BLUE, ORANGE)
_BYTES = {"float32": 4, "bfloat16": 2}
_LEFT, _TOP, _WIDTH, _STRIP = 144, 50, 320, 34
"""The panel of ratios: its corner, and how high a peer's strip is."""
_BESIDE = 96
"""Between the panels: room for the means, and for the second one's axis."""


def speed(documents: Sequence[dict]) -> str:
    """Two panels, a color for each machine's document: a strip of ratios per peer, and shares of the limit by size."""
    height = len(PEERS) * _STRIP
    right = _LEFT + _WIDTH + _BESIDE
    picture = Picture(right + _WIDTH + 8, _TOP + height + 40 + 20 * len(documents), "Speed of divisive normalization")
    picture.words(_LEFT, 16, "Time of others / time of divisive normalization", bold=True)
    picture.words(_LEFT, 34, "forward and backward; a dot: a setting; the number: geometric mean", size=11)
    _ratios(picture, documents, height)
    picture.words(right, 16, "Share of the speed that the bytes allow", bold=True)
    picture.words(right, 34, "divisive normalization, by the size of x in MB", size=11)
    _shares(picture, documents, right, height)
    for i, document in enumerate(documents):
        y = _TOP + height + 46 + 20 * i
        picture.dots([(_LEFT, y - 4)], 4, fill=_COLORS[i])
        machine = document["machine"]
        words = f"{machine_name(machine)}, torch {machine['torch']}; {headline(document['rows'])['settings']} settings"
        picture.words(_LEFT + 12, y, words, size=12)
    return picture.text()


def _ratios(picture: Picture, documents: Sequence[dict], height: float) -> None:
    least, most = 0.4, 150.0

    def across(value: float) -> float:
        return _LEFT + _WIDTH * log(value / least) / log(most / least)

    for tick in (0.5, 1, 2, 5, 10, 20, 50, 100):
        picture.line(across(tick), _TOP, across(tick), _TOP + height, opacity=0.9 if tick == 1 else 0.25)
        picture.words(across(tick), _TOP + height + 16, f"{tick:g}", size=11, anchor="middle")
    for i, peer in enumerate(PEERS):
        picture.words(_LEFT - 10, _TOP + (i + 0.5) * _STRIP + 4, peer, size=12, anchor="end")
        for j, document in enumerate(documents):
            y = _TOP + (i + (j + 1) / (len(documents) + 1)) * _STRIP
            values = [ratio(own, subjects.get(peer)) for own, subjects in _measured(document)]
            points = [(across(value), y) for value in values if value is not None]
            picture.dots(points, 2.5, fill=_COLORS[j], opacity=0.4)
            mean = headline(document["rows"])["geometric mean of peer time / our time"][peer]
            if mean is not None:
                picture.rectangle(across(mean) - 1.5, y - 6, 3, 12, fill=_COLORS[j])
                x = _LEFT + _WIDTH + 38
                picture.words(x, y + 4, f"{mean:.2f}", size=11, anchor="end", fill=_COLORS[j])


def _shares(picture: Picture, documents: Sequence[dict], left: float, height: float) -> None:
    least, most = 0.1, 300.0

    def across(megabytes: float) -> float:
        return left + _WIDTH * log(megabytes / least) / log(most / least)

    for tick in (0.1, 1, 10, 100):
        picture.line(across(tick), _TOP, across(tick), _TOP + height, opacity=0.25)
        picture.words(across(tick), _TOP + height + 16, f"{tick:g}", size=11, anchor="middle")
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = _TOP + height * (1 - share)
        picture.line(left, y, left + _WIDTH, y, opacity=0.9 if share == 1 else 0.25)
        picture.words(left - 8, y + 4, f"{share:.0%}", size=11, anchor="end")
    for j, document in enumerate(documents):
        points = [
            (across(prod(own["shape"]) * _BYTES[own["dtype"]] / 1e6), _TOP + height * (1 - share_of_limit(own)))
            for own, _ in _measured(document)
        ]
        picture.dots(points, 3, fill=_COLORS[j], opacity=0.55)


def _measured(document: dict) -> Iterator[tuple[dict, dict[str, dict]]]:
    for subjects in settings_of(document["rows"]).values():
        own = best_of_ours(subjects)
        if own is not None and own["times"] is not None:
            yield own, subjects
