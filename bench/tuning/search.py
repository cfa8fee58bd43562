"""The search: one entry of a row after another is varied, and the fastest value kept.

All values of an entry are timed in turn, call by call, on the kernels alone (no autograd). A value's score is the
geometric mean over the calls of its time against the present value's; one that fails or gives a wrong result is out.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from divnorm_kernels.backends import KERNELS, preference

from .. import gpu
from ..results import geometric_mean
from ..timing import interleaved
from .calls import DIRECTIONS, Call, Prepared
from .knobs import TUNABLE, row_of
from .tables import Row, replaced

GAIN = 0.99
"""A value takes the place of the present one if it takes less than this part of its time."""


@dataclass
class Trial:
    """One entry of one row: what its values took, against the present one's time, and which was kept."""

    backend: str
    row: Row
    knob: str
    present: Any
    kept: Any
    scores: dict[str, float]
    """Geometric means by value."""
    calls: dict[str, dict[str, float]]
    """The same by call."""
    out: dict[str, str] = field(default_factory=dict)
    """Values that failed or were wrong, and why."""


def tuned(
    backend: str,
    direction: str,
    prepared: list[Prepared],
    knobs: list[str],
    seconds: float,
    workers: Executor | None,
) -> Iterator[Trial]:
    """Tunes the row of one backend, direction and size of an element; yields a trial an entry, the last with the row.

    ``seconds``: for the values of one entry on one call together. ``workers`` compile ahead, where that takes long.
    """
    tunable = TUNABLE[backend]
    served = [p for p in prepared if KERNELS[backend].refusal(p.call.geometry(), p.xs[0]) is None]
    row = row_of(tunable, served[0].xs[0], direction)
    for knob in knobs:
        values = list(dict.fromkeys([row[knob], *tunable.knobs[knob]]))
        trial = Trial(backend, row, knob, row[knob], row[knob], {}, {})
        if workers is not None:
            jobs = [(backend, direction, {**row, knob: value}, p.call) for p in served for value in values]
            list(workers.map(compile_ahead, jobs, chunksize=len(values)))
        rows = {str(value): {**row, knob: value} for value in values}
        for p in served:
            trial.calls[p.call.name] = compared(backend, direction, rows, p, seconds, trial.out)
        trial.scores = scored(trial.calls.values(), rows, trial.out)
        best = min((v for v in values if str(v) in trial.scores), key=lambda v: trial.scores[str(v)])
        if trial.scores[str(best)] < GAIN:
            trial.kept, row = best, {**row, knob: best}
            trial.row = row
        yield trial


def compared(
    backend: str, direction: str, rows: dict[str, Row], p: Prepared, seconds: float, out: dict[str, str]
) -> dict[str, float]:
    """Times of a call under rows over that under the first; those that fail are noted in ``out``, and why.

    Raises:
        RuntimeError: where the first one fails.
    """
    tunable, g, x = TUNABLE[backend], p.call.geometry(), p.xs[0]
    cuts: list[object] = []
    alike: dict[str, int] = {}
    rounds: dict[int, Callable[[], tuple[float, float]]] = {}
    for name, row in rows.items():
        with replaced(tunable.table, [row, *tunable.table.ROWS]):
            try:
                cut = tunable.cut(g, x, direction)
                if cut not in cuts:
                    run = p.runner(backend, direction)
                    if p.wrong(run(0), direction):
                        raise ArithmeticError(f"wrong result on {p.call.name}")
                    rounds[len(cuts)] = gpu_round(run, len(p.xs))
                    cuts.append(cut)
            except Exception as error:  # whatever a candidate raises, the others go on where they can
                if gpu.spoilt(error):
                    raise
                out[name] = str(error)
                continue
            alike[name] = cuts.index(cut)
    present = out.get(next(iter(rows)))
    if present is not None:
        raise RuntimeError(f"{backend}, {direction}, the present row: {present}")
    times = interleaved(rounds, seconds)
    return {name: times[i].both / times[0].both for name, i in alike.items()}


def scored(by_call: Iterable[dict[str, float]], rows: Iterable[str], out: Container[str]) -> dict[str, float]:
    """Geometric means over calls of what `compared` gives, of the rows that are not out."""
    found = list(by_call)
    return {name: geometric_mean([of[name] for of in found]) for name in rows if name not in out}


def gpu_round(run: Callable[[int], object], rotation: int) -> Callable[[], tuple[float, float]]:
    """A round of a function of the step's number, which takes so many copies in turn: seconds a step."""
    replay, steps = gpu.captured(run, rotation)
    return lambda: (gpu.elapsed(replay) / steps, 0.0)


def compile_ahead(job: tuple[str, str, Row, Call]) -> None:
    """Runs a candidate once, in a process of its own, so that the compiler's cache has it."""
    backend, direction, row, call = job
    tunable = TUNABLE[backend]
    with replaced(tunable.table, [row, *tunable.table.ROWS]), suppress(Exception):  # it will be met again, and told
        _prepared(call).runner(backend, direction)


@lru_cache(maxsize=1)  # the candidates of a call follow each other
def _prepared(call: Call) -> Prepared:
    return Prepared(call)


def preferred(prepared: list[Prepared], seconds: float) -> Iterator[tuple[Row, dict[str, dict[str, float]]]]:
    """A row of the table of preferences for each kind of fields, and by call the times over the fastest's behind it."""
    x = prepared[0].xs[0]
    for fields in ("windows", "whole"):
        by_call: dict[str, dict[str, float]] = {}
        for p in (p for p in prepared if p.call.fields == fields):
            rounds = {
                (backend, direction): gpu_round(p.runner(backend, direction), len(p.xs))
                for backend in TUNABLE
                for direction in DIRECTIONS
            }
            times = interleaved(rounds, seconds)
            both = {backend: sum(times[backend, direction].both for direction in DIRECTIONS) for backend in TUNABLE}
            by_call[p.call.name] = {backend: taken / min(both.values()) for backend, taken in both.items()}
        score = {backend: geometric_mean([of[backend] for of in by_call.values()]) for backend in TUNABLE}
        order = sorted(score, key=score.get)
        arch = preference.arch(x.device.index)
        yield {"arch": arch, "bytes": x.element_size(), "fields": fields, "order": order, "measured": True}, by_call
