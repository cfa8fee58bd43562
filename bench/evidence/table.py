"""A table of the evidence: which norms are trained, with which settings, seeds and learning rates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..training.runs import EXPERIMENTS, Experiment, Run
from ..training.settings import Settings

FINAL = "final"
"""The folder of the runs that count, with the rate behind it where that was chosen."""


@dataclass(frozen=True)
class Choice:
    """How each norm's learning rate is chosen: by the figure on held-out training samples, of shorter runs."""

    rates: tuple[float, ...]
    """In order."""
    steps: int
    held_out: float
    """For the settings' field of that name."""
    seeds: int = 1
    further: tuple[float, ...] = ()
    """Rates around ``rates``: while a norm's best is at an end of what was tried, the next beyond it is tried too."""

    def beyond(self, tried: tuple[float, ...], best: float) -> tuple[float, ...]:
        """``tried``, in order, and the next of ``further`` where the best is at an end and there is one."""
        if best == tried[0]:
            return (*sorted(rate for rate in self.further if rate < best)[-1:], *tried)
        if best == tried[-1]:
            return (*tried, *sorted(rate for rate in self.further if rate > best)[:1])
        return tried


@dataclass(frozen=True)
class Work:
    """One run of a table; ``rate`` is given where the run is there to choose one."""

    table: Table
    norm: str
    seed: int
    rate: float | None = None

    @property
    def run(self) -> Run:
        """As the training loop knows it."""
        return Run(self.norm, self.seed)

    def settings(self, chosen: float | None) -> Settings:
        """The settings of the run; ``chosen`` is the norm's rate, for runs that count."""
        table = self.table
        if self.rate is None:
            return table.settings if chosen is None else replace(table.settings, rate=chosen)
        short = {"steps": table.choice.steps, "rate": self.rate, "held_out": table.choice.held_out, "evaluations": 1}
        return replace(table.settings, **short)

    def folder(self, out: Path, chosen: float | None) -> Path:
        """Where its log and checkpoint are."""
        if self.rate is not None:
            return out / self.table.name / f"rate-{self.rate:g}"
        return out / self.table.name / (FINAL if chosen is None else f"{FINAL}-{chosen:g}")


@dataclass(frozen=True)
class Table:
    """One table of the documentation, and all that it takes to make it.

    Args:
        name: of its folder of results.
        experiment: which program, by its name in `EXPERIMENTS`.
        settings: of the runs that count; the data's folder is filled in when they run.
        norms: a line each.
        seeds: of every norm.
        step_ms: milliseconds of processor time a step, as measured once; for estimates.
        data: the folder of the data, below the one that is given when they run; ``None``: comes along.
        choice: how rates are chosen; ``None``: all norms have the settings'.
        paper: the paper's figures by norm.
    """

    name: str
    experiment: str
    settings: Settings
    norms: tuple[str, ...]
    seeds: int
    step_ms: float
    data: str | None = None
    choice: Choice | None = None
    paper: Mapping[str, float] = field(default_factory=dict, hash=False)

    @property
    def program(self) -> Experiment:
        """The experiment's entry in the list of programs."""
        return EXPERIMENTS[self.experiment]

    def at(self, data: Path | None) -> Table:
        """The table with its data below the folder ``data``.

        Raises:
            ValueError: where it needs data and none is given.
        """
        if self.data is None:
            return self
        if data is None:
            raise ValueError(f"{self.name}: needs --data, a folder that holds {self.data}")
        return replace(self, settings=replace(self.settings, data=data / self.data))

    def counting(self, seeds: int | None = None) -> Iterator[Work]:
        """The runs that count, all norms of a seed before the next."""
        for seed in range(self.seeds if seeds is None else min(seeds, self.seeds)):
            for norm in self.norms:
                yield Work(self, norm, seed)

    def record(self, work: Work, chosen: float | None) -> dict[str, Any]:
        """What the run's log has as its settings."""
        more = {"experiment": self.experiment, "norm": work.norm, "seed": work.seed, "data": self.data}
        return {**work.settings(chosen).record(), **more}
