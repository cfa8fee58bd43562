"""The CUDA backend for the tests: on the GPU where there is one, else its kernels on the emulated device.

The emulated device (``csrc/tests/emulated_device.h``) runs the very sources of the kernels on CPU tensors and counts
what they read and write of global memory.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pybind11
import pytest
import torch
from caches import forget
from process import ROOT, load, run

from divnorm_kernels.backends import cuda
from divnorm_kernels.backends.cuda import table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HOPPER = table.Device((9, 0), 132, 60 << 20, 228 << 10, 227 << 10)
"""An H200, for choices that nothing is launched for."""
TINY = table.Device((9, 0), 3, 1 << 14, 228 << 10, 227 << 10)
"""The emulated device: few multiprocessors and a small cache, so that small tensors take several rounds and chunks."""


def module() -> ModuleType:
    """The kernels compiled for the emulated device."""
    return _built("emulated")


def counted() -> ModuleType:
    """The same, with accesses to shared memory among the costs that it keeps, at some five times the time.

    It takes minutes to compile: with DIVNORM_NO_COSTS=1 the tests that need it are skipped.
    """
    if os.environ.get("DIVNORM_NO_COSTS") == "1":
        pytest.skip("DIVNORM_NO_COSTS=1")
    return _built("counted", "-DDIVNORM_COUNTED=ON")


@cache
def _built(name: str, *more: str) -> ModuleType:
    folder = ROOT / "build" / name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes
        options = (f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *more)
        run("cmake", "-S", ROOT, "-B", folder, "-DDIVNORM_EMULATED=ON", "-DDIVNORM_OPTIMIZE=-O1", *options)
        run("cmake", "--build", folder, "--target", f"_{name}", "--parallel")
    return loaded(name, folder)


def loaded(name: str, folder: Path) -> ModuleType:
    """The kernels that have been built for the emulated device in a folder."""
    found = load(f"_{name}", folder)
    found.cuda_archs = "compute_80"  # for whatever it passes for
    return found


@contextmanager
def backend(library: ModuleType | None = None, device: table.Device = TINY, **row: Any) -> Iterator[None]:
    """The CUDA backend for `DEVICE`, with entries of the table replaced, for calls that have not been planned yet.

    ``library``: another build for the emulated device, which passes for ``device``.
    """
    saved = cuda.library, cuda.DEVICE_TYPE, cuda.device_of, table.ROWS
    table.ROWS = [{**entry, **row} for entry in saved[3]]
    if DEVICE == "cpu":
        cuda.library, cuda.DEVICE_TYPE, cuda.device_of = library or module(), "cpu", lambda x: device
    forget()
    try:
        yield
    finally:
        cuda.library, cuda.DEVICE_TYPE, cuda.device_of, table.ROWS = saved
        forget()
