"""What the GPU backends are to reach, as data, and where a run falls short of it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from rich.table import Table

from .cases import DTYPES
from .results import Rows, settings_of
from .subjects import BATCH_NORM, OURS


@dataclass(frozen=True)
class Target:
    """The least shares of the copy's bandwidth, in the fewest bytes, and the most of BatchNorm's time for both."""

    forward: float
    backward: float
    batch_norm: float
    """Where images have `LARGE` positions or more; elsewhere no more than BatchNorm's time."""


TARGETS = {"cuda": Target(0.90, 0.85, 0.7), "triton": Target(0.80, 0.75, 0.8)}
LARGE = 28 * 28
FORWARD_TENSORS, BACKWARD_TENSORS = 2, 3
"""How often x's bytes move at least: forward reads x and writes y, backward reads x and dy and writes dx."""


@dataclass(frozen=True)
class Verdict:
    """One backend in one setting: what was reached, and what it was to be."""

    setting: tuple
    backend: str
    forward: float
    backward: float
    batch_norm: float
    """Our time over BatchNorm's, forward and backward."""
    target: Target

    @property
    def missed(self) -> list[str]:
        """The targets that were not reached."""
        reached = {
            "forward": self.forward >= self.target.forward,
            "backward": self.backward >= self.target.backward,
            BATCH_NORM: self.batch_norm <= self.target.batch_norm,
        }
        return [name for name, met in reached.items() if not met]


def verdicts(rows: Rows, machine: dict) -> list[Verdict]:
    """What every backend with targets reached in every setting that BatchNorm was measured on too."""
    ceiling = machine.get("copy_bytes_per_second")
    found = []
    for setting, subjects in settings_of(rows).items():
        for backend, target in TARGETS.items():
            own, peer = subjects.get(f"{OURS} {backend}"), subjects.get(BATCH_NORM)
            if ceiling is None or own is None or own["times"] is None or peer is None:
                continue
            size = prod(own["shape"]) * DTYPES[own["dtype"]].itemsize
            large = len(own["shape"]) > 2 and prod(own["shape"][2:]) >= LARGE
            found.append(
                Verdict(
                    setting,
                    backend,
                    FORWARD_TENSORS * size / (1e-3 * own["times"]["forward"]) / ceiling,
                    BACKWARD_TENSORS * size / (1e-3 * own["times"]["backward"]) / ceiling,
                    own["times"]["both"] / peer["times"]["both"],
                    target if large else Target(target.forward, target.backward, 1.0),
                )
            )
    return found


def table(found: list[Verdict]) -> Table:
    """A line per setting and backend, what was missed in red."""
    out = Table(
        title="what was reached: share of the copy's bandwidth in the fewest bytes, and our time over BatchNorm's",
        caption="in brackets the target, where it was missed",
        pad_edge=False,
    )
    for name in ("case", "dtype", "format", "k", "backend", "forward", "backward", f"of {BATCH_NORM}'s time", "missed"):
        out.add_column(name, no_wrap=True)
    for verdict in found:
        missed = verdict.missed
        target = verdict.target
        cells = [
            f"[red]{value:{form}} ({limit:{form}})[/]" if name in missed else f"{value:{form}}"
            for name, value, limit, form in (
                ("forward", verdict.forward, target.forward, ".0%"),
                ("backward", verdict.backward, target.backward, ".0%"),
                (BATCH_NORM, verdict.batch_norm, target.batch_norm, ".2f"),
            )
        ]
        case, dtype, form, window = verdict.setting
        out.add_row(case, dtype, form, str(window), verdict.backend, *cells, ", ".join(missed))
    return out
