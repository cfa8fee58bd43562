"""A run's results for reading: the table and the headline."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .measure import COPY
from .results import (
    Rows,
    against,
    best_of_ours,
    by_window,
    direction_shares,
    geometric_mean,
    headline,
    in_words,
    machine_name,
    ratio,
    settings_of,
    share_of_limit,
    window_growth,
)
from .subjects import BATCH_NORM, GROUP_NORM, PEERS

SHORT = {
    "BatchNorm": "Batch",
    "GroupNorm": "Group",
    "LayerNorm": "Layer",
    "LocalResponseNorm": "LRN",
    "eager reference": "eager",
    "torch.compile": "compile",
}


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _peer(value: float | None) -> str:
    if value is None:
        return "-"
    return f"[{'green' if value >= 1 else 'red'}]{value:.2f}x[/]" if value < 10 else f"[green]{value:.0f}x[/]"


def table(rows: Rows) -> Table:
    """One line per setting and backend of ours."""
    out = Table(
        title="divisive normalization, forward + backward; right: how many times as long a peer takes",
        caption="copy: one copy of x. limit, fwd, bwd: share of the speed that the bytes alone would allow "
        "(2.5 copies; forward 1, backward 1.5).",
        pad_edge=False,
    )
    left = ("case", "dtype", "format")
    ours = ("k", "copy ms", "fwd ms", "bwd ms", "copies", "limit", "fwd", "bwd")
    for name in (*left, *ours, *SHORT.values(), "extra", "error"):
        out.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    for (case, dtype, form, window), subjects in settings_of(rows).items():
        own = best_of_ours(subjects)
        if own is None:
            continue
        times, error = own["times"], own["error"]
        cells = [case, dtype, "channels" if form == "channels_last" else "contig.", str(window)]
        cells.append(_number(subjects[COPY]["times"]["both"], ".3f"))
        if times is None:
            cells += [f"[red]{'failed' if own.get('failure') else 'wrong'}[/]", *"-----"]
        else:
            cells += [_number(times["forward"], ".3f"), _number(times["backward"], ".3f")]
            cells += [_number(own["copies"], ".2f"), _number(share_of_limit(own), ".0%")]
            cells += [_number(share, ".0%") for share in direction_shares(own, subjects[COPY])]
        cells += [_peer(ratio(own, subjects.get(peer))) for peer in PEERS]
        cells.append(_number(own["extra_share"], ".1%"))
        cells.append(_number(error and max(error["y"], error["dx"]), ".1e"))
        out.add_row(*cells)
    return out


def sweep_table(sweeps: Rows) -> Table:
    """Time against the window size, in copies."""
    windows = sorted({row["window"] for row in sweeps})
    out = Table(title="copies of x against the window size", pad_edge=False)
    for name in ("case", "dtype", "format", "backend", *map(str, windows), f"{windows[-1]} / {windows[0]}"):
        out.add_column(name, no_wrap=True)
    growth = window_growth(sweeps)
    for key, line in by_window(sweeps).items():
        out.add_row(
            *key, *(_number(line[w]["copies"], ".2f") if w in line else "-" for w in windows), f"{growth[key]:.2f}"
        )
    return out


def ratios_table(rows: Rows) -> Table:
    """How many times as long BatchNorm / GroupNorm take: a line per case, a column per dtype and format; one window."""
    window = rows[0]["window"]
    found = {key: subjects for key, subjects in settings_of(rows).items() if key[3] == window}
    columns = list(dict.fromkeys((dtype, form) for _, dtype, form, _ in found))
    out = Table("N x C x H x W")
    for dtype, form in columns:
        out.add_column(dtype if form == "contiguous" else f"{dtype}, {form}", no_wrap=True)
    for case in dict.fromkeys(key[0] for key in found):
        cells = []
        for column in columns:
            subjects = found.get((case, *column, window), {})
            own = best_of_ours(subjects)
            values = [None if own is None else ratio(own, subjects.get(peer)) for peer in (BATCH_NORM, GROUP_NORM)]
            cells.append(" / ".join(_number(value, ".2f") for value in values) if any(values) else "-")
        out.add_row(case, *cells)
    return out


def means_table(documents: list[dict]) -> Table:
    """A line per peer, a column per machine: how many times as long the peer takes, and what else sums a run up."""
    out = Table("times as long as divisive normalization")
    for document in documents:
        out.add_column(f"{machine_name(document['machine'])}, torch {document['machine']['torch']}", no_wrap=True)
    summaries = [headline(document["rows"]) for document in documents]
    for peer in PEERS:
        means = (summary["geometric mean of peer time / our time"][peer] for summary in summaries)
        out.add_row(peer, *(_number(mean, ".2f") for mean in means))
    growths = [list(window_growth(document["sweeps"]).values()) for document in documents]
    out.add_row("window 31 / window 3", *(_number(geometric_mean(growth), ".2f") for growth in growths))
    out.add_row("settings", *(str(summary["settings"]) for summary in summaries))
    return out


def print_headline(console: Console, rows: Rows, sweeps: Rows, overhead: dict[str, float], machine: dict) -> None:
    """The ratios that sum the run up."""
    summary = headline(rows)
    console.rule(machine_name(machine))
    for peer, value in summary["geometric mean of peer time / our time"].items():
        if value is not None:
            console.print(f"{against(value, peer)} (geometric mean, forward + backward)")
    count, total = (
        summary["settings no slower than the faster of BatchNorm and GroupNorm"],
        summary["settings with both"],
    )
    console.print(f"{count} of {total} settings are no slower than the faster of BatchNorm and GroupNorm")
    if summary["worst of them"] is not None:
        where = " ".join(map(str, summary["worst of them"]["setting"]))
        console.print(f"the worst of them: {in_words(summary['worst of them']['ratio'])} on {where}")
    growth = window_growth(sweeps).values()
    if growth:
        windows = {row["window"] for row in sweeps}
        console.print(
            f"window {max(windows)} takes {geometric_mean(list(growth)):.2f}x the time of window {min(windows)} "
            f"(geometric mean), at most {max(growth):.2f}x"
        )
    if overhead:
        console.print("a forward call on 4 KB: " + ", ".join(f"{k} {v:.1f} us" for k, v in overhead.items()))
    failed = ((row["subject"], row["failure"]) for row in (*rows, *sweeps) if row.get("failure"))
    for subject, failure in dict.fromkeys(failed):
        console.print(f"{subject} was not measured everywhere: {escape(failure.splitlines()[0])}")
    if summary["failed"]:
        console.print(f"[bold red]{summary['failed']} times a backend of ours failed[/]")
    if summary["wrong"]:
        console.print(f"[bold red]{summary['wrong']} settings gave wrong results and were not timed[/]")
