"""A run's results as data: ratios, headline figures, JSON."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, is_dataclass
from math import prod
from pathlib import Path
from typing import Any

from .measure import LIMIT_COPIES
from .subjects import BATCH_NORM, GROUP_NORM, OURS, PEERS

METHOD = (
    "Subjects run in turn, round after round; medians, milliseconds. forward: the call with gradients on; backward: "
    "torch.autograd.grad for x and the parameters. CPU: the C library keeps freed memory, for every subject, so that "
    "none pays page faults. GPU: CUDA graphs of steps over copies that pass the cache, results kept as long. copies: "
    "forward + backward in copies of x. limit: 2.5 copies."
)
Rows = list[dict]
KEY = ("case", "dtype", "format", "window")
SAME = ("gpu", "processor", "threads", "torch", "divnorm_kernels")
"""What a run that goes on must have in common with the one before."""


def write_rows(path: Path, rows: list[Any], machine: dict, command: str) -> None:
    """One JSON document of rows that are dataclasses or dictionaries."""
    plain = [asdict(row) if is_dataclass(row) else row for row in rows]
    path.write_text(json.dumps({"machine": machine, "command": command, "rows": plain}, indent=1) + "\n")


def machine_name(machine: dict) -> str:
    """What computed: the GPU, or the processor with its threads and instruction set."""
    gpu = machine.get("gpu")
    return gpu["name"] if gpu else f"{machine['processor']}, {machine['threads']} threads, {machine['instruction_set']}"


def settings_of(rows: Rows) -> dict[tuple, dict[str, dict]]:
    """Rows by setting and subject, in the order measured."""
    grouped: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        grouped.setdefault(tuple(row[name] for name in KEY), {})[row["subject"]] = row
    return grouped


def best_of_ours(subjects: dict[str, dict]) -> dict | None:
    """Our fastest backend of a setting; one that was wrong or failed, and has no time, only where there is no other."""
    own = [row for name, row in subjects.items() if name.startswith(OURS)]
    return min(own, key=lambda row: (row["times"] is None, row["times"] and row["times"]["both"]), default=None)


def ratio(own: dict, peer: dict | None) -> float | None:
    """How many times as long the peer takes, forward and backward."""
    if own["times"] is None or peer is None or peer["times"] is None:
        return None
    return peer["times"]["both"] / own["times"]["both"]


def share_of_limit(own: dict) -> float | None:
    """The part of the byte limit's speed that is reached."""
    return None if own["copies"] is None else LIMIT_COPIES / own["copies"]


def direction_shares(own: dict, copy: dict) -> tuple[float | None, float | None]:
    """The parts of the speed that forward's bytes, a read and a write, and backward's, two reads and a write, allow."""
    if own["times"] is None:
        return None, None
    times, limit = own["times"], copy["times"]["both"]
    return limit / times["forward"], 1.5 * limit / times["backward"]


def in_words(ratio: float) -> str:
    """A ratio, the peer's time over ours, as what ours is."""
    return f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"


def against(ratio: float, peer: str) -> str:
    """The same as a line among others."""
    return f"{in_words(ratio):>14} than {peer}"


def geometric_mean(values: list[float]) -> float | None:
    """The geometric mean; ``None`` of nothing."""
    return prod(values) ** (1 / len(values)) if values else None


def by_window(sweeps: Rows) -> dict[tuple, dict[int, dict]]:
    """Rows of a sweep by (case, dtype, format, subject) and window; what has no time left out."""
    grouped: dict[tuple, dict[int, dict]] = {}
    for row in sweeps:
        if row["times"] is not None:
            grouped.setdefault((row["case"], row["dtype"], row["format"], row["subject"]), {})[row["window"]] = row
    return grouped


def window_growth(sweeps: Rows) -> dict[tuple, float]:
    """How many times as long the largest window takes as the smallest, for every line of `by_window`."""
    return {
        key: line[max(line)]["times"]["both"] / line[min(line)]["times"]["both"]
        for key, line in by_window(sweeps).items()
    }


def headline(rows: Rows) -> dict[str, object]:
    """The ratios that sum a run up."""
    grouped = settings_of(rows)
    own = {key: best_of_ours(subjects) for key, subjects in grouped.items()}
    own = {key: row for key, row in own.items() if row is not None}

    def mean_ratio(peer: str) -> float | None:
        return geometric_mean([r for key, row in own.items() if (r := ratio(row, grouped[key].get(peer)))])

    against = {}
    for key, row in own.items():
        best = [r for peer in (BATCH_NORM, GROUP_NORM) if (r := ratio(row, grouped[key].get(peer)))]
        if best:
            against[key] = min(best)
    worst = min(against, key=against.get, default=None)
    return {
        "geometric mean of peer time / our time": {peer: mean_ratio(peer) for peer in PEERS},
        "settings": len(own),
        "settings no slower than the faster of BatchNorm and GroupNorm": sum(r >= 1 for r in against.values()),
        "settings with both": len(against),
        "worst of them": None if worst is None else {"setting": list(worst), "ratio": against[worst]},
        "wrong": sum(row["times"] is None and not row.get("failure") for row in own.values()),
        "failed": sum(row["subject"].startswith(OURS) and bool(row.get("failure")) for row in rows),
    }


def write(path: Path, document: dict) -> None:
    """One JSON document with everything a later reader needs; the file is replaced at once, never half written."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(part, path)


def read(path: Path) -> dict:
    """A document of `write`."""
    document = json.loads(path.read_text())
    if not isinstance(document, dict) or not {"rows", "sweeps", "machine"} <= document.keys():
        raise ValueError(f"{path}: expected a results file of this benchmark")
    return document


def check_machine(path: Path, before: dict, now: dict) -> None:
    """Raises a ValueError unless the results in a file are of this machine."""
    for name in SAME:
        if before.get(name) != now[name]:
            raise ValueError(f"{path}: got results with {name} {before.get(name)!r}, expected {now[name]!r}, as here")
