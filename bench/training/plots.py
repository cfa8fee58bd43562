"""Training runs as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..figures import plt, save
from .summary import by_norm, mean_and_deviation

WIDTH = 0.8
"""Of a group of bars."""


def _colours(names: list[str]) -> dict[str, Any]:
    return dict(zip(names, plt.get_cmap("tab10" if len(names) <= 10 else "tab20").colors, strict=False))


def _band(axes: plt.Axes, runs: list[dict], name: str, label: str, colour: Any) -> None:
    """The mean of a record's value over the runs, and their range."""
    values: dict[int, list[float]] = {}
    for run in runs:
        for record in run["records"]:
            if name in record:
                values.setdefault(record["step"], []).append(record[name])
    if values:
        steps, rows = list(values), list(values.values())
        axes.plot(steps, [sum(row) / len(row) for row in rows], label=label, color=colour, linewidth=1.3)
        axes.fill_between(steps, [min(row) for row in rows], [max(row) for row in rows], color=colour, alpha=0.15)


def plot_curves(path: Path, document: dict[str, Any]) -> None:
    """Training loss, and the figure on data that training does not see, against the steps."""
    groups = by_norm(document["runs"], tuple(document["norms"]))
    colours = _colours(list(groups))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for norm, runs in groups.items():
        _band(left, runs, "loss", norm, colours[norm])
        _band(right, runs, document["curve"], norm, colours[norm])
    left.set(xlabel="step", ylabel="training loss, without the penalty", yscale="log")
    right.set(xlabel="step", ylabel=document["curve"])
    if not document["higher_is_better"]:
        right.set_yscale("log")
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=10)
    figure.suptitle(document["title"], fontsize=10)
    save(figure, path)


def plot_activations(path: Path, document: dict[str, Any]) -> None:
    """Sparsity and pairwise correlation by place and norm; bars are means over the seeds, whiskers their deviation."""
    ended = [run for run in document["runs"] if not run["diverged"]]
    groups = by_norm(ended, tuple(document["norms"]))
    if not groups:
        return
    colours = _colours(list(groups))
    places = list(ended[0]["activations"])
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axes, name in zip(panels, ("sparsity", "correlation"), strict=True):
        for i, (norm, runs) in enumerate(groups.items()):
            at = np.arange(len(places)) + WIDTH * ((i + 0.5) / len(groups) - 0.5)
            rows = [mean_and_deviation([run["activations"][place][name] for run in runs]) for place in places]
            heights, errors = zip(*rows, strict=True)
            axes.bar(at, heights, WIDTH / len(groups), yerr=np.nan_to_num(errors), label=norm, color=colours[norm])
        axes.set_xticks(range(len(places)), places)
        axes.set_ylabel({"sparsity": "sparsity", "correlation": "mean |correlation| of two channels"}[name])
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=10)
    figure.suptitle(f"activations, {document['title']}", fontsize=10)
    save(figure, path)


def plot_pictures(path: Path, parts: dict[str, np.ndarray]) -> None:
    """Pictures from 0 to 255 side by side, each under its title."""
    figure, panels = plt.subplots(1, len(parts), figsize=(3 * len(parts), 3.3), layout="constrained")
    for axes, (title, values) in zip(panels, parts.items(), strict=True):
        axes.imshow(values, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(title, fontsize=9)
        axes.axis("off")
    save(figure, path)
