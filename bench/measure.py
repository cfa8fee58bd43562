"""Measures one setting: every subject in the same interleaved run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from .accuracy import Error, compare, exact
from .cases import Setting
from .subjects import Subject, activation, ours, peers
from .timing import Times, extra_memory, interleaved, step, time_copy

COPY = "copy"
LIMIT_COPIES = 2.5
"""Forward 1 read + 1 write, backward 2 reads + 1 write: five times the bytes of x, where a copy moves two."""


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
    times: Times | None
    copies: float | None
    extra_bytes: int | None
    extra_share: float | None
    error: Error | None

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass
class Check:
    """What is found out about one of our backends before anything is timed."""

    error: Error
    extra_bytes: int | None


def check(setting: Setting) -> dict[str, Check]:
    """Compares our backends with the reference in float64, and measures their memory."""
    x, dy = _inputs(setting)
    expected = exact(x, dy, setting.window)
    found = {}
    for subject in ours(setting, x):
        _, _, (y, dx, *_) = step(subject, x, dy)
        error = compare(y, dx, expected, setting.window)
        del y, dx
        found[subject.name] = Check(error, extra_memory(subject, x, dy))
    return found


def measure(
    setting: Setting, checks: dict[str, Check], *, with_peers: bool, compiled: bool, seconds: float
) -> list[Row]:
    """Rows for a copy, our backends and the peers, measured in turn for ``seconds`` in all."""
    x, dy = _inputs(setting)
    subjects = ours(setting, x) + (peers(setting, x, compiled) if with_peers else [])
    timed = [s for s in subjects if s.name not in checks or not checks[s.name].error.wrong]
    times = interleaved({COPY: time_copy(x)} | {s.name: _round(s, x, dy) for s in timed}, seconds)
    rows = []
    for subject in (Subject(COPY, "Tensor.copy_", torch.clone, []), *subjects):
        taken, checked = times.get(subject.name), checks.get(subject.name)
        extra = None if checked is None else checked.extra_bytes
        rows.append(
            Row(
                setting.case.name,
                setting.case.what,
                list(setting.case.shape),
                setting.dtype,
                setting.format,
                setting.window,
                subject.name,
                subject.implementation,
                taken,
                None if taken is None else taken.both / times[COPY].both,
                extra,
                None if extra is None else extra / (x.numel() * x.element_size()),
                None if checked is None else checked.error,
            )
        )
    return rows


def _inputs(setting: Setting) -> tuple[Tensor, Tensor]:
    x = activation(setting, setting.case.values()).requires_grad_()
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    return x, torch.empty_like(x, requires_grad=False).copy_(dy)


def _round(subject: Subject, x: Tensor, dy: Tensor) -> Callable[[], tuple[float, float]]:
    return lambda: step(subject, x, dy)[:2]
