"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

import divnorm_kernels
from divnorm_kernels.backends import cpu


def processor() -> str:
    """The processor's own name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()


def caches() -> dict[str, str]:
    """Sizes of the first processor's caches by level and kind, where the system tells them."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        found[f"L{level} {kind.lower()}"] = size
    return found


def describe() -> dict[str, object]:
    """Processor, caches, threads and versions."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "caches": caches(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "divnorm_kernels": divnorm_kernels.__version__,
        "instruction_set": cpu.instruction_set(),
    }
