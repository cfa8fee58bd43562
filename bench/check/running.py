"""Runs steps: each in processes of its own, ended at its limit."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

from ..options import GO_ON
from . import steps
from .record import CUT_OFF, DONE, FAILED, RUNNING, Outcome, Record
from .steps import Device, Step

LEAST_SECONDS = 30
"""With less time left than this no step begins."""
GRACE = 5
"""Seconds that a command has to end when told to."""
SAID = 5
"""The lines of a step's output that are kept with its outcome."""


def run(wanted: list[Step], device: Device, record: Record, seconds: float) -> Iterator[tuple[Step, Outcome]]:
    """Runs steps in turn while there is time, and gives each with what came of it."""
    end = monotonic() + seconds
    for step in wanted:
        left = end - monotonic()
        if left < LEAST_SECONDS:
            return
        before = record.outcomes.get(step.name, Outcome(RUNNING))
        record.outcomes[step.name] = Outcome(RUNNING, before.seconds)
        record.save()
        begin = monotonic()
        log = record.folder / f"{step.name}.log"
        code = _run(step, device, record.folder, log, begin + min(step.limit, left))
        state = CUT_OFF if code is None else DONE if code == 0 else FAILED
        outcome = Outcome(state, before.seconds + monotonic() - begin, code, _end_of(log))
        record.outcomes[step.name] = outcome
        record.save()
        record.pack()
        yield step, outcome
        if step.needed and state == FAILED:
            return


def _run(step: Step, device: Device, folder: Path, log: Path, end: float) -> int | None:
    """The exit status of a step's commands, ``None`` where the time was up."""
    environment = {**steps.environment(), **step.environment(device)}
    with log.open("a") as output:
        try:
            commands = step.commands(device, folder)
        except FileNotFoundError as error:  # a tool or data that is not there
            print(error, file=output)
            return 1
        for command in commands:
            code = GO_ON
            while code == GO_ON:  # it wrote down why, and leaves that out in another process
                print("$", *command, file=output, flush=True)
                code = _ended(command, environment, output, end)
            if code != 0:
                return code
    return 0


def _ended(command: list[str], environment: dict[str, str], output: object, end: float) -> int | None:
    """The exit status of a command, ``None`` where it was ended with all that it had started."""
    job = subprocess.Popen(
        command,
        cwd=steps.ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        preexec_fn=os.setpgrp,  # a group, to be ended together, in the caller's session, to be ended with that
    )
    try:
        return job.wait(max(0.0, end - monotonic()))
    except subprocess.TimeoutExpired:
        return None
    finally:
        if job.returncode is None:
            _end(job)


def _end(job: subprocess.Popen) -> None:
    os.killpg(job.pid, signal.SIGTERM)
    try:
        job.wait(GRACE)
    except subprocess.TimeoutExpired:
        pass
    finally:
        if job.returncode is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()


def _end_of(log: Path) -> list[str]:
    """Its last lines with words in them."""
    return [line for line in log.read_text(errors="replace").splitlines() if any(map(str.isalnum, line))][-SAID:]
