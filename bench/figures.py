"""How plots look, and how they are written: without a ground of their own, legible on white pages and on dark ones."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from .pictures.svg import INK

matplotlib.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["INK", "plt", "save"]

plt.rcParams.update(
    {
        "savefig.transparent": True,
        "legend.framealpha": 0,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    }
)


def save(figure: plt.Figure, path: Path) -> None:
    """Writes a figure, and frees it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
