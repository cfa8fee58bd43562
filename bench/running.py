"""A run of the benchmark: every setting is checked, then timed, and the results are on disk after each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

from .cases import Setting
from .measure import Check, Ended, check, measure, measure_windows
from .results import KEY, METHOD, Rows, check_machine, headline, read, write
from .timing import keep_freed_memory, return_freed_memory

SWEEP_SHARE = 0.25
"""Part of a setting's seconds that one window of a sweep gets: it has one subject, not eight."""


@dataclass
class Plan:
    """What is to be measured: settings, groups of settings that differ in the window alone, and for how long."""

    settings: list[Setting]
    sweeps: list[list[Setting]]
    compiled: set[str]
    """Cases on which torch.compile is measured too."""
    seconds: float
    """For the subjects of one setting together."""

    def without(self, done: Results) -> Plan:
        """What is left where ``done`` has been measured."""
        settings, swept = ({_key(row) for row in rows} for rows in (done.rows, done.sweeps))
        return Plan(
            [s for s in self.settings if _name(s) not in settings],
            [group for group in self.sweeps if not {_name(s) for s in group} <= swept],
            self.compiled,
            self.seconds,
        )


@dataclass
class Results:
    """A results file in the making; ``rows`` and ``sweeps`` as `measure.Row.as_dict` gives them."""

    path: Path
    machine: dict
    command: str
    overhead: dict[str, float]
    rows: Rows = field(default_factory=list)
    sweeps: Rows = field(default_factory=list)
    failures: Rows = field(default_factory=list)
    """Subjects whose failure ended a process, setting by setting; they are not tried again."""

    def go_on(self) -> None:
        """Takes over what the file has, if there is one.

        Raises:
            ValueError: where it is no results file or one of another machine.
        """
        if not self.path.exists():
            return
        before = read(self.path)
        check_machine(self.path, before["machine"], self.machine)
        self.rows, self.sweeps, self.failures = before["rows"], before["sweeps"], before.get("failures", [])

    def add(self, ended: Ended) -> None:
        """Writes down a failure that ends the process."""
        named = dict(zip(KEY, _name(ended.setting), strict=True))
        self.failures.append({**named, "subject": ended.subject, "failure": ended.failure})
        self.write()

    def failures_of(self, setting: Setting) -> dict[str, str]:
        """Those of a setting, by subject."""
        return {row["subject"]: row["failure"] for row in self.failures if _key(row) == _name(setting)}

    def write(self) -> None:
        """Replaces the file."""
        write(self.path, self.document())

    def document(self) -> dict:
        """What the file holds."""
        return {
            "machine": self.machine,
            "command": self.command,
            "method": METHOD,
            "headline": headline(self.rows),
            "call_overhead_us": self.overhead,
            "rows": self.rows,
            "sweeps": self.sweeps,
            "failures": self.failures,
        }


def _key(row: dict) -> tuple:
    return tuple(row[name] for name in KEY)


def _name(setting: Setting) -> tuple:
    return setting.case.name, setting.dtype, setting.format, setting.window


def steps(plan: Plan, results: Results) -> Iterator[tuple[str, Callable[[], None]]]:
    """The work of a plan, in order: what to tell the user, and what to do; what is measured goes to ``results``.

    The work raises `Ended` where another process has to go on.
    """
    checks: dict[Setting, dict[str, Check]] = {}

    def checked(setting: Setting) -> dict[str, Check]:
        if setting not in checks:
            checks[setting] = check(setting, results.failures_of(setting))
        return checks[setting]

    def time(setting: Setting) -> None:
        rows = measure(
            setting,
            checked(setting),
            compiled=setting.case.name in plan.compiled,
            seconds=plan.seconds,
            failures=results.failures_of(setting),
        )
        results.rows += [row.as_dict() for row in rows]
        results.write()

    def time_windows(group: list[Setting]) -> None:
        rows = measure_windows(
            group,
            list(map(checked, group)),
            seconds=SWEEP_SHARE * plan.seconds * len(group),
            failures=list(map(results.failures_of, group)),
        )
        results.sweeps += [row.as_dict() for row in rows]
        results.write()

    everything = dict.fromkeys([*plan.settings, *chain(*plan.sweeps)])
    if any(setting.device == "cpu" for setting in everything):
        # memory is counted before the C library is told to keep it; a GPU's allocator counts at any time
        yield "", return_freed_memory
        yield from ((f"checking {_described(s)} window {s.window}", partial(checked, s)) for s in everything)
    yield "", keep_freed_memory
    for setting in plan.settings:
        yield f"timing {_described(setting)} window {setting.window}", partial(time, setting)
    for group in plan.sweeps:
        yield f"timing {_described(group[0])} against the window", partial(time_windows, group)


def _described(setting: Setting) -> str:
    return f"{setting.case.name} {setting.dtype} {setting.format}"
