"""What has run, one JSON document a table: what the pages are written from, and what is not run again."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from ..machine import describe
from ..training.runs import RESULTS
from .table import Table, Work

RESULTS_FOLDER = Path("bench/results/experiments")
DIGITS = 6
"""Of the figures that are kept."""

Logs = list[dict[str, Any]]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value


def kept(log: dict[str, Any], curve: str) -> dict[str, Any]:
    """What of a run's log is committed: of its records those with an evaluation."""
    small = {name: value for name, value in log.items() if name != "finished"}
    return _rounded({**small, "records": [record for record in log["records"] if curve in record]})


@dataclass
class Results:
    """The runs of a table that have ended, in a file of ``folder``."""

    table: Table
    folder: Path = RESULTS_FOLDER

    def __post_init__(self) -> None:
        path = self.path
        document = json.loads(path.read_text()) if path.exists() else {"choice": [], "runs": []}
        self.choice: Logs = document["choice"]
        self.runs: Logs = document["runs"]

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / self.table.name / RESULTS

    def _better(self, figures: list[float]) -> float:
        return mean(figures) if self.table.program.higher_is_better else -mean(figures)

    def _best(self, norm: str, rates: tuple[float, ...]) -> float | None:
        """The best of ``rates`` on held-out samples; ``None`` before all have run.

        Of several that are equal the middle one, of two the higher; the lowest where all have diverged.
        """
        figure, scores = self.table.program.figure, {}
        for rate in rates:
            logs = [self.log(Work(self.table, norm, seed, rate)) for seed in range(self.table.choice.seeds)]
            if any(log is None for log in logs):
                return None
            if not any(log["diverged"] for log in logs):
                scores[rate] = self._better([log["figures"][figure] for log in logs])
        top = max(scores.values(), default=0.0)
        best = [rate for rate in scores if math.isclose(scores[rate], top, rel_tol=10.0 ** (1 - DIGITS))] or rates[:1]
        return best[len(best) // 2]

    def tried(self, norm: str) -> tuple[float, ...]:
        """The rates that a norm's is chosen from, as far as is known; none where the table has no choice."""
        choice = self.table.choice
        rates, wider = (), () if choice is None else choice.rates
        while rates != wider:
            rates, best = wider, self._best(norm, wider)
            wider = rates if best is None else choice.beyond(rates, best)
        return rates

    def chosen(self, norm: str) -> float | None:
        """The rate of a norm's runs; ``None`` where there is no choice, or not yet."""
        return None if self.table.choice is None else self._best(norm, self.tried(norm))

    def choosing(self) -> Iterator[Work]:
        """The runs that rates are chosen by, as far as is known."""
        for seed in range(0 if self.table.choice is None else self.table.choice.seeds):
            for norm in self.table.norms:
                for rate in self.tried(norm):
                    yield Work(self.table, norm, seed, rate)

    def ready(self, work: Work) -> bool:
        """Whether a run has all that its settings depend on."""
        return work.rate is not None or self.table.choice is None or self.chosen(work.norm) is not None

    def record(self, work: Work) -> dict[str, Any]:
        """The settings of a run that is `ready`, as the log that is kept of it has them."""
        return _rounded(self.table.record(work, None if work.rate is not None else self.chosen(work.norm)))

    def log(self, work: Work) -> dict[str, Any] | None:
        """What a run has come to, if it has ended with these very settings."""
        if not self.ready(work):
            return None
        record = self.record(work)
        logs = self.runs if work.rate is None else self.choice
        return next((log for log in logs if log["settings"] == record), None)

    def add(self, work: Work, log: dict[str, Any]) -> None:
        """Takes up a run that has ended."""
        log = {**log, "settings": self.record(work)}
        (self.runs if work.rate is None else self.choice).append(kept(log, self.table.program.curve))

    def counting(self) -> Logs:
        """The logs of the runs that count, in the plan's order."""
        return [log for log in map(self.log, self.table.counting()) if log is not None]

    def left(self, seeds: int | None = None) -> list[Work]:
        """The runs that have not ended, of the first ``seeds``."""
        works = [*self.choosing(), *self.table.counting(seeds)]
        return [work for work in works if self.log(work) is None]

    def seconds(self, work: Work) -> float:
        """An estimate of a run's processor time."""
        measured = [log["seconds_per_step"] for log in (*self.runs, *self.choice)]
        each = median(measured) if measured else self.table.step_ms / 1e3
        return each * work.settings(None).steps

    def write(self) -> None:
        """Replaces the file in one step."""
        program = self.table.program
        document = {
            "command": f"python -m bench evidence {self.table.name} --data DIR",
            "machine": describe("cpu"),
            "figure": program.figure,
            "curve": program.curve,
            "higher_is_better": program.higher_is_better,
            "choice": self.choice,
            "runs": self.runs,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(document, separators=(",", ":")) + "\n")
        os.replace(part, self.path)
