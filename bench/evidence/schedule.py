"""Runs what is left of the plan, several processes at a time, in an order of worth."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from ..training.loop import finished
from ..training.runs import processes
from .results import Results
from .table import Work

THREADS = 1
"""Of each process: results do not depend on how many processes run."""

Say = Callable[[str], None]


def in_order(results: dict[str, Results], order: Iterable[tuple[str, int]]) -> list[Work]:
    """What is left, by the order of (table, seeds): what a stage needs beyond the ones before it, table by table."""
    works = [work for name, seeds in order if name in results for work in results[name].left(seeds)]
    return list(dict.fromkeys(works))


def _told(work: Work, results: Results) -> str:
    log, program = results.log(work), results.table.program
    figure = log["figures"].get(program.figure)
    rate = "" if work.rate is None else f", rate {work.rate:g}"
    outcome = "diverged" if figure is None else f"{program.figure} {figure:.4g}"
    return f"{work.table.name}: {work.norm}, seed {work.seed}{rate}: {outcome}"


def run(works: list[Work], results: dict[str, Results], out: Path, jobs: int, say: Say) -> list[str]:
    """Runs ``works``, each as soon as a process is free and its rate is chosen, and rates that turn out to be needed.

    What has ended is written to its table's results at once. A run that was stopped goes on from its checkpoint.

    Args:
        works: in order of worth.
        results: by table.
        out: receives logs and checkpoints.
        jobs: processes.
        say: receives a line for every run that has ended.

    Returns:
        What failed, a line each.
    """
    failed, waiting = [], list(works)
    begun: dict[Work, Path] = {}
    with processes(jobs, THREADS, 1) as (submit, _):
        running: dict[Future, Work] = {}
        while waiting or running:
            waiting = [w for w in waiting if results[w.table.name].log(w) is None]  # known once its rate is
            for work in [w for w in waiting if results[w.table.name].ready(w)][: jobs - len(running)]:
                waiting.remove(work)
                chosen = None if work.rate is not None else results[work.table.name].chosen(work.norm)
                begun[work] = work.folder(out, chosen)
                running[submit(0, work.table.experiment, work.settings(chosen), work.run, begun[work])] = work
            if not running:
                failed += [f"{w.table.name}: {w.norm}, seed {w.seed}: no rate was chosen" for w in waiting]
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                work = running.pop(future)
                try:
                    future.result()
                except BrokenProcessPool:
                    say(f"a process has ended without a word; what is left goes on from {out} with the next command")
                    return [*failed, f"{work.table.name}: {work.norm}, seed {work.seed}: its process or another ended"]
                except Exception as error:
                    failed.append(f"{work.table.name}: {work.norm}, seed {work.seed}: {error!r}")
                    say(failed[-1])
                    continue
                of = results[work.table.name]
                of.add(work, finished(work.run.folder(begun[work])))
                of.write()
                say(_told(work, of))
                if work.rate is not None:
                    beyond = [w for w in of.left(0) if w.norm == work.norm and w not in begun and w not in waiting]
                    waiting = beyond + waiting
    return failed
