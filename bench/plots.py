"""A run's results as pictures."""

from __future__ import annotations

from pathlib import Path

from .figures import INK, plt, save
from .measure import LIMIT_COPIES
from .results import Rows, best_of_ours, by_window, machine_name, ratio, settings_of
from .subjects import PEERS


def _title(machine: dict) -> str:
    return f"{machine_name(machine)}, torch {machine['torch']}"


def plot_ratios(path: Path, rows: Rows, machine: dict) -> None:
    """How many times as long each peer takes, a line of points per setting."""
    lines = []
    for (case, dtype, form, window), subjects in settings_of(rows).items():
        own = best_of_ours(subjects)
        if own is not None and own["times"] is not None:
            label = f"{case} {dtype} {'channels_last' if form == 'channels_last' else ''} k={window}"
            lines.append((label, {peer: ratio(own, subjects.get(peer)) for peer in PEERS}))
    figure, axes = plt.subplots(figsize=(10, 1.5 + 0.25 * len(lines)), layout="constrained")
    for peer in PEERS:
        points = [(values[peer], i) for i, (_, values) in enumerate(lines) if values[peer] is not None]
        if points:
            axes.scatter(*zip(*points, strict=True), label=peer, s=22)
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(lines)), [label for label, _ in lines], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("time of the peer / time of divisive_norm, forward + backward (right of 1: we are faster)")
    axes.set_title(_title(machine), fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    figure.legend(fontsize=7, loc="outside lower center", ncols=len(PEERS))
    save(figure, path)


def plot_windows(path: Path, sweeps: Rows, machine: dict) -> None:
    """Forward + backward in copies of x against the window size."""
    lines = by_window(sweeps)
    figure, axes = plt.subplots(figsize=(8, 5.4 + 0.08 * len(lines)), layout="constrained")
    for i, (key, line) in enumerate(lines.items()):
        copies = [row["copies"] for row in line.values()]
        style = ("-", "--", ":")[i // 10 % 3]  # ten colours
        axes.plot(list(line), copies, style, marker="o", markersize=3, label=" ".join(key))
    axes.axhline(LIMIT_COPIES, color=INK, linewidth=1, linestyle="--", label="limit by bytes")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("window")
    axes.set_ylabel("forward + backward, copies of x")
    axes.set_title(_title(machine), fontsize=9)
    figure.legend(fontsize=7, loc="outside lower center", ncols=2, handlelength=5)
    save(figure, path)
