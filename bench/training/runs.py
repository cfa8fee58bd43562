"""Many runs of one experiment: every norm with every seed, in one process or several."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any

import torch

from ..timing import keep_freed_memory
from . import cifar, deep, dense, norms, placing, samples, stream, superres, text
from .loop import Task, finished, train
from .settings import Settings

RESULTS = "results.json"


@dataclass(frozen=True)
class Experiment:
    """A program of this folder: its models, and what its table shows."""

    name: str
    models: tuple[str, ...]
    task: Callable[[Any, str, int], Task]
    load: Callable[[Any], Any]
    """Reads the data, so that what is wrong with it is said before any run starts."""
    check_norm: Callable[[str, str], None]
    """Raises ValueError on a norm that a model, the second argument, cannot be trained with."""
    figure: str
    """The figure of the table, from the final evaluation."""
    curve: str
    """The figure of the plot, from every evaluation."""
    also: tuple[str, ...]
    """Other figures of the table."""
    higher_is_better: bool
    norms: tuple[str, ...] = ()
    """Those that `bench train` runs by default, where it runs the program."""
    steps: int | None = None
    """As ``norms``."""
    paper: Callable[[Any], dict[str, float]] = lambda settings: {}
    """The paper's figures by norm, where it has them for these settings and this data."""


EXPERIMENTS = {
    e.name: e
    for e in (
        Experiment(
            "cifar",
            tuple(cifar.Classification.MODELS),
            cifar.Classification,
            lambda s: cifar.pictures(s.data),
            cifar.check_norm,
            "accuracy",
            "accuracy",
            (),
            True,
            ("none", "bn", "bn-s", "bn*", "ln", "ln-s", "ln*", "dn", "dn*"),
            600,
            lambda s: cifar.PAPER.get(cifar.pictures(s.data).name, {}) if s.model == "cnn" else {},
        ),
        Experiment(
            "text",
            tuple(text.WINDOWS),
            text.Language,
            lambda s: text.texts(s.data, s.vocabulary),
            lambda norm, model: text.check_norm(norm),
            "perplexity",
            "valid",
            ("valid",),
            False,
            ("none", "bn", "bn*", "ln", "ln-s", "ln*", "dn", "dn*"),
            600,
            lambda s: {} if s.data is None else text.PAPER[s.model],
        ),
        Experiment(
            "superres",
            ("srcnn",),
            superres.SuperResolution,
            lambda s: superres.pictures(s.data, s.scale),
            lambda norm, model: norms.check_norm(norm),
            "psnr",
            "psnr",
            ("ssim", "bicubic psnr", "bicubic ssim"),
            True,
            ("none", "bn", "dn*"),
            2000,
            lambda s: {} if s.data is None else superres.PAPER.get(s.scale, {}),
        ),
        Experiment(
            "deep",
            tuple(deep.DeepClassification.MODELS),
            deep.DeepClassification,
            lambda s: cifar.pictures(s.data),
            lambda norm, model: placing.check_norm(norm),
            "accuracy",
            "accuracy",
            (),
            True,
        ),
        Experiment(
            "dense",
            dense.MODELS,
            dense.DenseClassification,
            lambda s: samples.load(s.model, 0, s.held_out),
            lambda norm, model: dense.check_norm(norm),
            "accuracy",
            "accuracy",
            (),
            True,
        ),
        Experiment(
            "stream",
            tuple(stream.LabelStream.MODELS),
            stream.LabelStream,
            lambda s: cifar.pictures(s.data),
            cifar.check_norm,
            "accuracy",
            "fitted",
            ("fitted", "growth", "sigma share"),
            True,
        ),
    )
}


@dataclass(frozen=True)
class Run:
    """One training: a norm, and the seed of its initial values and of the data's order."""

    norm: str
    seed: int

    def folder(self, out: Path) -> Path:
        """Where its log and checkpoint are; a star is no character for a file name."""
        return out / f"{self.norm.replace('*', '-star')}-{self.seed}"


Report = Callable[[int, int], None]
"""Called with the number of a run and of its steps that are done."""


def _train(name: str, settings: Settings, run: Run, out: Path, advance: Callable[[int], None]) -> None:
    keep_freed_memory()
    record = {**settings.record(), "experiment": name, "norm": run.norm, "seed": run.seed}
    task = EXPERIMENTS[name].task
    train(lambda: task(settings, run.norm, run.seed), record, run.seed, run.folder(out), advance)


_done: Any = None
"""In a worker process: steps done by run, in memory that all processes share."""


def _start_worker(done: Any, threads: int) -> None:
    global _done
    _done = done
    torch.set_num_threads(threads)


@contextmanager
def processes(jobs: int, threads: int, runs: int) -> Iterator[tuple[Callable[..., Future], Any]]:
    """``(submit, done)``: what hands a run to one of ``jobs`` processes, and the steps that each of ``runs`` has done.

    ``submit`` takes the number of the run and what `_train` takes before its last. Ctrl-C ends the processes at once.
    """
    context = get_context("spawn")  # threads do not survive a fork
    done = context.Array("l", runs)
    with ProcessPoolExecutor(jobs, context, _start_worker, (done, threads)) as pool:

        def submit(*arguments: Any) -> Future:
            # The terminal sends Ctrl-C to all; the workers, which inherit what is ignored, leave it to this process.
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
            try:
                return pool.submit(_train_in_worker, *arguments)
            finally:
                signal.signal(signal.SIGINT, handler)

        try:
            yield submit, done
        except KeyboardInterrupt:
            for worker in active_children():
                worker.kill()  # at any time its files are whole
            raise


def _train_in_worker(number: int, *arguments: Any) -> None:
    def advance(step: int) -> None:
        if not parent_process().is_alive():  # killed, and perhaps started again: two would write one folder
            os._exit(1)  # an exception would only end the task, and the process wait for the next
        _done[number] = step

    _train(*arguments, advance)


def run_all(name: str, settings: Settings, runs: list[Run], out: Path, jobs: int, report: Report) -> None:
    """Trains every run that has not ended before; with several ``jobs``, in so many processes at a time."""
    if jobs == 1:
        for number, run in enumerate(runs):
            _train(name, settings, run, out, lambda step, number=number: report(number, step))
        return
    with processes(jobs, max(1, (os.cpu_count() or 1) // jobs), len(runs)) as (submit, done):
        waiting = {submit(i, name, settings, run, out) for i, run in enumerate(runs)}
        while waiting:
            ended, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            for number, step in enumerate(done):
                report(number, step)
            for future in ended:
                if future.exception() is not None:
                    for other in waiting:
                        other.cancel()
                future.result()


def collect(out: Path, record: dict[str, Any]) -> list[dict[str, Any]]:
    """The logs of the runs in the folder that have ended with the settings of ``record``, of earlier commands too."""
    logs = (finished(folder) for folder in sorted(out.iterdir()) if folder.is_dir())
    return [log for log in logs if log is not None and log["settings"].items() >= record.items()]
