"""A processor was met whose vector divisions in float64 err by 2**-34 now and then, for a moment up to a minute.

It is everyone's alike, torch's and the kernels'. A watch, of low priority on every core, notes when it sees that; what
failed meanwhile is done once more.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

NOTES = "DIVNORM_PROCESSOR_NOTES"
"""The environment variable with the path of the notes: a line for every error, with the time."""
PAUSE = 0.002
"""Seconds between two looks, which take a few microseconds each."""
QUIET, LONGEST_FAULT = 5, 300
"""Seconds without an error after which the fault is over; and for which that is waited for."""


@contextmanager
def watched() -> Iterator[list[int]]:
    """Inside of it every core is watched, for this process and those that it starts; gives the watches' numbers."""
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder) / "notes"
        notes.touch()
        os.environ[NOTES] = str(notes)
        watches = [
            subprocess.Popen([sys.executable, __file__, notes, str(core), str(os.getpid())], start_new_session=True)
            for core in os.sched_getaffinity(0)
        ]
        try:
            yield [watch.pid for watch in watches]
        finally:
            del os.environ[NOTES]
            for watch in watches:
                watch.kill()
                watch.wait()


def erred(since: float) -> bool:
    """Whether the watch has seen an error since a time."""
    notes = os.environ.get(NOTES)
    return notes is not None and any(float(line) >= since for line in Path(notes).read_text().split())


def once_more_if_it_erred(function: Callable[[], Any]) -> Any:
    """Calls ``function``; where it fails and the processor erred meanwhile, again when it does not."""
    begin = time.time()
    try:
        return function()
    except Exception:
        time.sleep(2 * PAUSE)  # for the note of what is happening now
        if not erred(begin):
            raise
    end = time.monotonic() + LONGEST_FAULT
    while erred(time.time() - QUIET) and time.monotonic() < end:
        time.sleep(1)
    warnings.warn("the processor divided wrongly, what failed meanwhile is done again", stacklevel=2)
    return function()


def look(divide: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.div) -> Callable[[], bool]:
    """What tells whether vector divisions give the numbers of scalar ones."""
    a = torch.linspace(1, 2, 4096, dtype=torch.float64)
    b = a.flip(0).sin()
    one_by_one = torch.tensor([p / q for p, q in zip(a.tolist(), b.tolist(), strict=True)], dtype=torch.float64)
    return lambda: torch.equal(divide(a, b), one_by_one)


def main(notes: str, core: str, parent: str) -> None:
    """Watches a core until the process that asked for it is gone."""
    os.nice(19)
    os.sched_setaffinity(0, {int(core)})
    torch.set_num_threads(1)
    divides = look()
    while os.getppid() == int(parent):
        if not divides():
            with open(notes, "a") as file:
                file.write(f"{time.time()}\n")
        time.sleep(PAUSE)


if __name__ == "__main__":
    main(*sys.argv[1:])
