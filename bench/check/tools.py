"""CUDA's own tools, and what they say."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

PLACE = Path("/usr/local/cuda/bin")
"""Where an installation of CUDA has them, on the PATH or not."""


def path() -> str:
    """The PATH, and behind it CUDA's place for tools."""
    before = os.environ.get("PATH", os.defpath)
    return before if str(PLACE) in before.split(os.pathsep) else f"{before}{os.pathsep}{PLACE}"


def found(name: str) -> str:
    """Where a tool is.

    Raises:
        FileNotFoundError: where it is not.
    """
    place = shutil.which(name, path=path())
    if place is None:
        raise FileNotFoundError(f"{name} is neither on the PATH nor in {PLACE}")
    return place


def said(name: str, *arguments: object) -> str:
    """What a tool prints to its standard output.

    Raises:
        FileNotFoundError: where there is no such tool.
        RuntimeError: where it fails, with the end of all that it printed.
    """
    command = [found(name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path()})
    if done.returncode != 0:
        raise RuntimeError(f"{name} ended with {done.returncode}: {(done.stdout + done.stderr).strip()[-500:]}")
    return done.stdout
