"""Measures one setting: every subject in the same interleaved run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from . import gpu, timing
from .accuracy import Error, compare, exact
from .cases import Case, Setting
from .subjects import Subject, activation, ours, peers
from .timing import Times, interleaved, step

COPY = "copy"
CEILING_BYTES = 1 << 28
"""A tensor larger than every cache."""
CEILING_SECONDS = 0.3
LIMIT_COPIES = 2.5
"""Forward 1 read + 1 write, backward 2 reads + 1 write: five times the bytes of x, where a copy moves two."""

_COPIED = Subject(COPY, "Tensor.copy_", torch.clone, [])


@dataclass
class Row:
    """One subject in one setting. Times in milliseconds; absent where the result was wrong."""

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
    """Why a peer could not be measured."""

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass
class Check:
    """What is found out about one of our backends before anything is timed."""

    error: Error
    extra_bytes: int | None


def copy_bandwidth(device: str) -> float:
    """Bytes per second, those read and those written, of a copy that no cache helps: the ceiling of every kernel."""
    x = torch.randn(CEILING_BYTES // 4, device=device)
    taken = interleaved({COPY: _clock(device).copy_round(x)}, CEILING_SECONDS)[COPY]
    return 2 * CEILING_BYTES / (1e-3 * taken.both)


def check(setting: Setting) -> dict[str, Check]:
    """Compares our backends with the reference in float64, and measures their memory."""
    x, dy = _inputs(setting)
    expected = exact(x, dy, setting.window)
    found = {}
    for subject in ours(setting, x):
        _, _, (y, dx, *_) = step(subject, x, dy)
        error = compare(y, dx, expected, setting.window)
        del y, dx
        found[subject.name] = Check(error, _clock(setting.device).extra_memory(subject, x, dy))
    return found


def measure(setting: Setting, checks: dict[str, Check], *, compiled: bool, seconds: float) -> list[Row]:
    """Rows for a copy, our backends and the peers, measured in turn for ``seconds`` in all."""
    x, dy = _inputs(setting)
    subjects = ours(setting, x) + peers(setting, x, compiled)
    timed = [s for s in subjects if s.name not in checks or not checks[s.name].error.wrong]
    clock = _clock(setting.device)
    rounds, failures = {COPY: clock.copy_round(x)}, {}
    for subject in timed:
        try:
            rounds[subject.name] = clock.round_of(subject, x, dy)
        except RuntimeError as error:  # a peer that cannot be compiled or captured takes nothing from the others
            if subject.name in checks:
                raise
            failures[subject.name] = f"{type(error).__name__}: {error}"
    times = interleaved(rounds, seconds)
    return [
        _row(setting, x, s, times.get(s.name), checks.get(s.name), times[COPY], failures.get(s.name))
        for s in (_COPIED, *subjects)
    ]


def measure_windows(sweep: list[Setting], checks: list[dict[str, Check]], *, seconds: float) -> list[Row]:
    """Rows for our backends on settings that differ in the window alone, all measured in turn with one copy."""
    x, dy = _inputs(sweep[0])
    subjects = [(s, subject, of[subject.name]) for s, of in zip(sweep, checks, strict=True) for subject in ours(s, x)]
    clock = _clock(sweep[0].device)
    rounds = {(s.window, own.name): clock.round_of(own, x, dy) for s, own, of in subjects if not of.error.wrong}
    times = interleaved({(0, COPY): clock.copy_round(x)} | rounds, seconds)
    copy = times[0, COPY]
    return [_row(s, x, subject, times.get((s.window, subject.name)), of, copy) for s, subject, of in subjects]


def _row(
    setting: Setting,
    x: Tensor,
    subject: Subject,
    taken: Times | None,
    checked: Check | None,
    copy: Times,
    failure: str | None = None,
) -> Row:
    extra = None if checked is None else checked.extra_bytes
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
