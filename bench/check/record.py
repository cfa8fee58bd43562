"""What is known of the steps: on disk after each, and carried on by the next run."""

from __future__ import annotations

import json
import os
import tarfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..results import write
from .steps import STEPS, Device, Step

FILE = "check.json"
DONE, FAILED, CUT_OFF, RUNNING = "done", "failed", "cut off", "running"
ARCHIVE = "gpu-check.tar.gz"
OUT = "OUT"
"""The environment variable with a folder that the results are packed into, where they are to leave the machine."""


@dataclass
class Outcome:
    """What came of a step."""

    state: str
    seconds: float = 0.0
    """Of all its runs."""
    code: int | None = None
    says: list[str] = field(default_factory=list)
    """The last lines that it printed."""


@dataclass
class Record:
    """A folder's steps by name, the GPU they ran on, and of which sources."""

    folder: Path
    gpu: str | None = None
    sources: str | None = None
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Record:
        """What a folder holds. A step that was running when its process was killed was cut off."""
        path = folder / FILE
        if not path.exists():
            return cls(folder)
        document = json.loads(path.read_text())
        outcomes = {name: Outcome(**of) for name, of in document["steps"].items()}
        for outcome in outcomes.values():
            if outcome.state == RUNNING:
                outcome.state = CUT_OFF
        return cls(folder, document["gpu"], document["sources"], outcomes)

    def save(self) -> None:
        """Replaces the file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        outcomes = {name: asdict(outcome) for name, outcome in self.outcomes.items()}
        write(self.folder / FILE, {"gpu": self.gpu, "sources": self.sources, "steps": outcomes})

    def pack(self) -> None:
        """Packs the folder into one file where the environment names a place for it; never half a file."""
        place = os.environ.get(OUT)
        if place:
            part = Path(place) / f"{ARCHIVE}.part"
            with tarfile.open(part, "w:gz") as archive:
                archive.add(self.folder, self.folder.name)
            part.replace(Path(place) / ARCHIVE)

    def next(self, device: Device | None = None) -> list[Step]:
        """What has not been run to its end, as what failed has; on a device, what is not there any more too.

        A failure of what the steps behind it need comes again, before them.
        """

        def ended(step: Step) -> bool:
            state = self.outcomes.get(step.name, Outcome(CUT_OFF)).state
            return (state == FAILED and not step.needed) or (state == DONE and (device is None or step.there(device)))

        return [step for step in STEPS.values() if not (step.asked_for or ended(step))]
