"""What the runs answer: differences between norms, seed by seed, with their uncertainty."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ..training.summary import by_norm
from .plan import TABLES, Contrast
from .results import Results

CONFIDENCE = 0.95


def interval(differences: list[float]) -> float:
    """Half of the width of Student's interval around the mean of ``differences``; infinite for fewer than two."""
    from scipy.stats import t

    count = len(differences)
    if count < 2:
        return math.inf
    return float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * stdev(differences) / math.sqrt(count)


def figures(results: Results, norm: str) -> dict[int, float | None]:
    """The figure of the table by seed, of the runs of a norm that have ended; ``None`` where one diverged."""
    name = results.table.program.figure
    logs = [log for log in results.counting() if log["settings"]["norm"] == norm]
    return {log["settings"]["seed"]: log["figures"].get(name) for log in logs}


@dataclass(frozen=True)
class Answer:
    """A contrast's differences, where both runs of a seed have ended."""

    contrast: Contrast
    differences: tuple[float, ...]
    planned: int
    diverged: tuple[str, ...]
    """The norms of which a run diverged."""
    higher_is_better: bool

    @property
    def verdict(self) -> str:
        """In a word: "better" or "worse" where the interval is on one side of zero."""
        if self.diverged:
            return f"{' and '.join(self.diverged)} diverged"
        if not self.differences:
            return "not yet run"
        if len(self.differences) < 2:
            return "one seed"
        middle = mean(self.differences)
        if abs(middle) <= interval(list(self.differences)):
            return "undecided"
        return "better" if (middle > 0) == self.higher_is_better else "worse"


def answer(contrast: Contrast, folder: Path) -> Answer:
    """What the committed runs say of a contrast."""
    one, other = (Results(TABLES[name], folder) for name in (contrast.table, contrast.than_table or contrast.table))
    first, second = figures(one, contrast.norm), figures(other, contrast.than)
    seeds = sorted(first.keys() & second.keys())
    diverged = [
        name
        for name, found in ((contrast.norm, first), (contrast.than, second))
        if any(found[seed] is None for seed in seeds)
    ]
    differences = [first[s] - second[s] for s in seeds if first[s] is not None and second[s] is not None]
    planned = min(one.table.seeds, other.table.seeds)
    return Answer(
        contrast, tuple(differences), planned, tuple(dict.fromkeys(diverged)), one.table.program.higher_is_better
    )


def _probe(log: dict[str, Any], name: str) -> float:
    """A probe as one number: of gradients first to last layer, of the others what the last layer has."""
    return log["probes"][name][0 if name == "gradient" else -1]


def probe_points(logs: list[dict[str, Any]], probe: str) -> dict[str, tuple[float, float]]:
    """A probe at the start and the accuracy at the end by norm, means over its seeds."""
    ended = by_norm([log for log in logs if not log["diverged"]])
    return {
        norm: (mean(_probe(log, probe) for log in of), mean(log["figures"]["accuracy"] for log in of))
        for norm, of in ended.items()
    }


def rank_correlation(logs: list[dict[str, Any]], probe: str) -> tuple[float, float]:
    """Spearman's correlation over the norms of `probe_points`, and its p-value."""
    from scipy.stats import spearmanr

    found = spearmanr(*zip(*probe_points(logs, probe).values(), strict=True))
    return float(found.statistic), float(found.pvalue)
