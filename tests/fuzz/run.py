"""Builds a target, starts its processes, counts calls, and shows the smallest that fails."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pybind11
from process import ROOT, run
from processor import watched

from fuzz.child import FAILED

PROCESSES = len(os.sched_getaffinity(0))
RARE, ENOUGH = 0.05, 50
"""The least share of pipelined kernels, which few calls are for, among this many calls at least."""


@dataclass(frozen=True)
class Target:
    """A build of the kernels, and what runs it."""

    folder: Path
    sanitizers: str
    module: str
    library: str
    batch: int
    """Calls of a process."""

    def build(self) -> None:
        """Compiles the module, beside the native tests of the same kernels."""
        options = ("-DDIVNORM_NATIVE_TESTS=ON", "-DDIVNORM_FUZZ=ON", f"-DDIVNORM_SANITIZE={self.sanitizers}")
        python = (f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
        run("cmake", "-S", ROOT, "-B", self.folder, *options, *python)
        run("cmake", "--build", self.folder, "--target", self.module, "--parallel", PROCESSES)

    def environment(self) -> dict[str, str]:
        """That of a process with the sanitizer's library, and the C++ library whose exceptions it watches."""
        compiler = os.environ.get("CXX", "c++")
        preloaded = (
            run(compiler, f"-print-file-name={name}").stdout.strip() for name in (self.library, "libstdc++.so")
        )
        return {
            "LD_PRELOAD": " ".join(preloaded),
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "TSAN_OPTIONS": "halt_on_error=1:die_after_fork=0:ignore_noninstrumented_modules=1",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
            "OMP_WAIT_POLICY": "PASSIVE",
            "OPENBLAS_NUM_THREADS": "1",
        }


TARGETS = {
    "cpu": Target(ROOT / "build" / "native-tests", "address,undefined", "_native", "libasan.so", 1000),
    "cuda": Target(ROOT / "build" / "native-tests", "address,undefined", "_emulated", "libasan.so", 250),
    "races": Target(ROOT / "build" / "race-tests", "thread", "_emulated", "libtsan.so", 25),
}


def child(name: str, *arguments: object) -> subprocess.CompletedProcess:
    """A process of a target, ended, with what it wrote."""
    target = TARGETS[name]
    command = (sys.executable, "-m", "fuzz.child", name, target.folder, *arguments)
    environment = {**os.environ, **target.environment()}
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)


def again(name: str, *case: object) -> None:
    """Makes one call under its sanitizer and prints what comes of it."""
    print(child(name, "--only", repr(case)).stderr or "no error")


@dataclass(frozen=True)
class Failure:
    """A call that failed, and what it wrote."""

    case: str
    errors: str

    def text(self, name: str) -> str:
        """The error, and Python that makes the call again."""
        imports = ("import torch", "from fuzz.run import again", "from strategies import Recipe")
        code = "\n".join((*imports, "", f"again({name!r}, *{self.case})"))
        return f"{self.errors}\nThe smallest call that fails, to be run in tests/:\n\n{code}\n"


def batch(name: str, calls: int, seed: int) -> Counter[str] | Failure:
    """Makes calls in a process: how often each strategy was taken, or the smallest call that fails."""
    note = TARGETS[name].folder / f"fuzz-{name}-{seed}.txt"
    arguments = ("--note", note, "--calls", calls, "--seed", seed)
    try:
        done = child(name, *arguments)
        if done.returncode == 0:
            return Counter(json.loads(done.stdout))
        failure = Failure(note.read_text() if note.exists() else "()", done.stderr)
        if done.returncode != FAILED:
            done = child(name, *arguments, "--fork")
            if done.returncode == FAILED:
                failure = Failure(note.read_text(), done.stderr)
        return failure
    finally:
        note.unlink(missing_ok=True)


def batches(name: str, calls: int, seed: int) -> Iterator[tuple[int, Counter[str] | Failure]]:
    """Batch by batch, how many calls it made and what `batch` has of them; none is started after a failure."""
    size = min(TARGETS[name].batch, -(-calls // PROCESSES))
    sizes = [min(size, calls - first) for first in range(0, calls, size)]
    with ThreadPoolExecutor(PROCESSES) as pool:
        running = [pool.submit(batch, name, count, seed + i) for i, count in enumerate(sizes)]
        for count, one in zip(sizes, running, strict=True):
            outcome = one.result()
            if isinstance(outcome, Failure):
                pool.shutdown(wait=False, cancel_futures=True)
            yield count, outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("calls", type=int)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    options = parser.parse_args()
    TARGETS[options.target].build()
    started, made, taken = time.monotonic(), 0, Counter()
    print(f"{options.target}: {options.calls} calls, seed {options.seed}", flush=True)
    with watched():
        for count, outcome in batches(options.target, options.calls, options.seed):
            if isinstance(outcome, Failure):
                print(outcome.text(options.target))
                return 1
            made, taken = made + count, taken + outcome
            print(f"{options.target}: {made} of {options.calls} calls, {time.monotonic() - started:.0f} s", flush=True)
    for strategy, count in taken.most_common():
        print(f"{options.target}: {strategy}, {count} of {taken.total()} directions")
    if made >= ENOUGH and taken["pipelined"] < RARE * taken.total():
        print(f"{options.target}: the calls hardly reach the pipelined kernels")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
