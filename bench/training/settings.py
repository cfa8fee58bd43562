"""What a user chooses for an experiment, as plain values that every process and every log can hold."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .loop import Plan


@dataclass(frozen=True)
class Settings:
    """The choices that all experiments have; ``rate`` and ``decay`` are the paper's where not given."""

    model: str
    data: Path | None
    steps: int
    rate: float | None = None
    decay: tuple[float, ...] = ()
    """Parts of the steps at which the rate is divided by ten, in place of the paper's schedule."""
    evaluations: int = 5
    checkpoint_every: int = 200
    backend: str | None = None
    device: str = "cpu"

    def plan(self, rate: float, decays: tuple[tuple[float, float], ...], **options: Any) -> Plan:
        """A plan with the paper's ``rate`` and ``decays``, or those chosen."""
        return Plan(
            self.steps,
            rate if self.rate is None else self.rate,
            tuple((part, 0.1) for part in self.decay) if self.decay else decays,
            evaluations=min(self.evaluations, self.steps),
            checkpoint_every=self.checkpoint_every,
            **options,
        )

    def record(self) -> dict[str, Any]:
        """As JSON holds it; of the data the folder's name alone, which is what a log may tell of a machine."""
        plain = asdict(self) | {"data": None if self.data is None else self.data.resolve().name}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


@dataclass(frozen=True)
class ClassSettings(Settings):
    """Of experiments whose samples have classes."""

    batch: int = 100
    held_out: int = 0
    """Training samples that take the test samples' place: what is chosen by them has not seen the test set."""
    precision: str = "float32"
    """Or "bfloat16": under autocast."""
    projected: bool = False
    """Whether the weights are projected to their initial norms after each step."""
