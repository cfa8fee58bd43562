"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from time import sleep

import torch

import divnorm_kernels
from divnorm_kernels.backends import cpu, triton


def processor() -> str:
    """The processor's own name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()


def taken_by_others(stat: Path = Path("/proc/stat")) -> float | None:
    """The share of all processors' time that goes to others, in half a second of this process's sleep; Linux alone."""
    if not stat.exists():
        return None

    def times() -> tuple[int, int]:
        counted = [int(ticks) for ticks in stat.read_text().splitlines()[0].split()[1:9]]
        return sum(counted), counted[3] + counted[4]  # idle, and waiting for a disk

    before, idle_before = times()
    sleep(0.5)
    after, idle_after = times()
    return 1 - (idle_after - idle_before) / max(1, after - before)


def caches() -> dict[str, str]:
    """Sizes of the first processor's caches by level and kind, where the system tells them."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        found[f"L{level} {kind.lower()}"] = size
    return found


def gpu() -> dict[str, object] | None:
    """The GPU and what drives it, where there is one."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "L2 cache": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton.description() if triton.missing() is None else None,
    }


def describe(device: str) -> dict[str, object]:
    """Processor, caches, threads and versions; the GPU where ``device`` is one."""
    return {
        "device": device,
        "gpu": None if device == "cpu" else gpu(),
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
