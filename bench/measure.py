"""Measures one setting: every subject in the same interleaved run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor

from . import gpu, timing
from .accuracy import Error, compare, exact
from .cases import Case, Setting
from .subjects import Subject, activation, ours, peers
from .timing import Times, interleaved, step

COPY, EXACT = "copy", "the reference in float64"
CEILING_BYTES = 1 << 28
"""A tensor larger than every cache."""
CEILING_SECONDS = 0.3
LIMIT_COPIES = 2.5
"""Forward 1 read + 1 write, backward 2 reads + 1 write: five times the bytes of x, where a copy moves two."""

_COPIED = Subject(COPY, "Tensor.copy_", torch.clone, [])
Found = TypeVar("Found")


@dataclass
class Row:
    """One subject in one setting. Times in milliseconds; absent where the result was wrong or the subject failed."""

    case: str
    what: str
    shape: list[int]
    dtype: str
    format: str
    window: int
    subject: str
    implementation: str
    device: str
    times: Times | None
    copies: float | None
    extra_bytes: int | None
    extra_share: float | None
    error: Error | None
    failure: str | None
    """Why it could not be measured."""

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass
class Check:
    """What is found out about one of our backends before anything is timed."""

    error: Error | None
    extra_bytes: int | None
    failure: str | None = None
    """Why the rest is not there."""

    @property
    def passed(self) -> bool:
        """Whether there is something to time."""
        return self.error is not None and not self.error.wrong


class Ended(RuntimeError):
    """A subject's failure behind which this process can measure nothing more; another one can."""

    def __init__(self, setting: Setting, subject: str, failure: str):
        super().__init__(f"{setting.case.name} {setting.dtype} {setting.format} {subject}: {failure}")
        self.setting, self.subject, self.failure = setting, subject, failure


class Attempts:
    """What is tried with the subjects of a setting: a failure is kept, and takes nothing from the other subjects."""

    def __init__(self, setting: Setting, failures: dict[str, str]):
        """``failures``: why subjects are not to be tried, which ended a process before."""
        self.setting, self.failures = setting, dict(failures)

    def __call__(self, name: str, work: Callable[[], Found]) -> Found | None:
        """What ``work`` gives for a subject; ``None`` where it or something before it failed.

        Raises:
            Ended: where no other subject can be measured after this failure.
        """
        if name in self.failures:
            return None
        try:
            return work()
        except Exception as error:
            self.failures[name] = f"{type(error).__name__}: {error}"
            if _clock(self.setting.device).spoilt(error):
                raise Ended(self.setting, name, self.failures[name]) from error
            return None


def copy_bandwidth(device: str) -> float:
    """Bytes per second, those read and those written, of a copy that no cache helps: the ceiling of every kernel."""
    x = torch.randn(CEILING_BYTES // 4, device=device)
    taken = interleaved({COPY: _clock(device).copy_round(x)}, CEILING_SECONDS)[COPY]
    return 2 * CEILING_BYTES / (1e-3 * taken.both)


def check(setting: Setting, failures: dict[str, str]) -> dict[str, Check]:
    """Compares our backends with the reference in float64, and measures their memory.

    ``failures``: as of `Attempts`.
    """
    x, dy = _inputs(setting)
    attempt = Attempts(setting, failures)
    expected = attempt(EXACT, lambda: exact(x, dy, setting.window))

    def checked(subject: Subject) -> Check:
        _, _, (y, dx, *_) = step(subject, x, dy)
        error = compare(y, dx, expected, setting.window)
        del y, dx
        return Check(error, _clock(setting.device).extra_memory(subject, x, dy))

    found = {}
    for subject in ours(setting, x):
        if expected is None:
            attempt.failures.setdefault(subject.name, f"nothing to compare with: {attempt.failures[EXACT]}")
        passed = attempt(subject.name, partial(checked, subject))
        found[subject.name] = passed or Check(None, None, attempt.failures[subject.name])
    return found


def measure(
    setting: Setting, checks: dict[str, Check], *, compiled: bool, seconds: float, failures: dict[str, str]
) -> list[Row]:
    """Rows for a copy, our backends and the peers, measured in turn for ``seconds`` in all.

    ``failures``: as of `Attempts`.
    """
    x, dy = _inputs(setting)
    subjects = ours(setting, x) + peers(setting, x, compiled)
    attempt = Attempts(setting, failures)
    clock = _clock(setting.device)
    rounds = {COPY: clock.copy_round(x)}
    for subject in subjects:
        if subject.name not in checks or checks[subject.name].passed:
            once = attempt(subject.name, partial(ready, clock, subject, x, dy))
            rounds |= {} if once is None else {subject.name: once}
    times = interleaved(rounds, seconds)
    return [
        _row(setting, x, s, times.get(s.name), checks.get(s.name), times[COPY], attempt.failures.get(s.name))
        for s in (_COPIED, *subjects)
    ]


def measure_windows(
    sweep: list[Setting], checks: list[dict[str, Check]], *, seconds: float, failures: list[dict[str, str]]
) -> list[Row]:
    """Rows for our backends on settings that differ in the window alone, all measured in turn with one copy.

    ``failures``: as of `Attempts`, setting by setting.
    """
    x, dy = _inputs(sweep[0])
    clock = _clock(sweep[0].device)
    rounds = {(0, COPY): clock.copy_round(x)}
    subjects = []
    for setting, of, known in zip(sweep, checks, failures, strict=True):
        attempt = Attempts(setting, known)
        for own in ours(setting, x):
            if of[own.name].passed:
                once = attempt(own.name, partial(ready, clock, own, x, dy))
                rounds |= {} if once is None else {(setting.window, own.name): once}
            subjects.append((setting, own, of[own.name], attempt.failures.get(own.name)))
    times = interleaved(rounds, seconds)
    copy = times[0, COPY]
    return [_row(s, x, own, times.get((s.window, own.name)), of, copy, failure) for s, own, of, failure in subjects]


def ready(clock: ModuleType, subject: Subject, x: Tensor, dy: Tensor) -> Callable[[], tuple[float, float]]:
    """A round that has run once, so that what fails does so here, where it is known whose it is."""
    once = clock.round_of(subject, x, dy)
    once()
    return once


def _row(
    setting: Setting,
    x: Tensor,
    subject: Subject,
    taken: Times | None,
    checked: Check | None,
    copy: Times,
    failure: str | None,
) -> Row:
    extra = None if checked is None else checked.extra_bytes
    if checked is not None:
        failure = checked.failure or failure
    return Row(
        setting.case.name,
        setting.case.what,
        list(setting.case.shape),
        setting.dtype,
        setting.format,
        setting.window,
        subject.name,
        subject.implementation,
        setting.device,
        taken,
        None if taken is None else taken.both / copy.both,
        extra,
        None if extra is None else extra / (x.numel() * x.element_size()),
        None if checked is None else checked.error,
        failure,
    )


def _inputs(setting: Setting) -> tuple[Tensor, Tensor]:
    x = activation(setting, _values(setting.case)).detach().requires_grad_()
    return x, torch.empty_like(x, requires_grad=False).copy_(_upstream(x.shape))


@lru_cache(maxsize=1)  # the settings of a case follow each other
def _values(case: Case) -> Tensor:
    return case.values()


@lru_cache(maxsize=1)
def _upstream(shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _clock(device: str) -> ModuleType:
    return timing if device == "cpu" else gpu
